// Ranks above 32 of the "wgmma" variant: everything around the products of fused.h (wide.cuh).
#pragma once

#include <cuda_runtime.h>

#include "common/checks.h"
#include "expert_linear/fused.h"

namespace fera::cuda {

// What fused.h takes at these ranks rather than skinny.h's products.
inline bool wide_ranks(const fera_experts& e) { return int64_t{e.experts} * e.rank > 32; }

// Whether the parts below take these operands, and why not ("" if they do). The weight is not looked at.
const char* wide_refuses(const fera_expert_update_args& a);
const char* wide_refuses(const fera_expert_update_backward_args& a);

size_t wide_workspace(const fera_expert_update_args& a);
size_t wide_workspace(const fera_expert_update_backward_args& a);

// Where everything is made beside the product's tiles: one linear, or several of one x, each with its workspace.
// Backward sums their dx into the first one's.
size_t wide_members_workspace(const fera_expert_update_args& a);
size_t wide_members_workspace(const fera_expert_update_backward_args& a);
fera_status wide_members(const char* op, int members, const Call<fera_expert_update_args>* calls,
                         const fera_context* context);
fera_status wide_members(const char* op, int members, const Call<fera_expert_update_backward_args>* calls,
                         const fera_context* context);

// The operands of the low-rank term: u (T, rank) is gate scale h or gate scale dh; v is B (out, rank) or A (rank, in).
struct LowRank {
  const void *u, *v;
  int rank;
};
// Else by kernels of their own: the parts without the products that write y and dx. The workspace is wide_workspace's.
fera_status wide_down(const fera_expert_update_args& a, const fera_context* context, LowRank* term);
fera_status wide_across(const fera_expert_update_backward_args& a, const fera_context* context, LowRank* term);

}  // namespace fera::cuda
