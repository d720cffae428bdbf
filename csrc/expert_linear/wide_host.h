// What the hosts of wide ranks share: launches, adapters as tensor maps read them, slices of tokens, the reduction.
#pragma once

#include <algorithm>
#include <string>

#include "expert_linear/fused.h"
#include "expert_linear/fused_host.h"
#include "expert_linear/launch.h"
#include "expert_linear/operands.h"
#include "expert_linear/wide_sums.h"

namespace fera::cuda {

inline int wide_tiles(int64_t width) { return static_cast<int>(ceil_div(width, int64_t{128})); }

inline WideGates wide_gates(const fera_experts& e) {
  return {static_cast<const float*>(e.gate), static_cast<int>(e.rows_per_gate), e.experts, e.rank,
          static_cast<float>(e.scale)};
}

// A and B in x's dtype, in place or a copy in the workspace, and zeros: one launch makes all of a call's.
class WideCasts {
 public:
  explicit WideCasts(fera_dtype dtype) : dtype_(dtype) {}
  const void* take(const void* weights, fera_dtype from, int64_t count, Workspace* workspace) {
    if (from == dtype_ && aligned(weights)) return weights;
    void* to = workspace->take<Half>(count);
    cast_.piece[cast_.pieces++] = {weights, to, count / 8, from == FERA_F32, aligned(weights), {}, 0, 0};
    return to;
  }
  // gate scale weights, one copy a gate row; number i is of rank i / width modulo the ranks.
  const void* take_gated(const void* weights, fera_dtype from, int64_t count, const fera_experts& e, int64_t width,
                         Workspace* workspace) {
    const int64_t rows = e.tokens / e.rows_per_gate;
    void* to = workspace->take<Half>(count * rows);
    cast_.piece[cast_.pieces++] = {weights,       to,        count * rows / 8,       from == FERA_F32, aligned(weights),
                                   wide_gates(e), count / 8, static_cast<int>(width)};
    return to;
  }
  // Up to three numbers more than `count` are cleared: pieces of the workspace end at multiples of 256 bytes.
  int* zeros(int64_t count, Workspace* workspace) {
    int* to = workspace->take<int>(count);
    cast_.piece[cast_.pieces++] = {nullptr, to, ceil_div(count, int64_t{4}), false, true, {}, 0, 0};
    return to;
  }
  bool empty() const { return cast_.pieces == 0; }
  fera_status launch(const char* op, cudaStream_t stream) const { return launch_wide_cast(op, dtype_, cast_, stream); }

 private:
  fera_dtype dtype_;
  WideCast cast_{};
};

// `layers` of `tokens` tokens in slices: of the numbers of them tried the one of least `time`(steps a slice, slices).
template <class Time>
Slices cut_slices(int64_t tokens, int64_t layers, int64_t m, int64_t n, Time time) {
  const int64_t steps = ceil_div(tokens, int64_t{64});
  double least = 1e30;
  int64_t chosen = steps;
  for (const int64_t wanted : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}) {
    const int64_t per_slice = ceil_div<int64_t>(steps, wanted), each = ceil_div<int64_t>(steps, per_slice);
    // Partial sums are written and read again.
    const double took = time(static_cast<double>(per_slice), static_cast<double>(each * layers)) +
                        8.0 * static_cast<double>(each * layers * m * n) / 2.5e6;
    if (took < least) least = took, chosen = per_slice;
  }
  return {m,
          n,
          static_cast<int>(layers),
          static_cast<int>(steps),
          static_cast<int>(chosen),
          static_cast<int>(ceil_div(steps, chosen))};
}

// What the reduction does for a linear: partial sums of dA and dB, and dgate's, (slice, 128 of out, R). Those of dB
// always lack gate and scale, those of dA where `da_gated`.
inline WideMember wide_sums_of(const fera_expert_update_backward_args& a, const Slices& da, bool da_gated,
                               const Slices& db, const float* da_sums, const float* db_sums, const float* gate_sums) {
  constexpr int kFours = kReduceFours;
  const fera_experts& e = a.experts;
  WideMember m{};
  m.gates = wide_gates(e);
  const auto sum = [&](const float* partial, const Slices& cut, int64_t gated, void* out, fera_dtype to) {
    const int64_t fours = cut.m * cut.n / 4;
    return WideSum{partial,
                   cut.count(),
                   cut.slices_per_gate,
                   static_cast<int>(gated),
                   fours,
                   out,
                   to,
                   aligned(out),
                   static_cast<int>(ceil_div(fours, int64_t{kFours}))};
  };
  if (a.da) m.a = sum(da_sums, da, da_gated ? e.in : 0, a.da, e.a_dtype);
  if (a.db) m.b = sum(db_sums, db, 1, a.db, e.b_dtype);
  if (a.dgate)
    m.gate = {gate_sums, db.slices_per_gate * wide_tiles(e.out),
              static_cast<int>(e.tokens / e.rows_per_gate * e.experts), static_cast<float*>(a.dgate)};
  return m;
}

}  // namespace fera::cuda
