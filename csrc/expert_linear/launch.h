// One way to launch the kernels of the tensor core variants.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/cuda_overlap.cuh"
#include "expert_linear/operands.h"

namespace fera::cuda {

// The dynamic shared memory that a kernel's blocks may have, always the same `bytes`; and all of it as shared memory,
// else the first level cache may be left so much that two blocks do not fit. Asked of the driver once a kernel and
// device: these calls are a good part of a launch. After cudaDeviceReset they would have to come again, but nothing of
// a process's tensors is left then.
inline cudaError_t allow_shared(const void* kernel, int bytes) {
  static std::atomic<uintptr_t> known[512];
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uintptr_t key = reinterpret_cast<uintptr_t>(kernel) ^ static_cast<uintptr_t>(device + 1) << 48;
  std::atomic<uintptr_t>& place = known[(key >> 4 ^ key >> 13 ^ key >> 48) % 512];
  if (place.load(std::memory_order_acquire) == key) return cudaSuccess;
  const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (allowed != cudaSuccess) return allowed;
  cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  place.store(key, std::memory_order_release);
  return cudaSuccess;
}

// `follows`: the kernel waits by itself (wait_for_previous) for the one before it on the stream, and may start before
// that ends.
template <class... Parameters>
fera_status launch_kernel(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, int bytes, int cluster,
                          bool follows, cudaStream_t stream, const Parameters&... parameters) {
  cudaError_t error = cudaSuccess;
  if (bytes > 0) error = allow_shared(reinterpret_cast<const void*>(kernel), bytes);
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (follows && overlap_wished()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  if (error == cudaSuccess) cudaLaunchKernelEx(&config, kernel, parameters...);
  return launch_status(op);
}

}  // namespace fera::cuda
