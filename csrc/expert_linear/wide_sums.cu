#include "expert_linear/tensor_core.cuh"
#include "expert_linear/wide_host.h"
#include "expert_linear/wide_sums.h"

namespace fera::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(256) wide_cast(const __grid_constant__ WideCast cast) {
  wait_for_previous();
  let_next_start();  // only now: what follows reads what is older than the call before it waits
  int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  int which = 0;
  while (which < cast.pieces && at >= cast.piece[which].eights) at -= cast.piece[which++].eights;
  if (which == cast.pieces) return;
  const WidePiece& p = cast.piece[which];
  if (p.from == nullptr) {
    static_cast<uint4*>(p.to)[at] = make_uint4(0, 0, 0, 0);
    return;
  }
  const int64_t gate_row = p.gate_eights > 0 ? at / p.gate_eights : 0, eight = at - gate_row * p.gate_eights;
  float v[8];
  if (p.masters) {
    const float* from = static_cast<const float*>(p.from) + eight * 8;
    if (p.aligned) {
      const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
      v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z,
      v[7] = high.w;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = from[i];
    }
  } else {
    const T* from = static_cast<const T*>(p.from) + eight * 8;
    if (p.aligned) {
      const uint4 eights = *reinterpret_cast<const uint4*>(from);
      const float2 a = unpack<T>(eights.x), b = unpack<T>(eights.y), c = unpack<T>(eights.z), d = unpack<T>(eights.w);
      v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = widen(from[i]);
    }
  }
  if (p.gate_eights > 0) {
    // Of the weights rounded, as everywhere. Eight neighbours are of one rank (the width is a multiple of 8), or of
    // eight.
    const int stacked = p.gates.experts * p.gates.rank;
    const int q = p.width > 1 ? static_cast<int>(eight * 8 / p.width) : static_cast<int>(eight * 8 % stacked);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[i] = widen(narrow<T>(v[i])) *
             p.gates.factor(static_cast<int>(gate_row), (q + (p.width > 1 ? 0 : i)) / p.gates.rank);
  }
  static_cast<uint4*>(p.to)[at] =
      make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}

// A block: 64 times four numbers, the slices shared out to four threads each; or one number of dgate.
__global__ void __launch_bounds__(kReduceFours* kReduceShares) wide_reduce(const __grid_constant__ WideReduce r) {
  __shared__ float4 shares[kReduceShares][kReduceFours];
  __shared__ float scratch[32];
  let_next_start();
  wait_for_previous();
  int block = blockIdx.x, which = 0;
  while (block >= r.member[which].blocks()) block -= r.member[which++].blocks();
  const WideMember& m = r.member[which];
  if (block >= m.a.blocks + m.b.blocks) {
    block -= m.a.blocks + m.b.blocks;
    const int gate_row = block / m.gates.experts, expert = block % m.gates.experts, rank = m.gates.rank;
    const float* from = m.gate.sums + static_cast<int64_t>(gate_row) * m.gate.slices * r.ranks + expert * rank;
    float sum = 0;
    for (int i = threadIdx.x; i < m.gate.slices * rank; i += blockDim.x)
      sum += from[static_cast<int64_t>(i / rank) * r.ranks + i % rank];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) m.gate.dgate[block] = sum * m.gates.scale;
    return;
  }
  const bool second = block >= m.a.blocks;
  const WideSum& s = second ? m.b : m.a;
  if (second) block -= m.a.blocks;
  const int column = threadIdx.x % kReduceFours, share = threadIdx.x / kReduceFours;
  const int64_t four = static_cast<int64_t>(block) * kReduceFours + column;
  const bool present = four < s.fours;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if (present) {
    const float4* from = reinterpret_cast<const float4*>(s.partial) + four;
    if (s.gated > 0) {  // four neighbours are of one rank, or of four
      const int q = static_cast<int>(four * 4 / s.gated % r.ranks), next = s.gated == 1;
      int known = -1;
      float4 factor = sum;
#pragma unroll 4
      for (int slice = share; slice < s.slices; slice += kReduceShares) {
        const float4 v = from[slice * s.fours];
        const int gate_row = slice / s.slices_per_gate;
        if (gate_row != known) {
          known = gate_row;
          factor = make_float4(m.gates.factor(gate_row, q / m.gates.rank),
                               m.gates.factor(gate_row, (q + next) / m.gates.rank),
                               m.gates.factor(gate_row, (q + 2 * next) / m.gates.rank),
                               m.gates.factor(gate_row, (q + 3 * next) / m.gates.rank));
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

}  // namespace

fera_status launch_wide_cast(const char* op, fera_dtype dtype, const WideCast& cast, cudaStream_t stream) {
  int64_t eights = 0;
  for (int i = 0; i < cast.pieces; ++i) eights += cast.piece[i].eights;
  if (eights == 0) return FERA_OK;
  const auto kernel = dtype == FERA_BF16 ? wide_cast<Bfloat> : wide_cast<Half>;
  return launch_kernel(op, kernel, ceil_div(eights, int64_t{256}), 256, 0, 1, waits(kernel), stream, cast);
}

fera_status launch_wide_reduce(const char* op, const WideReduce& r, cudaStream_t stream) {
  int64_t blocks = 0;
  for (const WideMember& m : r.member) blocks += m.blocks();
  if (blocks == 0) return FERA_OK;
  return launch_kernel(op, wide_reduce, blocks, kReduceFours * kReduceShares, 0, 1, true, stream, r);
}

}  // namespace fera::cuda
