// The operators of an adapted layer, called from Python without torch.ops. What torch.ops does at each call (find the
// overload, match every argument with the schema, box it, unbox it) is more of an eager training step's time than the
// operators' own checks. Nothing else differs: the calls go through the dispatcher.
#include <ATen/ops/cat.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "autograd.h"
#include "python.h"

namespace fera::torch_binding {
namespace {

using Biases = c10::List<OptionalTensor>;

// Whether this is all that torch.ops would see: exactly torch's own tensors, with nobody overriding its functions or
// recording a trace, which torch.ops does itself.
bool plain(py::handle object) { return THPVariable_CheckExact(object.ptr()); }
bool plain_or_none(py::handle object) { return object.is_none() || plain(object); }
bool plain_list(py::handle object) {
  if (!PyList_CheckExact(object.ptr())) return false;
  const py::list list = py::reinterpret_borrow<py::list>(object);
  return std::all_of(list.begin(), list.end(), plain_or_none);
}
bool unobserved() { return !at::impl::torch_function_mode_enabled() && !torch::jit::tracer::isTracing(); }

OptionalTensor optional_of(py::handle object) {
  return object.is_none() ? OptionalTensor() : OptionalTensor(tensor_of(object));
}
bool tensors_of(py::handle list, Variables* to) {
  for (const py::handle item : py::reinterpret_borrow<py::list>(list)) {
    if (item.is_none()) return false;
    to->push_back(tensor_of(item));
  }
  return true;
}
py::object wrap(const Tensor& t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(t)); }

// torch.ops.fera_ext.expert_linear(...)[0], or None: then torch.ops must be asked.
py::object expert_linear(py::handle x, py::handle weight, py::handle bias, py::handle lora_a, py::handle lora_b,
                         py::handle gate, double scale, double dropout, py::handle seed, int64_t stream) {
  HANDLE_TH_ERRORS
  for (const py::handle each : {x, weight, lora_a, lora_b, gate})
    if (!plain(each)) return py::none();
  if (!plain_or_none(bias) || !plain_or_none(seed) || !unobserved()) return py::none();
  using Op = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const OptionalTensor&, const Tensor&,
                                        const Tensor&, const Tensor&, double, double, const OptionalTensor&, int64_t);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("fera_ext::expert_linear", "").typed<Op>();
  Tensor y;
  {
    const OptionalTensor given_bias = optional_of(bias), given_seed = optional_of(seed);
    const py::gil_scoped_release without_gil;
    y = std::get<0>(op.call(tensor_of(x), tensor_of(weight), given_bias, tensor_of(lora_a), tensor_of(lora_b),
                            tensor_of(gate), scale, dropout, given_seed, stream));
  }
  return wrap(y);
  END_HANDLE_TH_ERRORS_PYBIND
}

// torch.ops.fera_ext.expert_linear_group(...)[0], or None: then torch.ops must be asked.
py::object expert_linear_group(py::handle x, py::handle weights, py::handle biases, py::handle lora_as,
                               py::handle lora_bs, py::handle gate, double scale) {
  HANDLE_TH_ERRORS
  if (!plain(x) || !plain(gate) || !unobserved()) return py::none();
  Variables given[3];
  int next = 0;
  for (const py::handle list : {weights, lora_as, lora_bs})
    if (!plain_list(list) || !tensors_of(list, &given[next++])) return py::none();
  if (!plain_list(biases)) return py::none();
  Biases given_biases;
  for (const py::handle bias : py::reinterpret_borrow<py::list>(biases)) given_biases.push_back(optional_of(bias));
  using Op = std::tuple<Variables, Variables>(const Tensor&, at::TensorList, const Biases&, at::TensorList,
                                              at::TensorList, const Tensor&, double);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fera_ext::expert_linear_group", "").typed<Op>();
  Variables ys;
  {
    const py::gil_scoped_release without_gil;
    ys = std::get<0>(op.call(tensor_of(x), given[0], given_biases, given[1], given[2], tensor_of(gate), scale));
  }
  py::list out(ys.size());
  for (size_t i = 0; i < ys.size(); ++i) out[i] = wrap(ys[i]);
  return std::move(out);
  END_HANDLE_TH_ERRORS_PYBIND
}

// A gate (G, E) to views of it, and the gradients that come back summed once: fera_ext/nn/fan.py.
class FanOut : public torch::autograd::Function<FanOut> {
 public:
  // members, count for each kind.
  static Variables forward(Context* ctx, const Tensor& gate, const std::vector<std::pair<int64_t, int64_t>>& kinds) {
    ctx->set_materialize_grads(false);
    Variables views;
    for (const auto& [members, count] : kinds) {
      std::vector<int64_t> sizes{count};
      if (members > 1) sizes.push_back(members);
      sizes.insert(sizes.end(), gate.sizes().begin(), gate.sizes().end());
      for (Tensor& view : gate.expand(sizes).unbind(0)) views.push_back(std::move(view));
    }
    return views;
  }
  // A view that nobody used costs nothing: no zeros stand for it.
  static Variables backward(Context*, const Variables& grads) {
    Variables ones, rest;
    for (const Tensor& grad : grads)
      if (grad.defined()) (grad.dim() == 2 ? ones : rest).push_back(grad);
    if (rest.empty() && ones.size() < 2) return {ones.empty() ? Tensor() : ones[0], Tensor()};
    if (!ones.empty()) rest.push_back(at::stack(ones));
    return {(rest.size() > 1 ? at::cat(rest) : rest[0]).sum(0), Tensor()};
  }
};

Variables fan_out(const Tensor& gate, const std::vector<std::pair<int64_t, int64_t>>& kinds) {
  return FanOut::apply(gate, kinds);
}

}  // namespace

void bind_calls(py::module_& m) {
  using namespace py::literals;
  m.def("expert_linear", expert_linear, "x"_a, "weight"_a, "bias"_a, "lora_a"_a, "lora_b"_a, "gate"_a, "scale"_a,
        "dropout"_a, "seed"_a, "stream"_a);
  m.def("expert_linear_group", expert_linear_group, "x"_a, "weights"_a, "biases"_a, "lora_as"_a, "lora_bs"_a, "gate"_a,
        "scale"_a);
  m.def("fan_out", torch::wrap_pybind_function(fan_out), "gate"_a, "kinds"_a);
}

}  // namespace fera::torch_binding
