// Kernels of one call overlap where the device can (programmatic dependent launch): the next kernel may start once
// every block has let it, and waits before it reads what this one wrote. A kernel that has ended has waited, so those
// before it have ended too.
#pragma once

#include <atomic>

#include "common/cuda_common.cuh"

namespace fera::cuda {

__device__ inline void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ inline void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Whether a kernel that begins with wait_for_previous does wait here: an image made for an older GPU does not. Asked
// once a device and type of kernel.
template <class... Parameters>
bool waits(void (*kernel)(Parameters...)) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];  // 1 + answer
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) {
    cudaGetLastError();
    return false;
  }
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    int major = 0;
    cudaFuncAttributes attributes{};
    const bool asked = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                       cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess;
    if (!asked) cudaGetLastError();  // an unknown device is an answer, not an error
    value = 1 + (asked && major >= 9 && attributes.ptxVersion >= 90);
    known[device].store(value, std::memory_order_relaxed);
  }
  return value == 2;
}

// A kernel that begins with wait_for_previous, right after another one of the stream, whatever that is.
template <class... Parameters, class... Arguments>
fera_status launch_early(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, cudaStream_t stream,
                         const Arguments&... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = waits(kernel) ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return launch_status(op);
}

}  // namespace fera::cuda
