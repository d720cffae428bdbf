// Host side of wide.cuh: what wide ranks are taken, how the work is cut, the launches.
#include "expert_linear/wide.cuh"
#include "expert_linear/wide.h"
#include "expert_linear/wide_host.h"

namespace fera::cuda {
namespace {

constexpr int64_t kLeastGateRows = 64;  // a step of cross
constexpr int64_t kLargePartial = int64_t{64} << 20;

// Whether pairs of tiles waste no more than an eleventh of the blocks.
bool pairs_well(int64_t tiles) { return tiles % 2 == 0 || tiles > 10; }
int64_t paired(int64_t tiles, int pair) { return ceil_div(tiles, int64_t{pair}) * pair; }

const char* refuses(const fera_experts& e, fera_dtype dtype, const void* h) {
  if (dtype != FERA_BF16 && dtype != FERA_F16) return "x is not of 16 bits";
  if (e.rows_per_gate < 1) return "rows_per_gate is below 1";  // arguments that are not checked yet
  if (stacked_of(e) % 16 != 0) return "experts * rank is above 32 and not a multiple of 16";
  if (e.in % 8 != 0 || e.out % 8 != 0) return "in or out is not a multiple of 8";
  for (const fera_dtype t : {e.a_dtype, e.b_dtype})
    if (t != FERA_F32 && t != dtype) return "A or B is neither float32 nor of x's dtype";
  if (e.tokens > kMostTokens || std::max(e.in, e.out) > kMostColumns) return "tokens, in or out is above 2^28 or 2^24";
  if (!aligned(h)) return "h is not aligned to 16 bytes";
  return "";
}

// Blocks that share a tile's loop over k: enough to keep most of the machine at work, two stages each at least.
int splits_of(int64_t tiles, int depth, int pair) {
  int splits = 1;
  while (splits * pair < 8 && tiles * splits * 4 < int64_t{hopper()} * 3 && depth >= splits * 4) splits *= 2;
  return splits;
}

template <class T>
WideProject<T> project_of(const fera_experts& e, int64_t depth, int pair, void* h, void* gated) {
  const int column_tiles = wide_tiles(stacked_of(e)), steps = static_cast<int>(ceil_div(depth, int64_t{kWideDepth}));
  const int tiles = static_cast<int>(paired(wide_tiles(e.tokens), pair)) * column_tiles;
  const int splits = splits_of(tiles, steps, pair);
  WideProject<T> p{};
  p.blocks = tiles * splits;
  p.splits = splits;
  p.column_tiles = column_tiles;
  p.depth = steps;
  p.tokens = static_cast<int>(e.tokens);
  p.ranks = static_cast<int>(stacked_of(e));
  p.gates = wide_gates(e);
  p.h = static_cast<T*>(h);
  p.gated = static_cast<T*>(gated);
  return p;
}

// How cross is cut: the time of the blocks is that of all multiprocessors at work, then half a block's until the last
// has ended; or one block's. `taken`: blocks of the same launch that project.
Slices slices_of(int64_t tokens, int64_t layers, int64_t m, int64_t n, int pair, int64_t taken) {
  const double tiles = static_cast<double>(std::min(wide_tiles(m), wide_tiles(n)) *
                                           paired(std::max(wide_tiles(m), wide_tiles(n)), pair));
  return cut_slices(tokens, layers, m, n, [&](double work, double slices) {
    const double many = tiles * slices * (work * 0.33 + 0.8) / std::max(hopper(), 1) + work * 0.25;
    return std::max(many, work * (taken > 0 ? 0.7 : 0.45) + 2);
  });
}

template <class T>
WideCross<T> cross_of(const Slices& cut, int pair, float* partial) {
  const int rows = wide_tiles(cut.m), columns = wide_tiles(cut.n);
  const int64_t tiles = std::min(rows, columns) * paired(std::max(rows, columns), pair);
  return {static_cast<int>(tiles) * cut.count(),
          {rows, columns, static_cast<int>(cut.m), static_cast<int>(cut.n), cut.steps, cut.steps_per_slice,
           cut.slices_per_gate, cut.count(), partial, nullptr, nullptr}};
}

// Of the launch that projects T x R tiles and crosses M x N.
int pair_of(const fera_experts& e, bool projects, int64_t m, int64_t n) {
  const bool rows = !projects || pairs_well(wide_tiles(e.tokens));
  return rows && pairs_well(std::max(wide_tiles(m), wide_tiles(n))) ? 2 : 1;
}

// The cuts do not depend on which gradients are asked for, so neither do their bits.
struct Layout {
  int pair, da_pair;  // of the launch that makes dh and dy^T h; of that of dA
  Slices db, da;
  Workspace workspace;
  WideCasts casts;
  const void *a, *b;
  void* gated;
  float *db_sums, *da_sums, *gate_sums;
  bool with_dh, with_m;  // dh = dy B; dy^T h
  Layout(const fera_expert_update_backward_args& g, void* base)
      : pair(pair_of(g.experts, true, g.experts.out, stacked_of(g.experts))),
        da_pair(pair_of(g.experts, false, stacked_of(g.experts), g.experts.in)),
        db(slices_of(g.experts.rows_per_gate, g.experts.tokens / g.experts.rows_per_gate, g.experts.out,
                     stacked_of(g.experts), pair,
                     project_of<Half>(g.experts, g.experts.out, pair, nullptr, nullptr).blocks)),
        da(slices_of(g.experts.tokens, 1, stacked_of(g.experts), g.experts.in, da_pair, 0)),
        workspace(base),
        casts(g.x.dtype),
        with_dh(g.dx.data != nullptr || g.da != nullptr),
        with_m(g.db != nullptr || g.dgate != nullptr) {
    const fera_experts& e = g.experts;
    const int64_t stacked = stacked_of(e);
    a = g.dx.data ? casts.take(e.lora_a, e.a_dtype, stacked * e.in, &workspace) : nullptr;
    b = g.dx.data || g.da || g.dgate ? casts.take(e.lora_b, e.b_dtype, stacked * e.out, &workspace) : nullptr;
    gated = workspace.take<Half>(with_dh ? e.tokens * stacked : 0);
    db_sums = workspace.take<float>(with_m ? db.count() * e.out * stacked : 0);
    da_sums = workspace.take<float>(g.da ? da.count() * e.in * stacked : 0);
    gate_sums = workspace.take<float>(g.dgate ? int64_t{db.count()} * wide_tiles(e.out) * stacked : 0);
  }
};

template <class T>
fera_status forward(const fera_expert_update_args& a, const fera_context* context, LowRank* term) {
  const char* op = "expert_update";
  const fera_experts& e = a.experts;
  const int64_t stacked = stacked_of(e);
  Workspace workspace(context->workspace);
  WideCasts casts(a.x.dtype);
  const void* lora_a = casts.take(e.lora_a, e.a_dtype, stacked * e.in, &workspace);
  const void* lora_b = casts.take(e.lora_b, e.b_dtype, stacked * e.out, &workspace);
  T* gated = workspace.take<T>(e.tokens * stacked);
  *term = {gated, lora_b, static_cast<int>(stacked)};
  const int pair = pairs_well(wide_tiles(e.tokens)) ? 2 : 1;
  const WideProject<T> p = project_of<T>(e, e.in, pair, a.h, gated);
  WideMaps maps{};
  if (!encode_rows(&maps.x, a.x.dtype, a.x.data, e.in, e.tokens, a.x.stride, kWideDepth, kWideTile) ||
      !encode_rows(&maps.w, a.x.dtype, lora_a, e.in, stacked, e.in, kWideDepth, kWideTile / pair))
    return refused_map(op);
  FERA_RETURN_IF_ERROR(casts.launch(op, stream_of(context)));
  return launch_kernel(op, pair == 2 ? wide<T, false, 2> : wide<T, false, 1>, p.blocks, kWideThreads, kWideBytes,
                       p.splits * pair, !casts.empty(), stream_of(context), maps, p, WideCross<T>{});
}

template <class T>
fera_status backward(const fera_expert_update_backward_args& a, const fera_context* context, LowRank* term) {
  const char* op = "expert_update_backward";
  const fera_experts& e = a.experts;
  const fera_dtype dtype = a.x.dtype;
  const int64_t stacked = stacked_of(e), groups = e.tokens / e.rows_per_gate;
  const cudaStream_t stream = stream_of(context);
  const Layout l(a, context->workspace);
  *term = {l.gated, l.a, static_cast<int>(stacked)};
  WideMaps first{}, second{};
  WideProject<T> p{};
  WideCross<T> c{}, d{};
  bool encoded = true;
  if (l.with_dh) {
    p = project_of<T>(e, e.out, l.pair, nullptr, l.gated);
    encoded = encode_rows(&first.x, dtype, a.dy.data, e.out, e.tokens, a.dy.stride, kWideDepth, kWideTile) &&
              encode_rows(&first.w, dtype, l.b, stacked, e.out, stacked, 64, kWideDepth);
  }
  if (l.with_m) {
    c = cross_of<T>(l.db, l.pair, l.db_sums);
    c.of.b = static_cast<const T*>(l.b);
    c.of.gate_sums = a.dgate ? l.gate_sums : nullptr;
    encoded =
        encoded &&
        encode_layers(&first.left, dtype, a.dy.data, e.out, e.rows_per_gate, groups, a.dy.stride, 64, kWideDepth) &&
        encode_layers(&first.right, dtype, a.h, stacked, e.rows_per_gate, groups, stacked, 64, kWideDepth);
  }
  if (a.da) {
    d = cross_of<T>(l.da, l.da_pair, l.da_sums);
    encoded = encoded && encode_layers(&second.left, dtype, l.gated, stacked, e.tokens, 1, stacked, 64, kWideDepth) &&
              encode_layers(&second.right, dtype, a.x.data, e.in, e.tokens, 1, a.x.stride, 64, kWideDepth);
  }
  if (!encoded) return refused_map(op);

  const auto kernel = [](int pair) { return pair == 2 ? wide<T, true, 2> : wide<T, true, 1>; };
  FERA_RETURN_IF_ERROR(l.casts.launch(op, stream));
  bool follows = !l.casts.empty();
  if (l.with_dh || l.with_m) {
    const int cluster = std::max(p.splits, 1) * l.pair;
    FERA_RETURN_IF_ERROR(launch_kernel(op, kernel(l.pair), p.blocks + ceil_div(c.blocks, cluster) * cluster,
                                       kWideThreads, kWideBytes, cluster, follows, stream, first, p, c));
    follows = true;
  }
  if (a.da)
    FERA_RETURN_IF_ERROR(launch_kernel(op, kernel(l.da_pair), d.blocks, kWideThreads, kWideBytes, l.da_pair, follows,
                                       stream, second, WideProject<T>{}, d));
  const WideReduce r{static_cast<int>(stacked),
                     {wide_sums_of(a, l.da, false, l.db, l.da_sums, l.db_sums, l.gate_sums)}};
  return launch_wide_reduce(op, r, stream);
}

}  // namespace

const char* wide_refuses(const fera_expert_update_args& a) {
  const char* why = refuses(a.experts, a.x.dtype, a.h);
  if (*why != 0) return why;
  if (!fits(a.x) || !fits(a.y)) return "rows of x or y are not aligned to 16 bytes";
  if (a.x.stride < a.experts.in) return "rows of x repeat";  // a tensor map has no stride of 0
  return "";
}

const char* wide_refuses(const fera_expert_update_backward_args& a) {
  const fera_experts& e = a.experts;
  const char* why = refuses(e, a.x.dtype, a.h);
  if (*why != 0) return why;
  if (!fits(a.x) || !fits(a.dy) || !fits(a.dx)) return "rows of x, dy or dx are not aligned to 16 bytes";
  if (a.x.stride < e.in || a.dy.stride < e.out) return "rows of x or dy repeat";
  const int64_t groups = e.tokens / std::max<int64_t>(1, e.rows_per_gate);
  if (groups > 1 && e.rows_per_gate < kLeastGateRows) return "a gate row has fewer than 64 tokens";
  // A slice of the sums is of one gate row: they must not outgrow dy.
  if (groups * e.out * stacked_of(e) * 4 > kLargePartial && e.rows_per_gate < 2 * stacked_of(e))
    return "a gate row has fewer than 2 * experts * rank tokens";
  return "";
}

size_t wide_workspace(const fera_expert_update_args& a) {
  const fera_experts& e = a.experts;
  Workspace workspace(nullptr);
  WideCasts casts(a.x.dtype);
  casts.take(e.lora_a, e.a_dtype, stacked_of(e) * e.in, &workspace);
  casts.take(e.lora_b, e.b_dtype, stacked_of(e) * e.out, &workspace);
  workspace.take<Half>(e.tokens * stacked_of(e));
  return workspace.used();
}
size_t wide_workspace(const fera_expert_update_backward_args& a) { return Layout(a, nullptr).workspace.used(); }

fera_status wide_down(const fera_expert_update_args& a, const fera_context* context, LowRank* term) {
  return a.x.dtype == FERA_BF16 ? forward<Bfloat>(a, context, term) : forward<Half>(a, context, term);
}
fera_status wide_across(const fera_expert_update_backward_args& a, const fera_context* context, LowRank* term) {
  return a.x.dtype == FERA_BF16 ? backward<Bfloat>(a, context, term) : backward<Half>(a, context, term);
}

}  // namespace fera::cuda
