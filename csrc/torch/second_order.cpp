// A second backward is an error, not a silent zero: the *_backward operators refuse to be differentiated.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(fera_ext, Autograd, m) {
  for (const char* op : {"band_energy_backward", "frequency_energy_backward", "router_softmax_backward",
                         "expert_linear_backward", "expert_linear_group_backward", "fecl_loss_backward"})
    m.impl(op, torch::autograd::autogradNotImplementedFallback());
}
