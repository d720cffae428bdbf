// What the hosts of the sm_90a kernels share: whether the device is one, and tensor maps.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <string>

#include "common/checks.h"

namespace fera::cuda {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// The driver's function, found at run time: the library links no driver.
inline Encode encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) {
      cudaGetLastError();
      entry = nullptr;
    }
    return reinterpret_cast<Encode>(entry);
  }();
  return found;
}

// 0 where the device is no sm_90, else its multiprocessors.
inline int hopper() {
  static std::atomic<int> known[64];  // multiprocessors + 1
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= 64) {
    cudaGetLastError();
    return 0;
  }
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    int sm = 0, major = 0, minor = 0;
    const bool ok = cudaDeviceGetAttribute(&sm, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
                    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
    if (!ok) cudaGetLastError();
    value = 1 + (ok && major == 9 && minor == 0 ? sm : 0);
    known[device].store(value, std::memory_order_relaxed);
  }
  return value - 1;
}

template <int kDimensions>
bool encode_map(CUtensorMap* map, fera_dtype dtype, const void* data, const cuuint64_t (&sizes)[kDimensions],
                const cuuint64_t* strides, const cuuint32_t (&box)[kDimensions]) {
  cuuint32_t steps[kDimensions];
  for (cuuint32_t& step : steps) step = 1;
  const auto run = [&] {
    return encoder()(map, dtype == FERA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                     kDimensions, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     box[0] == 32 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = run();
  if (result == CUDA_ERROR_INVALID_CONTEXT || result == CUDA_ERROR_NOT_INITIALIZED) {
    // The driver's function wants a context, and a thread whose first call this is (autograd's, say) has none yet:
    // the runtime's functions make one.
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess && cudaSetDevice(device) == cudaSuccess) result = run();
  }
  if (result == CUDA_SUCCESS) return true;
  std::string what = "CUDA refused a tensor map (" + std::to_string(static_cast<int>(result)) +
                     ") at address modulo 256 " + std::to_string(reinterpret_cast<uintptr_t>(data) % 256) + ":";
  for (int i = 0; i < kDimensions; ++i)
    what += " " + std::to_string(sizes[i]) + (i > 0 ? " every " + std::to_string(strides[i - 1]) + " bytes" : "") +
            " by " + std::to_string(box[i]);
  set_last_error(what);
  return false;
}

// width x rows numbers of 16 bits, `stride` numbers between rows, in boxes of box_width x box_rows.
inline bool encode_rows(CUtensorMap* map, fera_dtype dtype, const void* data, int64_t width, int64_t rows,
                        int64_t stride, int box_width, int box_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_width), static_cast<cuuint32_t>(box_rows)};
  return encode_map(map, dtype, data, sizes, strides, box);
}

// The same in layers of `rows` rows: a box past the end of its layer is filled with zeros, not with the next layer.
inline bool encode_layers(CUtensorMap* map, fera_dtype dtype, const void* data, int64_t width, int64_t rows,
                          int64_t layers, int64_t stride, int box_width, int box_rows) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(layers)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride) * 2, static_cast<cuuint64_t>(stride) * 2 * rows};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_width), static_cast<cuuint32_t>(box_rows), 1};
  return encode_map(map, dtype, data, sizes, strides, box);
}

// What launches return then.
inline fera_status refused_map(const char* op) {
  set_last_error(std::string(op) + ": " + fera_last_error());
  return FERA_CUDA_ERROR;
}

}  // namespace fera::cuda
