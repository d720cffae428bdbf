// Scratch each device's kernels of router want; fera_<op>_workspace in router.cpp chooses between them.
#pragma once

#include "common/checks.h"

namespace fera {

size_t router_softmax_workspace_cpu(const fera_router_softmax_args& a);
size_t router_softmax_workspace_cuda(const fera_router_softmax_args& a);
size_t router_softmax_backward_workspace_cpu(const fera_router_softmax_backward_args& a);
size_t router_softmax_backward_workspace_cuda(const fera_router_softmax_backward_args& a);
size_t latent_gate_workspace_cpu(const fera_latent_gate_args& a);
size_t latent_gate_workspace_cuda(const fera_latent_gate_args& a);

}  // namespace fera
