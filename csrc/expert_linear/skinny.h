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

// The parts without the products that write y and dx: h and gated h; all but dx. The workspace is skinny_workspace's;
// `base` and `y`, and the rows of dx, are neither read nor written. `follows`: the kernel before on the stream is of
// the same call and lets these start early.
fera_status skinny_before(const fera_expert_update_args& a, bool follows, const fera_context* context);
fera_status skinny_before(const fera_expert_update_backward_args& a, bool follows, const fera_context* context);
// Where in the workspace they write gate scale h, or gate scale dh (NULL where dx is not wanted): (T, 16 or 32, which R
// is padded to with zeros) in x's dtype.
const void* skinny_gated(const fera_expert_update_args& a, void* workspace);
const void* skinny_gated(const fera_expert_update_backward_args& a, void* workspace);

fera_status skinny_launch(const fera_expert_update_args& a, const fera_context* context);
fera_status skinny_launch(const fera_expert_update_backward_args& a, const fera_context* context);

}  // namespace fera::cuda
