// The adapters' weights in x's dtype, ranks padded with zeros, as the tensor maps of the fused kernel read them.
#pragma once

#include "expert_linear/launch.h"
#include "expert_linear/tensor_core.cuh"

namespace fera::cuda {

constexpr int kPackThreads = 256;

// Element (i, j) of `from` at i * stride_i + j * stride_j, (i_size, j_size); `out` (rows, columns) contiguous, zeros
// outside.
struct Pack {
  const void* from;
  bool masters;  // float32, else x's dtype
  int64_t stride_i, stride_j;
  int i_size, j_size, rows, columns;
  void* out;
};
struct Packs {
  int pieces;
  Pack piece[3 * FERA_MAX_GROUP];  // of each member A, B and zeros
};

// grid (blocks of the largest piece, pieces)
template <class T>
__global__ void __launch_bounds__(kPackThreads) pack_pieces(const __grid_constant__ Packs packs) {
  wait_for_previous();
  let_next_start();  // only now: what follows reads what is older than the call before it waits
  const Pack& p = packs.piece[blockIdx.y];
  const int at = blockIdx.x * kPackThreads + threadIdx.x;
  if (at >= p.rows * p.columns) return;
  const int i = at / p.columns, j = at % p.columns;
  float v = 0;
  if (i < p.i_size && j < p.j_size) {
    const int64_t where = i * p.stride_i + j * p.stride_j;
    v = p.masters ? static_cast<const float*>(p.from)[where] : widen(static_cast<const T*>(p.from)[where]);
  }
  static_cast<T*>(p.out)[at] = narrow<T>(v);
}

inline fera_status launch_pack(const char* op, fera_dtype dtype, const Packs& packs, cudaStream_t stream) {
  int most = 0;
  for (int i = 0; i < packs.pieces; ++i)
    most = packs.piece[i].rows * packs.piece[i].columns > most ? packs.piece[i].rows * packs.piece[i].columns : most;
  const dim3 grid(static_cast<unsigned>(ceil_div(most, kPackThreads)), static_cast<unsigned>(packs.pieces));
  const auto kernel = dtype == FERA_BF16 ? pack_pieces<Bfloat> : pack_pieces<Half>;
  return launch_kernel(op, kernel, grid, kPackThreads, 0, 1, waits(kernel), stream, packs);
}

}  // namespace fera::cuda
