// What the bindings that speak Python share. Not part of the operators: those know no Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

namespace fera::torch_binding {

namespace py = pybind11;

// The innermost pair of hooks on saved tensors, None without any.
py::object saved_tensor_hooks();

inline const at::Tensor& tensor_of(py::handle object) { return THPVariable_Unpack(object.ptr()); }

void bind_calls(py::module_& m);    // calls.cpp
void bind_sharing(py::module_& m);  // sharing.cpp

}  // namespace fera::torch_binding
