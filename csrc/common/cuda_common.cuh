// Device helpers every CUDA kernel shares: conversions, block reductions, launch status.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/checks.h"
#include "common/dispatch.h"

namespace fera::cuda {

using Half = __half;
using Bfloat = __nv_bfloat16;

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class F>
fera_status dispatch(fera_dtype dtype, F&& f) {
  return dispatch_dtype<Half, Bfloat>(dtype, f);
}

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(Half v) { return __half2float(v); }
__device__ inline float widen(Bfloat v) { return __bfloat162float(v); }
__device__ inline double widen(double v) { return v; }

// Round-to-nearest-even from the compute type to the storage type.
template <class T>
__device__ inline T narrow(Compute<T> v) {
  return static_cast<T>(v);
}
template <>
__device__ inline Half narrow<Half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline Bfloat narrow<Bfloat>(float v) {
  return __float2bfloat16_rn(v);
}

// Elements whose dtype is only known at run time (the adapter's master weights and their gradients).
template <class Real>
__device__ inline Real load_any(const void* data, fera_dtype dtype, int64_t i) {
  switch (dtype) {
    case FERA_F32:
      return static_cast<Real>(static_cast<const float*>(data)[i]);
    case FERA_F16:
      return static_cast<Real>(widen(static_cast<const Half*>(data)[i]));
    case FERA_BF16:
      return static_cast<Real>(widen(static_cast<const Bfloat*>(data)[i]));
    default:
      return static_cast<Real>(static_cast<const double*>(data)[i]);
  }
}
template <class Real>
__device__ inline void store_any(void* data, fera_dtype dtype, int64_t i, Real v) {
  switch (dtype) {
    case FERA_F32:
      static_cast<float*>(data)[i] = static_cast<float>(v);
      break;
    case FERA_F16:
      static_cast<Half*>(data)[i] = narrow<Half>(static_cast<float>(v));
      break;
    case FERA_BF16:
      static_cast<Bfloat*>(data)[i] = narrow<Bfloat>(static_cast<float>(v));
      break;
    default:
      static_cast<double*>(data)[i] = static_cast<double>(v);
  }
}

// Sum over the block in a fixed order (shuffles within warps, then the first warp over the warps);
// the result is valid in every thread. `scratch` holds 32 values; blockDim.x is a multiple of 32.
template <class Real>
__device__ inline Real block_sum(Real v, Real* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = lane < warps ? scratch[lane] : Real(0);
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

template <class Real>
__device__ inline Real block_max(Real v, Real* scratch) {
  for (int offset = 16; offset > 0; offset /= 2) v = fmax(v, __shfl_xor_sync(0xffffffffu, v, offset));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  __syncthreads();
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = lane < warps ? scratch[lane] : Real(0);
  for (int offset = 16; offset > 0; offset /= 2) v = fmax(v, __shfl_xor_sync(0xffffffffu, v, offset));
  return v;
}

inline fera_status launch_status(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return FERA_OK;
  set_last_error(std::string(op) + ": CUDA reported " + cudaGetErrorString(error));
  return FERA_CUDA_ERROR;
}

inline cudaStream_t stream_of(const fera_context* context) { return static_cast<cudaStream_t>(context->stream); }

template <class I>
__host__ __device__ inline I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

// Hands out 256-byte aligned pieces of the caller's workspace; with a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += align256(static_cast<size_t>(count) * sizeof(T));
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace fera::cuda
