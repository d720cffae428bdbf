#include "autograd.h"

namespace fera::torch_binding {
namespace {

// (energies or indicator, total); the total is empty with the energies.
std::tuple<Tensor, Tensor> run(const char* op, const Tensor& z, const Tensor& table, const OptionalTensor& right,
                               const OptionalTensor& mix, at::IntArrayRef reach, double eps, bool indicator) {
  const DeviceScope scope(z);
  const Latent latent(op, "z", z);
  const Filters filters(op, z, table, right, mix, reach);
  const Tensor out = empty({z.size(0), filters.view.bands}, compute_options(z));
  const Tensor total = empty({indicator ? z.size(0) : 0}, z.options().dtype(at::kDouble));
  const fera_band_energy_args args{latent.view,
                                   filters.view,
                                   eps,
                                   indicator ? nullptr : out.data_ptr(),
                                   indicator ? out.data_ptr() : nullptr,
                                   indicator ? total.data_ptr<double>() : nullptr};
  FERA_CALL(z, band_energy, args);
  return {out, total};
}

Tensor run_backward(const char* op, const Tensor& grad, const OptionalTensor& indicator, const OptionalTensor& total,
                    const Tensor& z, const Tensor& table, const OptionalTensor& right, const OptionalTensor& mix,
                    at::IntArrayRef reach, double eps) {
  const DeviceScope scope(z);
  const Latent latent(op, "z", z);
  const Filters filters(op, z, table, right, mix, reach);
  FERA_REQUIRE(op, grad.dim() == 2 && grad.size(0) == z.size(0) && grad.size(1) == filters.view.bands, "grad",
               join("(", z.size(0), ", ", filters.view.bands, ")"), grad.sizes());
  const Tensor upstream = cast(grad, compute_type(z)).contiguous();
  require_same_device(op, "grad", grad, z);
  Tensor e, sums;
  if (indicator.has_value()) {
    FERA_REQUIRE(op, indicator->sizes() == grad.sizes(), "indicator", grad.sizes(), indicator->sizes());
    FERA_REQUIRE(op, total->dim() == 1 && total->size(0) == z.size(0) && total->scalar_type() == at::kDouble, "total",
                 join("(", z.size(0), ") float64"), total->sizes());
    require_same_device(op, "indicator", *indicator, z);
    require_same_device(op, "total", *total, z);
    e = indicator->to(compute_type(z)).contiguous();
    sums = total->contiguous();
  }
  const Tensor dz = empty(z.sizes(), z.options());
  const Latent out(op, "dz", dz);
  const fera_band_energy_backward_args args{latent.view,
                                            filters.view,
                                            upstream.data_ptr(),
                                            e.defined() ? e.data_ptr() : nullptr,
                                            sums.defined() ? sums.data_ptr<double>() : nullptr,
                                            out.view,
                                            eps};
  FERA_CALL(z, band_energy_backward, args);
  return dz;
}

Tensor band_energy(const Tensor& z, const Tensor& table, const OptionalTensor& right, const OptionalTensor& mix,
                   at::IntArrayRef reach) {
  return std::get<0>(run("band_energy", z, table, right, mix, reach, 0.0, false));
}

Tensor band_energy_backward(const Tensor& grad, const Tensor& z, const Tensor& table, const OptionalTensor& right,
                            const OptionalTensor& mix, at::IntArrayRef reach) {
  return run_backward("band_energy_backward", grad, {}, {}, z, table, right, mix, reach, 0.0);
}

std::tuple<Tensor, Tensor> frequency_energy(const Tensor& z, const Tensor& table, const OptionalTensor& right,
                                            const OptionalTensor& mix, at::IntArrayRef reach, double eps) {
  FERA_REQUIRE("frequency_energy", eps >= 0 && std::isfinite(eps), "eps", "finite and not negative", eps);
  return run("frequency_energy", z, table, right, mix, reach, eps, true);
}

}  // namespace

Tensor frequency_energy_backward(const Tensor& grad, const Tensor& indicator, const Tensor& total, const Tensor& z,
                                 const Tensor& table, const OptionalTensor& right, const OptionalTensor& mix,
                                 at::IntArrayRef reach, double eps) {
  return run_backward("frequency_energy_backward", grad, indicator, total, z, table, right, mix, reach, eps);
}

namespace {

class BandEnergy : public Formula<BandEnergy> {
 public:
  static Tensor forward(Context* ctx, const Tensor& z, const FilterArguments& f) {
    const Tensor energy =
        call_below_autograd<band_energy>("fera_ext::band_energy", z, f.table, f.right, f.mix, f.reach);
    ctx->set_materialize_grads(false);
    Variables saved{z};
    f.save(ctx, &saved);
    ctx->save_for_backward(std::move(saved));
    return energy;
  }

  static Variables backward(Context* ctx, const Variables& upstream) {
    Variables grads(2);
    if (!upstream[0].defined() || !ctx->needs_input_grad(0)) return grads;
    const Variables saved = ctx->get_saved_variables();
    grads[0] = call_operator<band_energy_backward>("fera_ext::band_energy_backward", upstream[0], saved[0], saved[1],
                                                   optional(saved[2]), optional(saved[3]),
                                                   ctx->saved_data["reach"].toIntVector());
    return grads;
  }
};

Tensor band_energy_autograd(const Tensor& z, const Tensor& table, const OptionalTensor& right,
                            const OptionalTensor& mix, at::IntArrayRef reach) {
  if (!recorded(z)) return call_below_autograd<band_energy>("fera_ext::band_energy", z, table, right, mix, reach);
  return BandEnergy::apply(z, FilterArguments{table, right, mix, reach});
}

class FrequencyEnergy : public Formula<FrequencyEnergy> {
 public:
  static Tensor forward(Context* ctx, const Tensor& z, const FilterArguments& f, double eps, Tensor* total) {
    Tensor indicator;
    std::tie(indicator, *total) =
        call_below_autograd<frequency_energy>("fera_ext::frequency_energy", z, f.table, f.right, f.mix, f.reach, eps);
    ctx->set_materialize_grads(false);
    Variables saved{indicator, *total, z};
    f.save(ctx, &saved);
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["eps"] = eps;
    return indicator;
  }

  static Variables backward(Context* ctx, const Variables& upstream) {
    Variables grads(4);
    if (!upstream[0].defined() || !ctx->needs_input_grad(0)) return grads;
    const Variables saved = ctx->get_saved_variables();
    grads[0] = indicator_gradient(ctx, upstream[0], saved[0], saved[1], at::TensorList(saved).slice(2));
    return grads;
  }
};

std::tuple<Tensor, Tensor> frequency_energy_autograd(const Tensor& z, const Tensor& table, const OptionalTensor& right,
                                                     const OptionalTensor& mix, at::IntArrayRef reach, double eps) {
  if (!recorded(z))
    return call_below_autograd<frequency_energy>("fera_ext::frequency_energy", z, table, right, mix, reach, eps);
  Tensor total;
  const Tensor indicator = FrequencyEnergy::apply(z, FilterArguments{table, right, mix, reach}, eps, &total);
  return {indicator, total};
}

void register_kernels(torch::Library& m) {
  m.impl("band_energy", band_energy);
  m.impl("band_energy_backward", band_energy_backward);
  m.impl("frequency_energy", frequency_energy);
  m.impl("frequency_energy_backward", frequency_energy_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fera_ext, m) {
  m.def("band_energy(Tensor z, Tensor table, Tensor? right, Tensor? mix, int[] reach) -> Tensor");
  m.def("band_energy_backward(Tensor grad, Tensor z, Tensor table, Tensor? right, Tensor? mix, int[] reach) -> Tensor");
  m.def(
      "frequency_energy(Tensor z, Tensor table, Tensor? right, Tensor? mix, int[] reach, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "frequency_energy_backward(Tensor grad, Tensor indicator, Tensor total, Tensor z, Tensor table, Tensor? right,"
      " Tensor? mix, int[] reach, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(fera_ext, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fera_ext, Autograd, m) {
  m.impl("band_energy", band_energy_autograd);
  m.impl("frequency_energy", frequency_energy_autograd);
}
#if defined(FERA_TORCH_CUDA)
TORCH_LIBRARY_IMPL(fera_ext, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fera::torch_binding
