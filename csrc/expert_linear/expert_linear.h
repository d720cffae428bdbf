// Scratch each device's kernels of expert_linear want; fera_<op>_workspace in expert_linear.cpp chooses between them.
#pragma once

#include "common/checks.h"

namespace fera {

size_t expert_update_workspace_cpu(const fera_expert_update_args& a);
size_t expert_update_workspace_cuda(const fera_expert_update_args& a);
size_t expert_update_backward_workspace_cpu(const fera_expert_update_backward_args& a);
size_t expert_update_backward_workspace_cuda(const fera_expert_update_backward_args& a);

}  // namespace fera
