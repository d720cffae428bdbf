// What expert_linear, expert_update and their group share: operands, checks, the choice of a variant, the library's
// products.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>

#include <cstdlib>
#include <cstring>

#include "autograd.h"

namespace fera::torch_binding {

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

// Dropout on the experts' input as the operators take it: p, a tensor with the seed, the layer's number. No tensor in
// here is a variable of an autograd formula.
struct DropoutArguments {
  double p = 0;
  OptionalTensor seed;
  int64_t stream = 0;
};

// The adapter's operands, checked against x, kept alive beside the struct that points into them. `of` ends the
// arguments' names in messages: "[1]" for a group's second member.
class Experts {
 public:
  Experts(const char* op, const Tensor& x, int64_t out, const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate,
          double scale, const char* of = "") {
    FERA_REQUIRE(op, x.dim() >= 2, "x", "(N, ..., in)", x.sizes());
    const int64_t in = x.size(-1), rows = x.size(0);
    FERA_REQUIRE(op, lora_a.dim() == 3 && lora_a.size(2) == in, join("lora_a", of), join("(E, r, ", in, ")"),
                 lora_a.sizes());
    const int64_t experts = lora_a.size(0), rank = lora_a.size(1);
    FERA_REQUIRE(op, in >= 1 && out >= 1, "in and out", "at least 1", std::min(in, out));
    FERA_REQUIRE(op, experts >= 1 && experts <= FERA_MAX_EXPERTS, "experts", "from 1 to 32", experts);
    FERA_REQUIRE(op, (lora_b.sizes() == at::IntArrayRef{out, experts, rank}), join("lora_b", of),
                 join("(", out, ", ", experts, ", ", rank, ")"), lora_b.sizes());
    FERA_REQUIRE(op, gate.dim() == 2 && gate.size(1) == experts, "gate", join("(G, ", experts, ")"), gate.sizes());
    dtype_of(op, "gate", gate);
    const int64_t groups = gate.size(0);
    FERA_REQUIRE(op, groups > 0 ? rows % groups == 0 : rows == 0, "gate rows", join("a divisor of x's ", rows), groups);
    FERA_REQUIRE(op, experts >= 1 && rank >= 1 && experts * rank <= FERA_MAX_RANK, "experts * rank", "from 1 to 512",
                 experts * rank);
    FERA_REQUIRE(op, std::isfinite(scale), "scale", "finite", scale);
    require_same_device(op, "lora_a", lora_a, x, of);
    require_same_device(op, "lora_b", lora_b, x, of);
    require_same_device(op, "gate", gate, x);
    a = lora_a.contiguous();
    b = lora_b.contiguous();
    g = cast(gate, compute_type(x)).contiguous();
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
            scale,
            0,
            nullptr,
            0};
  }

  // The same with dropout; the kernels read the seed where it is. Without (p = 0) a seed is not looked at.
  Experts(const char* op, const Tensor& x, int64_t out, const Tensor& lora_a, const Tensor& lora_b, const Tensor& gate,
          double scale, const DropoutArguments& dropout)
      : Experts(op, x, out, lora_a, lora_b, gate, scale) {
    FERA_REQUIRE(op, dropout.p >= 0 && dropout.p < 1, "dropout", "in [0, 1)", dropout.p);
    if (dropout.p == 0) return;
    FERA_REQUIRE(op, dropout.seed.has_value() && dropout.seed->defined(), "seed", "a tensor with dropout", "None");
    seed = *dropout.seed;
    FERA_REQUIRE(op, seed.scalar_type() == at::kLong && seed.numel() == 1, "seed", "one number of int64",
                 join(seed.scalar_type(), " ", seed.sizes()));
    require_same_device(op, "seed", seed, x);
    FERA_REQUIRE(op, dropout.stream >= 0 && dropout.stream <= UINT32_MAX, "stream", "from 0 to 2^32 - 1",
                 dropout.stream);
    view.dropout = dropout.p;
    view.seed = seed.const_data_ptr<int64_t>();
    view.stream = static_cast<uint32_t>(dropout.stream);
  }

  int64_t stacked() const { return int64_t{view.experts} * view.rank; }
  int64_t groups() const { return g.size(0); }

  Tensor a, b, g, seed;
  fera_experts view;
};

// The core's kernels come in variants of their own (tiles, mma, wgmma); library: the vendor's products, below.
// FERA_EXPERT_VARIANT asks for one; "auto" where it says nothing.
inline std::string wished(const char* op) {
  const char* wish = std::getenv("FERA_EXPERT_VARIANT");
  if (wish == nullptr || *wish == 0) return "auto";
  bool known = false;
  for (const char* name : {"auto", "tiles", "mma", "wgmma", "library"}) known = known || std::strcmp(wish, name) == 0;
  FERA_REQUIRE(op, known, "FERA_EXPERT_VARIANT", "auto, tiles, mma, wgmma or library", wish);
  return wish;
}

enum class Way {
  fused,    // the core's kernel with the base product in it
  update,   // the core's kernels after the vendor's base product
  library,  // the vendor's products alone: on CUDA where the core says so
};

// `variant` asks the core, whose answer may differ with and without the weight.
template <class Variant>
Way way(const char* op, const Tensor& x, bool weight, Variant variant) {
  const std::string wish = wished(op);
  if (wish == "library") return Way::library;
  if (!x.is_cuda() || x.numel() == 0) return Way::update;
  // A wish for wgmma that the core does not grant is left to the core to refuse.
  if (weight && (wish == "wgmma" || (wish == "auto" && std::strcmp(variant(true), "wgmma") == 0))) return Way::fused;
  return wish == "auto" && std::strcmp(variant(false), "library") == 0 ? Way::library : Way::update;
}

inline fera_rows weight_rows(const OptionalTensor& weight) {
  if (!weight.has_value()) return {};
  return {weight->data_ptr(), dtype_of("expert_linear", "weight", *weight), weight->stride(0)};
}

inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes.back() = last;
  return sizes;
}

// Products of the vendor's library inside an operator keep the operator's dtype: autocast has had its say in the
// operator's own autocast kernel, and in a backward under autocast it must have none.
class NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard_{c10::autocast_dispatch_keyset};
};

// (dweight, dbias) of the base product, undefined where not wanted. The base is frozen in FeRA; a trainer that
// unfreezes it still gets its gradients.
inline std::tuple<Tensor, Tensor> base_gradients(const Tensor& dy, const Tensor& x, bool weight, bool bias) {
  const NoAutocast products;
  Tensor dweight, dbias;
  if (!weight && !bias) return {dweight, dbias};
  const Tensor rows = dy.flatten(0, -2);
  if (weight) dweight = at::matmul(rows.t(), x.flatten(0, -2));
  if (bias) dbias = rows.sum(0);
  return {dweight, dbias};
}

// The library variant: the stacked form with gate and scale folded into the small side, B' = gate * scale * B, one a
// gate row, so that nothing of the size of x or y is touched but by products.
//   h = x A^T                        y += h B'^T
//   dh' = dy B'    dx += dh' A       dA = dh'^T x
//   M = dy^T h, one a gate row:      dB = sum_g gate_g scale M_g,   dgate[g, m] = scale <M_g, B> over m's columns
// Dropout is a pass of its own here, over x for its products and over dh' A.
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
    const Tensor h = at::matmul(dropped(), a_.t());
    if (x_.size(0) > 0) grouped(y).baddbmm_(grouped(h), gated_b().transpose(1, 2));
    return h;
  }

  // dx: the base layer's part, or undefined; dgate (G, E) is written where wanted.
  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy, const Tensor& h, Tensor dx, Tensor dgate,
                                              std::array<bool, 4> wanted) const {
    Tensor da, db;
    if (x_.size(0) == 0) {
      if (wanted[0] && !dx.defined()) dx = at::zeros_like(x_);
      if (wanted[1]) da = at::zeros_like(e_.a);
      if (wanted[2]) db = at::zeros_like(e_.b);
      if (wanted[3]) dgate.zero_();
      return {dx, da, db};
    }
    if (wanted[0] || wanted[1]) {
      const Tensor dh = at::bmm(grouped(dy), gated_b()).view({x_.size(0), r_});
      if (wanted[0] && e_.view.dropout > 0) {
        const Tensor product = at::matmul(dh, a_);
        drop(product, dx.defined() ? dx : product, dx.defined());
        if (!dx.defined()) dx = product;
      } else if (wanted[0]) {
        dx = dx.defined() ? dx.addmm_(dh, a_) : at::matmul(dh, a_);
      }
      if (wanted[1]) da = at::matmul(dh.t(), dropped()).view(e_.a.sizes()).to(e_.a.scalar_type());
    }
    if (wanted[2] || wanted[3]) {
      const at::ScalarType wide = e_.g.scalar_type();
      const Tensor m = at::bmm(grouped(dy).transpose(1, 2), grouped(h)).to(wide).view(by_expert(g_));
      if (wanted[2]) db = (m * scaled_).sum(0).to(e_.b.scalar_type());
      if (wanted[3]) at::sum_out(dgate, m * e_.b.to(wide).view(by_expert(1)), {1, 3}).mul_(e_.view.scale);
    }
    return {dx, da, db};
  }

 private:
  // Both (T, in) and contiguous.
  void drop(const Tensor& from, const Tensor& to, bool add) const {
    const fera_experts& e = e_.view;
    const fera_dtype dtype = dtype_of("expert_dropout", "x", from);
    const fera_expert_dropout_args args{
        e.tokens, e.in, {from.data_ptr(), dtype, e.in}, {to.data_ptr(), dtype, e.in}, add, e.dropout, e.seed, e.stream};
    FERA_CALL(from, expert_dropout, args);
  }
  Tensor dropped() const {
    if (e_.view.dropout == 0 || x_.numel() == 0) return x_;
    const Tensor to = empty(x_.sizes(), x_.options());
    drop(x_.contiguous(), to, false);
    return to;
  }

  std::array<int64_t, 4> by_expert(int64_t rows) const { return {rows, out_, e_.view.experts, e_.view.rank}; }
  Tensor grouped(const Tensor& t) const { return t.view({g_, x_.size(0) / g_, t.size(-1)}); }
  Tensor gated_b() const {  // (G, out, R), multiplied in the compute dtype and rounded once
    Tensor b = empty(by_expert(g_), x_.options());
    at::mul_out(b, e_.b.view(by_expert(1)), scaled_);
    return b.view({g_, out_, r_});
  }

  const Experts& e_;
  int64_t g_, r_, out_;
  Tensor x_, a_, scaled_;  // scaled_: gate * scale (G, 1, E, 1)
};

// A member's frozen linear, checked against x.
inline void check_linear(const char* op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const char* of = "") {
  FERA_REQUIRE(op, weight.dim() == 2 && weight.size(1) == x.size(-1), join("weight", of),
               join("(out, ", x.size(-1), ")"), weight.sizes());
  FERA_REQUIRE(op, weight.scalar_type() == x.scalar_type(), join("weight", of), join("of x's dtype ", x.scalar_type()),
               weight.scalar_type());
  require_same_device(op, "weight", weight, x, of);
  if (!bias.has_value()) return;
  FERA_REQUIRE(op, bias->dim() == 1 && bias->size(0) == weight.size(0), join("bias", of),
               join("(", weight.size(0), ")"), bias->sizes());
  FERA_REQUIRE(op, bias->scalar_type() == x.scalar_type(), join("bias", of), join("of x's dtype ", x.scalar_type()),
               bias->scalar_type());
  require_same_device(op, "bias", *bias, x, of);
}

// What arrives from above and from forward, checked against x.
inline void check_upstream(const char* op, const Tensor& x, const Tensor& dy, const Tensor& h, const char* of = "") {
  FERA_REQUIRE(op, dy.dim() == x.dim() && dy.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
               join("dy", of), join("(N, ..., out) with the leading sizes of x ", x.sizes()), dy.sizes());
  FERA_REQUIRE(op, dy.scalar_type() == x.scalar_type(), join("dy", of), join("of x's dtype ", x.scalar_type()),
               dy.scalar_type());
  require_same_device(op, "dy", dy, x, of);
  require_same_device(op, "h", h, x, of);
}

inline void check_hidden(const char* op, const Tensor& x, const Tensor& h, const Experts& experts,
                         const char* of = "") {
  FERA_REQUIRE(op, h.scalar_type() == x.scalar_type() && h.sizes() == at::IntArrayRef(with_last(x, experts.stacked())),
               join("h", of), "what forward returned", h.sizes());
}

// y and h of one linear, its arguments checked.
std::tuple<Tensor, Tensor> linear_forward(const char* op, const Tensor& x, const Tensor& weight,
                                          const OptionalTensor& bias, const Experts& experts);

struct Gradients {
  Tensor dx, da, db, dgate;  // empty where not wanted; dgate in the compute dtype
};

// Contiguous, of t's sizes; empty where not wanted.
inline Tensor like(bool wanted, const Tensor& t) {
  return wanted ? empty(t.sizes(), t.options()) : empty({0}, t.options());
}

// wanted: (x, lora_a, lora_b, gate). With a weight, dx holds the frozen linear's part too. Where `sum` is defined, of
// x's sizes and contiguous, dx is added to it and is it. dgate: of the gate's sizes and contiguous, written where
// wanted.
Gradients linear_backward(const char* op, const Tensor& dy, const Tensor& x, const Tensor& h,
                          const OptionalTensor& weight, const Experts& experts, std::array<bool, 4> wanted,
                          const Tensor& dgate, const Tensor& sum = {});

}  // namespace fera::torch_binding
