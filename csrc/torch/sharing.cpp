// What fera_ext/nn/sharing.py asks at every call of an adapted layer, of the objects it is made of. In Python these
// questions, of dozens of dicts and versions an attention, took as long as the operators they are about.
#include <ATen/SavedTensorHooks.h>
#include <ATen/autocast_mode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "python.h"

namespace fera::torch_binding {
namespace {

using at::Tensor;

// torch from 2.7 on hides hooks while it traces, unless asked not to; before it has no such argument, nor a name for
// Python.
template <class Hooks>
auto innermost(int) -> decltype(Hooks::get_hooks(true)) {
  return Hooks::get_hooks(true);
}
template <class Hooks>
auto innermost(long) -> decltype(Hooks::get_hooks()) {
  return Hooks::get_hooks();
}

PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }  // kept for good

// dict[key], borrowed; null where it is not there, or where there is no dict.
PyObject* item(PyObject* dict, PyObject* key) {
  if (dict == nullptr || !PyDict_Check(dict)) return nullptr;
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr) PyErr_Clear();
  return value;
}
// An object's own attributes; module attributes that are no parameters, buffers or modules among them.
py::object attributes(PyObject* object) {
  PyObject* const dict = PyObject_GenericGetDict(object, nullptr);
  if (dict == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(dict);
}
bool filled(PyObject* own, PyObject* key) {
  PyObject* const dict = item(own, key);
  return dict == nullptr || !PyDict_Check(dict) || PyDict_Size(dict) > 0;
}
double number(PyObject* own, PyObject* key) {
  PyObject* const value = item(own, key);
  const double v = value == nullptr ? 0 : PyFloat_AsDouble(value);
  if (PyErr_Occurred()) throw py::error_already_set();
  return v;
}

// Weight, bias (None without one), lora_A and lora_B, borrowed from the modules they are parameters of.
using Weights = std::array<PyObject*, 4>;

// sharing._unheard
bool unheard(PyObject* base, PyObject* own) {
  static PyObject* const forward = name("forward");
  static PyObject* const hooks[] = {name("_forward_hooks"), name("_forward_pre_hooks"), name("_backward_hooks"),
                                    name("_backward_pre_hooks")};
  static PyObject* const linear =
      py::object(py::module_::import("torch.nn").attr("Linear").attr("forward")).release().ptr();
  const auto type = py::handle(reinterpret_cast<PyObject*>(Py_TYPE(base)));
  if (!py::object(type.attr(py::handle(forward))).is(py::handle(linear))) return false;
  for (PyObject* const listeners : hooks)
    if (filled(own, listeners)) return false;
  return item(own, forward) == nullptr;
}

// Weight and bias of a base layer that is plain and has both as parameters.
bool plain_weights(PyObject* base, PyObject** weight, PyObject** bias) {
  static PyObject* const parameters = name("_parameters");
  static PyObject* const names[] = {name("weight"), name("bias")};
  const py::object own = attributes(base);
  if (!unheard(base, own.ptr())) return false;
  PyObject* const given = item(own.ptr(), parameters);
  *weight = item(given, names[0]);
  *bias = item(given, names[1]);
  return *weight != nullptr && *bias != nullptr && THPVariable_CheckExact(*weight) &&
         (*bias == Py_None || THPVariable_Check(*bias));
}

std::optional<Weights> weights_in(PyObject* own) {
  static PyObject *const modules = name("_modules"), *const parameters = name("_parameters"),
                         *const base_name = name("base");
  static PyObject* const names[] = {name("lora_A"), name("lora_B")};
  PyObject* const base = item(item(own, modules), base_name);
  PyObject* const experts = item(own, parameters);
  Weights found{};
  if (base == nullptr || !plain_weights(base, &found[0], &found[1])) return {};
  found[2] = item(experts, names[0]);
  found[3] = item(experts, names[1]);
  for (const int i : {2, 3})
    if (found[i] == nullptr || !THPVariable_Check(found[i])) return {};
  return found;
}

// What a layer computes with where its call is the operator of its base layer, with nobody listening to what comes in.
std::optional<Weights> joining(PyObject* layer, double scale) {
  static PyObject *const scale_name = name("scale"), *const listeners = name("_forward_pre_hooks"),
                         *const dropout = name("_dropout"), *const training = name("training"),
                         *const forward = name("forward");
  const py::object own = attributes(layer);
  if (number(own.ptr(), scale_name) != scale || filled(own.ptr(), listeners)) return {};
  PyObject* const trains = item(own.ptr(), training);
  if (number(own.ptr(), dropout) > 0 && trains != nullptr && PyObject_IsTrue(trains)) return {};
  if (item(own.ptr(), forward) != nullptr) return {};
  return weights_in(own.ptr());
}

py::object weights_of(py::handle layer) {
  const auto found = weights_in(attributes(layer.ptr()).ptr());
  if (!found) return py::none();
  const Weights& w = *found;
  return py::make_tuple(py::handle(w[0]), py::handle(w[1]), py::handle(w[2]), py::handle(w[3]));
}

py::object plain_weights_of(py::handle base) {
  PyObject *weight = nullptr, *bias = nullptr;
  if (!plain_weights(base.ptr(), &weight, &bias)) return py::none();
  return py::make_tuple(py::handle(weight), py::handle(bias));
}

// Changes whenever the values do, other than by `data`; inference tensors have none.
int64_t version_of(const Tensor& t) {
  return t.is_inference() ? -1 : static_cast<int64_t>(t.unsafeGetTensorImpl()->version_counter().current_version());
}

std::optional<at::ScalarType> autocast_type(at::DeviceType device) {
  if (!at::autocast::is_autocast_enabled(device)) return {};
  return at::autocast::get_autocast_dtype(device);
}

// The members' weights, biases, lora_As and lora_Bs, a list each; None where the operator cannot take them all.
py::object joined(py::dict children, py::dict names, py::tuple members, double scale, py::handle input) {
  if (!THPVariable_Check(input.ptr())) return py::none();
  const Tensor& x = tensor_of(input);
  py::list lists[4];
  for (const py::handle member : members) {
    // A wrapper in the layer's place (FSDP's) may be what makes its parameters whole.
    PyObject* const called = item(names.ptr(), member.ptr());
    if (called == nullptr || item(children.ptr(), called) != member.ptr()) return py::none();
    const auto found = joining(member.ptr(), scale);
    if (!found) return py::none();
    const Tensor& weight = tensor_of((*found)[0]);
    if (weight.device() != x.device()) return py::none();
    if (weight.scalar_type() != x.scalar_type() && !autocast_type(x.device().type())) return py::none();
    for (int i = 0; i < 4; ++i) lists[i].append(py::handle((*found)[i]));
  }
  return py::make_tuple(lists[0], lists[1], lists[2], lists[3]);
}

// Outputs computed ahead of their calls, and what those calls must be given.
class Kept {
 public:
  // outputs[i] of members[i], the first of which has been called; what they were computed with.
  Kept(py::tuple members, py::handle x, py::handle gate, double scale, py::list outputs, py::list weights,
       py::list biases, py::list lora_as, py::list lora_bs)
      : scale_(scale),
        x_(tensor_of(x)),
        gate_(tensor_of(gate)),
        x_version_(version_of(x_)),
        gate_version_(version_of(gate_)),
        asks_(x_.requires_grad()),
        grad_(at::GradMode::is_enabled()),
        inference_(c10::InferenceMode::is_enabled()),
        autocast_(autocast_type(x_.device().type())),
        hooks_(saved_tensor_hooks()) {
    for (size_t i = 1; i < members.size(); ++i) {
      Waiting w;
      w.layer = members[i].ptr();
      w.output = outputs[i];
      const py::handle own[] = {weights[i], biases[i], lora_as[i], lora_bs[i]};
      for (size_t k = 0; k < w.own.size(); ++k) w.own[k] = one(own[k]);
      waiting_.push_back(std::move(w));
    }
  }

  // The output of `layer` for exactly these arguments, once; None where it is not there. What decides on the result of
  // a call and on what it saves is compared; tensors by identity.
  py::object take(py::handle layer, py::handle x, py::handle gate) {
    const auto found =
        std::find_if(waiting_.begin(), waiting_.end(), [&](const Waiting& w) { return w.layer == layer.ptr(); });
    if (found == waiting_.end() || !same(x, x_) || !same(gate, gate_) || version_of(x_) != x_version_ ||
        x_.requires_grad() != asks_ || version_of(gate_) != gate_version_ || at::GradMode::is_enabled() != grad_ ||
        c10::InferenceMode::is_enabled() != inference_ || autocast_type(x_.device().type()) != autocast_ ||
        !saved_tensor_hooks().equal(hooks_))
      return py::none();
    const auto own = joining(layer.ptr(), scale_);
    if (!own) return py::none();
    for (size_t k = 0; k < own->size(); ++k)
      if (one((*own)[k]) != found->own[k]) return py::none();
    py::object output = std::move(found->output);
    waiting_.erase(found);
    return output;
  }

  size_t waiting() const { return waiting_.size(); }
  bool waits(py::handle layer) const {
    return std::any_of(waiting_.begin(), waiting_.end(), [&](const Waiting& w) { return w.layer == layer.ptr(); });
  }

 private:
  // A tensor that something was computed with; empty for None.
  struct One {
    Tensor tensor;
    int64_t version = 0;
    bool operator!=(const One& other) const { return !tensor.is_same(other.tensor) || version != other.version; }
  };
  struct Waiting {
    PyObject* layer;  // to be compared alone; whoever keeps this object keeps the layer
    py::object output;
    std::array<One, 4> own;
  };
  static One one(py::handle object) {
    if (object.is_none()) return {};
    const Tensor& t = tensor_of(object);
    return {t, version_of(t)};
  }
  static bool same(py::handle object, const Tensor& t) {
    return THPVariable_Check(object.ptr()) && tensor_of(object).is_same(t);
  }

  double scale_;
  Tensor x_, gate_;
  int64_t x_version_, gate_version_;
  bool asks_, grad_, inference_;
  std::optional<at::ScalarType> autocast_;
  py::object hooks_;
  std::vector<Waiting> waiting_;
};

}  // namespace

py::object saved_tensor_hooks() {
  const auto hooks = innermost<at::SavedTensorDefaultHooks>(0);
  if (!hooks) return py::none();
  const auto object = [](const c10::SafePyObject& hook) {
    return py::reinterpret_borrow<py::object>(hook.ptr(getPyInterpreter()));
  };
  return py::make_tuple(object(hooks->first), object(hooks->second));
}

void bind_sharing(py::module_& m) {
  using namespace py::literals;
  m.def("saved_tensor_hooks", saved_tensor_hooks);
  m.def("plain_weights", plain_weights_of, "base"_a);
  m.def("weights_of", weights_of, "layer"_a);
  m.def("joined", joined, "children"_a, "names"_a, "members"_a, "scale"_a, "x"_a);
  py::class_<Kept>(m, "Kept")
      .def(py::init<py::tuple, py::handle, py::handle, double, py::list, py::list, py::list, py::list, py::list>(),
           "members"_a, "x"_a, "gate"_a, "scale"_a, "outputs"_a, "weights"_a, "biases"_a, "lora_as"_a, "lora_bs"_a)
      .def("take", &Kept::take, "layer"_a, "x"_a, "gate"_a)
      .def("waits", &Kept::waits, "layer"_a)
      .def_property_readonly("waiting", &Kept::waiting);
}

}  // namespace fera::torch_binding
