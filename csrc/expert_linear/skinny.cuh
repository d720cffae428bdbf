// The skinny products of the gated multi-expert linear on tensor cores, for R <= 32 and 16-bit x:
//   down     h = x A^T and gated = gate scale h                         reads x once        skinny_down.cuh
//   across   rows    dh = dy B, one partial sum a column block          reads dy once for both
//            columns dB = dy^T (gate scale h), one partial sum a slice of tokens
//            and, over x, dA likewise from dh, with sum h dh on the way reads x once        skinny_across.cuh
//   up       y = base + gated B^T, dx = base + gated A                  reads and writes y  skinny_up.cuh
//   reduce   the partial sums of dA, dB and dgate, in order                                 skinny_up.cuh
// Ranks are padded with zeros to kRank = 16 or 32. What they share:
#pragma once

#include <type_traits>

#include "common/cuda_dropout.cuh"
#include "expert_linear/tensor_core.cuh"

namespace fera::cuda {

constexpr int kWarp = 32;

// A or B of the adapter: float32 masters or x's dtype, element (i, j) at i * stride_i + j * stride_j; zero outside.
// kMasters is `masters`: a branch on it between loads would keep them from being in flight together.
template <class T>
struct Weights {
  const void* data;
  bool masters;
  int64_t stride_i, stride_j;
  int i_size, j_size;
  template <bool kMasters>
  __device__ float at(int i, int j) const {
    using From = std::conditional_t<kMasters, float, T>;
    From v{};
    if (i < i_size && j < j_size) v = static_cast<const From*>(data)[i * stride_i + j * stride_j];
    return widen(v);
  }
  // (i, j) to (i, j + 3) of a matrix with stride_j 1 whose rows are multiples of 8 long, j a multiple of 4.
  template <bool kMasters>
  using Four = std::conditional_t<kMasters, float4, uint2>;
  template <bool kMasters>
  __device__ Four<kMasters> four(int i, int j) const {
    using From = std::conditional_t<kMasters, float, T>;
    Four<kMasters> v{};
    if (i < i_size && j < j_size)
      v = *reinterpret_cast<const Four<kMasters>*>(static_cast<const From*>(data) + i * stride_i + j);
    return v;
  }
};
template <class T>
__device__ inline uint2 pack_four(float4 v) {
  return make_uint2(pack<T>(v.x, v.y), pack<T>(v.z, v.w));
}
template <class T>
__device__ inline uint2 pack_four(uint2 v) {
  return v;
}

// f(kMasters)
template <class T, class F>
__device__ inline void with_masters(const Weights<T>& w, F f) {
  if (w.masters)
    f(std::true_type{});
  else
    f(std::false_type{});
}

template <class T>
struct RowsView {
  T* data;
  int64_t stride;
};

struct Gates {
  const float* gate;
  int rows_per_gate;  // at least 16
  int experts, rank;
  float scale;
  __device__ int stacked() const { return experts * rank; }
  __device__ float factor(int g, int expert) const { return gate[static_cast<int64_t>(g) * experts + expert] * scale; }
};

// The template argument kDrops: with dropout. What is kept is scaled in the (T, R) operands, h forward and gate scale
// dh backward; x and the product for dx are only masked.

__device__ inline uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

}  // namespace fera::cuda
