// The "wgmma" variant of expert_linear on sm_90a: base product and low-rank term in one kernel (fused.cuh).
#pragma once

#include <cuda_runtime.h>

#include "common/checks.h"

namespace fera::cuda {

// Where u = gate scale h is made: by another kernel, inside the product's tiles (forward alone, fused.cuh), or by items
// of work beside them (fused_beside.cuh). Backward likewise u = gate scale dh. wide: R > 32, beside the tiles too, but
// u is h or dh itself, and V has gate and scale in it (fused_wide.cuh).
// turns: inside, by warpgroups in turns (fused_turns.cuh). rows: backward, inside, by whole rows (fused_rows.cuh).
enum class Place { outside, inside, turns, beside, rows, wide };

// The narrow product of the same kernel: h = x A^T rounded to x's dtype, or dh = dy B, not rounded.
struct Narrow {
  const void* a;  // A or B^T (rank, K), R padded to rank = 16 or 32, x's dtype; wide: A (R, K) or B (K, R)
  const float* gate;
  int rows_per_gate, experts, each;  // each: ranks of an expert
  float scale;
  void* h;  // forward: (T, R), x's dtype
};

// Of wide ranks, how tokens are cut into slices for dy^T h or dh^T x, (m, n): a partial sum each. A slice is of one
// layer: a gate row, or all there is; steps are of 64 tokens.
struct Slices {
  int64_t m, n;
  int layers, steps, steps_per_slice, slices_per_gate;
  int count() const { return slices_per_gate * layers; }
};

// What Place::beside, rows and wide need besides.
struct Items {
  int* ready;        // 1 + beside_flags(T) numbers, zeros: the queue (of the first member) and the flags or arrivals
  const void* h;     // the rest backward: the forward's, (T, R) in x's dtype
  float *db, *da;    // a partial sum for each 128 rows, (R, width); wide: a slice, like B and A. NULL: not asked for
  float* gate_sums;  // (16 rows each, 2, rank); wide: (slice, 128 of out, R); or NULL
  // wide: gate rows, of which each has its V; the cuts.
  int layers;
  Slices db_slices, da_slices;
};
inline int64_t beside_flags(int64_t tokens) { return (tokens + 255) / 256 * 2; }  // a cluster's rows are 256 at most
// Tiles of 128 rows that do not cross gate rows, of whole clusters of up to four.
inline int64_t wide_flags(const fera_experts& e) {
  return (e.tokens / e.rows_per_gate * ((e.rows_per_gate + 127) / 128) + 3) / 4 * 4;
}

// One product: y (T, N) = x (T, K) W + bias + u (T, rank) V, all of one 16-bit dtype; rank a multiple of 16. wide: u is
// written here, and V is one a gate row.
struct Product {
  fera_rows x, weight, y;
  bool n_major;  // W is stored (K, N) and V (rank, N); else (N, K) and (N, rank)
  const void *bias, *u, *v;
  int64_t rows, columns, depth;
  int rank;
  Narrow narrow;
  Items items;
};

// Microseconds on an H200 of an item of `steps` blocks of the ring, 128 x 128 each, of wide ranks, beside another.
inline double wide_item_time(double steps) { return 3 + 0.7 * steps; }

// How fused_rows.cuh cuts dx (rows x columns) with `depth` numbers along k: into shares of its columns that are blocks
// of their own, each in passes of 320 columns.
struct RowsCut {
  int shares, passes;
  int64_t blocks;
};
RowsCut cut_rows(int64_t rows, int64_t columns, int64_t depth);

// Up to four in one kernel, all n_major or none. Of one x, each with its own y; or, summed, into one y (of the first).
struct Products {
  int members;
  bool summed;
  Place place;
  fera_rows other;  // beside, n_major: the forward's x
  int64_t other_columns;
  Product member[FERA_MAX_GROUP];
};
// `follows`: the kernel before it on the stream is of the same call and lets it start early.
fera_status launch_products(const char* op, const Products& p, bool follows, cudaStream_t stream);
fera_status launch_turns(const char* op, const Products& p, bool follows, cudaStream_t stream);
fera_status launch_rows(const char* op, const Products& p, bool follows, cudaStream_t stream);
fera_status launch_wide_products(const char* op, const Products& p, bool follows, cudaStream_t stream);

// Whether the variant takes these operands on the current device, and why not ("" if it does).
const char* fused_refuses(const fera_expert_update_args& a);
const char* fused_refuses(const fera_expert_update_backward_args& a);

// Whether it has anything to do without the base weight.
inline bool fused_needs_weight(const fera_expert_update_args&) { return true; }
bool fused_needs_weight(const fera_expert_update_backward_args& a);

size_t fused_workspace(const fera_expert_update_args& a);
size_t fused_workspace(const fera_expert_update_backward_args& a);

fera_status fused_launch(const fera_expert_update_args& a, const fera_context* context);

fera_status fused_launch(const fera_expert_update_backward_args& a, const fera_context* context);

// For groups: the place of h (dh), of all members alike; the call of up to four linears of one x, each with its
// workspace (wide ranks: Place::wide alone). Backward sums their dx into the first one's.
Place fused_place(const fera_expert_update_args& a);
Place fused_place(const fera_expert_update_backward_args& a);
size_t fused_workspace(const fera_expert_update_args& a, Place place);
size_t fused_workspace(const fera_expert_update_backward_args& a, Place place);
template <class Args>
struct Call {
  const Args* args;
  void* workspace;
};
fera_status fused_members(const char* op, int members, const Call<fera_expert_update_args>* calls, Place place,
                          const fera_context* context);
fera_status fused_members(const char* op, int members, const Call<fera_expert_update_backward_args>* calls, Place place,
                          const fera_context* context);

}  // namespace fera::cuda
