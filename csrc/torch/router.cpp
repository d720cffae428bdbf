#include "autograd.h"

namespace fera::torch_binding {
namespace {

// The router's weights in the compute dtype, kept alive beside the struct that points into them.
class Router {
 public:
  Router(const char* op, const Tensor& like, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
         double tau) {
    FERA_REQUIRE(op, w1.dim() == 2, "w1", "(hidden, K)", w1.sizes());
    const int64_t hidden = w1.size(0);
    FERA_REQUIRE(op, w2.dim() == 2 && w2.size(1) == hidden, "w2", join("(E, ", hidden, ")"), w2.sizes());
    FERA_REQUIRE(op, b1.dim() == 1 && b1.size(0) == hidden, "b1", join("(", hidden, ")"), b1.sizes());
    FERA_REQUIRE(op, b2.dim() == 1 && b2.size(0) == w2.size(0), "b2", join("(", w2.size(0), ")"), b2.sizes());
    const at::ScalarType type = compute_type(like);
    const Tensor* given[] = {&w1, &b1, &w2, &b2};
    const char* names[] = {"w1", "b1", "w2", "b2"};
    for (int i = 0; i < 4; ++i) {
      dtype_of(op, names[i], *given[i]);
      require_same_device(op, names[i], *given[i], like);
      weights[i] = given[i]->to(type).contiguous();
    }
    view = {type == at::kDouble ? FERA_F64 : FERA_F32,
            static_cast<int32_t>(w1.size(1)),
            static_cast<int32_t>(hidden),
            static_cast<int32_t>(w2.size(0)),
            weights[0].data_ptr(),
            weights[1].data_ptr(),
            weights[2].data_ptr(),
            weights[3].data_ptr(),
            tau};
  }

  Tensor weights[4];
  fera_router view;
};

void require_energy(const char* op, const Tensor& energy, const Tensor& w1) {
  dtype_of(op, "energy", energy);
  FERA_REQUIRE(op, energy.dim() == 2 && w1.dim() == 2 && energy.size(1) == w1.size(1), "energy",
               join("(N, K) with K the columns of w1 ", w1.sizes()), energy.sizes());
}

Tensor router_softmax(const Tensor& energy, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
                      double tau) {
  const char* op = "router_softmax";
  const DeviceScope scope(energy);
  require_energy(op, energy, w1);
  const Router router(op, energy, w1, b1, w2, b2, tau);
  const Tensor e = cast(energy, compute_type(energy)).contiguous();
  const Tensor gate = empty({e.size(0), router.view.experts}, e.options());
  const fera_router_softmax_args args{router.view, e.size(0), e.data_ptr(), gate.data_ptr()};
  FERA_CALL(e, router_softmax, args);
  return gate;
}

// wanted: (energy, weights); gradients that are not wanted come back empty. Each has its own tensor's dtype.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> router_softmax_backward(const Tensor& grad, const Tensor& gate,
                                                                           const Tensor& energy, const Tensor& w1,
                                                                           const Tensor& b1, const Tensor& w2,
                                                                           const Tensor& b2, double tau,
                                                                           std::array<bool, 2> wanted) {
  const char* op = "router_softmax_backward";
  const DeviceScope scope(energy);
  require_energy(op, energy, w1);
  const Router router(op, energy, w1, b1, w2, b2, tau);
  const Tensor e = cast(energy, compute_type(energy)).contiguous();
  const std::array<int64_t, 2> sizes{e.size(0), router.view.experts};
  const at::IntArrayRef shape(sizes);
  FERA_REQUIRE(op, grad.sizes() == shape, "grad", shape, grad.sizes());
  FERA_REQUIRE(op, gate.sizes() == shape, "gate", shape, gate.sizes());
  const Tensor g = cast(gate, e.scalar_type()).contiguous(), dg = cast(grad, e.scalar_type()).contiguous();
  const Tensor de = empty({wanted[0] ? e.size(0) : 0, e.size(1)}, e.options());
  Tensor dw[4];
  for (int i = 0; i < 4; ++i)
    dw[i] = wanted[1] ? empty(router.weights[i].sizes(), router.weights[i].options())
                      : empty({0}, router.weights[i].options());
  auto data = [](bool yes, const Tensor& t) { return yes ? t.data_ptr() : nullptr; };
  const fera_router_softmax_backward_args args{router.view,
                                               e.size(0),
                                               e.data_ptr(),
                                               g.data_ptr(),
                                               dg.data_ptr(),
                                               data(wanted[0], de),
                                               data(wanted[1], dw[0]),
                                               data(wanted[1], dw[1]),
                                               data(wanted[1], dw[2]),
                                               data(wanted[1], dw[3])};
  FERA_CALL(e, router_softmax_backward, args);
  return {cast(de, energy.scalar_type()), cast(dw[0], w1.scalar_type()), cast(dw[1], b1.scalar_type()),
          cast(dw[2], w2.scalar_type()), cast(dw[3], b2.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> latent_gate(const Tensor& z, const Tensor& table, const OptionalTensor& right,
                                               const OptionalTensor& mix, at::IntArrayRef reach, const Tensor& w1,
                                               const Tensor& b1, const Tensor& w2, const Tensor& b2, double tau,
                                               double eps) {
  const char* op = "latent_gate";
  const DeviceScope scope(z);
  const Latent latent(op, "z", z);
  const Filters filters(op, z, table, right, mix, reach);
  const Router router(op, z, w1, b1, w2, b2, tau);
  const Tensor energy = empty({z.size(0), filters.view.bands}, compute_options(z));
  const Tensor total = empty({z.size(0)}, z.options().dtype(at::kDouble));
  const Tensor gate = empty({z.size(0), router.view.experts}, compute_options(z));
  const fera_latent_gate_args args{
      {latent.view, filters.view, eps, nullptr, energy.data_ptr(), total.data_ptr<double>()},
      router.view,
      gate.data_ptr()};
  FERA_CALL(z, latent_gate, args);
  return {gate, energy, total};
}

// What router_softmax and latent_gate share of their formulas: the first variables are the input, then w1, b1, w2, b2
// (`weights`). The gradients of energy and of the weights; undefined where not wanted.
Variables router_gradients(Context* ctx, const Tensor& grad, const Tensor& gate, const Tensor& energy,
                           at::TensorList weights) {
  std::array<bool, 5> needs;
  for (size_t i = 0; i < needs.size(); ++i) needs[i] = ctx->needs_input_grad(i);
  const std::array<bool, 2> wanted{needs[0], needs[1] || needs[2] || needs[3] || needs[4]};
  auto [de, dw1, db1, dw2, db2] = call_operator<router_softmax_backward>(
      "fera_ext::router_softmax_backward", grad, gate, energy, weights[0], weights[1], weights[2], weights[3],
      ctx->saved_data["tau"].toDouble(), wanted);
  Variables grads{de, dw1, db1, dw2, db2};
  for (size_t i = 0; i < needs.size(); ++i)
    if (!needs[i]) grads[i].reset();
  return grads;
}

class RouterSoftmax : public Formula<RouterSoftmax> {
 public:
  static Tensor forward(Context* ctx, const Tensor& energy, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                        const Tensor& b2, double tau) {
    const Tensor gate = call_below_autograd<router_softmax>("fera_ext::router_softmax", energy, w1, b1, w2, b2, tau);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({gate, energy, w1, b1, w2, b2});
    ctx->saved_data["tau"] = tau;
    return gate;
  }

  static Variables backward(Context* ctx, const Variables& upstream) {
    if (!upstream[0].defined()) return Variables(6);
    const Variables saved = ctx->get_saved_variables();
    Variables grads = router_gradients(ctx, upstream[0], saved[0], saved[1], at::TensorList(saved).slice(2));
    grads.resize(6);
    return grads;
  }
};

Tensor router_softmax_autograd(const Tensor& energy, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                               const Tensor& b2, double tau) {
  if (!recorded(energy, w1, b1, w2, b2))
    return call_below_autograd<router_softmax>("fera_ext::router_softmax", energy, w1, b1, w2, b2, tau);
  return RouterSoftmax::apply(energy, w1, b1, w2, b2, tau);
}

class LatentGate : public Formula<LatentGate> {
 public:
  static Tensor forward(Context* ctx, const Tensor& z, const Tensor& w1, const Tensor& b1, const Tensor& w2,
                        const Tensor& b2, const FilterArguments& f, double tau, double eps, Tensor* energy,
                        Tensor* total) {
    Tensor gate;
    std::tie(gate, *energy, *total) = call_below_autograd<latent_gate>("fera_ext::latent_gate", z, f.table, f.right,
                                                                       f.mix, f.reach, w1, b1, w2, b2, tau, eps);
    ctx->set_materialize_grads(false);
    Variables saved{gate, *energy, w1, b1, w2, b2};
    // The latent is kept only for a gradient of its own; the router's gradients need the indicator alone.
    if (asks(z)) {
      saved.insert(saved.end(), {*total, z});
      f.save(ctx, &saved);
      ctx->saved_data["eps"] = eps;
    }
    ctx->save_for_backward(std::move(saved));
    ctx->saved_data["tau"] = tau;
    return gate;
  }

  static Variables backward(Context* ctx, const Variables& upstream) {
    if (!upstream[0].defined()) return Variables(10);
    const Variables saved = ctx->get_saved_variables();
    const at::TensorList list(saved);
    Variables grads = router_gradients(ctx, upstream[0], saved[0], saved[1], list.slice(2, 4));
    if (grads[0].defined()) grads[0] = indicator_gradient(ctx, grads[0], saved[1], saved[6], list.slice(7));
    grads.resize(10);
    return grads;
  }
};

std::tuple<Tensor, Tensor, Tensor> latent_gate_autograd(const Tensor& z, const Tensor& table,
                                                        const OptionalTensor& right, const OptionalTensor& mix,
                                                        at::IntArrayRef reach, const Tensor& w1, const Tensor& b1,
                                                        const Tensor& w2, const Tensor& b2, double tau, double eps) {
  if (!recorded(z, w1, b1, w2, b2))
    return call_below_autograd<latent_gate>("fera_ext::latent_gate", z, table, right, mix, reach, w1, b1, w2, b2, tau,
                                            eps);
  Tensor energy, total;
  const Tensor gate =
      LatentGate::apply(z, w1, b1, w2, b2, FilterArguments{table, right, mix, reach}, tau, eps, &energy, &total);
  return {gate, energy, total};
}

void register_kernels(torch::Library& m) {
  m.impl("router_softmax", router_softmax);
  m.impl("router_softmax_backward", router_softmax_backward);
  m.impl("latent_gate", latent_gate);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fera_ext, m) {
  m.def("router_softmax(Tensor energy, Tensor w1, Tensor b1, Tensor w2, Tensor b2, float tau) -> Tensor");
  m.def(
      "router_softmax_backward(Tensor grad, Tensor gate, Tensor energy, Tensor w1, Tensor b1, Tensor w2, Tensor b2,"
      " float tau, bool[2] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "latent_gate(Tensor z, Tensor table, Tensor? right, Tensor? mix, int[] reach, Tensor w1, Tensor b1, Tensor w2,"
      " Tensor b2, float tau, float eps) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fera_ext, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fera_ext, Autograd, m) {
  m.impl("router_softmax", router_softmax_autograd);
  m.impl("latent_gate", latent_gate_autograd);
}
#if defined(FERA_TORCH_CUDA)
TORCH_LIBRARY_IMPL(fera_ext, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fera::torch_binding
