#include "autograd.h"

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

// gradient: whether to compute dL/dfera for an upstream gradient of 1; it and its factors come back empty where not.
std::tuple<Tensor, Tensor, Tensor> fecl_loss(const Tensor& base, const Tensor& fera, const Tensor& target,
                                             const Tensor& table, const OptionalTensor& right,
                                             const OptionalTensor& mix, at::IntArrayRef reach, double eps,
                                             bool gradient) {
  const char* op = "fecl_loss";
  const DeviceScope scope(fera);
  const Latents latents(op, base, fera, target);
  const Filters filters(op, fera, table, right, mix, reach);
  const Tensor loss = empty({}, compute_options(fera));
  const Tensor dfera = gradient ? empty(fera.sizes(), compute_options(fera)) : empty({0}, compute_options(fera));
  const Tensor factor = empty({gradient ? fera.size(0) : 0}, fera.options().dtype(at::kDouble));
  // Samples of no planes have nothing to scale, but their factors are an output.
  if (dfera.numel() == 0) factor.fill_(1);
  const bool wanted = gradient && dfera.numel() > 0;
  const fera_fecl_loss_args args{latents.base.view,
                                 latents.fera.view,
                                 latents.target.view,
                                 filters.view,
                                 eps,
                                 loss.data_ptr(),
                                 wanted ? dfera.data_ptr() : nullptr,
                                 wanted ? factor.data_ptr<double>() : nullptr};
  FERA_CALL(fera, fecl_loss, args);
  return {loss, dfera, factor};
}

// gradient and factor as forward returned them, dtype that of forward's fera.
Tensor fecl_loss_backward(const Tensor& grad, const Tensor& gradient, const Tensor& factor, at::ScalarType dtype) {
  const char* op = "fecl_loss_backward";
  const DeviceScope scope(gradient);
  const Tensor dfera = empty(gradient.sizes(), gradient.options().dtype(dtype));
  const Latent out(op, "gradient", dfera);
  FERA_REQUIRE(op, grad.numel() == 1, "grad", "a scalar", grad.sizes());
  FERA_REQUIRE(op, gradient.scalar_type() == compute_type(dfera), "gradient", join("of dtype ", compute_type(dfera)),
               gradient.scalar_type());
  FERA_REQUIRE(op, (factor.scalar_type() == at::kDouble && factor.sizes() == at::IntArrayRef{gradient.size(0)}),
               "factor", join("(", gradient.size(0), ") float64"), factor.sizes());
  require_same_device(op, "grad", grad, gradient);
  require_same_device(op, "factor", factor, gradient);
  const Tensor upstream = cast(grad, compute_type(dfera)), whole = gradient.contiguous(), powers = factor.contiguous();
  const fera_fecl_loss_backward_args args{whole.data_ptr(), powers.data_ptr<double>(), upstream.data_ptr(), out.view};
  FERA_CALL(gradient, fecl_loss_backward, args);
  return dfera;
}

// fera's gradient is an output, and all that is kept.
class Fecl : public Formula<Fecl> {
 public:
  static Tensor forward(Context* ctx, const Tensor& base, const Tensor& fera, const Tensor& target,
                        const FilterArguments& f, double eps, bool gradient, Tensor* dfera, Tensor* factor) {
    Tensor loss;
    std::tie(loss, *dfera, *factor) = call_below_autograd<fecl_loss>("fera_ext::fecl_loss", base, fera, target, f.table,
                                                                     f.right, f.mix, f.reach, eps, gradient);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({*dfera, *factor});
    ctx->saved_data["refused"] = asks(base) || asks(target);
    ctx->saved_data["gradient"] = gradient;
    ctx->saved_data["dtype"] = static_cast<int64_t>(fera.scalar_type());
    return loss;
  }

  static Variables backward(Context* ctx, const Variables& upstream) {
    const char* op = "fecl_loss";
    FERA_REQUIRE(op, !ctx->saved_data["refused"].toBool(), "base and target", "without gradient", "requires_grad=True");
    Variables grads(8);
    if (!upstream[0].defined() || !ctx->needs_input_grad(1)) return grads;
    FERA_REQUIRE(op, ctx->saved_data["gradient"].toBool(), "gradient", "True to differentiate", "False");
    const Variables saved = ctx->get_saved_variables();
    grads[1] = call_operator<fecl_loss_backward>("fera_ext::fecl_loss_backward", upstream[0], saved[0], saved[1],
                                                 static_cast<at::ScalarType>(ctx->saved_data["dtype"].toInt()));
    return grads;
  }
};

std::tuple<Tensor, Tensor, Tensor> fecl_loss_autograd(const Tensor& base, const Tensor& fera, const Tensor& target,
                                                      const Tensor& table, const OptionalTensor& right,
                                                      const OptionalTensor& mix, at::IntArrayRef reach, double eps,
                                                      bool gradient) {
  if (!recorded(base, fera, target))
    return call_below_autograd<fecl_loss>("fera_ext::fecl_loss", base, fera, target, table, right, mix, reach, eps,
                                          gradient);
  Tensor dfera, factor;
  const Tensor loss =
      Fecl::apply(base, fera, target, FilterArguments{table, right, mix, reach}, eps, gradient, &dfera, &factor);
  return {loss, dfera, factor};
}

void register_kernels(torch::Library& m) {
  m.impl("fecl_loss", fecl_loss);
  m.impl("fecl_loss_backward", fecl_loss_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fera_ext, m) {
  m.def(
      "fecl_loss(Tensor base, Tensor fera, Tensor target, Tensor table, Tensor? right, Tensor? mix, int[] reach,"
      " float eps, bool gradient) -> (Tensor, Tensor, Tensor)");
  m.def("fecl_loss_backward(Tensor grad, Tensor gradient, Tensor factor, ScalarType dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(fera_ext, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fera_ext, Autograd, m) { m.impl("fecl_loss", fecl_loss_autograd); }
#if defined(FERA_TORCH_CUDA)
TORCH_LIBRARY_IMPL(fera_ext, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fera::torch_binding
