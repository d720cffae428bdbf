// What the hosts of the skinny and of the fused products share: device arguments from a call's.
#pragma once

#include "expert_linear/operands.h"
#include "expert_linear/skinny_up.cuh"

namespace fera::cuda {

inline Gates gates_of(const fera_experts& e) {
  return {static_cast<const float*>(e.gate), static_cast<int>(e.rows_per_gate), e.experts, e.rank,
          static_cast<float>(e.scale)};
}

// Partial sums of dA and dB, one a slice, and of dgate, one a tile of `tile` tokens.
struct PartialSums {
  const float *da, *db, *gate_sums;
  int da_slices, db_slices, tile;
};
// What `reduce` does for what a call asks for.
inline ReduceArgs reduce_of(const fera_expert_update_backward_args& a, const PartialSums& p) {
  const fera_experts& e = a.experts;
  const int stacked = static_cast<int>(stacked_of(e)), in = static_cast<int>(e.in), out = static_cast<int>(e.out);
  ReduceArgs sums{};
  sums.gates = gates_of(e);
  if (a.da) sums.a = {p.da, p.da_slices, in, a.da, e.a_dtype, 1, e.in, ceil_div(in * stacked, 64)};
  if (a.db) sums.b = {p.db, p.db_slices, out, a.db, e.b_dtype, stacked, 1, ceil_div(out * stacked, 64)};
  if (a.dgate) {
    sums.gate_sums = p.gate_sums;
    sums.tile = p.tile;
    sums.gate_blocks = static_cast<int>(e.tokens / e.rows_per_gate * e.experts);
    sums.dgate = static_cast<float*>(a.dgate);
  }
  return sums;
}

}  // namespace fera::cuda
