#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>

#include <cstdlib>
#include <cstring>

#include "call.h"

namespace fera::torch_binding {
namespace {

// (N, ..., width) as T rows; copied only where the leading axes' strides do not merge.
class Rows {
 public:
  Rows(const char* op, const char* name, const Tensor& t, int64_t width) : tensor(t) {
    FERA_REQUIRE(op, t.dim() >= 2 && t.size(-1) == width, name, join("(N, ..., ", width, ")"), t.sizes());
    const fera_dtype dtype = dtype_of(op, name, t);
    const int64_t last = t.dim() - 1, row = merged_stride(t, 0, last, width);
    if ((row >= 0 && (t.stride(last) == 1 || width == 1)) || t.numel() == 0) {
      view = {tensor.data_ptr(), dtype, row};
    } else {
      tensor = t.contiguous();
      view = {tensor.data_ptr(), dtype, width};
    }
  }

  Tensor tensor;
  fera_rows view;
};

// The adapter's operands, checked against x, kept alive beside the struct that points into them.
class Experts {
 public:
  Experts(const char* op, const Tensor& x, int64_t out, const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate,
          double scale) {
    FERA_REQUIRE(op, x.dim() >= 2, "x", "(N, ..., in)", x.sizes());
    const int64_t in = x.size(-1), rows = x.size(0);
    FERA_REQUIRE(op, lora_a.dim() == 3 && lora_a.size(2) == in, "lora_a", join("(E, r, ", in, ")"), lora_a.sizes());
    const int64_t experts = lora_a.size(0), rank = lora_a.size(1);
    FERA_REQUIRE(op, in >= 1 && out >= 1, "in and out", "at least 1", std::min(in, out));
    FERA_REQUIRE(op, experts >= 1 && experts <= FERA_MAX_EXPERTS, "experts", "from 1 to 32", experts);
    FERA_REQUIRE(op, (lora_b.sizes() == at::IntArrayRef{out, experts, rank}), "lora_b",
                 join("(", out, ", ", experts, ", ", rank, ")"), lora_b.sizes());
    FERA_REQUIRE(op, gate.dim() == 2 && gate.size(1) == experts, "gate", join("(G, ", experts, ")"), gate.sizes());
    dtype_of(op, "gate", gate);
    const int64_t groups = gate.size(0);
    FERA_REQUIRE(op, groups > 0 ? rows % groups == 0 : rows == 0, "gate rows", join("a divisor of x's ", rows), groups);
    FERA_REQUIRE(op, experts >= 1 && rank >= 1 && experts * rank <= FERA_MAX_RANK, "experts * rank", "from 1 to 512",
                 experts * rank);
    FERA_REQUIRE(op, std::isfinite(scale), "scale", "finite", scale);
    require_same_device(op, "lora_a", lora_a, x);
    require_same_device(op, "lora_b", lora_b, x);
    require_same_device(op, "gate", gate, x);
    a = lora_a.contiguous();
    b = lora_b.contiguous();
    g = gate.to(compute_type(x)).contiguous();
    const int64_t tokens = in > 0 ? x.numel() / in : 0;
    view = {tokens,
            in,
            out,
            static_cast<int32_t>(experts),
            static_cast<int32_t>(rank),
            tokens > 0 ? tokens / groups : 1,
            a.data_ptr(),
            dtype_of(op, "lora_a", a),
            b.data_ptr(),
            dtype_of(op, "lora_b", b),
            g.data_ptr(),
            scale};
  }

  int64_t stacked() const { return int64_t{view.experts} * view.rank; }
  int64_t groups() const { return g.size(0); }

  Tensor a, b, g;
  fera_experts view;
};

// tiles: the core's kernels. library: the vendor's products. FERA_EXPERT_VARIANT asks for one; empty or auto is tiles.
bool by_library(const char* op) {
  const char* wish = std::getenv("FERA_EXPERT_VARIANT");
  if (wish == nullptr || *wish == 0 || std::strcmp(wish, "auto") == 0 || std::strcmp(wish, "tiles") == 0) return false;
  FERA_REQUIRE(op, std::strcmp(wish, "library") == 0, "FERA_EXPERT_VARIANT", "auto, tiles or library", wish);
  return true;
}

// The library variant: the stacked form with gate and scale folded into the small side, B' = gate * scale * B, one a
// gate row, so that nothing of the size of x or y is touched but by products.
//   h = x A^T                        y += h B'^T
//   dh' = dy B'    dx += dh' A       dA = dh'^T x
//   M = dy^T h, one a gate row:      dB = sum_g gate_g scale M_g,   dgate[g, m] = scale <M_g, B> over m's columns
class Library {
 public:
  Library(const Tensor& x, const Experts& experts)
      : e_(experts),
        g_(experts.groups()),
        r_(experts.stacked()),
        out_(experts.view.out),
        x_(x.reshape({experts.view.tokens, experts.view.in})),
        a_(experts.a.to(x.scalar_type()).view({r_, experts.view.in})),
        scaled_((experts.g * experts.view.scale).view({g_, 1, experts.view.experts, 1})) {}

  // h (T, R); y (T, out) is updated.
  Tensor forward(const Tensor& y) const {
    const Tensor h = at::matmul(x_, a_.t());
    if (x_.size(0) > 0) grouped(y).baddbmm_(grouped(h), gated_b().transpose(1, 2));
    return h;
  }

  // dx: the base layer's part, or undefined.
  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& h, Tensor dx,
                                                      std::array<bool, 4> wanted) const {
    Tensor da, db, dgate;
    if (x_.size(0) == 0) {
      if (wanted[0] && !dx.defined()) dx = at::zeros_like(x_);
      if (wanted[1]) da = at::zeros_like(e_.a);
      if (wanted[2]) db = at::zeros_like(e_.b);
      if (wanted[3]) dgate = at::zeros_like(e_.g);
      return {dx, da, db, dgate};
    }
    if (wanted[0] || wanted[1]) {
      const Tensor dh = at::bmm(grouped(dy), gated_b()).view({x_.size(0), r_});
      if (wanted[0]) dx = dx.defined() ? dx.addmm_(dh, a_) : at::matmul(dh, a_);
      if (wanted[1]) da = at::matmul(dh.t(), x_).view(e_.a.sizes()).to(e_.a.scalar_type());
    }
    if (wanted[2] || wanted[3]) {
      const at::ScalarType wide = e_.g.scalar_type();
      const Tensor m = at::bmm(grouped(dy).transpose(1, 2), grouped(h)).to(wide).view(by_expert(g_));
      if (wanted[2]) db = (m * scaled_).sum(0).to(e_.b.scalar_type());
      if (wanted[3]) dgate = (m * e_.b.to(wide).view(by_expert(1))).sum({1, 3}).mul_(e_.view.scale);
    }
    return {dx, da, db, dgate};
  }

 private:
  std::array<int64_t, 4> by_expert(int64_t rows) const { return {rows, out_, e_.view.experts, e_.view.rank}; }
  Tensor grouped(const Tensor& t) const { return t.view({g_, x_.size(0) / g_, t.size(-1)}); }
  Tensor gated_b() const {  // (G, out, R), multiplied in the compute dtype and rounded once
    Tensor b = at::empty(by_expert(g_), x_.options());
    at::mul_out(b, e_.b.view(by_expert(1)), scaled_);
    return b.view({g_, out_, r_});
  }

  const Experts& e_;
  int64_t g_, r_, out_;
  Tensor x_, a_, scaled_;  // scaled_: gate * scale (G, 1, E, 1)
};

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// Products of the vendor's library inside an operator keep the operator's dtype: autocast has had its say in the
// operator's own autocast kernel, and in a backward under autocast it must have none.
class NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autocast_dispatch_keyset};
};

// Adds the experts' part to `base`, into `y` (which may be `base`).
std::tuple<Tensor, Tensor> update(const char* op, const Tensor& base, const Tensor& y, const Tensor& x,
                                  const Experts& experts) {
  const int64_t out = experts.view.out;
  if (by_library(op)) {
    const NoAutocast products;
    if (!y.is_same(base)) y.copy_(base);
    const Tensor h = Library(x, experts).forward(y.view({experts.view.tokens, out}));
    return {y, h.view(with_last(x, experts.stacked()))};
  }
  const Tensor h = at::empty(with_last(x, experts.stacked()), x.options());
  const Rows x_rows(op, "x", x, experts.view.in), base_rows(op, "base_out", base, out), y_rows(op, "y", y, out);
  const fera_expert_update_args args{experts.view, x_rows.view, base_rows.view, y_rows.view, h.data_ptr()};
  FERA_CALL(x, expert_update, args);
  return {y, h};
}

std::tuple<Tensor, Tensor> expert_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                         const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate, double scale) {
  const char* op = "expert_linear";
  const DeviceScope scope(x);
  const NoAutocast products;
  dtype_of(op, "x", x);
  FERA_REQUIRE(op, x.dim() >= 2, "x", "(N, ..., in)", x.sizes());
  FERA_REQUIRE(op, weight.dim() == 2 && weight.size(1) == x.size(-1), "weight", join("(out, ", x.size(-1), ")"),
               weight.sizes());
  FERA_REQUIRE(op, weight.scalar_type() == x.scalar_type(), "weight", join("of x's dtype ", x.scalar_type()),
               weight.scalar_type());
  require_same_device(op, "weight", weight, x);
  if (bias.has_value()) {
    FERA_REQUIRE(op, bias->dim() == 1 && bias->size(0) == weight.size(0), "bias", join("(", weight.size(0), ")"),
                 bias->sizes());
    FERA_REQUIRE(op, bias->scalar_type() == x.scalar_type(), "bias", join("of x's dtype ", x.scalar_type()),
                 bias->scalar_type());
  }
  const Experts experts(op, x, weight.size(0), lora_a, lora_b, gate, scale);
  const Tensor y = at::linear(x, weight, bias).contiguous();
  return update(op, y, y, x, experts);
}

std::tuple<Tensor, Tensor> expert_update(const Tensor& base_out, const Tensor& x, const Tensor& lora_a,
                                         const Tensor& lora_b, const Tensor& gate, double scale) {
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
  const Experts experts(op, x, base_out.size(-1), lora_a, lora_b, gate, scale);
  return update(op, base_out, at::empty(base_out.sizes(), base_out.options()), x, experts);
}

// wanted: (x, lora_a, lora_b, gate); gradients that are not wanted come back empty. With a weight, dx holds
// the frozen linear's part too.
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_linear_backward(const Tensor& dy, const Tensor& x, const Tensor& h,
                                                                  const OptionalTensor& weight, const Tensor& lora_a,
                                                                  const Tensor& lora_b, const Tensor& gate,
                                                                  double scale, std::array<bool, 4> wanted) {
  const char* op = "expert_linear_backward";
  const DeviceScope scope(x);
  const NoAutocast products;
  dtype_of(op, "x", x);
  FERA_REQUIRE(
      op, x.dim() >= 2 && dy.dim() == x.dim() && dy.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
      "dy", join("(N, ..., out) with the leading sizes of x ", x.sizes()), dy.sizes());
  require_same_device(op, "dy", dy, x);
  require_same_device(op, "h", h, x);
  if (weight.has_value()) {
    FERA_REQUIRE(op, (weight->sizes() == at::IntArrayRef{dy.size(-1), x.size(-1)}), "weight",
                 join("(", dy.size(-1), ", ", x.size(-1), ")"), weight->sizes());
    FERA_REQUIRE(op, weight->scalar_type() == x.scalar_type(), "weight", join("of x's dtype ", x.scalar_type()),
                 weight->scalar_type());
    require_same_device(op, "weight", *weight, x);
  }
  FERA_REQUIRE(op, dy.scalar_type() == x.scalar_type(), "dy", join("of x's dtype ", x.scalar_type()), dy.scalar_type());
  const Experts experts(op, x, dy.size(-1), lora_a, lora_b, gate, scale);
  const Rows x_rows(op, "x", x, experts.view.in), dy_rows(op, "dy", dy, experts.view.out);
  const Tensor h_rows = h.contiguous();
  FERA_REQUIRE(op, h.scalar_type() == x.scalar_type() && h.sizes() == at::IntArrayRef(with_last(x, experts.stacked())),
               "h", "what forward returned", h.sizes());
  if (by_library(op)) {
    const Tensor rows = dy.contiguous().view({experts.view.tokens, experts.view.out});
    Tensor dx;
    if (wanted[0] && weight.has_value()) dx = at::matmul(rows, *weight);
    Tensor da, db, dg;
    std::tie(dx, da, db, dg) =
        Library(x, experts).backward(rows, h_rows.view({experts.view.tokens, experts.stacked()}), dx, wanted);
    auto given = [&](bool yes, const Tensor& t) { return yes ? t : at::empty({0}, x.options()); };
    return {wanted[0] ? dx.view(x.sizes()) : given(false, dx), given(wanted[1], da), given(wanted[2], db),
            wanted[3] ? dg.to(gate.scalar_type()) : given(false, dg)};
  }
  auto like = [](bool yes, const Tensor& t) {
    return yes ? at::empty(t.sizes(), t.options()) : at::empty({0}, t.options());
  };
  Tensor dx;
  if (wanted[0] && weight.has_value())
    dx = at::matmul(dy, *weight).contiguous();
  else
    dx = like(wanted[0], x);
  const Tensor da = like(wanted[1], experts.a), db = like(wanted[2], experts.b), dg = like(wanted[3], experts.g);
  if (experts.view.tokens == 0) dg.zero_();  // the kernels do not know the gate's rows then
  auto data = [](bool yes, const Tensor& t) { return yes ? t.data_ptr() : nullptr; };
  const fera_expert_update_backward_args args{experts.view,
                                              dy_rows.view,
                                              x_rows.view,
                                              h_rows.data_ptr(),
                                              {data(wanted[0], dx), x_rows.view.dtype, experts.view.in},
                                              wanted[0] && weight.has_value() ? 1 : 0,
                                              data(wanted[1], da),
                                              data(wanted[2], db),
                                              data(wanted[3], dg)};
  FERA_CALL(x, expert_update_backward, args);
  return {dx, da, db, dg.to(gate.scalar_type())};
}

void register_kernels(torch::Library& m) {
  m.impl("expert_linear", expert_linear);
  m.impl("expert_update", expert_update);
  m.impl("expert_linear_backward", expert_linear_backward);
}

// Autocast: the base product's operands go to the autocast dtype; A and B are rounded by the kernels, the gate
// stays float32.
template <c10::DeviceType Device, c10::DispatchKey Key>
std::tuple<Tensor, Tensor> expert_linear_autocast(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                  const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate,
                                                  double scale) {
  const c10::impl::ExcludeDispatchKeyGuard guard(Key);
  const at::ScalarType type = at::autocast::get_autocast_dtype(Device);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fera_ext::expert_linear", "").typed<decltype(expert_linear)>();
  return op.call(at::autocast::cached_cast(type, x, Device), at::autocast::cached_cast(type, weight, Device),
                 at::autocast::cached_cast(type, bias, Device), lora_a, lora_b, gate, scale);
}

template <c10::DeviceType Device, c10::DispatchKey Key>
std::tuple<Tensor, Tensor> expert_update_autocast(const Tensor& base_out, const Tensor& x, const Tensor& lora_a,
                                                  const Tensor& lora_b, const Tensor& gate, double scale) {
  const c10::impl::ExcludeDispatchKeyGuard guard(Key);
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fera_ext::expert_update", "").typed<decltype(expert_update)>();
  // The base layer has chosen its output's dtype already; x follows it.
  return op.call(base_out, x.to(base_out.scalar_type()), lora_a, lora_b, gate, scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fera_ext, m) {
  m.def(
      "expert_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor gate, float scale)"
      " -> (Tensor, Tensor)");
  m.def(
      "expert_update(Tensor base_out, Tensor x, Tensor lora_a, Tensor lora_b, Tensor gate, float scale)"
      " -> (Tensor, Tensor)");
  m.def(
      "expert_linear_backward(Tensor dy, Tensor x, Tensor h, Tensor? weight, Tensor lora_a, Tensor lora_b,"
      " Tensor gate, float scale, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fera_ext, CPU, m) { register_kernels(m); }
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
