// The "wgmma" variant of expert_linear on sm_90a: base product and low-rank term in one kernel (fused.cuh).
#pragma once

#include <cuda_runtime.h>

#include "common/checks.h"

namespace fera::cuda {

// h made beside the product: u = gate scale h, h = x A^T rounded to x's dtype, R padded to rank = 16 or 32. Where W is
// n_major, dh beside dx: dh = dy B, not rounded.
struct Inside {
  const void* a;  // A (rank, K) or, n_major, B (K, rank), x's dtype; NULL: u is given
  const float* gate;
  int rows_per_gate, experts, each;  // each: ranks of an expert
  float scale;
  void* h;  // (T, R), x's dtype; or dh (T, rank) in float32, NULL where nobody reads it
};

// One product: y (T, N) = x (T, K) W + bias + u (T, rank) V, all of one 16-bit dtype; rank a multiple of 16.
struct Product {
  fera_rows x, weight, y;
  bool n_major;  // W is stored (K, N) and V (rank, N); else (N, K) and (N, rank)
  const void *bias, *u, *v;
  int64_t rows, columns, depth;
  int rank;
  Inside inside;
};

// Up to four in one kernel, all n_major or none. Of one x, each with its own y; or, summed, into one y (of the first).
struct Products {
  int members;
  bool summed;
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

// Calls with R <= 32, for groups: whether h (dh) is made inside the product, all members alike; the call of up to four
// linears of one x, each with its workspace. Backward sums their dx into the first one's.
bool fused_inside(const fera_expert_update_args& a);
bool fused_inside(const fera_expert_update_backward_args& a);
size_t fused_workspace(const fera_expert_update_args& a, bool inside);
size_t fused_workspace(const fera_expert_update_backward_args& a, bool inside);
template <class Args>
struct Call {
  const Args* args;
  void* workspace;
};
fera_status fused_members(const char* op, int members, const Call<fera_expert_update_args>* calls, bool inside,
                          const fera_context* context);
fera_status fused_members(const char* op, int members, const Call<fera_expert_update_backward_args>* calls, bool inside,
                          const fera_context* context);

}  // namespace fera::cuda
