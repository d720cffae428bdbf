// The ends of wide ranks' work: adapters to x's dtype before it, partial sums to gradients after it.
#pragma once

#include "common/cuda_common.cuh"

namespace fera::cuda {

struct WideGates {
  const float* gate;
  int rows_per_gate, experts, rank;
  float scale;
  __device__ float factor(int row, int expert) const {
    return gate[static_cast<int64_t>(row) * experts + expert] * scale;
  }
};

// Pieces of eights of numbers: from float32 or T to T, or zeros; or times gate and scale, once a gate row.
constexpr int kMostPieces = 3 * FERA_MAX_GROUP;  // of each member A, B and zeros
struct WidePiece {
  const void* from;  // NULL: zeros
  void* to;
  int64_t eights;
  bool masters, aligned;
  WideGates gates;
  int64_t gate_eights;  // of a gate row, 0: without gate
  int width;            // neighbours of one rank
};
struct WideCast {
  int pieces;
  WidePiece piece[kMostPieces];
};
fera_status launch_wide_cast(const char* op, fera_dtype dtype, const WideCast& cast, cudaStream_t stream);

struct WideSum {
  const float* partial;  // [slice][fours * 4]
  int slices, slices_per_gate;
  int gated;  // each slice times gate and scale, by a number's rank: its index / gated modulo the ranks; 0: not
  int64_t fours;
  void* out;
  fera_dtype dtype;
  bool aligned;
  int blocks;
};
struct WideGateSum {
  const float* sums;  // [slice][row tile][ranks]
  int slices;         // of a gate row, times row tiles
  int blocks;         // gate rows * experts, 0: not wanted
  float* dgate;
};
struct WideMember {
  WideSum a, b;
  WideGates gates;
  WideGateSum gate;
  __host__ __device__ int blocks() const { return a.blocks + b.blocks + gate.blocks; }
};
struct WideReduce {
  int ranks;
  WideMember member[FERA_MAX_GROUP];
};
constexpr int kReduceFours = 64, kReduceShares = 4;  // of a block
// Right after the kernel that writes the partial sums: it may start before that ends.
fera_status launch_wide_reduce(const char* op, const WideReduce& r, cudaStream_t stream);

}  // namespace fera::cuda
