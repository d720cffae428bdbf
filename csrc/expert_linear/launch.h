// One way to launch the kernels of the tensor core variants.
#pragma once

#include <cuda_runtime.h>

#include "common/cuda_overlap.cuh"
#include "expert_linear/operands.h"

namespace fera::cuda {

// `follows`: the kernel waits by itself (wait_for_previous) for the one before it on the stream, and may start before
// that ends.
template <class... Parameters>
fera_status launch_kernel(const char* op, void (*kernel)(Parameters...), dim3 grid, int threads, int bytes, int cluster,
                          bool follows, cudaStream_t stream, const Parameters&... parameters) {
  cudaError_t error = cudaSuccess;
  if (bytes > 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    // Else the first level cache may be left so much that two blocks do not fit.
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
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
