// The extension module: importing it registers torch.ops.fera_ext.*, and it says how it was built.
#include <ATen/Parallel.h>
#include <torch/version.h>

#include <algorithm>
#include <vector>

#include "fera/fera.h"
#include "python.h"

namespace {

// fera_band_variant for a contiguous latent; dtype is a fera_dtype, `reach` one number a blur.
const char* band_variant(int64_t n, int64_t p, int64_t h, int64_t w, int dtype, int32_t bands,
                         const std::vector<int32_t>& reach, bool cuda) {
  const fera_latent z{nullptr, static_cast<fera_dtype>(dtype), n, p, h, w, p * h * w, h * w, w, 1};
  fera_filters filters{};
  filters.bands = bands;
  filters.blurs = static_cast<int32_t>(std::min<size_t>(reach.size(), FERA_MAX_BANDS));
  std::copy_n(reach.begin(), filters.blurs, filters.reach);
  return fera_band_variant(&z, &filters, cuda ? FERA_CUDA : FERA_CPU);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fera_ext's torch operators; importing it registers torch.ops.fera_ext";
  m.attr("bindings") = 11;  // fera_ext/_extension.py expects this number
  m.attr("core_version") = fera_version();
  m.attr("core_cpu_isa") = fera_cpu_isa();
  m.attr("core_cuda") = fera_has_cuda() != 0;
  m.attr("core_cuda_targets") = fera_cuda_targets();
  m.attr("torch_version") = TORCH_VERSION;
  m.def("band_variant", band_variant, pybind11::arg("n"), pybind11::arg("p"), pybind11::arg("h"), pybind11::arg("w"),
        pybind11::arg("dtype"), pybind11::arg("bands"), pybind11::arg("reach"), pybind11::arg("cuda"));
  fera::torch_binding::bind_calls(m);
  fera::torch_binding::bind_sharing(m);
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
