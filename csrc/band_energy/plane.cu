#include <algorithm>
#include <atomic>
#include <climits>
#include <iterator>

#include "band_energy/plane.cuh"
#include "band_energy/plane.h"

namespace fera::cuda {
namespace {

// Height, width and threads of every kernel that is built; the first of a size is the usual one.
#define FERA_PLANE_SIZES(X) X(128, 128, 1024) X(128, 128, 512)

constexpr int kMaxDevices = 64;

struct Kernels {
  int h, w, threads;
  size_t bytes;
  void (*energies)(Source, const float*, int, Finish<float>, double*);
  void (*gradient)(Source, const float*, int, Coefficients, Output);
};

const Kernels kKernels[] = {
#define FERA_KERNELS(H, W, T) \
  {H, W, T, PlaneSize<H, W>::bytes, plane_energies<PlaneSize<H, W>, T>, plane_gradient<PlaneSize<H, W>, T>},
    FERA_PLANE_SIZES(FERA_KERNELS)
#undef FERA_KERNELS
};

// Blocks that run side by side, 0 where the kernels do not run. Asked once a device and size; also raises the kernels'
// limits there.
int blocks_of(const Kernels& k) {
  static std::atomic<int> known[kMaxDevices][std::size(kKernels)];  // blocks + 1
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) {
    cudaGetLastError();  // no device is an answer here, and an error where something is launched
    return 0;
  }
  if (device >= kMaxDevices) return 0;
  std::atomic<int>& slot = known[device][&k - kKernels];
  int value = slot.load(std::memory_order_acquire);
  if (value == 0) {
    int multiprocessors = 0, cooperative = 0, fit = 0;
    bool ok = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
              cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) == cudaSuccess &&
              cooperative != 0;
    for (const void* kernel : {reinterpret_cast<const void*>(k.energies), reinterpret_cast<const void*>(k.gradient)}) {
      cudaFuncAttributes attributes{};
      ok = ok && cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90 &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(k.bytes)) ==
               cudaSuccess;
    }
    ok = ok && cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, k.energies, k.threads, k.bytes) == cudaSuccess;
    if (!ok) cudaGetLastError();  // an image or a block that does not fit is an answer, not an error
    value = (ok ? fit * multiprocessors : 0) + 1;
    slot.store(value, std::memory_order_release);
  }
  return value - 1;
}

const Kernels* find(const Source& s, int threads) {
  const auto* const found = std::find_if(std::begin(kKernels), std::end(kKernels), [&](const Kernels& k) {
    return k.h == s.h && k.w == s.w && (threads == 0 || k.threads == threads);
  });
  return found == std::end(kKernels) ? nullptr : found;
}

template <class... Parameters, class... Arguments>
fera_status launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, const Kernels& k, bool cooperative,
                   const fera_context* context, Arguments&&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(k.threads);
  config.dynamicSmemBytes = k.bytes;
  config.stream = stream_of(context);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
  return launch_status(op);
}

}  // namespace

bool plane_takes(const Source& s, const fera_filters& f, bool wished, int threads) {
  if (f.blurs != 0 || s.dtype == FERA_F64 || s.n <= 0 || s.p <= 0 || s.signals != 1 || s.whole.stride_w != 1)
    return false;
  const Kernels* const k = find(s, threads);
  const int64_t planes = s.n * s.pairs();
  if (k == nullptr || planes > INT_MAX) return false;
  const int blocks = blocks_of(*k);
  return blocks > 0 && (wished || 3 * planes >= blocks);
}

// (N, pairs, K)
size_t plane_workspace(const Source& s, const fera_filters& f) {
  return align256(sizeof(double) * std::max<int64_t>(s.n, 0) * s.pairs() * f.bands);
}

fera_status plane_energies_launch(const char* op, const Source& s, const fera_filters& f, const Finish<float>& finish,
                                  int threads, const fera_context* context) {
  const Kernels& k = *find(s, threads);
  return launch(op, k.energies, std::min<int64_t>(blocks_of(k), s.n * s.pairs()), k, true, context, s, masks_of(f),
                static_cast<int>(f.bands), finish, static_cast<double*>(context->workspace));
}

fera_status plane_adjoint_launch(const char* op, const Source& s, const fera_filters& f, const Coefficients& from,
                                 const Output& dz, int threads, const fera_context* context) {
  const Kernels& k = *find(s, threads);
  return launch(op, k.gradient, s.n * s.pairs(), k, false, context, s, masks_of(f), static_cast<int>(f.bands), from,
                dz);
}

}  // namespace fera::cuda
