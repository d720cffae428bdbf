#include "experts.h"

namespace fera::torch_binding {
namespace {

// Adds the experts' part to `base`, into `y` (which may be `base`).
std::tuple<Tensor, Tensor> update(const char* op, const Tensor& base, const Tensor& y, const Tensor& x,
                                  const Experts& experts, bool by_library, fera_expert_update_args args) {
  const int64_t out = experts.view.out;
  if (by_library) {
    const NoAutocast products;
    if (!y.is_same(base)) y.copy_(base);
    const Tensor h = Library(x, experts).forward(y.view({experts.view.tokens, out}));
    return {y, h.view(with_last(x, experts.stacked()))};
  }
  const Tensor h = empty(with_last(x, experts.stacked()), x.options());
  const Rows base_rows(op, "base_out", base, out), y_rows(op, "y", y, out);
  args.base = base_rows.view;
  args.y = y_rows.view;
  args.h = h.data_ptr();
  FERA_CALL(x, expert_update, args);
  return {y, h};
}

}  // namespace

std::tuple<Tensor, Tensor> linear_forward(const char* op, const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& bias, const Experts& experts) {
  const Rows x_rows(op, "x", x, experts.view.in);
  // The answer is contiguous, whatever computes it.
  const fera_rows out_rows{nullptr, x_rows.view.dtype, experts.view.out};
  const void* bias_data = bias.has_value() ? bias->data_ptr() : nullptr;
  fera_expert_update_args args{experts.view, x_rows.view, out_rows, out_rows, nullptr, {}, bias_data};
  const Way chosen = way(op, x, weight.stride(1) == 1 && (!bias.has_value() || bias->stride(0) == 1), [&](bool fused) {
    args.weight = fused ? weight_rows(weight) : fera_rows{};
    return fera_expert_variant(&args, FERA_CUDA);
  });
  if (chosen == Way::fused) {
    const Tensor y = empty(with_last(x, weight.size(0)), x.options());
    const Tensor h = empty(with_last(x, experts.stacked()), x.options());
    args.weight = weight_rows(weight);
    args.y.data = y.data_ptr();
    args.h = h.data_ptr();
    FERA_CALL(x, expert_update, args);
    return {y, h};
  }
  args.weight = {};
  const Tensor y = at::linear(x_rows.tensor, weight, bias).contiguous();
  return update(op, y, y, x, experts, chosen == Way::library, args);
}

Gradients linear_backward(const char* op, const Tensor& dy, const Tensor& x, const Tensor& h,
                          const OptionalTensor& weight, const Experts& experts, std::array<bool, 4> wanted,
                          const Tensor& dgate, const Tensor& sum) {
  const fera_experts& e = experts.view;
  const Rows x_rows(op, "x", x, e.in), dy_rows(op, "dy", dy, e.out);
  const Tensor h_rows = h.contiguous();
  auto data = [](bool yes, const Tensor& t) { return yes ? t.data_ptr() : nullptr; };
  const bool add = wanted[0] && sum.defined(), base = wanted[0] && weight.has_value();
  Tensor dx = add ? sum : like(wanted[0], x);
  const Tensor da = like(wanted[1], experts.a), db = like(wanted[2], experts.b);
  fera_expert_update_backward_args args{e,
                                        dy_rows.view,
                                        x_rows.view,
                                        h_rows.data_ptr(),
                                        {data(wanted[0], dx), x_rows.view.dtype, e.in},
                                        0,
                                        data(wanted[1], da),
                                        data(wanted[2], db),
                                        data(wanted[3], dgate),
                                        {}};
  const Way chosen = way(op, x, base && weight->stride(1) == 1, [&](bool fused) {
    args.weight = fused ? weight_rows(weight) : fera_rows{};
    return fera_expert_backward_variant(&args, FERA_CUDA);
  });
  if (chosen == Way::fused) {
    // This kernel writes its product, so a sum takes it from beside.
    if (add) dx = like(true, x);
    args.dx.data = dx.data_ptr();
    args.weight = weight_rows(weight);
    FERA_CALL(x, expert_update_backward, args);
    return {add ? sum.add_(dx) : dx, da, db, dgate};
  }
  args.weight = {};
  args.add_to_dx = base || add ? 1 : 0;
  if (base) {
    const Tensor rows = dx.view({e.tokens, e.in}), dy_flat = dy_rows.tensor.reshape({e.tokens, e.out});
    Tensor product = rows;
    if (add)
      product.addmm_(dy_flat, *weight);
    else
      at::mm_out(product, dy_flat, *weight);
  }
  if (chosen == Way::library) {
    const Tensor dy_flat = dy_rows.tensor.reshape({e.tokens, e.out}).contiguous();
    const Tensor before = args.add_to_dx ? dx.view({e.tokens, e.in}) : Tensor();
    auto [library_dx, library_da, library_db] =
        Library(x, experts).backward(dy_flat, h_rows.view({e.tokens, experts.stacked()}), before, dgate, wanted);
    return {wanted[0] ? library_dx.view(x.sizes()) : dx, wanted[1] ? library_da : da, wanted[2] ? library_db : db,
            dgate};
  }
  if (e.tokens == 0) dgate.zero_();  // the kernels do not know the gate's rows then
  FERA_CALL(x, expert_update_backward, args);
  return {dx, da, db, dgate};
}

namespace {

std::tuple<Tensor, Tensor> expert_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate, double scale,
                                         double dropout, const OptionalTensor& seed, int64_t stream) {
  const char* op = "expert_linear";
  const DeviceScope scope(x);
  const NoAutocast products;
  dtype_of(op, "x", x);
  FERA_REQUIRE(op, x.dim() >= 2, "x", "(N, ..., in)", x.sizes());
  check_linear(op, x, weight, bias);
  return linear_forward(op, x, weight, bias,
                        Experts(op, x, weight.size(0), lora_a, lora_b, gate, scale, {dropout, seed, stream}));
}

std::tuple<Tensor, Tensor> expert_update(const Tensor& base_out, const Tensor& x, const Tensor& lora_a,
                                         const Tensor& lora_b, const Tensor& gate, double scale, double dropout,
                                         const OptionalTensor& seed, int64_t stream) {
  const char* op = "expert_update";
  const DeviceScope scope(x);
  dtype_of(op, "x", x);
  FERA_REQUIRE(op,
               x.dim() >= 2 && base_out.dim() == x.dim() &&
                   base_out.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
               "base_out", join("(N, ..., out) with the leading sizes of x ", x.sizes()), base_out.sizes());
  FERA_REQUIRE(op, base_out.scalar_type() == x.scalar_type(), "base_out", join("of x's dtype ", x.scalar_type()),
               base_out.scalar_type());
  require_same_device(op, "base_out", base_out, x);
  const Experts experts(op, x, base_out.size(-1), lora_a, lora_b, gate, scale, {dropout, seed, stream});
  const Rows x_rows(op, "x", x, experts.view.in), base_rows(op, "base_out", base_out, experts.view.out);
  const fera_rows y_rows{nullptr, x_rows.view.dtype, experts.view.out};
  const fera_expert_update_args args{experts.view, x_rows.view, base_rows.view, y_rows, nullptr, {}, nullptr};
  const Way chosen = way(op, x, false, [&](bool) { return fera_expert_variant(&args, FERA_CUDA); });
  const Tensor y = empty(base_out.sizes(), base_out.options());
  return update(op, base_out, y, x, experts, chosen == Way::library, args);
}

// wanted: (x, lora_a, lora_b, gate); gradients that are not wanted come back empty. With a weight, dx holds
// the frozen linear's part too.
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& h,
                                                                  const OptionalTensor& weight, const Tensor& lora_a,
                                                                  const Tensor& lora_b, const Tensor& gate,
                                                                  double scale, std::array<bool, 4> wanted,
                                                                  double dropout, const OptionalTensor& seed,
                                                                  int64_t stream) {
  const char* op = "expert_linear_backward";
  const DeviceScope scope(x);
  const NoAutocast products;
  dtype_of(op, "x", x);
  FERA_REQUIRE(op, x.dim() >= 2, "x", "(N, ..., in)", x.sizes());
  check_upstream(op, x, dy, h);
  if (weight.has_value()) {
    FERA_REQUIRE(op, (weight->sizes() == at::IntArrayRef{dy.size(-1), x.size(-1)}), "weight",
                 join("(", dy.size(-1), ", ", x.size(-1), ")"), weight->sizes());
    check_linear(op, x, *weight, {});
  }
  const Experts experts(op, x, dy.size(-1), lora_a, lora_b, gate, scale, {dropout, seed, stream});
  check_hidden(op, x, h, experts);
  const Gradients g = linear_backward(op, dy, x, h, weight, experts, wanted, like(wanted[3], experts.g));
  return {g.dx, g.da, g.db, cast(g.dgate, gate.scalar_type())};
}

void register_kernels(torch::Library& m) {
  m.impl("expert_linear", expert_linear);
  m.impl("expert_update", expert_update);
  m.impl("expert_linear_backward", expert_linear_backward);
}

// What expert_linear and expert_update share of their formulas: x, lora_a, lora_b and gate are the first variables.
// saved: x, h, lora_a, lora_b, gate, and the seed of dropout. Their gradients; undefined where not wanted.
Variables expert_gradients(Context* ctx, const Tensor& dy, const Variables& saved, const OptionalTensor& weight,
                           std::array<bool, 4> wanted) {
  auto [dx, da, db, dgate] = call_operator<expert_linear_backward>(
      "fera_ext::expert_linear_backward", dy, saved[0], saved[1], weight, saved[2], saved[3], saved[4],
      ctx->saved_data["scale"].toDouble(), wanted, ctx->saved_data["dropout"].toDouble(), optional(saved[5]),
      ctx->saved_data["stream"].toInt());
  Variables grads{dx, da, db, dgate};
  for (size_t i = 0; i < wanted.size(); ++i)
    if (!wanted[i]) grads[i].reset();
  return grads;
}

void save_numbers(Context* ctx, double scale, const DropoutArguments& dropout) {
  ctx->saved_data["scale"] = scale;
  ctx->saved_data["dropout"] = dropout.p;
  ctx->saved_data["stream"] = dropout.stream;
}

std::array<bool, 4> wanted_gradients(Context* ctx) {
  return {ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2), ctx->needs_input_grad(3)};
}

bool any(const std::array<bool, 4>& flags) { return flags[0] || flags[1] || flags[2] || flags[3]; }

class ExpertLinear : public Formula<ExpertLinear> {
 public:
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate,
                        const Tensor& weight, const OptionalTensor& bias, double scale, const DropoutArguments& dropout,
                        Tensor* h) {
    Tensor y;
    std::tie(y, *h) = call_below_autograd<expert_linear>("fera_ext::expert_linear", x, weight, bias, lora_a, lora_b,
                                                         gate, scale, dropout.p, dropout.seed, dropout.stream);
    ctx->set_materialize_grads(false);
    // dx alone needs the weight, which may be autocast's copy.
    ctx->save_for_backward({x, *h, lora_a, lora_b, gate, dropout.seed.value_or(Tensor()), asks(x) ? weight : Tensor()});
    save_numbers(ctx, scale, dropout);
    ctx->saved_data["biased"] = bias.has_value() && bias->defined();  // an absent one is no variable
    return y;
  }

  static Variables backward(Context* ctx, const Variables& upstream) {
    Variables grads(9);
    const Tensor& dy = upstream[0];
    if (!dy.defined()) return grads;
    // Read once: under checkpointing each read asks for the recomputation.
    const Variables saved = ctx->get_saved_variables();
    const std::array<bool, 4> wanted = wanted_gradients(ctx);
    if (any(wanted)) grads = expert_gradients(ctx, dy, saved, optional(saved[6]), wanted);
    grads.resize(9);
    std::tie(grads[4], grads[5]) = base_gradients(dy, saved[0], ctx->needs_input_grad(4),
                                                  ctx->saved_data["biased"].toBool() && ctx->needs_input_grad(5));
    return grads;
  }
};

std::tuple<Tensor, Tensor> expert_linear_autograd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                  const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate,
                                                  double scale, double dropout, const OptionalTensor& seed,
                                                  int64_t stream) {
  if (!recorded(x, weight, bias, lora_a, lora_b, gate))
    return call_below_autograd<expert_linear>("fera_ext::expert_linear", x, weight, bias, lora_a, lora_b, gate, scale,
                                              dropout, seed, stream);
  Tensor h;
  const Tensor y =
      ExpertLinear::apply(x, lora_a, lora_b, gate, weight, bias, scale, DropoutArguments{dropout, seed, stream}, &h);
  return {y, h};
}

class ExpertUpdate : public Formula<ExpertUpdate> {
 public:
  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate,
                        const Tensor& base_out, double scale, const DropoutArguments& dropout, Tensor* h) {
    Tensor y;
    std::tie(y, *h) = call_below_autograd<expert_update>("fera_ext::expert_update", base_out, x, lora_a, lora_b, gate,
                                                         scale, dropout.p, dropout.seed, dropout.stream);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, *h, lora_a, lora_b, gate, dropout.seed.value_or(Tensor())});
    save_numbers(ctx, scale, dropout);
    return y;
  }

  static Variables backward(Context* ctx, const Variables& upstream) {
    Variables grads(8);
    const Tensor& dy = upstream[0];
    if (!dy.defined()) return grads;
    const std::array<bool, 4> wanted = wanted_gradients(ctx);
    if (any(wanted)) grads = expert_gradients(ctx, dy, ctx->get_saved_variables(), {}, wanted);
    grads.resize(8);
    if (ctx->needs_input_grad(4)) grads[4] = dy;
    return grads;
  }
};

std::tuple<Tensor, Tensor> expert_update_autograd(const Tensor& base_out, const Tensor& x, const Tensor& lora_a,
                                                  const Tensor& lora_b, const Tensor& gate, double scale,
                                                  double dropout, const OptionalTensor& seed, int64_t stream) {
  if (!recorded(base_out, x, lora_a, lora_b, gate))
    return call_below_autograd<expert_update>("fera_ext::expert_update", base_out, x, lora_a, lora_b, gate, scale,
                                              dropout, seed, stream);
  Tensor h;
  const Tensor y =
      ExpertUpdate::apply(x, lora_a, lora_b, gate, base_out, scale, DropoutArguments{dropout, seed, stream}, &h);
  return {y, h};
}

// Autocast: the base product's operands go to the autocast dtype; A and B are rounded by the kernels, the gate
// stays float32.
template <c10::DeviceType Device, c10::DispatchKey Key>
std::tuple<Tensor, Tensor> expert_linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                  const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate,
                                                  double scale, double dropout, const OptionalTensor& seed,
                                                  int64_t stream) {
  const c10::impl::ExcludeDispatchKeyGuard guard(Key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(Device);
  return call_operator<expert_linear>("fera_ext::expert_linear", at::autocast::cached_cast(type, x, Device),
                                      at::autocast::cached_cast(type, weight, Device),
                                      at::autocast::cached_cast(type, bias, Device), lora_a, lora_b, gate, scale,
                                      dropout, seed, stream);
}

template <c10::DeviceType Device, c10::DispatchKey Key>
std::tuple<Tensor, Tensor> expert_update_autocast(const Tensor& base_out, const Tensor& x, const Tensor& lora_a,
                                                  const Tensor& lora_b, const Tensor& gate, double scale,
                                                  double dropout, const OptionalTensor& seed, int64_t stream) {
  const c10::impl::ExcludeDispatchKeyGuard guard(Key);
  // The base layer has chosen its output's dtype already; x follows it.
  return call_operator<expert_update>("fera_ext::expert_update", base_out, x.to(base_out.scalar_type()), lora_a, lora_b,
                                      gate, scale, dropout, seed, stream);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fera_ext, m) {
  m.def(
      "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor gate, float scale,"
      " float dropout=0.0, Tensor? seed=None, int stream=0) -> (Tensor, Tensor)");
  m.def(
      "expert_update(Tensor base_out, Tensor x, Tensor lora_a, Tensor lora_b, Tensor gate, float scale,"
      " float dropout=0.0, Tensor? seed=None, int stream=0) -> (Tensor, Tensor)");
  m.def(
      "expert_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor? weight, Tensor lora_a, Tensor lora_b,"
      " Tensor gate, float scale, bool[4] wanted, float dropout=0.0, Tensor? seed=None, int stream=0)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fera_ext, CPU, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fera_ext, Autograd, m) {
  m.impl("expert_linear", expert_linear_autograd);
  m.impl("expert_update", expert_update_autograd);
}
TORCH_LIBRARY_IMPL(fera_ext, AutocastCPU, m) {
  m.impl("expert_linear", expert_linear_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
  m.impl("expert_update", expert_update_autocast<c10::DeviceType::CPU, c10::DispatchKey::AutocastCPU>);
}
#if defined(FERA_TORCH_CUDA)
TORCH_LIBRARY_IMPL(fera_ext, CUDA, m) { register_kernels(m); }
TORCH_LIBRARY_IMPL(fera_ext, AutocastCUDA, m) {
  m.impl("expert_linear", expert_linear_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
  m.impl("expert_update", expert_update_autocast<c10::DeviceType::CUDA, c10::DispatchKey::AutocastCUDA>);
}
#endif

}  // namespace fera::torch_binding
