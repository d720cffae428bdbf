#include "common/checks.h"

#include <algorithm>
#include <cmath>

namespace fera {

fera_status check_latent(const char* op, const char* name, const fera_latent& z) {
  FERA_CHECK(op, is_dtype(z.dtype), std::string(name) + ".dtype", "float32, float16, bfloat16 or float64",
             static_cast<int>(z.dtype));
  FERA_CHECK(op, z.n >= 0 && z.p >= 0, std::string(name) + " sizes", "not negative", std::min(z.n, z.p));
  FERA_CHECK(op, z.h >= 1 && z.h <= FERA_MAX_SIDE, std::string(name) + " height", "from 1 to 512", z.h);
  FERA_CHECK(op, z.w >= 1 && z.w <= FERA_MAX_SIDE, std::string(name) + " width", "from 1 to 512", z.w);
  FERA_CHECK(op, z.p == 0 || z.n < (int64_t{1} << 30) / z.p, std::string(name) + " planes", "fewer than 2^30",
             text(z.n) + " x " + text(z.p));
  FERA_CHECK(op, z.data != nullptr || z.n * z.p == 0, name, "a pointer", "NULL");
  return FERA_OK;
}

namespace {

std::string describe(const fera_latent& z) {
  return "(" + text(z.n) + ", " + text(z.p) + ", " + text(z.h) + ", " + text(z.w) + ") of dtype " +
         text(static_cast<int>(z.dtype));
}

}  // namespace

fera_status check_same_latent(const char* op, const char* name, const fera_latent& z, const fera_latent& like) {
  FERA_RETURN_IF_ERROR(check_latent(op, name, z));
  const bool same = z.n == like.n && z.p == like.p && z.h == like.h && z.w == like.w && z.dtype == like.dtype;
  FERA_CHECK(op, same, name, describe(like), describe(z));
  return FERA_OK;
}

fera_status check_filters(const char* op, const fera_filters& f) {
  FERA_CHECK(op, f.bands >= 1 && f.bands <= FERA_MAX_BANDS, "bands", "from 1 to 16", f.bands);
  FERA_CHECK(op, f.blurs >= 0 && f.blurs <= FERA_MAX_BANDS, "blurs", "from 0 to 16", f.blurs);
  FERA_CHECK(op, f.table != nullptr, "filters.table", "a pointer", "NULL");
  FERA_CHECK(op, f.blurs == 0 || (f.right != nullptr && f.mix != nullptr), "filters.right and filters.mix",
             "pointers when there are blurs", "NULL");
  for (int j = 0; j < f.blurs; ++j)
    FERA_CHECK(op, f.reach[j] >= 0 && f.reach[j] < FERA_MAX_SIDE, "filters.reach", "from 0 to 511", f.reach[j]);
  return FERA_OK;
}

fera_status check_router(const char* op, const fera_router& r) {
  FERA_CHECK(op, r.dtype == FERA_F32 || r.dtype == FERA_F64, "router.dtype", "float32 or float64",
             static_cast<int>(r.dtype));
  FERA_CHECK(op, r.bands >= 1 && r.bands <= FERA_MAX_BANDS, "bands", "from 1 to 16", r.bands);
  FERA_CHECK(op, r.hidden >= 1 && r.hidden <= FERA_MAX_HIDDEN, "hidden", "from 1 to 256", r.hidden);
  FERA_CHECK(op, r.experts >= 1 && r.experts <= FERA_MAX_EXPERTS, "experts", "from 1 to 32", r.experts);
  FERA_CHECK(op, r.tau > 0 && std::isfinite(r.tau), "tau", "positive and finite", r.tau);
  FERA_CHECK(op, r.w1 && r.b1 && r.w2 && r.b2, "w1, b1, w2 and b2", "pointers", "NULL");
  return FERA_OK;
}

fera_status check_workspace(const char* op, const fera_context* context, size_t needed) {
  FERA_CHECK(op, context != nullptr, "context", "a pointer", "NULL");
  const bool enough = needed == 0 || (context->workspace != nullptr && context->workspace_bytes >= needed);
  const bool aligned = reinterpret_cast<uintptr_t>(context->workspace) % 256 == 0;
  FERA_CHECK(op, enough, "workspace", "at least " + std::to_string(needed) + " bytes", context->workspace_bytes);
  FERA_CHECK(op, needed == 0 || aligned, "workspace", "aligned to 256 bytes", "another address");
  return FERA_OK;
}

fera_status check_dropout(const char* op, double dropout, const int64_t* seed) {
  FERA_CHECK(op, dropout >= 0 && dropout < 1, "dropout", "in [0, 1)", dropout);
  FERA_CHECK(op, seed != nullptr || dropout == 0, "seed", "a pointer with dropout", "NULL");
  FERA_CHECK(op, seed == nullptr || dropout > 0, "seed", "NULL without dropout", "a pointer");
  return FERA_OK;
}

fera_status check_experts(const char* op, const fera_experts& e) {
  const int64_t stacked = int64_t{e.experts} * e.rank;
  FERA_CHECK(op, e.tokens >= 0 && e.in >= 1 && e.out >= 1, "tokens, in and out", "at least 0, 1 and 1",
             std::min(e.tokens, std::min(e.in, e.out)));
  FERA_CHECK(op, e.tokens < (int64_t{1} << 31) && e.in < (int64_t{1} << 24) && e.out < (int64_t{1} << 24),
             "tokens, in and out", "below 2^31, 2^24 and 2^24", std::max(e.tokens, std::max(e.in, e.out)));
  FERA_CHECK(op, e.experts >= 1 && e.experts <= FERA_MAX_EXPERTS, "experts", "from 1 to 32", e.experts);
  FERA_CHECK(op, e.rank >= 1 && stacked <= FERA_MAX_RANK, "experts * rank", "from 1 to 512", stacked);
  FERA_CHECK(op, is_dtype(e.a_dtype) && is_dtype(e.b_dtype), "lora dtype", "float32, float16, bfloat16 or float64",
             static_cast<int>(is_dtype(e.a_dtype) ? e.b_dtype : e.a_dtype));
  FERA_CHECK(op, e.rows_per_gate >= 1 || e.tokens == 0, "rows_per_gate", "positive", e.rows_per_gate);
  FERA_CHECK(op, e.tokens == 0 || e.tokens % e.rows_per_gate == 0, "tokens",
             "a multiple of rows_per_gate " + std::to_string(e.rows_per_gate), e.tokens);
  FERA_CHECK(op, e.lora_a && e.lora_b && (e.gate || e.tokens == 0), "lora_a, lora_b and gate", "pointers", "NULL");
  FERA_CHECK(op, std::isfinite(e.scale), "scale", "finite", e.scale);
  return check_dropout(op, e.dropout, e.seed);
}

fera_status check(const fera_band_energy_args& a) {
  const char* op = "band_energy";
  FERA_RETURN_IF_ERROR(check_latent(op, "z", a.z));
  FERA_RETURN_IF_ERROR(check_filters(op, a.filters));
  FERA_CHECK(op, a.eps >= 0 && std::isfinite(a.eps), "eps", "finite and not negative", a.eps);
  return FERA_OK;
}

fera_status check(const fera_band_energy_backward_args& a) {
  const char* op = "band_energy_backward";
  FERA_RETURN_IF_ERROR(check_latent(op, "z", a.z));
  FERA_RETURN_IF_ERROR(check_filters(op, a.filters));
  FERA_RETURN_IF_ERROR(check_same_latent(op, "dz", a.dz, a.z));
  FERA_CHECK(op, a.grad || a.z.n == 0, "grad", "a pointer", "NULL");
  FERA_CHECK(op, !a.indicator == !a.total || a.z.n == 0, "indicator and total", "given together", "one");
  return FERA_OK;
}

fera_status check(const fera_router_softmax_args& a) {
  const char* op = "router_softmax";
  FERA_RETURN_IF_ERROR(check_router(op, a.router));
  FERA_CHECK(op, a.n >= 0 && a.n < (int64_t{1} << 31), "n", "from 0 to 2^31 - 1", a.n);
  FERA_CHECK(op, (a.energy && a.gate) || a.n == 0, "energy and gate", "pointers", "NULL");
  return FERA_OK;
}

fera_status check(const fera_router_softmax_backward_args& a) {
  const char* op = "router_softmax_backward";
  FERA_RETURN_IF_ERROR(check_router(op, a.router));
  FERA_CHECK(op, a.n >= 0 && a.n < (int64_t{1} << 31), "n", "from 0 to 2^31 - 1", a.n);
  FERA_CHECK(op, (a.energy && a.gate && a.grad) || a.n == 0, "energy, gate and grad", "pointers", "NULL");
  FERA_CHECK(op, !a.dw1 == !a.db1 && !a.dw1 == !a.dw2 && !a.dw1 == !a.db2, "dw1, db1, dw2 and db2", "given together",
             "some");
  return FERA_OK;
}

fera_status check(const fera_latent_gate_args& a) {
  const char* op = "latent_gate";
  FERA_RETURN_IF_ERROR(check_latent(op, "z", a.energy.z));
  FERA_RETURN_IF_ERROR(check_filters(op, a.energy.filters));
  FERA_RETURN_IF_ERROR(check_router(op, a.router));
  FERA_CHECK(op, a.energy.eps >= 0 && std::isfinite(a.energy.eps), "eps", "finite and not negative", a.energy.eps);
  FERA_CHECK(op, a.router.bands == a.energy.filters.bands, "w1 columns",
             "the number of bands " + std::to_string(a.energy.filters.bands), a.router.bands);
  FERA_CHECK(op, a.router.dtype == compute_dtype(a.energy.z.dtype), "router.dtype", "the compute dtype of z",
             static_cast<int>(a.router.dtype));
  FERA_CHECK(op, (a.gate && a.energy.indicator) || a.energy.z.n == 0, "gate and indicator", "pointers", "NULL");
  return FERA_OK;
}

fera_status check(const fera_fecl_loss_args& a) {
  const char* op = "fecl_loss";
  FERA_RETURN_IF_ERROR(check_latent(op, "fera", a.fera));
  FERA_RETURN_IF_ERROR(check_same_latent(op, "base", a.base, a.fera));
  FERA_RETURN_IF_ERROR(check_same_latent(op, "target", a.target, a.fera));
  FERA_RETURN_IF_ERROR(check_filters(op, a.filters));
  FERA_CHECK(op, a.eps >= 0 && std::isfinite(a.eps), "eps", "finite and not negative", a.eps);
  FERA_CHECK(op, a.loss != nullptr, "loss", "a pointer", "NULL");
  FERA_CHECK(op, !a.gradient == !a.factor || a.fera.n * a.fera.p == 0, "gradient and factor", "given together", "one");
  return FERA_OK;
}

fera_status check(const fera_fecl_loss_backward_args& a) {
  const char* op = "fecl_loss_backward";
  FERA_RETURN_IF_ERROR(check_latent(op, "dfera", a.dfera));
  FERA_CHECK(op, (a.gradient && a.factor && a.grad) || a.dfera.n * a.dfera.p == 0, "gradient, factor and grad",
             "pointers", "NULL");
  return FERA_OK;
}

namespace {

fera_status check_rows(const char* op, const char* name, const fera_rows& rows, fera_dtype dtype, int64_t tokens,
                       int64_t width) {
  FERA_CHECK(op, rows.dtype == dtype, std::string(name) + ".dtype", "the dtype of x", static_cast<int>(rows.dtype));
  FERA_CHECK(op, rows.data != nullptr || tokens == 0, name, "a pointer", "NULL");
  FERA_CHECK(op, rows.stride >= width || tokens <= 1, std::string(name) + ".stride",
             "at least " + std::to_string(width), rows.stride);
  return FERA_OK;
}

}  // namespace

fera_status check(const fera_expert_update_args& a) {
  const char* op = "expert_update";
  FERA_RETURN_IF_ERROR(check_experts(op, a.experts));
  FERA_CHECK(op, is_dtype(a.x.dtype), "x.dtype", "float32, float16, bfloat16 or float64", static_cast<int>(a.x.dtype));
  // Rows of x and base may repeat (stride 0, an expanded tensor): they are only read.
  if (a.weight.data != nullptr) {
    FERA_CHECK(op, (a.x.data && a.h) || a.experts.tokens == 0, "x and h", "pointers", "NULL");
    FERA_RETURN_IF_ERROR(check_rows(op, "weight", a.weight, a.x.dtype, a.experts.out, a.experts.in));
  } else {
    FERA_CHECK(op, (a.x.data && a.base.data && a.h) || a.experts.tokens == 0, "x, base and h", "pointers", "NULL");
    FERA_CHECK(op, a.base.dtype == a.x.dtype, "base.dtype", "the dtype of x", static_cast<int>(a.base.dtype));
  }
  return check_rows(op, "y", a.y, a.x.dtype, a.experts.tokens, a.experts.out);
}

fera_status check(const fera_expert_update_backward_args& a) {
  const char* op = "expert_update_backward";
  FERA_RETURN_IF_ERROR(check_experts(op, a.experts));
  FERA_CHECK(op, is_dtype(a.x.dtype), "x.dtype", "float32, float16, bfloat16 or float64", static_cast<int>(a.x.dtype));
  FERA_CHECK(op, (a.x.data && a.dy.data && a.h) || a.experts.tokens == 0, "x, dy and h", "pointers", "NULL");
  FERA_CHECK(op, a.dy.dtype == a.x.dtype, "dy.dtype", "the dtype of x", static_cast<int>(a.dy.dtype));
  if (a.weight.data != nullptr) {
    FERA_RETURN_IF_ERROR(check_rows(op, "weight", a.weight, a.x.dtype, a.experts.out, a.experts.in));
    FERA_CHECK(op, !a.add_to_dx, "add_to_dx", "0 with a weight", a.add_to_dx);
  }
  if (a.dx.data) return check_rows(op, "dx", a.dx, a.x.dtype, a.experts.tokens, a.experts.in);
  return FERA_OK;
}

fera_status check(const fera_expert_dropout_args& a) {
  const char* op = "expert_dropout";
  FERA_CHECK(op, a.tokens >= 0 && a.tokens < (int64_t{1} << 31), "tokens", "from 0 to 2^31 - 1", a.tokens);
  FERA_CHECK(op, a.in >= 1 && a.in < (int64_t{1} << 24), "in", "from 1 to 2^24 - 1", a.in);
  FERA_CHECK(op, is_dtype(a.x.dtype), "x.dtype", "float32, float16, bfloat16 or float64", static_cast<int>(a.x.dtype));
  FERA_CHECK(op, a.x.data || a.tokens == 0, "x", "a pointer", "NULL");
  FERA_RETURN_IF_ERROR(check_dropout(op, a.dropout, a.seed));
  return check_rows(op, "y", a.y, a.x.dtype, a.tokens, a.in);
}

}  // namespace fera
