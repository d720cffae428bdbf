#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "band_energy/asked.h"
#include "band_energy/cluster.h"
#include "band_energy/cluster_back.cuh"
#include "band_energy/plane.h"
#include "band_energy/real_plane.h"

namespace fera::cuda {
namespace {

// Height, width and blocks a cluster of every kernel that is built: one line, one size. Of two clusters for a size the
// smaller takes many planes.
#define FERA_CLUSTER_SIZES(X) \
  X(64, 64, 8)                \
  X(64, 96, 8)                \
  X(96, 64, 8)                \
  X(96, 96, 8)                \
  X(72, 128, 8)               \
  X(128, 128, 16)             \
  X(128, 128, 8)              \
  X(104, 152, 8)              \
  X(152, 104, 8)              \
  X(104, 156, 16)

constexpr int kFewThreads = 256;            // of a block, usually; no kernel needs more
constexpr size_t kStaticShared = 4 * 1024;  // above what the kernels declare statically
constexpr int kMultiprocessors = 132;       // of the largest sm_90; only a measure of what fills a machine

struct Kernels {
  int h, w, size;
  int points;         // of a complex plane a block
  int butterflies;    // of a plane and block in a phase, at most
  int least_threads;  // each plane's last butterfly of rows, first of columns backwards, at once
  size_t kept;        // float2 of a complex plane's spectrum, where it is kept
  bool beside;        // weights come beside the rows, if some warps have none
  void (*energies)(Source, ClusterPlan, const float*, int, Finish<float>, double*, float2*);
  void (*keeping)(Source, ClusterPlan, const float*, int, Finish<float>, double*, float2*);
  void (*gradient)(Source, ClusterPlan, const float*, int, ClusterGradient);
  size_t (*shared_bytes)(const ClusterPlan&, int, int, int);
};

const Kernels kKernels[] = {
#define FERA_KERNELS(H, W, S)                                       \
  {H,                                                               \
   W,                                                               \
   S,                                                               \
   ClusterSize<H, W, S>::rows * W,                                  \
   ClusterSize<H, W, S>::butterflies,                               \
   std::max(ClusterSize<H, W, S>::rows * ClusterSize<H, W, S>::w1,  \
            ClusterSize<H, W, S>::cols * ClusterSize<H, W, S>::h2), \
   size_t{S} * ClusterSize<H, W, S>::column_plane,                  \
   ClusterSize<H, W, S>::shifts,                                    \
   cluster_energies<ClusterSize<H, W, S>, false>,                   \
   cluster_energies<ClusterSize<H, W, S>, true>,                    \
   cluster_gradient<ClusterSize<H, W, S>>,                          \
   cluster_shared_bytes<ClusterSize<H, W, S>>},
    FERA_CLUSTER_SIZES(FERA_KERNELS)
#undef FERA_KERNELS
};

// Bytes of shared memory a block may have, 0 where clusters of that size do not run; and the clusters that run side by
// side at least, whatever a block takes.
struct Limits {
  size_t shared;
  int clusters;
};

// Asked once a device and kernel; also raises the kernels' limits there.
Limits limits_of(const Kernels& k) {
  static Asked<std::size(kKernels)> asked;
  const Answer found = asked(&k - kKernels, [&](int device, Answer* answer) {
    int shared = 0, launches = 0, cooperative = 0;
    bool ok = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) == cudaSuccess;
    const void* kernels[] = {reinterpret_cast<const void*>(k.energies), reinterpret_cast<const void*>(k.keeping),
                             reinterpret_cast<const void*>(k.gradient)};
    // An image made for an older architecture has no clusters in it, whatever the device has.
    for (const void* kernel : kernels) {
      cudaFuncAttributes attributes{};
      ok = ok && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    }
    if (!ok || launches == 0) return false;
    const int limit = shared - static_cast<int>(kStaticShared);
    for (const void* kernel : kernels)
      ok = ok && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit) == cudaSuccess &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess;
    cudaLaunchAttribute attribute = cluster_of(k.size);
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(k.size);
    config.blockDim = dim3(kClusterThreads);
    config.dynamicSmemBytes = limit;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int fit = 0;
    ok = ok && cudaOccupancyMaxActiveClusters(&fit, k.gradient, &config) == cudaSuccess && fit > 0;
    // Several clusters a sample need a cooperative launch.
    *answer = {limit, cooperative == 0 ? std::min(fit, 1) : fit};
    return ok;
  });
  return {static_cast<size_t>(found.first), found.second};
}

// FERA_BAND_CLUSTER, read at every call: numbers by name, as in "blocks=8,threads=256", instead of what choose() finds
// best; 0 where none is asked for. A latent that cannot have them has no cluster variant.
struct Wish {
  int blocks;    // of a cluster; 1: a block a plane (plane.h)
  int threads;   // of a block
  int clusters;  // of a sample, at most one a pair of planes
  int pairs;     // at once, at most
  int launches;  // of FECL's energies and gradient: 1 or 2
  int split;     // blocks of a plane (plane.h)
  int real;      // energies of one signal by real planes, so many blocks a multiprocessor (real_plane.h)
  bool known;    // every name and number

  PlaneWish plane() const { return {split != 0 ? split : blocks, threads, launches}; }
  RealWish real_plane() const { return {real, threads, launches}; }
  bool open() const { return blocks == 0 && clusters == 0 && pairs == 0 && split == 0; }
  // Whether it asks for kernels that are not among the others; the adjoint has none of them.
  bool only_real(const Source& s, ClusterTask task) const {
    return real != 0 && (s.signals == 2 || task == ClusterTask::energies);
  }
};

Wish wish() {
  Wish found{0, 0, 0, 0, 0, 0, 0, true};
  const char* at = std::getenv(kClusterWish);
  while (at != nullptr && *at != 0) {
    const struct {
      const char* name;
      int* to;
    } names[] = {{"blocks=", &found.blocks}, {"threads=", &found.threads},   {"clusters=", &found.clusters},
                 {"pairs=", &found.pairs},   {"launches=", &found.launches}, {"split=", &found.split},
                 {"real=", &found.real}};
    const auto* const named = std::find_if(std::begin(names), std::end(names), [&](const auto& n) {
      return std::strncmp(at, n.name, std::strlen(n.name)) == 0;
    });
    if (named == std::end(names)) return {0, 0, 0, 0, 0, 0, 0, false};
    at += std::strlen(named->name);
    char* end = nullptr;
    const long value = std::strtol(at, &end, 10);
    if (end == at || value < 1 || value > 1024 || (*end != 0 && *end != ',')) return {0, 0, 0, 0, 0, 0, 0, false};
    *named->to = static_cast<int>(value);
    at = *end == ',' ? end + 1 : end;
  }
  found.known = found.launches <= 2 && found.real <= 2 && found.threads % 32 == 0;
  return found;
}

struct Choice {
  const Kernels* kernels;
  ClusterPlan plan;
  int threads;
  size_t shared_bytes;
};

// The kernels of this size, of two signals the same for every task: what one keeps another reads. Fewer blocks a
// cluster where as many clusters as there are planes fill the machine even so, or FECL, whose clusters hold more at
// once, seven eighths of it: the exchanges are of larger parcels and meet fewer blocks. One signal's adjoint has a
// cluster a plane: fewer where the larger ones do not lie side by side.
const Kernels* kernels_of(const Source& s, int bands, ClusterTask task, int blocks, Limits* limits) {
  const Kernels* best = nullptr;
  for (const Kernels& k : kKernels) {
    if (k.h != s.h || k.w != s.w || (blocks != 0 && k.size != blocks)) continue;
    const Limits of = limits_of(k);
    ClusterPlan one{};
    one.pairs_at_once = 1;
    if (of.shared == 0 || k.shared_bytes(one, s.signals, bands, kFewThreads) > of.shared) continue;
    const int fewer = best == nullptr ? k.size : std::min(k.size, best->size);
    bool many = 8 * s.n * s.pairs() * s.signals * fewer > (s.signals == 2 ? 7 : 8) * kMultiprocessors;
    if (best != nullptr && task == ClusterTask::adjoint && s.signals == 1)
      many = s.n * s.pairs() > (k.size < best->size ? *limits : of).clusters;
    if (best != nullptr && many != (k.size < best->size)) continue;
    best = &k;
    *limits = of;
  }
  return best;
}

bool choose(const Source& s, const fera_filters& f, ClusterTask task, Choice* choice) {
  if (f.blurs != 0 || s.dtype == FERA_F64 || s.n <= 0 || s.p <= 0 || s.n > 65535 || s.whole.stride_w != 1) return false;
  if (s.signals == 2 && (s.minus[0].stride_w != 1 || s.minus[1].stride_w != 1)) return false;
  const Wish wanted = wish();
  const bool fecl = task == ClusterTask::fecl;
  if (!wanted.known || wanted.split != 0 || wanted.only_real(s, task) || (fecl && wanted.launches == 2)) return false;
  Limits limits{};
  const Kernels* const found = kernels_of(s, f.bands, task, wanted.blocks, &limits);
  if (found == nullptr || wanted.threads > kClusterThreads ||
      (wanted.threads != 0 && wanted.threads < found->least_threads))
    return false;
  // The loss alone sums as the loss with its gradient does, so that both are the same number.
  if (task == ClusterTask::energies && s.signals == 2 && choose(s, f, ClusterTask::fecl, choice)) return true;
  const Kernels& k = *found;
  ClusterPlan p{};
  p.pairs = s.pairs();
  const int64_t blocks = s.n * p.pairs * k.size;  // one pair a cluster
  // Clusters of a sample that meet at the grid's barrier all run side by side. (Twice the room where a block takes less
  // than half of the shared memory ran and was faster at (4,16,104,156), but a count that was not asked of the device
  // is a hang where it is wrong.)
  const int64_t room = std::max<int64_t>(1, limits.clusters / s.n);
  const auto share = [&](int64_t clusters) {
    if (wanted.clusters != 0) clusters = std::min(wanted.clusters, p.pairs);
    p.clusters = static_cast<int>(std::max<int64_t>(1, clusters));
    p.pairs_of = ceil_div(p.pairs, p.clusters);
    p.clusters = ceil_div(p.pairs, p.pairs_of);
    return task == ClusterTask::adjoint || p.clusters <= room;
  };
  const auto fit = [&] {
    const bool crowded = s.n * p.clusters * k.size > kMultiprocessors;
    const auto bytes = [&] { return k.shared_bytes(p, s.signals, f.bands, choice->threads); };
    // Small blocks where several fit on a multiprocessor and there are as many.
    choice->threads = std::max(crowded && p.pairs_of <= 2 ? 128 : kFewThreads, ceil_div(k.least_threads, 32) * 32);
    if (wanted.threads != 0) choice->threads = wanted.threads;
    // Two signals of many planes: one pair at a time leaves room for another block.
    int most = s.signals == 2 && blocks > 2 * kMultiprocessors ? 1 : 4;
    if (wanted.pairs != 0) most = wanted.pairs;
    for (p.pairs_at_once = fecl ? p.pairs_of : std::min(p.pairs_of, most); p.pairs_at_once > 0;
         p.pairs_at_once = fecl ? 0 : p.pairs_at_once / 2) {
      choice->shared_bytes = bytes();
      const bool shares = choice->shared_bytes <= (limits.shared - kStaticShared) / 2;  // a multiprocessor with another
      if (choice->shared_bytes > limits.shared ||
          (crowded && !fecl && !shares && wanted.pairs == 0 && p.pairs_at_once > 1))
        continue;
      // A block alone on its multiprocessor: a thread for every butterfly.
      const int base = choice->threads;
      const bool beside = k.beside && task == ClusterTask::adjoint && s.signals == 1;  // other warps take the weights
      const int butterflies = ceil_div((beside ? 2 : s.signals) * p.pairs_at_once * k.butterflies, 32) * 32;
      if ((!crowded || !shares) && wanted.threads == 0) {
        choice->threads = std::clamp(butterflies, base, kClusterThreads);
        choice->shared_bytes = bytes();
        if (choice->shared_bytes > limits.shared) {
          choice->threads = base;
          choice->shared_bytes = bytes();
        }
      }
      choice->kernels = found;
      choice->plan = p;
      return true;
    }
    return false;
  };
  // Gradients meet nowhere: a pair a cluster, two where that is more than the machine holds.
  if (task == ClusterTask::adjoint)
    return share(blocks <= 2 * kMultiprocessors ? p.pairs : ceil_div(p.pairs, 2)) && fit();
  // Two pairs a cluster while there is room.
  if (!fecl) return share(std::min<int64_t>(ceil_div(p.pairs, 2), room)) && fit();
  // All pairs of a sample at once, in as many clusters as there is room for where one would have much to do.
  const bool much = int64_t{2} * p.pairs * k.points > 8 * kClusterThreads;
  return (much && share(std::min<int64_t>(p.pairs, room)) && fit()) || (share(1) && fit());
}

// Whether energies are made by real planes.
bool takes_real(const Source& s, const fera_filters& f, ClusterTask task) {
  const Wish wanted = wish();
  return task == ClusterTask::energies && wanted.known && wanted.open() &&
         real_takes(s, f, wanted.real != 0, wanted.real_plane());
}

// Whether planes are taken by a block or a few.
bool takes_planes(const Source& s, const fera_filters& f, ClusterTask task) {
  const Wish wanted = wish();
  const bool open = wanted.open();
  if (!wanted.known || wanted.only_real(s, task) || !(open || wanted.blocks == 1 || wanted.split != 0) ||
      !plane_takes(s, f, task, !open, wanted.plane()))
    return false;
  return wanted.launches != 1 || s.signals == 1 || plane_fecl_fits(s, wanted.plane());
}

// (N, clusters, signals, K+1), with several clusters a sample.
size_t partial_bytes(const Source& s, const fera_filters& f, int clusters) {
  return clusters > 1 ? align256(sizeof(double) * s.n * clusters * s.signals * (f.bands + 1)) : 0;
}

template <class... Parameters, class... Arguments>
fera_status launch(const char* op, void (*kernel)(Parameters...), const Choice& choice, int64_t samples,
                   bool cooperative, const fera_context* context, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{cluster_of(choice.kernels->size)};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(samples * choice.plan.clusters * choice.kernels->size));
  config.blockDim = dim3(choice.threads);
  config.dynamicSmemBytes = choice.shared_bytes;
  config.stream = stream_of(context);
  config.attrs = attributes;
  config.numAttrs = cooperative ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return launch_status(op);
}

__global__ void __launch_bounds__(32) cluster_mean(int64_t samples, const double* losses, float* loss) {
  wait_for_previous();
  mean_of_losses(samples, losses, loss);
}

fera_status launch_mean(const char* op, int64_t samples, const double* losses, float* loss,
                        const fera_context* context) {
  return launch_early(op, cluster_mean, dim3(1), 32, stream_of(context), samples, losses, loss);
}

}  // namespace

bool cluster_takes(const Source& source, const fera_filters& filters, ClusterTask task) {
  Choice choice;
  return takes_real(source, filters, task) || takes_planes(source, filters, task) ||
         choose(source, filters, task, &choice);
}

size_t cluster_workspace(const Source& source, const fera_filters& filters) {
  if (source.n <= 0) return 0;
  if (takes_real(source, filters, ClusterTask::energies)) return real_workspace(source, filters);
  if (takes_planes(source, filters, ClusterTask::energies)) return plane_workspace(source, filters, wish().plane());
  return partial_bytes(source, filters, source.pairs());
}

size_t cluster_fecl_workspace(const Source& source, const fera_filters& filters) {
  Choice choice;
  if (takes_planes(source, filters, ClusterTask::fecl) || choose(source, filters, ClusterTask::fecl, &choice))
    return cluster_workspace(source, filters);
  if (!choose(source, filters, ClusterTask::energies, &choice)) return 0;
  return cluster_workspace(source, filters) +
         align256(sizeof(float2) * choice.kernels->kept * source.n * source.signals * source.pairs());
}

bool cluster_wish_given() {
  const char* value = std::getenv(kClusterWish);
  return value != nullptr && *value != 0;
}
bool cluster_wish_known() { return wish().known; }

fera_status cluster_energies_launch(const char* op, const Source& source, const fera_filters& filters,
                                    const Finish<float>& finish, float* loss, const fera_context* context) {
  if (takes_real(source, filters, ClusterTask::energies))
    return real_energies_launch(op, source, filters, finish, wish().real_plane(), context);
  if (takes_planes(source, filters, ClusterTask::energies))
    return plane_energies_launch(op, source, filters, finish, loss, wish().plane(), context);
  Choice choice;
  if (!choose(source, filters, ClusterTask::energies, &choice)) return FERA_UNSUPPORTED;
  double* const partial = static_cast<double*>(context->workspace);
  FERA_RETURN_IF_ERROR(launch(op, choice.kernels->energies, choice, source.n, choice.plan.clusters > 1, context, source,
                              choice.plan, masks_of(filters), static_cast<int>(filters.bands), finish, partial,
                              static_cast<float2*>(nullptr)));
  return loss == nullptr ? FERA_OK : launch_mean(op, source.n, finish.losses, loss, context);
}

fera_status cluster_adjoint_launch(const char* op, const Source& source, const fera_filters& filters,
                                   const Coefficients& from, const Output& dz, const fera_context* context) {
  if (takes_planes(source, filters, ClusterTask::adjoint))
    return plane_adjoint_launch(op, source, filters, from, dz, wish().plane(), context);
  Choice choice;
  if (!choose(source, filters, ClusterTask::adjoint, &choice)) return FERA_UNSUPPORTED;
  const ClusterGradient to{dz, from, 0, 0, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  return launch(op, choice.kernels->gradient, choice, source.n, false, context, source, choice.plan, masks_of(filters),
                static_cast<int>(filters.bands), to);
}

fera_status cluster_fecl_launch(const char* op, const Source& source, const fera_filters& filters,
                                const Finish<float>& finish, float* loss, const View& gradient, double* factor,
                                const fera_context* context) {
  if (takes_planes(source, filters, ClusterTask::fecl))
    return plane_fecl_launch(op, source, filters, finish, loss, gradient, factor, wish().plane(), context);
  Choice choice;
  const int bands = filters.bands;
  double* const partial = static_cast<double*>(context->workspace);
  if (choose(source, filters, ClusterTask::fecl, &choice)) {
    const bool several = choice.plan.clusters > 1;
    const ClusterGradient to{{gradient, true}, {},      finish.eps, finish.weight, factor,
                             finish.losses,    partial, nullptr,    nullptr,       several ? loss : nullptr};
    FERA_RETURN_IF_ERROR(launch(op, choice.kernels->gradient, choice, source.n, several, context, source, choice.plan,
                                masks_of(filters), bands, to));
    return several ? FERA_OK : launch_mean(op, source.n, finish.losses, loss, context);
  }
  FERA_CHECK(op, wish().launches != 1, kClusterWish, "without launches=1 for this latent", std::getenv(kClusterWish));
  if (!choose(source, filters, ClusterTask::energies, &choice)) return FERA_UNSUPPORTED;
  float2* const kept =
      reinterpret_cast<float2*>(static_cast<char*>(context->workspace) + cluster_workspace(source, filters));
  FERA_RETURN_IF_ERROR(launch(op, choice.kernels->keeping, choice, source.n, choice.plan.clusters > 1, context, source,
                              choice.plan, masks_of(filters), bands, finish, partial, kept));
  if (!choose(source, filters, ClusterTask::adjoint, &choice)) return FERA_UNSUPPORTED;
  const Coefficients from{finish.coefficients, nullptr, nullptr, nullptr, 0, factor};
  const ClusterGradient to{{gradient, true}, from, 0, 0, nullptr, nullptr, nullptr, kept, finish.losses, loss};
  return launch(op, choice.kernels->gradient, choice, source.n, false, context, source, choice.plan, masks_of(filters),
                bands, to);
}

}  // namespace fera::cuda
