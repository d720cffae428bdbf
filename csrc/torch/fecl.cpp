#include "call.h"

namespace fera::torch_binding {
namespace {

struct Latents {
  Latent base, fera, target;
  Latents(const char* op, const Tensor& b, const Tensor& f, const Tensor& t)
      : base(op, "base", b), fera(op, "fera", f), target(op, "target", t) {
    require_like(op, "base", b, f);
    require_like(op, "target", t, f);
  }
  static void require_like(const char* op, const char* name, const Tensor& t, const Tensor& fera) {
    FERA_REQUIRE(op, t.sizes() == fera.sizes(), name, join("of fera's shape ", fera.sizes()), t.sizes());
    FERA_REQUIRE(op, t.scalar_type() == fera.scalar_type(), name, join("of fera's dtype ", fera.scalar_type()),
                 t.scalar_type());
    require_same_device(op, name, t, fera);
  }
};

std::tuple<Tensor, Tensor> fecl_loss(const Tensor& base, const Tensor& fera, const Tensor& target, const Tensor& table,
                                     const OptionalTensor& right, const OptionalTensor& mix, at::IntArrayRef reach,
                                     double eps) {
  const char* op = "fecl_loss";
  const DeviceScope scope(fera);
  const Latents latents(op, base, fera, target);
  const Filters filters(op, fera, table, right, mix, reach);
  const Tensor loss = at::empty({}, compute_options(fera));
  const Tensor coefficients = at::empty({fera.size(0), 2, filters.view.bands + 1}, fera.options().dtype(at::kDouble));
  const fera_fecl_loss_args args{latents.base.view,
                                 latents.fera.view,
                                 latents.target.view,
                                 filters.view,
                                 eps,
                                 loss.data_ptr(),
                                 coefficients.data_ptr<double>()};
  FERA_CALL(fera, fecl_loss, args);
  return {loss, coefficients};
}

Tensor fecl_loss_backward(const Tensor& grad, const Tensor& coefficients, const Tensor& base, const Tensor& fera,
                          const Tensor& target, const Tensor& table, const OptionalTensor& right,
                          const OptionalTensor& mix, at::IntArrayRef reach) {
  const char* op = "fecl_loss_backward";
  const DeviceScope scope(fera);
  const Latents latents(op, base, fera, target);
  const Filters filters(op, fera, table, right, mix, reach);
  FERA_REQUIRE(op, grad.numel() == 1, "grad", "a scalar", grad.sizes());
  FERA_REQUIRE(op,
               (coefficients.scalar_type() == at::kDouble &&
                coefficients.sizes() == at::IntArrayRef{fera.size(0), 2, filters.view.bands + 1}),
               "coefficients", "what forward returned", coefficients.sizes());
  require_same_device(op, "grad", grad, fera);
  require_same_device(op, "coefficients", coefficients, fera);
  const Tensor upstream = grad.to(compute_type(fera)), c = coefficients.contiguous();
  const Tensor dfera = at::empty(fera.sizes(), fera.options());
  const Latent out(op, "dfera", dfera);
  const fera_fecl_loss_backward_args args{latents.base.view, latents.fera.view,    latents.target.view,
                                          filters.view,      c.data_ptr<double>(), upstream.data_ptr(),
                                          out.view};
  FERA_CALL(fera, fecl_loss_backward, args);
  return dfera;
}

void register_kernels(torch::Library& m) {
  m.impl("fecl_loss", fecl_loss);
  m.impl("fecl_loss_backward", fecl_loss_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fera_ext, m) {
  m.def(
      "fecl_loss(Tensor base, Tensor fera, Tensor target, Tensor table, Tensor? right, Tensor? mix, int[] reach,"
      " float eps) -> (Tensor, Tensor)");
  m.def(
      "fecl_loss_backward(Tensor grad, Tensor coefficients, Tensor base, Tensor fera, Tensor target, Tensor table,"
      " Tensor? right, Tensor? mix, int[] reach) -> Tensor");
}

TORCH_LIBRARY_IMPL(fera_ext, CPU, m) { register_kernels(m); }
#if defined(FERA_TORCH_CUDA)
TORCH_LIBRARY_IMPL(fera_ext, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fera::torch_binding
