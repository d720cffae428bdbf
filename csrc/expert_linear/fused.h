// The "wgmma" variant of expert_linear on sm_90a: base product and low-rank term in one kernel (fused.cuh).
#pragma once

#include <cuda_runtime.h>

#include "common/checks.h"

namespace fera::cuda {

// Where u = gate scale h is made: by another kernel, inside the product's tiles (forward alone, fused.cuh), or by items
// of work beside them (fused_beside.cuh). Backward likewise u = gate scale dh.
enum class Place { outside, inside, beside };

// The narrow product of the same kernel: h = x A^T rounded to x's dtype, or dh = dy B, not rounded.
struct Narrow {
  const void* a;  // A or B^T (rank, K), R padded to rank = 16 or 32, x's dtype
  const float* gate;
  int rows_per_gate, experts, each;  // each: ranks of an expert
  float scale;
  void* h;  // forward: (T, R), x's dtype
};

// What Place::beside needs besides.
struct Items {
  int* ready;        // 1 + beside_flags(T) numbers, zeros: the queue (of the first member) and the flags
  const void* h;     // the rest backward: the forward's, (T, R) in x's dtype
  float *db, *da;    // a partial sum for each 128 rows, (R, width); NULL where not asked for
  float* gate_sums;  // (16 rows each, 2, rank); or NULL
};
inline int64_t beside_flags(int64_t tokens) { return (tokens + 255) / 256 * 2; }  // a cluster's rows are 256 at most

// One product: y (T, N) = x (T, K) W + bias + u (T, rank) V, all of one 16-bit dtype; rank a multiple of 16.
struct Product {
  fera_rows x, weight, y;
  bool n_major;  // W is stored (K, N) and V (rank, N); else (N, K) and (N, rank)
  const void *bias, *u, *v;
  int64_t rows, columns, depth;
  int rank;
  Narrow narrow;
  Items items;
};

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

// Whether the variant takes these operands on the current device, and why not ("" if it does).
const char* fused_refuses(const fera_expert_update_args& a);
const char* fused_refuses(const fera_expert_update_backward_args& a);

size_t fused_workspace(const fera_expert_update_args& a);
size_t fused_workspace(const fera_expert_update_backward_args& a);

fera_status fused_launch(const fera_expert_update_args& a, const fera_context* context);

fera_status fused_launch(const fera_expert_update_backward_args& a, const fera_context* context);

// Calls with R <= 32, for groups: the place of h (dh), of all members alike; the call of up to four linears of one x,
// each with its workspace. Backward sums their dx into the first one's.
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
