// CPU entry points of expert_update: packed panels, blocks of tokens forward, blocks of columns for dA and dB.
#include <algorithm>
#include <type_traits>

#include "common/carver.h"
#include "common/cpu_parallel.h"
#include "common/dispatch.h"
#include "expert_linear/expert_linear.h"
#include "expert_linear/products_cpu.h"

namespace fera {
namespace {

using cpu::Product;
using cpu::ProductKernels;

constexpr int64_t kDepth = 256;  // length of a product between two trips to memory
constexpr int64_t kWidest = 32;  // no panel is wider
constexpr int64_t kGroup = 4;    // panels of columns that share a chunk of tiles

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <class T>
ProductKernels<T> products_of() {
  ProductKernels<float> f{};
  ProductKernels<double> d{};
#if FERA_CPU_X86
  if (cpu::cpu_isa() == cpu::Isa::avx512)
    cpu::avx512::products(&f, &d);
  else if (cpu::cpu_isa() == cpu::Isa::avx2)
    cpu::avx2::products(&f, &d);
  else
#endif
    cpu::generic::products(&f, &d);
  if constexpr (sizeof(T) == 8)
    return d;
  else
    return f;
}

// A (k, n) operand as panels of `width` columns, each (k, width) contiguous and padded with zeros.
template <class T>
struct Panels {
  T* data = nullptr;
  int64_t k = 0, n = 0, width = 0;
  const T* at(int64_t panel, int64_t row) const { return data + (panel * k + row) * width; }
  int64_t count() const { return (n + width - 1) / width; }
  int64_t columns(int64_t panel) const { return std::min(width, n - panel * width); }
};

template <class T>
struct Plan {
  fera_experts e;
  fera_dtype dtype;  // of x
  ProductKernels<T> kernels;
  int64_t stacked, padded;  // R, and the row length of (., R) scratch
  int64_t block, blocks;    // tokens a unit, units
  int64_t slots, slot_elements;
  bool direct;  // x's dtype is the compute dtype
  bool drops;
  Dropout dropout;
};

template <class T>
Plan<T> make_plan(const fera_experts& e, fera_dtype dtype) {
  Plan<T> p;
  p.e = e;
  p.dtype = dtype;
  p.kernels = products_of<T>();
  p.stacked = int64_t{e.experts} * e.rank;
  p.padded = round_up(p.stacked, kWidest);
  p.block = e.tokens <= 4096 ? 48 : 96;
  p.blocks = (e.tokens + p.block - 1) / p.block;
  p.slots = std::min<int64_t>(64, std::max(p.blocks, int64_t{1}));
  // h, h gated and the gates; one chunk of tokens in the compute dtype; one panel of results.
  p.slot_elements =
      (2 * p.block + 1) * p.padded + p.block * kDepth + std::max(p.block, p.padded) * kWidest + kDepth * kWidest;
  // Or, for dA and dB, kGroup packed panels and their results.
  p.slot_elements = round_up(std::max(p.slot_elements, (kDepth + p.padded) * kGroup * kWidest), 64);
  p.direct = dtype == compute_dtype(dtype);
  p.drops = e.dropout > 0;
  p.dropout = dropout_of(e);
  return p;
}

template <class T>
Panels<T> take_panels(const Plan<T>& p, int64_t k, int64_t n, Carver* carver) {
  Panels<T> panels;
  panels.k = k;
  panels.n = n;
  panels.width = n <= p.kernels.panel_width / 2 ? p.kernels.panel_width / 2 : p.kernels.panel_width;
  // Room for the widest level, so that the workspace does not depend on the machine.
  panels.data = carver->take<T>(k * round_up(n, kWidest));
  return panels;
}

// Element (i, j) of the operand is from[i * columns + j] of a contiguous matrix; panels run over j, or, transposed,
// the panels' k is j and their n is i.
template <class T>
void pack(const Plan<T>& p, const void* from, fera_dtype dtype, bool transposed, const Panels<T>& to,
          const fera_context* context) {
  const int64_t steps = (to.k + kDepth - 1) / kDepth;
  cpu::parallel_for(context, to.count() * steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const int64_t panel = u / steps, k0 = u % steps * kDepth, depth = std::min(kDepth, to.k - k0);
      const int64_t n0 = panel * to.width, columns = to.columns(panel);
      T* out = to.data + (panel * to.k + k0) * to.width;
      if (!transposed) {
        for (int64_t i = 0; i < depth; ++i, out += to.width) {
          p.kernels.widen_row(from, dtype, p.dtype, (k0 + i) * to.n + n0, columns, out);
          for (int64_t j = columns; j < to.width; ++j) out[j] = 0;
        }
        continue;
      }
      for (int64_t j0 = 0; j0 < to.width; j0 += 4) {
        T row[4][kDepth];
        for (int64_t j = 0; j < 4; ++j) {
          if (j0 + j < columns)
            p.kernels.widen_row(from, dtype, p.dtype, (n0 + j0 + j) * to.k + k0, depth, row[j]);
          else
            std::fill(row[j], row[j] + depth, T{0});
        }
        for (int64_t i = 0; i < depth; ++i)
          for (int64_t j = 0; j < std::min<int64_t>(4, to.width - j0); ++j) out[i * to.width + j0 + j] = row[j][i];
      }
    }
  });
}

// out (tokens, n) = rows (tokens, k) of `x` from t0 on, times panels; `chunk` holds converted rows. `masked`: of what
// dropout keeps of them.
template <class T>
void rows_product(const Plan<T>& p, const fera_rows& x, bool masked, int64_t t0, int64_t tokens,
                  const Panels<T>& panels, T* out, int64_t out_stride, T* chunk) {
  for (int64_t k0 = 0; k0 < panels.k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, panels.k - k0);
    const T* a = static_cast<const T*>(x.data) + t0 * x.stride + k0;
    int64_t a_step = x.stride;
    if (!p.direct || masked) {
      for (int64_t t = 0; t < tokens; ++t)
        p.kernels.widen_row(x.data, x.dtype, x.dtype, (t0 + t) * x.stride + k0, depth, chunk + t * kDepth);
      if (masked) p.kernels.mask(p.dropout, {chunk, kDepth, t0, tokens, k0, depth});
      a = chunk;
      a_step = kDepth;
    }
    for (int64_t panel = 0; panel < panels.count(); ++panel) {
      T* to = out + panel * panels.width;
      p.kernels.product({a, a_step, tokens, panels.columns(panel), depth, panels.at(panel, k0), panels.width,
                         k0 == 0 ? nullptr : to, out_stride, to, out_stride});
    }
  }
}

// to rows = (init rows or 0) + a (tokens, R) panels, in x's dtype; `result` holds a panel of results. `masked`: of the
// product only what dropout keeps.
template <class T>
void product_to_rows(const Plan<T>& p, const T* a, bool masked, int64_t t0, int64_t tokens, const Panels<T>& panels,
                     const fera_rows* init, const fera_rows& to, T* result) {
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    const int64_t n0 = panel * panels.width, columns = panels.columns(panel);
    if (p.direct && !masked) {
      T* out = static_cast<T*>(to.data) + t0 * to.stride + n0;
      const T* from = init == nullptr ? nullptr : static_cast<const T*>(init->data) + t0 * init->stride + n0;
      p.kernels.product({a, p.padded, tokens, columns, panels.k, panels.at(panel, 0), panels.width, from,
                         init == nullptr ? 0 : init->stride, out, to.stride});
      continue;
    }
    p.kernels.product(
        {a, p.padded, tokens, columns, panels.k, panels.at(panel, 0), panels.width, nullptr, 0, result, panels.width});
    if (masked) p.kernels.mask(p.dropout, {result, panels.width, t0, tokens, n0, columns});
    for (int64_t t = 0; t < tokens; ++t)
      p.kernels.narrow_row(result + t * panels.width, init == nullptr ? nullptr : init->data,
                           init == nullptr ? 0 : (t0 + t) * init->stride + n0, to.data, (t0 + t) * to.stride + n0,
                           p.dtype, columns);
  }
}

// (R) factors gate scale of the token's gate row, written where the row changes.
template <class T>
void update_factors(const fera_experts& e, int64_t t, int64_t first, T* factors) {
  if (t != first && t % e.rows_per_gate != 0) return;
  const T* gate = static_cast<const T*>(e.gate) + t / e.rows_per_gate * e.experts;
  for (int m = 0; m < e.experts; ++m)
    std::fill(factors + m * e.rank, factors + (m + 1) * e.rank, gate[m] * static_cast<T>(e.scale));
}

// What dropout keeps is scaled in the (R) rows that it was multiplied into, or will be.
template <class T>
void scale_row(const Plan<T>& p, T* row) {
  for (int64_t i = 0; i < p.stacked; ++i) row[i] *= static_cast<T>(p.dropout.scale);
}

// Row t of a (T, R) operand into tiles of tile_height columns, each (T, tile_height).
template <class T>
void write_tiles(const Plan<T>& p, const T* row, int64_t t, T* tiles) {
  const int64_t height = p.kernels.tile_height;
  for (int64_t i = 0; i < p.stacked; i += height) {
    T* to = tiles + (i * p.e.tokens) + t * height;
    const int64_t count = std::min(height, p.stacked - i);
    for (int64_t j = 0; j < count; ++j) to[j] = row[i + j];
    for (int64_t j = count; j < height; ++j) to[j] = 0;
  }
}

template <class T>
size_t forward(const fera_expert_update_args& a, const fera_context* context) {
  Carver carver{context == nullptr ? nullptr : static_cast<char*>(context->workspace)};
  const Plan<T> p = make_plan<T>(a.experts, a.x.dtype);
  const Panels<T> down = take_panels(p, a.experts.in, p.stacked, &carver);
  const Panels<T> up = take_panels(p, p.stacked, a.experts.out, &carver);
  T* scratch = carver.take<T>(p.slots * p.slot_elements);
  if (context == nullptr) return carver.used;
  pack(p, a.experts.lora_a, a.experts.a_dtype, true, down, context);
  pack(p, a.experts.lora_b, a.experts.b_dtype, true, up, context);
  cpu::for_units(context, p.blocks, p.slots, 1, [&](int64_t unit, int64_t slot) {
    const int64_t t0 = unit * p.block, tokens = std::min(p.block, a.experts.tokens - t0);
    T* h = scratch + slot * p.slot_elements;
    T* gated = h + p.block * p.padded;
    T* chunk = gated + p.block * p.padded;
    T* result = chunk + p.block * kDepth;
    T* factors = result + p.block * kWidest;
    rows_product(p, a.x, p.drops, t0, tokens, down, h, p.padded, chunk);
    for (int64_t t = 0; t < tokens; ++t) {
      T* row = h + t * p.padded;
      if (p.drops) scale_row(p, row);
      p.kernels.narrow_row(row, nullptr, 0, a.h, (t0 + t) * p.stacked, p.dtype, p.stacked);
      if (!p.direct) p.kernels.widen_row(a.h, p.dtype, p.dtype, (t0 + t) * p.stacked, p.stacked, row);
      update_factors(a.experts, t0 + t, t0, factors);
      p.kernels.multiply_row(factors, row, p.stacked, gated + t * p.padded);
    }
    product_to_rows(p, gated, false, t0, tokens, up, &a.base, a.y, result);
  });
  return carver.used;
}

// Columns [n0, n0 + columns) of left^T rows: out (R, columns) = sum_t left[t][:] rows[t][n0 ...], tokens in order;
// `left` (T, R) is in tiles, a chunk of which serves all the panels of the columns; `chunk` holds them packed.
// `masked`: of what dropout keeps of the rows.
template <class T>
void columns_product(const Plan<T>& p, const T* left, const fera_rows& rows, bool masked, int64_t n0, int64_t columns,
                     T* chunk, T* out, int64_t out_stride) {
  const int64_t width = p.kernels.panel_width, height = p.kernels.tile_height;
  for (int64_t t0 = 0; t0 < p.e.tokens; t0 += kDepth) {
    const int64_t depth = std::min(kDepth, p.e.tokens - t0);
    const bool packed = !p.direct || masked || columns < width || p.stacked > height;
    const int64_t panel_step = kDepth * width;
    if (packed)
      p.kernels.pack_rows(rows.data, p.dtype, t0 * rows.stride + n0, rows.stride, depth, columns, chunk, panel_step);
    for (int64_t c0 = 0; c0 < columns; c0 += width) {
      const T* panel =
          packed ? chunk + c0 / width * panel_step : static_cast<const T*>(rows.data) + t0 * rows.stride + n0 + c0;
      if (masked)
        p.kernels.mask(p.dropout,
                       {chunk + c0 / width * panel_step, width, t0, depth, n0 + c0, std::min(width, columns - c0)});
      p.kernels.transposed_product({left + t0 * height, p.e.tokens * height, p.stacked, std::min(width, columns - c0),
                                    depth, panel, packed ? width : rows.stride, t0 == 0 ? nullptr : out + c0,
                                    out_stride, out + c0, out_stride});
    }
  }
  if (p.e.tokens == 0)
    for (int64_t i = 0; i < p.stacked; ++i) std::fill(out + i * out_stride, out + i * out_stride + columns, T{0});
}

template <class T>
size_t backward(const fera_expert_update_backward_args& a, const fera_context* context) {
  Carver carver{context == nullptr ? nullptr : static_cast<char*>(context->workspace)};
  const fera_experts& e = a.experts;
  const Plan<T> p = make_plan<T>(e, a.x.dtype);
  const bool to_dx = a.dx.data != nullptr, to_a = a.da != nullptr, to_b = a.db != nullptr, to_gate = a.dgate != nullptr;
  const bool needs_dh = to_dx || to_a || to_gate;
  Panels<T> down, up;
  if (needs_dh) down = take_panels(p, e.out, p.stacked, &carver);
  if (to_dx) up = take_panels(p, p.stacked, e.in, &carver);
  const int64_t tiled = e.tokens * (p.stacked + 16);  // no tile is higher than 16
  T* tiled_dh = to_a ? carver.take<T>(tiled) : nullptr;
  T* tiled_h = to_b ? carver.take<T>(tiled) : nullptr;
  T* dots = to_gate ? carver.take<T>(e.tokens * e.experts) : nullptr;  // scale h . dh by token and expert
  // Several panels a unit where the tiles are more than a cache line wide.
  const int64_t width = p.kernels.panel_width * (p.stacked > p.kernels.tile_height ? kGroup : 1);
  const int64_t a_panels = to_a ? (e.in + width - 1) / width : 0, b_panels = to_b ? (e.out + width - 1) / width : 0;
  const int64_t column_slots = std::min<int64_t>(64, a_panels + b_panels);
  T* scratch = carver.take<T>(std::max<int64_t>(p.slots, to_a || to_b ? 64 : 0) * p.slot_elements);
  if (context == nullptr) return carver.used;

  if (needs_dh) pack(p, e.lora_b, e.b_dtype, false, down, context);
  if (to_dx) pack(p, e.lora_a, e.a_dtype, false, up, context);
  cpu::for_units(context, p.blocks, p.slots, 1, [&](int64_t unit, int64_t slot) {
    const int64_t t0 = unit * p.block, tokens = std::min(p.block, e.tokens - t0);
    T* dh = scratch + slot * p.slot_elements;
    T* h = dh + p.block * p.padded;
    T* chunk = h + p.block * p.padded;
    T* result = chunk + p.block * kDepth;
    T* factors = result + p.block * kWidest;
    if (needs_dh) rows_product(p, a.dy, false, t0, tokens, down, dh, p.padded, chunk);
    for (int64_t t = t0; t < t0 + tokens; ++t) {
      T* dh_row = dh + (t - t0) * p.padded;
      update_factors(e, t, t0, factors);
      if (to_gate || to_b) p.kernels.widen_row(a.h, p.dtype, p.dtype, t * p.stacked, p.stacked, h);
      if (to_gate) p.kernels.grouped_dots(h, dh_row, e.experts, e.rank, dots + t * e.experts);
      if (to_b) {
        p.kernels.multiply_row(factors, h, p.stacked, h);
        write_tiles(p, h, t, tiled_h);
      }
      if (to_a || to_dx) p.kernels.multiply_row(factors, dh_row, p.stacked, dh_row);
      if (p.drops) scale_row(p, dh_row);
      if (to_a) write_tiles(p, dh_row, t, tiled_dh);
    }
    if (to_dx) product_to_rows(p, dh, p.drops, t0, tokens, up, a.add_to_dx ? &a.dx : nullptr, a.dx, result);
  });

  if (to_gate)
    cpu::parallel_for(context, e.tokens == 0 ? 0 : e.tokens / e.rows_per_gate, 16, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g)
        for (int m = 0; m < e.experts; ++m) {
          double sum = 0;
          for (int64_t t = g * e.rows_per_gate; t < (g + 1) * e.rows_per_gate; ++t)
            sum += static_cast<double>(dots[t * e.experts + m]);
          static_cast<T*>(a.dgate)[g * e.experts + m] = static_cast<T>(e.scale * sum);
        }
    });

  cpu::for_units(context, a_panels + b_panels, column_slots, 1, [&](int64_t unit, int64_t slot) {
    T* chunk = scratch + slot * p.slot_elements;
    T* out = chunk + kDepth * kGroup * kWidest;
    const bool is_a = unit < a_panels;
    const int64_t n0 = (is_a ? unit : unit - a_panels) * width, columns = std::min(width, (is_a ? e.in : e.out) - n0);
    columns_product(p, is_a ? tiled_dh : tiled_h, is_a ? a.x : a.dy, is_a && p.drops, n0, columns, chunk, out, width);
    for (int64_t i = 0; is_a && i < p.stacked; ++i)
      p.kernels.narrow_row(out + i * width, nullptr, 0, a.da, i * e.in + n0, e.a_dtype, columns);
    for (int64_t j = 0; !is_a && j < columns; ++j) {
      T row[FERA_MAX_RANK];
      for (int64_t i = 0; i < p.stacked; ++i) row[i] = out[i * width + j];
      p.kernels.narrow_row(row, nullptr, 0, a.db, (n0 + j) * p.stacked, e.b_dtype, p.stacked);
    }
  });
  return carver.used;
}

template <class T>
void drop(const fera_expert_dropout_args& a, const fera_context* context) {
  const ProductKernels<T> kernels = products_of<T>();
  const Dropout d = dropout_of(a.dropout, a.seed, a.stream);
  cpu::parallel_for(context, a.tokens, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < a.in; i += kDepth) {
        T row[kDepth];
        const int64_t columns = std::min(kDepth, a.in - i), to = t * a.y.stride + i;
        kernels.widen_row(a.x.data, a.x.dtype, a.x.dtype, t * a.x.stride + i, columns, row);
        if (a.dropout > 0) kernels.mask(d, {row, kDepth, t, 1, i, columns});
        for (int64_t j = 0; j < columns; ++j) row[j] *= static_cast<T>(d.scale);
        kernels.narrow_row(row, a.add_to_y ? a.y.data : nullptr, to, a.y.data, to, a.y.dtype, columns);
      }
  });
}

// Sizes that the entry point will refuse need no workspace.
bool possible(const fera_experts& e) {
  return e.tokens >= 0 && e.tokens < (int64_t{1} << 31) && e.in >= 1 && e.in < (int64_t{1} << 24) && e.out >= 1 &&
         e.out < (int64_t{1} << 24) && e.experts >= 1 && e.rank >= 1 && int64_t{e.experts} * e.rank <= FERA_MAX_RANK;
}

}  // namespace

size_t expert_update_workspace_cpu(const fera_expert_update_args& a) {
  if (!possible(a.experts)) return 0;
  return a.x.dtype == FERA_F64 ? forward<double>(a, nullptr) : forward<float>(a, nullptr);
}

size_t expert_update_backward_workspace_cpu(const fera_expert_update_backward_args& a) {
  if (!possible(a.experts)) return 0;
  return a.x.dtype == FERA_F64 ? backward<double>(a, nullptr) : backward<float>(a, nullptr);
}

size_t expert_dropout_workspace_cpu(const fera_expert_dropout_args&) { return 0; }

}  // namespace fera

extern "C" fera_status fera_expert_dropout_cpu(const fera_expert_dropout_args* args, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("expert_dropout", context, 0));
  return dispatch_compute(args->x.dtype, [&](auto tag) {
    drop<typename decltype(tag)::type>(*args, context);
    return FERA_OK;
  });
}

extern "C" fera_status fera_expert_update_cpu(const fera_expert_update_args* args, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_CHECK("expert_update", args->weight.data == nullptr, "weight", "NULL on the CPU", "a pointer");
  FERA_RETURN_IF_ERROR(check_workspace("expert_update", context, expert_update_workspace_cpu(*args)));
  return dispatch_compute(args->x.dtype, [&](auto tag) {
    forward<typename decltype(tag)::type>(*args, context);
    return FERA_OK;
  });
}

extern "C" fera_status fera_expert_update_backward_cpu(const fera_expert_update_backward_args* args,
                                                       const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_CHECK("expert_update_backward", args->weight.data == nullptr, "weight", "NULL on the CPU", "a pointer");
  FERA_RETURN_IF_ERROR(check_workspace("expert_update_backward", context, expert_update_backward_workspace_cpu(*args)));
  return dispatch_compute(args->x.dtype, [&](auto tag) {
    backward<typename decltype(tag)::type>(*args, context);
    return FERA_OK;
  });
}
