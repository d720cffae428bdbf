// What the operators' autograd formulas share. They are in C++ because torch.library's, in Python, cost two to three
// times the host's time a call. A formula calls operators and not kernels, so that whatever traces sees them.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>

#include "call.h"

namespace fera::torch_binding {

using Context = torch::autograd::AutogradContext;
using Variables = torch::autograd::variable_list;

// Outputs without gradient leave forward by pointer: outputs that are marked so stop compiled autograd. Only tensors
// that are arguments of forward by themselves are variables, and needs_input_grad counts those alone.
template <class T>
class Formula : public torch::autograd::Function<T> {
 public:
  static constexpr bool is_traceable = true;  // backward reads its context alone
};

// Calls the operator `name`, whose kernel is `Kernel`.
template <auto* Kernel, class... Args>
auto call_operator(const char* name, Args&&... args) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<std::remove_pointer_t<decltype(Kernel)>>();
  return op.call(std::forward<Args>(args)...);
}

// The same from an Autograd kernel.
template <auto* Kernel, class... Args>
auto call_below_autograd(const char* name, Args&&... args) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call_operator<Kernel>(name, std::forward<Args>(args)...);
}

inline bool asks(const Tensor& t) { return t.requires_grad(); }
inline bool asks(const OptionalTensor& t) { return t.has_value() && t->requires_grad(); }
inline bool asks(at::TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return t.requires_grad(); });
}

// Whether the call is to be differentiated; where not, it makes no node.
template <class... Tensors>
bool recorded(const Tensors&... inputs) {
  return at::GradMode::is_enabled() && (asks(inputs) || ...);
}

inline OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : OptionalTensor(); }

// A definition's filters as the operators take them. They are constants: in here they are no variables.
struct FilterArguments {
  const Tensor& table;
  const OptionalTensor &right, &mix;
  at::IntArrayRef reach;

  void save(Context* ctx, Variables* saved) const {
    saved->insert(saved->end(), {table, right.value_or(Tensor()), mix.value_or(Tensor())});
    ctx->saved_data["reach"] = reach.vec();
  }
};

// band_energy.cpp's, for latent_gate's formula too.
Tensor frequency_energy_backward(const Tensor& grad, const Tensor& indicator, const Tensor& total, const Tensor& z,
                                 const Tensor& table, const OptionalTensor& right, const OptionalTensor& mix,
                                 at::IntArrayRef reach, double eps);

// latent: z, table, right, mix.
inline Tensor indicator_gradient(Context* ctx, const Tensor& grad, const Tensor& indicator, const Tensor& total,
                                 at::TensorList latent) {
  return call_operator<frequency_energy_backward>(
      "fera_ext::frequency_energy_backward", grad, indicator, total, latent[0], latent[1], optional(latent[2]),
      optional(latent[3]), ctx->saved_data["reach"].toIntVector(), ctx->saved_data["eps"].toDouble());
}

}  // namespace fera::torch_binding
