// What both devices' entry points of fecl share. fera_<op>_workspace in fecl.cpp chooses between the two.
#pragma once

#include "common/checks.h"

namespace fera {

size_t fecl_loss_workspace_cpu(const fera_fecl_loss_args& a);
size_t fecl_loss_workspace_cuda(const fera_fecl_loss_args& a);
size_t fecl_loss_backward_workspace_cpu(const fera_fecl_loss_backward_args& a);
size_t fecl_loss_backward_workspace_cuda(const fera_fecl_loss_backward_args& a);

// The gradient that forward writes: contiguous, in the compute dtype.
inline fera_latent gradient_of(const fera_fecl_loss_args& a) {
  const fera_latent& z = a.fera;
  return {a.gradient, compute_dtype(z.dtype), z.n, z.p, z.h, z.w, z.p * z.h * z.w, z.h * z.w, z.w, 1};
}

}  // namespace fera
