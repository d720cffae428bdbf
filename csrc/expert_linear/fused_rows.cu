// Host side of fused_rows.cuh: tensor maps, the launch.
#include "expert_linear/fused_launch.cuh"
#include "expert_linear/fused_rows.cuh"

namespace fera::cuda {
namespace {

bool encode(FusedMaps* maps, int i, const Product& p) {
  const fera_dtype t = p.x.dtype;
  return encode_rows(&maps->x[i], t, p.x.data, p.depth, p.rows, p.x.stride, 64, kFusedRows) &&
         encode_rows(&maps->w[i], t, p.weight.data, p.columns, p.depth, p.weight.stride, 64, kFusedDepth) &&
         encode_rows(&maps->narrow[i], t, p.narrow.a, p.depth, kRowsRank, p.depth, 64, kRowsRank) &&
         encode_rows(&maps->v[i], t, p.v, p.columns, kRowsRank, p.columns, 64, kRowsRank);
}

template <class T, bool kGroup>
fera_status run(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  FusedMaps maps;
  FusedShape<T> shape{};
  const Product& one = p.member[0];
  // dx is one, the first member's.
  bool encoded = encode_rows(&maps.y[0], one.x.dtype, one.y.data, one.columns, one.rows, one.y.stride, 32, kPieceRows);
  bool sums = false;
  shape.members = p.members;
  shape.rows = static_cast<int>(one.rows);
  int64_t depth = 0;
  for (int i = 0; i < p.members; ++i) depth += p.member[i].depth;
  const RowsCut cut = cut_rows(one.rows, one.columns, depth);
  shape.passes = cut.passes;
  shape.plan = schedule_of(static_cast<int>(ceil_div(one.rows, int64_t{kFusedRows})), cut.shares, 0, 0, hopper());
  for (int i = 0; i < p.members; ++i) {
    const Product& m = p.member[i];
    encoded = encoded && encode(&maps, i, m);
    shape.columns[i] = static_cast<int>(m.columns);
    shape.blocks[i] = static_cast<int>(ceil_div(m.depth, int64_t{kFusedDepth}));
    const Narrow& in = m.narrow;
    shape.hidden[i] = {in.gate, in.rows_per_gate, in.experts, in.each, in.scale, nullptr};
    const Items& items = m.items;
    shape.beside[i] = {static_cast<const T*>(items.h),
                       nullptr,
                       items.db,
                       items.da,
                       items.gate_sums,
                       nullptr,
                       static_cast<int>(m.depth),
                       static_cast<int>(p.other_columns)};
    sums = sums || items.da != nullptr;
  }
  if (sums) {
    shape.other_blocks = static_cast<int>(ceil_div(p.other_columns, int64_t{kFusedDepth}));
    encoded = encoded && encode_rows(&maps.other, p.other.dtype, p.other.data, p.other_columns, one.rows,
                                     p.other.stride, 64, kFusedRows);
  }
  if (!encoded) return refused_map(op);
  return launch_kernel(op, fused_rows<T, kGroup>, static_cast<unsigned>(shape.plan.tiles), kFusedThreads,
                       RowsSize<kGroup>::bytes, 1, follows, stream, maps, shape);
}

template <class T>
fera_status launch_type(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  return p.members > 1 ? run<T, true>(op, p, follows, stream) : run<T, false>(op, p, follows, stream);
}

}  // namespace

// Blocks run one after the other on a multiprocessor: a pass's block of 64 along k, and a block's start and ends, on an
// H200.
RowsCut cut_rows(int64_t rows, int64_t columns, int64_t depth) {
  const int64_t tiles = ceil_div(rows, int64_t{kFusedRows});
  const int all = static_cast<int>(ceil_div(columns, int64_t{RowsSize<false>::columns}));
  RowsCut best{};
  double least = 1e30;
  // For tests and timings: the columns of a block, a multiple of a pass's.
  const char* wish = std::getenv("FERA_EXPERT_TILE");
  const int wished = wish == nullptr ? 0 : std::min(std::atoi(wish) / RowsSize<false>::columns, all);
  for (int passes = all; passes >= 1; --passes) {
    if (wished > 0 && passes != wished) continue;
    const int shares = ceil_div(all, passes);
    const double waves = static_cast<double>(ceil_div(tiles * shares, int64_t{std::max(hopper(), 1)}));
    const double time = waves * (0.0125 * static_cast<double>(passes) * static_cast<double>(depth) + 9);
    if (time < least) best = {shares, passes, tiles * shares}, least = time;
  }
  return best;
}

fera_status launch_rows(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  return p.member[0].x.dtype == FERA_BF16 ? launch_type<Bfloat>(op, p, follows, stream)
                                          : launch_type<Half>(op, p, follows, stream);
}

}  // namespace fera::cuda
