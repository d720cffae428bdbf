// Scratch each device's kernels of expert_linear want; fera_<op>_workspace in expert_linear.cpp chooses between them.
#pragma once

#include "common/checks.h"

namespace fera {

size_t expert_update_workspace_cpu(const fera_expert_update_args& a);
size_t expert_update_workspace_cuda(const fera_expert_update_args& a);
size_t expert_update_backward_workspace_cpu(const fera_expert_update_backward_args& a);
size_t expert_update_backward_workspace_cuda(const fera_expert_update_backward_args& a);

size_t expert_dropout_workspace_cpu(const fera_expert_dropout_args& a);
size_t expert_dropout_workspace_cuda(const fera_expert_dropout_args& a);

size_t expert_group_workspace_cuda(const fera_expert_group_args& g);
size_t expert_group_backward_workspace_cuda(const fera_expert_group_backward_args& g);

const char* expert_variant_cuda(const fera_expert_update_args& a);
const char* expert_variant_cuda(const fera_expert_update_backward_args& a);

bool expert_group_takes_cuda(const fera_expert_group_args& g);
bool expert_group_takes_cuda(const fera_expert_group_backward_args& g);

}  // namespace fera
