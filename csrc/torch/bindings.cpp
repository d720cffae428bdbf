// The extension module: importing it registers torch.ops.fera_ext.*, and it says how it was built.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include "fera/fera.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "fera_ext's torch operators; importing it registers torch.ops.fera_ext";
  m.attr("bindings") = 4;  // fera_ext/_extension.py expects this number
  m.attr("core_version") = fera_version();
  m.attr("core_cpu_isa") = fera_cpu_isa();
  m.attr("core_cuda") = fera_has_cuda() != 0;
  m.attr("core_cuda_targets") = fera_cuda_targets();
  m.attr("torch_version") = TORCH_VERSION;
#if defined(INTRA_OP_PARALLEL)
  m.attr("parallel") = true;  // at::parallel_for uses torch's threads
#else
  m.attr("parallel") = false;
#endif
#if defined(FERA_TORCH_CUDA)
  m.attr("torch_cuda") = true;
#else
  m.attr("torch_cuda") = false;
#endif
}
