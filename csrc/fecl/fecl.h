// Scratch each device's kernels of fecl want; fera_<op>_workspace in fecl.cpp chooses between them.
#pragma once

#include "common/checks.h"

namespace fera {

size_t fecl_loss_workspace_cpu(const fera_fecl_loss_args& a);
size_t fecl_loss_workspace_cuda(const fera_fecl_loss_args& a);
size_t fecl_loss_backward_workspace_cpu(const fera_fecl_loss_backward_args& a);
size_t fecl_loss_backward_workspace_cuda(const fera_fecl_loss_backward_args& a);

}  // namespace fera
