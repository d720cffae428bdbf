// Host side of wide.cuh: what it takes, how it cuts the work, its launches.
#include <algorithm>

#include "expert_linear/fused_host.h"
#include "expert_linear/operands.h"
#include "expert_linear/wide.cuh"
#include "expert_linear/wide.h"
#include "expert_linear/wide_sums.cuh"

namespace fera::cuda {
namespace {

constexpr int64_t kLeastGateRows = 64;  // a step of cross
constexpr int64_t kLargePartial = int64_t{64} << 20;

// Whether pairs of tiles waste no more than an eleventh of the blocks.
bool pairs_well(int64_t tiles) { return tiles % 2 == 0 || tiles > 10; }
int64_t paired(int64_t tiles, int pair) { return ceil_div(tiles, int64_t{pair}) * pair; }
int tiles_of(int64_t width) { return static_cast<int>(ceil_div(width, int64_t{kWideTile})); }

const char* refuses(const fera_experts& e, fera_dtype dtype, const void* h) {
  if (dtype != FERA_BF16 && dtype != FERA_F16) return "x is not of 16 bits";
  if (stacked_of(e) % 16 != 0) return "experts * rank is above 32 and not a multiple of 16";
  if (e.in % 8 != 0 || e.out % 8 != 0) return "in or out is not a multiple of 8";
  for (const fera_dtype t : {e.a_dtype, e.b_dtype})
    if (t != FERA_F32 && t != dtype) return "A or B is neither float32 nor of x's dtype";
  if (e.tokens > kMostTokens || std::max(e.in, e.out) > kMostColumns) return "tokens, in or out is above 2^28 or 2^24";
  if (!aligned(h)) return "h is not aligned to 16 bytes";
  return "";
}

WideGates gates_of(const fera_experts& e) {
  return {static_cast<const float*>(e.gate), static_cast<int>(e.rows_per_gate), e.experts, e.rank,
          static_cast<float>(e.scale)};
}

// `follows`: another kernel of the same call was launched just before, and this one waits for it itself.
template <class... Parameters>
fera_status launch(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, int bytes, int cluster,
                   bool follows, cudaStream_t stream, const Parameters&... parameters) {
  cudaError_t error = cudaSuccess;
  if (bytes > 0) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    // Else the first level cache may be left so much that two blocks do not fit.
    cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  if (follows && overlap_wished()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count].val.programmaticStreamSerializationAllowed = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  if (error == cudaSuccess) cudaLaunchKernelEx(&config, kernel, parameters...);
  return launch_status(op);
}
fera_status refused_map(const char* op) {
  set_last_error(std::string(op) + ": " + fera_last_error());
  return FERA_CUDA_ERROR;
}

// A and B as tensor maps read them: in place, or a copy in the workspace.
struct Adapters {
  const void *a, *b;
  WideCast cast{};
  Adapters(const fera_experts& e, fera_dtype dtype, bool with_a, bool with_b, Workspace* workspace)
      : a(e.lora_a), b(e.lora_b) {
    if (with_a) add(0, &a, e.a_dtype, dtype, stacked_of(e) * e.in, workspace);
    if (with_b) add(1, &b, e.b_dtype, dtype, stacked_of(e) * e.out, workspace);
  }
  bool empty() const { return cast.eights[0] + cast.eights[1] == 0; }
  fera_status launch_cast(const char* op, fera_dtype dtype, cudaStream_t stream) const {
    if (empty()) return FERA_OK;
    const auto kernel = dtype == FERA_BF16 ? wide_cast<Bfloat> : wide_cast<Half>;
    return launch(op, kernel, ceil_div(cast.eights[0] + cast.eights[1], int64_t{256}), 256, 0, 1, false, stream, cast);
  }

 private:
  void add(int i, const void** weights, fera_dtype from, fera_dtype to, int64_t count, Workspace* workspace) {
    if (from == to && aligned(*weights)) return;
    cast.from[i] = *weights;
    cast.to[i] = workspace->take<Half>(count);
    cast.eights[i] = count / 8;
    cast.masters[i] = from == FERA_F32;
    cast.aligned[i] = aligned(*weights);
    *weights = cast.to[i];
  }
};

// Blocks that share a tile's loop over k: enough to keep most of the machine at work, two stages each at least.
int splits_of(int64_t tiles, int depth, int pair) {
  int splits = 1;
  while (splits * pair < 8 && tiles * splits * 4 < int64_t{hopper()} * 3 && depth >= splits * 4) splits *= 2;
  return splits;
}

template <class T>
WideProject<T> project_of(const fera_experts& e, int64_t depth, int pair, void* h, void* gated) {
  const int column_tiles = tiles_of(stacked_of(e)), steps = static_cast<int>(ceil_div(depth, int64_t{kWideDepth}));
  const int tiles = static_cast<int>(paired(tiles_of(e.tokens), pair)) * column_tiles;
  const int splits = splits_of(tiles, steps, pair);
  WideProject<T> p{};
  p.blocks = tiles * splits;
  p.splits = splits;
  p.column_tiles = column_tiles;
  p.depth = steps;
  p.tokens = static_cast<int>(e.tokens);
  p.ranks = static_cast<int>(stacked_of(e));
  p.gates = gates_of(e);
  p.h = static_cast<T*>(h);
  p.gated = static_cast<T*>(gated);
  return p;
}

// How cross cuts `layers` of `rows` tokens into slices. Their number weighs the time of the blocks (microseconds: all
// multiprocessors at work, then half a block's time until the last has ended; or one block's time) against that of
// writing and reading the partial sums. `taken`: blocks of the same launch that project.
struct Cut {
  int64_t m, n;
  int pair, tiles;  // tiles of a slice, in pairs
  int steps, steps_per_slice, slices_per_gate, slices;
  Cut(int64_t tokens, int64_t layers, int64_t rows, int64_t columns, int pair_of, int64_t taken)
      : m(rows), n(columns), pair(pair_of), steps(static_cast<int>(ceil_div(tokens, int64_t{kWideDepth}))) {
    tiles = static_cast<int>(std::min(tiles_of(m), tiles_of(n)) * paired(std::max(tiles_of(m), tiles_of(n)), pair));
    const double sm = std::max(hopper(), 1);
    double least = 1e30;
    steps_per_slice = steps;
    for (const int64_t wanted : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128}) {
      const int64_t per_slice = ceil_div<int64_t>(steps, wanted), each = ceil_div<int64_t>(steps, per_slice);
      const double blocks = static_cast<double>(tiles * each * layers), work = static_cast<double>(per_slice);
      const double many = blocks * (work * 0.33 + 0.8) / sm + work * 0.25, one = work * (taken > 0 ? 0.7 : 0.45) + 2;
      const double time = std::max(many, one) + 8.0 * static_cast<double>(each * layers * m * n) / 2.5e6;
      if (time < least) least = time, steps_per_slice = static_cast<int>(per_slice);
    }
    slices_per_gate = ceil_div(steps, steps_per_slice);
    slices = slices_per_gate * static_cast<int>(layers);
  }
};

template <class T>
WideCross<T> cross_of(const Cut& cut, float* partial) {
  WideCross<T> c{};
  c.blocks = cut.tiles * cut.slices;
  c.row_tiles = tiles_of(cut.m);
  c.column_tiles = tiles_of(cut.n);
  c.rows = static_cast<int>(cut.m);
  c.columns = static_cast<int>(cut.n);
  c.steps = cut.steps;
  c.steps_per_slice = cut.steps_per_slice;
  c.slices_per_gate = cut.slices_per_gate;
  c.partial = partial;
  return c;
}

// Of the launch that projects T x R tiles and crosses M x N.
int pair_of(const fera_experts& e, bool projects, int64_t m, int64_t n) {
  const bool rows = !projects || pairs_well(tiles_of(e.tokens));
  return rows && pairs_well(std::max(tiles_of(m), tiles_of(n))) ? 2 : 1;
}

// The cuts do not depend on which gradients are asked for, so neither do their bits.
struct Layout {
  int pair;  // of the launch that makes dh and dy^T h
  Cut db, da;
  Workspace workspace;
  Adapters adapters;
  void* gated;
  float *db_sums, *da_sums, *gate_sums;
  bool with_dh, with_m;  // dh = dy B; dy^T h
  Layout(const fera_expert_update_backward_args& a, void* base)
      : pair(pair_of(a.experts, true, a.experts.out, stacked_of(a.experts))),
        db(a.experts.rows_per_gate, a.experts.tokens / a.experts.rows_per_gate, a.experts.out, stacked_of(a.experts),
           pair, project_of<Half>(a.experts, a.experts.out, pair, nullptr, nullptr).blocks),
        da(a.experts.tokens, 1, stacked_of(a.experts), a.experts.in,
           pair_of(a.experts, false, stacked_of(a.experts), a.experts.in), 0),
        workspace(base),
        adapters(a.experts, a.x.dtype, a.dx.data != nullptr, a.dx.data || a.da || a.dgate, &workspace),
        with_dh(a.dx.data != nullptr || a.da != nullptr),
        with_m(a.db != nullptr || a.dgate != nullptr) {
    const fera_experts& e = a.experts;
    const int64_t stacked = stacked_of(e);
    gated = workspace.take<Half>(with_dh ? e.tokens * stacked : 0);
    db_sums = workspace.take<float>(with_m ? db.slices * e.out * stacked : 0);
    da_sums = workspace.take<float>(a.da ? da.slices * e.in * stacked : 0);
    gate_sums = workspace.take<float>(a.dgate ? int64_t{db.slices} * tiles_of(e.out) * stacked : 0);
  }
};

template <class T>
fera_status forward(const fera_expert_update_args& a, const fera_context* context, LowRank* term) {
  const char* op = "expert_update";
  const fera_experts& e = a.experts;
  const int64_t stacked = stacked_of(e);
  Workspace workspace(context->workspace);
  const Adapters adapters(e, a.x.dtype, true, true, &workspace);
  T* gated = workspace.take<T>(e.tokens * stacked);
  *term = {gated, adapters.b, static_cast<int>(stacked)};
  const int pair = pairs_well(tiles_of(e.tokens)) ? 2 : 1;
  const WideProject<T> p = project_of<T>(e, e.in, pair, a.h, gated);
  WideMaps maps{};
  if (!encode_rows(&maps.x, a.x.dtype, a.x.data, e.in, e.tokens, a.x.stride, kWideDepth, kWideTile) ||
      !encode_rows(&maps.w, a.x.dtype, adapters.a, e.in, stacked, e.in, kWideDepth, kWideTile / pair))
    return refused_map(op);
  FERA_RETURN_IF_ERROR(adapters.launch_cast(op, a.x.dtype, stream_of(context)));
  return launch(op, pair == 2 ? wide<T, false, 2> : wide<T, false, 1>, p.blocks, kWideThreads, kWideBytes,
                p.splits * pair, !adapters.empty(), stream_of(context), maps, p, WideCross<T>{});
}

template <class T>
fera_status backward(const fera_expert_update_backward_args& a, const fera_context* context, LowRank* term) {
  const char* op = "expert_update_backward";
  const fera_experts& e = a.experts;
  const fera_dtype dtype = a.x.dtype;
  const int64_t stacked = stacked_of(e), groups = e.tokens / e.rows_per_gate;
  const cudaStream_t stream = stream_of(context);
  const Layout l(a, context->workspace);
  *term = {l.gated, l.adapters.a, static_cast<int>(stacked)};
  WideMaps first{}, second{};
  WideProject<T> p{};
  WideCross<T> c{}, d{};
  bool encoded = true;
  if (l.with_dh) {
    p = project_of<T>(e, e.out, l.pair, nullptr, l.gated);
    encoded = encode_rows(&first.x, dtype, a.dy.data, e.out, e.tokens, a.dy.stride, kWideDepth, kWideTile) &&
              encode_rows(&first.w, dtype, l.adapters.b, stacked, e.out, stacked, 64, kWideDepth);
  }
  if (l.with_m) {
    c = cross_of<T>(l.db, l.db_sums);
    c.b = static_cast<const T*>(l.adapters.b);
    c.gate_sums = a.dgate ? l.gate_sums : nullptr;
    encoded =
        encoded &&
        encode_layers(&first.left, dtype, a.dy.data, e.out, e.rows_per_gate, groups, a.dy.stride, 64, kWideDepth) &&
        encode_layers(&first.right, dtype, a.h, stacked, e.rows_per_gate, groups, stacked, 64, kWideDepth);
  }
  if (a.da) {
    d = cross_of<T>(l.da, l.da_sums);
    encoded = encoded && encode_layers(&second.left, dtype, l.gated, stacked, e.tokens, 1, stacked, 64, kWideDepth) &&
              encode_layers(&second.right, dtype, a.x.data, e.in, e.tokens, 1, a.x.stride, 64, kWideDepth);
  }
  if (!encoded) return refused_map(op);

  const auto kernel = [](int pair) { return pair == 2 ? wide<T, true, 2> : wide<T, true, 1>; };
  FERA_RETURN_IF_ERROR(l.adapters.launch_cast(op, dtype, stream));
  bool follows = !l.adapters.empty();
  if (l.with_dh || l.with_m) {
    const int cluster = std::max(p.splits, 1) * l.pair;
    FERA_RETURN_IF_ERROR(launch(op, kernel(l.pair), p.blocks + ceil_div(c.blocks, cluster) * cluster, kWideThreads,
                                kWideBytes, cluster, follows, stream, first, p, c));
    follows = true;
  }
  if (a.da)
    FERA_RETURN_IF_ERROR(launch(op, kernel(l.da.pair), d.blocks, kWideThreads, kWideBytes, l.da.pair, follows, stream,
                                second, WideProject<T>{}, d));
  WideReduce r{};
  r.gates = gates_of(e);
  r.ranks = static_cast<int>(stacked);
  const auto sum = [&](const float* partial, const Cut& cut, bool gated, int64_t width, void* out, fera_dtype to) {
    const int64_t fours = width * stacked / 4;
    return WideSum{partial, cut.slices,   cut.slices_per_gate,
                   gated,   fours,        out,
                   to,      aligned(out), static_cast<int>(ceil_div(fours, int64_t{kReduceFours}))};
  };
  if (a.da) r.a = sum(l.da_sums, l.da, false, e.in, a.da, e.a_dtype);
  if (a.db) r.b = sum(l.db_sums, l.db, true, e.out, a.db, e.b_dtype);
  if (a.dgate) {
    r.gate_sums = l.gate_sums;
    r.gate_slices = l.db.slices_per_gate * tiles_of(e.out);
    r.gate_blocks = static_cast<int>(groups * e.experts);
    r.dgate = static_cast<float*>(a.dgate);
  }
  const int64_t blocks = int64_t{r.a.blocks} + r.b.blocks + r.gate_blocks;
  if (blocks == 0) return FERA_OK;
  return launch(op, wide_reduce, blocks, kReduceFours * kReduceShares, 0, 1, true, stream, r);
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
  Workspace workspace(nullptr);
  const Adapters adapters(a.experts, a.x.dtype, true, true, &workspace);
  workspace.take<Half>(a.experts.tokens * stacked_of(a.experts));
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
