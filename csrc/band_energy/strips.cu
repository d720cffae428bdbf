#include <algorithm>
#include <atomic>
#include <iterator>

#include "band_energy/strips.h"
#include "band_energy/strips_kernels.cuh"

namespace fera::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr size_t kStaticShared = 4 * 1024;  // above what the kernels declare statically
constexpr int kSizes[] = {16, 8};           // blocks a cluster

// Bytes of shared memory a block may have, 0 where clusters do not run, and for each of kSizes the clusters that run
// side by side at least, whatever a block takes.
struct Limits {
  size_t shared;
  int clusters[std::size(kSizes)];
  bool cooperative;
};

cudaLaunchAttribute cluster_of(int size) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = size;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

const void* const kKernels[] = {reinterpret_cast<const void*>(strips_energies),
                                reinterpret_cast<const void*>(strips_gradient)};

// Asks the current device, and raises the kernels' limits there.
Limits ask(int device) {
  Limits limits{};
  int shared = 0, launches = 0, cooperative = 0;
  bool ok = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
            cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
            cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) == cudaSuccess && launches != 0;
  const int limit = shared - static_cast<int>(kStaticShared);
  for (const void* kernel : kKernels) {
    // An image made for an older architecture has no clusters in it, whatever the device has.
    cudaFuncAttributes attributes{};
    ok = ok && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit) == cudaSuccess &&
         cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
  }
  bool any = false;
  for (size_t i = 0; ok && i < std::size(kSizes); ++i) {
    limits.clusters[i] = kStripThreads;
    for (const void* kernel : kKernels) {
      cudaLaunchAttribute attribute = cluster_of(kSizes[i]);
      cudaLaunchConfig_t config{};
      config.gridDim = dim3(kSizes[i]);
      config.blockDim = dim3(kStripThreads);
      config.dynamicSmemBytes = limit;
      config.attrs = &attribute;
      config.numAttrs = 1;
      int fit = 0;
      if (cudaOccupancyMaxActiveClusters(&fit, kernel, &config) != cudaSuccess) fit = 0;
      limits.clusters[i] = std::min(limits.clusters[i], fit);
    }
    any = any || limits.clusters[i] > 0;
  }
  cudaGetLastError();  // an image or a cluster that does not fit is an answer, not an error
  limits.shared = ok && any ? limit : 0;
  limits.cooperative = cooperative != 0;
  return limits;
}

// Asked once a device.
Limits limits_of_device() {
  static std::atomic<int64_t>
      known[kMaxDevices];  // 1 | cooperative << 1 | bytes << 2 | clusters << 32 | clusters << 48
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();  // no device is an answer here, and an error where something is launched
    return {};
  }
  if (device >= kMaxDevices) return {};
  int64_t value = known[device].load(std::memory_order_acquire);
  if (value == 0) {
    const Limits found = ask(device);
    value = 1 | int64_t{found.cooperative} << 1 | static_cast<int64_t>(found.shared) << 2 |
            static_cast<int64_t>(found.clusters[0]) << 32 | static_cast<int64_t>(found.clusters[1]) << 48;
    known[device].store(value, std::memory_order_release);
  }
  return {static_cast<size_t>(value >> 2 & 0x3fffffff),
          {static_cast<int>(value >> 32 & 0xffff), static_cast<int>(value >> 48 & 0x7fff)},
          (value & 2) != 0};
}

enum class Task { energies, adjoint };

struct Choice {
  StripsPlan plan;
  int threads;
  size_t shared_bytes;
};

// Cycles that a launch takes, by estimate; only their order counts. A step of a product is two loads of shared memory
// by every warp, 5 cycles of it down a tile (one of them is the same for the whole warp) and 8 along a line.
double cost_of(const StripsPlan& p, int threads, int signals, Task task, int64_t samples, int side_by_side) {
  constexpr double kUnit = 1500, kLaunch = 1500, kGridBarrier = 4500;
  const int warps = p.team / 32;
  double down = 0, along = 0;
  for (int j = 0; j < p.blurs; ++j) {
    down += 20.0 * warps * (2 * p.reach_h[j] + 1);
    along += 32.0 * warps * (2 * p.reach_w[j] + 1);
  }
  // Few warps do not cover latency: a step takes at least some 30 cycles, whoever else runs.
  const double least = 120.0 * (2 * p.widest() + 1);
  const double product = std::max(down, least) + std::max(along, least) + 4.0 * p.tile(p.widest()) / threads * 32;
  const bool energies = task == Task::energies;
  const double unit = energies ? product + kUnit : (signals == 1 ? 2 : 1) * product + 2 * kUnit;
  const int64_t units = static_cast<int64_t>(p.planes_of) * p.strips * (energies ? signals : 1);
  const int64_t waves = ceil_div<int64_t>(samples * p.clusters, side_by_side);
  return waves * (ceil_div<int64_t>(units, p.size) * unit + kLaunch) + (energies && p.clusters > 1 ? kGridBarrier : 0);
}

bool aligned(const View& v, int width, size_t element) {
  const int64_t strides = v.stride_n | v.stride_p | v.stride_h;
  return v.stride_w == 1 && width % 4 == 0 && strides % 4 == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % (4 * element) == 0;
}

bool choose(const Source& s, const fera_filters& f, Task task, Choice* choice) {
  if (f.blurs < 1 || f.blurs > kStripBlurs || f.bands < 1 || f.bands > FERA_MAX_BANDS || s.dtype == FERA_F64)
    return false;
  if (s.n <= 0 || s.n > 65535 || s.p <= 0 || s.h < 1 || s.w < 1 || s.h > FERA_MAX_SIDE || s.w > FERA_MAX_SIDE)
    return false;
  const Limits limits = limits_of_device();
  if (limits.shared == 0) return false;
  StripsPlan p{};
  p.left = static_cast<const float*>(f.table);
  p.right = static_cast<const float*>(f.right);
  p.mix = static_cast<const float*>(f.mix);
  p.bands = f.bands;
  p.blurs = f.blurs;
  p.high = ceil_div(s.h, 4);
  p.wide = ceil_div(s.w, 4);
  for (int j = 0; j < f.blurs; ++j) {
    const int reach = ceil_div(std::max(f.reach[j], 0), 4);
    p.reach_h[j] = std::min(reach, p.high - 1);
    p.reach_w[j] = std::min(reach, p.wide - 1);
  }
  const size_t element = dtype_size(s.dtype);
  p.vector_in = aligned(s.whole, s.w, element);
  for (int i = 0; s.signals == 2 && i < 2; ++i) p.vector_in = p.vector_in && aligned(s.minus[i], s.w, element);
  double best = 0;
  bool found = false;
  int last = 0;
  for (p.strips = 1; p.strips <= p.high && last != 1; ++p.strips) {
    p.groups = ceil_div(p.high, p.strips);
    if (p.groups == last || ceil_div(p.high, p.groups) != p.strips) continue;
    last = p.groups;
    p.team = ceil_div(p.groups * p.wide, 32) * 32;
    if (p.team > kStripThreads) continue;
    p.teams = std::min(p.blurs, kStripThreads / p.team);
    const int threads = p.team * p.teams;
    for (size_t i = 0; i < std::size(kSizes); ++i) {
      if (limits.clusters[i] == 0) continue;
      p.size = kSizes[i];
      const size_t bytes =
          task == Task::energies ? strips_energies_bytes(p, s.signals, threads) : strips_gradient_bytes(p, s.signals);
      if (bytes > limits.shared) continue;
      // One cluster a sample, or as many as run side by side.
      const bool several = task == Task::adjoint || limits.cooperative;
      const int64_t room = several ? std::min<int64_t>(s.p, limits.clusters[i] / s.n) : 1;
      for (int64_t clusters = 1;; clusters = room) {
        p.planes_of = static_cast<int>(ceil_div<int64_t>(s.p, clusters));
        p.clusters = ceil_div(s.p, p.planes_of);
        const double cost = cost_of(p, threads, s.signals, task, s.n, limits.clusters[i]);
        if (!found || cost < best) {
          *choice = {p, threads, bytes};
          best = cost;
          found = true;
        }
        if (clusters >= room) break;
      }
    }
  }
  return found;
}

// The pieces of the workspace; with a null base they are only counted.
struct Layout {
  double* partial;
  float4 *kept, *back;
  size_t bytes;
};

Layout lay_out(const Source& s, const StripsPlan& energies, bool sums, bool gradient, void* base) {
  Workspace workspace(base);
  const int64_t planes = s.n * s.p * energies.blurs;
  const bool kept = gradient && s.signals == 2;
  Layout layout{};
  layout.partial = workspace.take<double>(
      sums && energies.clusters > 1 ? s.n * energies.clusters * s.signals * (energies.bands + 1) : 0);
  if (kept) layout.kept = workspace.take<float4>(2 * planes * energies.high * s.w);
  layout.back = workspace.take<float4>(gradient ? planes * energies.high * 4 * energies.wide : 0);
  layout.bytes = workspace.used();
  return layout;
}

template <class... Parameters, class... Arguments>
fera_status launch(const char* op, void (*kernel)(Parameters...), const Choice& choice, int64_t samples,
                   bool cooperative, const fera_context* context, const Arguments&... arguments) {
  const StripsPlan& p = choice.plan;
  cudaLaunchAttribute attributes[2]{cluster_of(p.size)};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(samples * p.clusters * p.size));
  config.blockDim = dim3(choice.threads);
  config.dynamicSmemBytes = choice.shared_bytes;
  config.stream = stream_of(context);
  config.attrs = attributes;
  config.numAttrs = cooperative ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return launch_status(op);
}

__global__ void __launch_bounds__(32) strips_mean(int64_t samples, const double* losses, float* loss) {
  wait_for_previous();
  mean_of_losses(samples, losses, loss);
}

fera_status run_energies(const char* op, Choice choice, const Layout& layout, const Source& source,
                         const Finish<float>& finish, const fera_context* context) {
  choice.plan.partial = layout.partial;
  choice.plan.kept = layout.kept;
  return launch(op, strips_energies, choice, source.n, choice.plan.clusters > 1, context, source, choice.plan, finish);
}

fera_status run_gradient(const char* op, Choice choice, const Layout& layout, const Source& source,
                         const StripsGradient& to, const fera_context* context) {
  choice.plan.kept = layout.kept;
  choice.plan.back = layout.back;
  choice.plan.vector_out = aligned(to.dz.view, source.w, to.dz.wide ? sizeof(float) : dtype_size(source.dtype));
  return launch(op, strips_gradient, choice, source.n, false, context, source, choice.plan, to);
}

}  // namespace

bool strips_takes(const Source& source, const fera_filters& filters) {
  Choice choice;
  return choose(source, filters, Task::energies, &choice) && choose(source, filters, Task::adjoint, &choice);
}

size_t strips_energies_workspace(const Source& source, const fera_filters& filters) {
  Choice choice;
  if (!choose(source, filters, Task::energies, &choice)) return 0;
  return lay_out(source, choice.plan, true, false, nullptr).bytes;
}

size_t strips_adjoint_workspace(const Source& source, const fera_filters& filters) {
  Choice choice;
  if (!choose(source, filters, Task::energies, &choice)) return 0;
  return lay_out(source, choice.plan, source.signals == 2, true, nullptr).bytes;
}

fera_status strips_energies_launch(const char* op, const Source& source, const fera_filters& filters,
                                   const Finish<float>& finish, float* loss, const fera_context* context) {
  Choice choice;
  if (!choose(source, filters, Task::energies, &choice)) return FERA_UNSUPPORTED;
  const Layout layout = lay_out(source, choice.plan, true, false, context->workspace);
  FERA_RETURN_IF_ERROR(run_energies(op, choice, layout, source, finish, context));
  if (loss == nullptr) return FERA_OK;
  return launch_early(op, strips_mean, dim3(1), 32, stream_of(context), source.n, finish.losses, loss);
}

fera_status strips_adjoint_launch(const char* op, const Source& source, const fera_filters& filters,
                                  const Coefficients& from, const Output& dz, const fera_context* context) {
  Choice choice;
  if (!choose(source, filters, Task::adjoint, &choice)) return FERA_UNSUPPORTED;
  const Layout layout = lay_out(source, choice.plan, false, true, context->workspace);
  return run_gradient(op, choice, layout, source, {dz, from, nullptr, nullptr}, context);
}

fera_status strips_fecl_launch(const char* op, const Source& source, const fera_filters& filters,
                               const Finish<float>& finish, float* loss, const View& gradient, double* factor,
                               const fera_context* context) {
  Choice energies, adjoint;
  if (!choose(source, filters, Task::energies, &energies) || !choose(source, filters, Task::adjoint, &adjoint))
    return FERA_UNSUPPORTED;
  const Layout layout = lay_out(source, energies.plan, true, true, context->workspace);
  FERA_RETURN_IF_ERROR(run_energies(op, energies, layout, source, finish, context));
  const Coefficients from{finish.coefficients, nullptr, nullptr, nullptr, 0, factor};
  return run_gradient(op, adjoint, layout, source, {{gradient, true}, from, finish.losses, loss}, context);
}

}  // namespace fera::cuda
