// The ends of wide.cuh's work: adapters to x's dtype before it, partial sums to gradients after it.
#pragma once

#include "expert_linear/tensor_core.cuh"

namespace fera::cuda {

struct WideGates {
  const float* gate;
  int rows_per_gate, experts, rank;
  float scale;
  __device__ float factor(int row, int expert) const {
    return gate[static_cast<int64_t>(row) * experts + expert] * scale;
  }
};

// Numbers 8 i to 8 i + 7 of A, then of B, from float32 or T to T. Sizes are multiples of 8.
struct WideCast {
  const void* from[2];
  void* to[2];
  int64_t eights[2];
  bool masters[2], aligned[2];
};
template <class T>
__global__ void __launch_bounds__(256) wide_cast(const __grid_constant__ WideCast cast) {
  let_next_start();
  int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  const int which = at >= cast.eights[0];
  if (which) at -= cast.eights[0];
  if (at >= cast.eights[which]) return;
  uint4 packed;
  if (cast.masters[which]) {
    const float* from = static_cast<const float*>(cast.from[which]) + at * 8;
    float4 low, high;
    if (cast.aligned[which]) {
      low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    } else {
      low = make_float4(from[0], from[1], from[2], from[3]), high = make_float4(from[4], from[5], from[6], from[7]);
    }
    packed = make_uint4(pack<T>(low.x, low.y), pack<T>(low.z, low.w), pack<T>(high.x, high.y), pack<T>(high.z, high.w));
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(cast.from[which]) + at * 8;
    const auto two = [&](int i) { return static_cast<uint32_t>(from[i]) | static_cast<uint32_t>(from[i + 1]) << 16; };
    packed = make_uint4(two(0), two(2), two(4), two(6));
  }
  static_cast<uint4*>(cast.to[which])[at] = packed;
}

struct WideSum {
  const float* partial;  // [slice][fours * 4]
  int slices, slices_per_gate;
  bool gated;  // each slice times gate and scale, by the rank of a number: its index modulo the ranks
  int64_t fours;
  void* out;
  fera_dtype dtype;
  bool aligned;
  int blocks;
};
struct WideReduce {
  WideSum a, b;
  WideGates gates;
  int ranks;
  const float* gate_sums;  // [slice][row tile][ranks]
  int gate_slices;         // slices_per_gate * row tiles
  int gate_blocks;         // gate rows * experts, 0: not wanted
  float* dgate;
};
constexpr int kReduceFours = 64, kReduceShares = 4;

// A block: 64 times four numbers, the slices shared out to four threads each; or one number of dgate.
__global__ void __launch_bounds__(kReduceFours* kReduceShares) wide_reduce(const __grid_constant__ WideReduce r) {
  __shared__ float4 shares[kReduceShares][kReduceFours];
  __shared__ float scratch[32];
  let_next_start();
  wait_for_previous();
  int block = blockIdx.x;
  if (block >= r.a.blocks + r.b.blocks) {
    block -= r.a.blocks + r.b.blocks;
    const int gate_row = block / r.gates.experts, expert = block % r.gates.experts, rank = r.gates.rank;
    const float* from = r.gate_sums + static_cast<int64_t>(gate_row) * r.gate_slices * r.ranks + expert * rank;
    float sum = 0;
    for (int i = threadIdx.x; i < r.gate_slices * rank; i += blockDim.x)
      sum += from[static_cast<int64_t>(i / rank) * r.ranks + i % rank];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) r.dgate[block] = sum * r.gates.scale;
    return;
  }
  const bool second = block >= r.a.blocks;
  const WideSum& s = second ? r.b : r.a;
  if (second) block -= r.a.blocks;
  const int column = threadIdx.x % kReduceFours, share = threadIdx.x / kReduceFours;
  const int64_t four = static_cast<int64_t>(block) * kReduceFours + column;
  const bool present = four < s.fours;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if (present) {
    const float4* from = reinterpret_cast<const float4*>(s.partial) + four;
    if (s.gated) {
      const int q = static_cast<int>(four * 4 % r.ranks);
      int known = -1;
      float4 factor = sum;
#pragma unroll 4
      for (int slice = share; slice < s.slices; slice += kReduceShares) {
        const float4 v = from[slice * s.fours];
        const int gate_row = slice / s.slices_per_gate;
        if (gate_row != known) {
          known = gate_row;
          factor = make_float4(
              r.gates.factor(gate_row, q / r.gates.rank), r.gates.factor(gate_row, (q + 1) / r.gates.rank),
              r.gates.factor(gate_row, (q + 2) / r.gates.rank), r.gates.factor(gate_row, (q + 3) / r.gates.rank));
        }
        sum.x += v.x * factor.x, sum.y += v.y * factor.y, sum.z += v.z * factor.z, sum.w += v.w * factor.w;
      }
    } else {
#pragma unroll 4
      for (int slice = share; slice < s.slices; slice += kReduceShares) {
        const float4 v = from[slice * s.fours];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
    }
  }
  shares[share][column] = sum;
  __syncthreads();
  if (share != 0 || !present) return;
  for (int i = 1; i < kReduceShares; ++i) {
    const float4 v = shares[i][column];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  if (s.dtype == FERA_F32 && s.aligned) {
    static_cast<float4*>(s.out)[four] = sum;
    return;
  }
  store_any(s.out, s.dtype, four * 4, sum.x);
  store_any(s.out, s.dtype, four * 4 + 1, sum.y);
  store_any(s.out, s.dtype, four * 4 + 2, sum.z);
  store_any(s.out, s.dtype, four * 4 + 3, sum.w);
}

}  // namespace fera::cuda
