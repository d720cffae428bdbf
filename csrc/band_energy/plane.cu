#include <algorithm>
#include <atomic>
#include <climits>
#include <iterator>

#include "band_energy/plane.h"
#include "band_energy/plane_fecl.cuh"

namespace fera::cuda {
namespace {

// Height, width and threads of every kernel that is built; the first of a size is the usual one. Butterflies of 13
// points do not fit the registers that 1024 threads leave.
#define FERA_PLANE_SIZES(X) X(128, 128, 1024) X(128, 128, 512) X(104, 156, 512)

constexpr int kMaxDevices = 64;

struct Kernels {
  int h, w, threads;
  size_t bytes;
  void (*energies)(Source, const float*, int, Finish<float>, double*);
  void (*gradient)(Source, const float*, int, Coefficients, Output);
  void (*fecl[3])(Source, const float*, int, PlaneFecl);  // by FeclPart
};

const Kernels kKernels[] = {
#define FERA_KERNELS(H, W, T)                                                                            \
  {H,                                                                                                    \
   W,                                                                                                    \
   T,                                                                                                    \
   PlaneSize<H, W>::bytes,                                                                               \
   plane_energies<PlaneSize<H, W>, T>,                                                                   \
   plane_gradient<PlaneSize<H, W>, T>,                                                                   \
   {plane_fecl<PlaneSize<H, W>, T, FeclPart::whole>, plane_fecl<PlaneSize<H, W>, T, FeclPart::energies>, \
    plane_fecl<PlaneSize<H, W>, T, FeclPart::gradient>}},
    FERA_PLANE_SIZES(FERA_KERNELS)
#undef FERA_KERNELS
};

cudaLaunchAttribute pair_of_blocks() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = 2;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

// Blocks, and clusters of two, that run side by side; 0 where the kernels do not run.
struct Room {
  int blocks, clusters;
};

// Asked once a device and size; also raises the kernels' limits there.
Room room_of(const Kernels& k) {
  static std::atomic<int64_t> known[kMaxDevices][std::size(kKernels)];  // (clusters << 32 | blocks) + 1
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();  // no device is an answer here, and an error where something is launched
    return {0, 0};
  }
  if (device >= kMaxDevices) return {0, 0};
  std::atomic<int64_t>& slot = known[device][&k - kKernels];
  int64_t value = slot.load(std::memory_order_acquire);
  if (value == 0) {
    int multiprocessors = 0, cooperative = 0, launches = 0, fit = 0, clusters = 0;
    bool ok = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&launches, cudaDevAttrClusterLaunch, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) == cudaSuccess &&
              cooperative != 0 && launches != 0;
    for (const void* kernel : {reinterpret_cast<const void*>(k.energies), reinterpret_cast<const void*>(k.gradient),
                               reinterpret_cast<const void*>(k.fecl[0]), reinterpret_cast<const void*>(k.fecl[1]),
                               reinterpret_cast<const void*>(k.fecl[2])}) {
      cudaFuncAttributes attributes{};
      ok = ok && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(k.bytes)) ==
               cudaSuccess;
    }
    cudaLaunchAttribute attribute = pair_of_blocks();
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(2);
    config.blockDim = dim3(k.threads);
    config.dynamicSmemBytes = k.bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    ok = ok && cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, k.energies, k.threads, k.bytes) == cudaSuccess &&
         cudaOccupancyMaxActiveClusters(&clusters, k.fecl[static_cast<int>(FeclPart::whole)], &config) == cudaSuccess;
    if (!ok) cudaGetLastError();  // an image or a block that does not fit is an answer, not an error
    value = (ok ? static_cast<int64_t>(clusters) << 32 | (fit * multiprocessors) : 0) + 1;
    slot.store(value, std::memory_order_release);
  }
  --value;
  return {static_cast<int>(value & 0xffffffff), static_cast<int>(value >> 32)};
}

const Kernels* find(const Source& s, int threads) {
  const auto* const found = std::find_if(std::begin(kKernels), std::end(kKernels), [&](const Kernels& k) {
    return k.h == s.h && k.w == s.w && (threads == 0 || k.threads == threads);
  });
  return found == std::end(kKernels) ? nullptr : found;
}

template <class... Parameters, class... Arguments>
fera_status launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, const Kernels& k, bool cooperative,
                   bool clusters, const fera_context* context, Arguments&&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (clusters) attributes[count++] = pair_of_blocks();
  attributes[count].id = cudaLaunchAttributeCooperative;
  attributes[count].val.cooperative = 1;
  if (cooperative) ++count;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(k.threads);
  config.dynamicSmemBytes = k.bytes;
  config.stream = stream_of(context);
  config.attrs = attributes;
  config.numAttrs = count;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return launch_status(op);
}

fera_status launch(const char* op, FeclPart part, const Source& s, const fera_filters& f, const PlaneFecl& to,
                   const Kernels& k, const fera_context* context) {
  return launch(op, k.fecl[static_cast<int>(part)], s.n * s.pairs() * 2, k, part == FeclPart::whole,
                part != FeclPart::energies, context, s, masks_of(f), static_cast<int>(f.bands), to);
}

PlaneFecl fecl_of(const Finish<float>& finish, float* loss, const fera_context* context) {
  return {static_cast<double*>(context->workspace), finish.eps, finish.weight, finish.losses, loss, {}, nullptr};
}

}  // namespace

bool plane_takes(const Source& s, const fera_filters& f, bool wished, int threads) {
  if (f.blurs != 0 || s.dtype == FERA_F64 || s.n <= 0 || s.p <= 0 || s.whole.stride_w != 1) return false;
  if (s.signals == 2 && (s.minus[0].stride_w != 1 || s.minus[1].stride_w != 1)) return false;
  const Kernels* const k = find(s, threads);
  const int64_t planes = s.virtual_samples() * s.pairs();
  if (k == nullptr || planes > INT_MAX) return false;
  const int blocks = room_of(*k).blocks;
  return blocks > 0 && (wished || 3 * planes >= blocks);
}

// (N, pairs, K), of two signals (N, pairs, 2, K+1)
size_t plane_workspace(const Source& s, const fera_filters& f) {
  const int64_t sums = s.signals == 2 ? 2 * (f.bands + 1) : f.bands;
  return align256(sizeof(double) * std::max<int64_t>(s.n, 0) * s.pairs() * sums);
}

fera_status plane_energies_launch(const char* op, const Source& s, const fera_filters& f, const Finish<float>& finish,
                                  float* loss, int threads, const fera_context* context) {
  const Kernels& k = *find(s, threads);
  if (s.signals == 1)
    return launch(op, k.energies, std::min<int64_t>(room_of(k).blocks, s.n * s.pairs()), k, true, false, context, s,
                  masks_of(f), static_cast<int>(f.bands), finish, static_cast<double*>(context->workspace));
  const PlaneFecl to = fecl_of(finish, loss, context);
  FERA_RETURN_IF_ERROR(launch(op, FeclPart::energies, s, f, to, k, context));
  return launch_early(op, plane_loss, dim3(1), kLossThreads, stream_of(context), to, s.n, s.pairs(),
                      static_cast<int>(f.bands), 1.0 / (static_cast<double>(s.h) * s.w));
}

fera_status plane_adjoint_launch(const char* op, const Source& s, const fera_filters& f, const Coefficients& from,
                                 const Output& dz, int threads, const fera_context* context) {
  const Kernels& k = *find(s, threads);
  return launch(op, k.gradient, s.n * s.pairs(), k, false, false, context, s, masks_of(f), static_cast<int>(f.bands),
                from, dz);
}

bool plane_fecl_fits(const Source& s, int threads) { return s.n * s.pairs() <= room_of(*find(s, threads)).clusters; }

fera_status plane_fecl_launch(const char* op, const Source& s, const fera_filters& f, const Finish<float>& finish,
                              float* loss, const View& gradient, double* factor, int threads, int launches,
                              const fera_context* context) {
  const Kernels& k = *find(s, threads);
  PlaneFecl to = fecl_of(finish, loss, context);
  to.dz = {gradient, true};
  to.factor = factor;
  if (launches == 1) return launch(op, FeclPart::whole, s, f, to, k, context);
  FERA_RETURN_IF_ERROR(launch(op, FeclPart::energies, s, f, to, k, context));
  return launch(op, FeclPart::gradient, s, f, to, k, context);
}

}  // namespace fera::cuda
