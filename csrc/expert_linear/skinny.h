// The "mma" variant of expert_update: skinny products on tensor cores (skinny.cuh).
#pragma once

#include <cuda_runtime.h>

#include "common/checks.h"

namespace fera::cuda {

// Whether the variant takes these operands on the current device, and why not ("" if it does).
const char* skinny_refuses(const fera_expert_update_args& a);
const char* skinny_refuses(const fera_expert_update_backward_args& a);

size_t skinny_workspace(const fera_expert_update_args& a);
size_t skinny_workspace(const fera_expert_update_backward_args& a);

// (T, rank) in x's dtype: gate scale h, or gate scale dh. Ranks are padded with zeros to 16 or 32. In the workspace.
struct Gated {
  const void* rows;
  int rank;
};
// The parts without the products that write y and dx: h and gated h; all but dx (rows are NULL where dx is not wanted).
// The workspace is skinny_workspace's; `base` and `y`, and the rows of dx, are neither read nor written.
fera_status skinny_down(const fera_expert_update_args& a, const fera_context* context, Gated* gated);
fera_status skinny_across(const fera_expert_update_backward_args& a, const fera_context* context, Gated* gated);

fera_status skinny_launch(const fera_expert_update_args& a, const fera_context* context);
fera_status skinny_launch(const fera_expert_update_backward_args& a, const fera_context* context);

}  // namespace fera::cuda
