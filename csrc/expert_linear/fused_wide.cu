// Host side of fused_wide.cuh: tensor maps, the width of tiles, the launch.
#include <cstdlib>

#include "expert_linear/fused_wide.cuh"
#include "expert_linear/wide_host.h"

namespace fera::cuda {
namespace {

// A member's maps: rows by gate rows, V one a gate row.
template <int kN, bool kNMajor, int kCluster>
bool encode(WideProductMaps* maps, int i, const Product& p) {
  const fera_dtype t = p.x.dtype;
  const int64_t layers = p.items.layers, rows = p.rows / layers, rank = p.rank, stride = p.weight.stride;
  constexpr int kShare = kN / kCluster;
  return encode_layers(&maps->x[i], t, p.x.data, p.depth, rows, layers, p.x.stride, 64, kWideTile) &&
         encode_layers(&maps->u[i], t, p.u, rank, rows, layers, rank, 64, kWideTile) &&
         encode_layers(&maps->u_out[i], t, p.u, rank, rows, layers, rank, 32, kPieceRows) &&
         encode_layers(&maps->y[i], t, p.y.data, p.columns, rows, layers, p.y.stride, 32, kPieceRows) &&
         (kNMajor ? encode_rows(&maps->w[i], t, p.weight.data, p.columns, p.depth, stride, 64, kWideDepth) &&
                        encode_rows(&maps->first[i], t, p.narrow.a, rank, p.depth, rank, 64, kWideDepth) &&
                        encode_layers(&maps->v[i], t, p.v, p.columns, rank, layers, p.columns, 64, kWideDepth)
                  : encode_rows(&maps->w[i], t, p.weight.data, p.depth, p.columns, stride, 64, kShare) &&
                        encode_rows(&maps->first[i], t, p.narrow.a, p.depth, rank, p.depth, 64, kWideTile / kCluster) &&
                        encode_layers(&maps->v[i], t, p.v, rank, p.columns, layers, rank, 64, kShare));
}

// Items that cross: dB's of the members, then dA's; how many there are for clusters.
template <class T, int kCluster>
bool cross_jobs(const Products& p, WideProductMaps* maps, WideShape<T>* shape, int* crosses) {
  const fera_dtype t = p.member[0].x.dtype;
  const int64_t ranks = p.member[0].rank;
  bool encoded = true;
  int parts = 0;
  const auto add = [&](const Slices& cut, const fera_rows& left, const fera_rows& right, float* partial) {
    const int j = shape->jobs++;
    const auto layers = [&](CUtensorMap* map, const fera_rows& r, int64_t width) {
      return encode_layers(map, t, r.data, width, p.member[0].rows / cut.layers, cut.layers, r.stride, 64, kWideDepth);
    };
    encoded = encoded && layers(&maps->left[j], left, cut.m) && layers(&maps->right[j], right, cut.n);
    const int rows = wide_tiles(cut.m), columns = wide_tiles(cut.n);
    CrossJob<T>& job = shape->job[j];
    job.of = {rows,
              columns,
              static_cast<int>(cut.m),
              static_cast<int>(cut.n),
              cut.steps,
              cut.steps_per_slice,
              cut.slices_per_gate,
              cut.count(),
              partial,
              nullptr,
              nullptr};
    job.first = parts;
    job.arrivals = nullptr;
    job.tiles = Quotient(rows * columns);
    job.rows = Quotient(rows);
    job.slices = Quotient(cut.slices_per_gate);
    parts += ceil_div(rows * columns * cut.count(), kCluster) * kCluster;
    return &job;
  };
  for (int i = 0; i < p.members; ++i) {
    const Items& items = p.member[i].items;
    if (items.db == nullptr) continue;
    CrossJob<T>* job = add(items.db_slices, p.member[i].x, {const_cast<void*>(items.h), t, ranks}, items.db);
    job->of.b = static_cast<const T*>(p.member[i].narrow.a);
    job->of.gate_sums = items.gate_sums;
  }
  for (int i = 0; i < p.members; ++i) {
    const Items& items = p.member[i].items;
    if (items.da == nullptr) continue;
    add(items.da_slices, {const_cast<void*>(p.member[i].u), t, ranks}, p.other, items.da)->arrivals = items.ready + 1;
  }
  *crosses = parts / kCluster;
  return encoded;
}

template <class T, int kN, bool kNMajor, int kCluster>
fera_status launch(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  WideProductMaps maps;
  WideShape<T> shape{};
  const Product& one = p.member[0];
  const int clusters = hopper() / kCluster;
  bool encoded = true;
  int column_tiles = 0, crosses = 0;
  shape.members = p.members;
  shape.summed = p.summed;
  for (int i = 0; i < p.members; ++i) {
    const Product& m = p.member[i];
    encoded = encoded && encode<kN, kNMajor, kCluster>(&maps, i, m);
    shape.bias[i] = static_cast<const T*>(m.bias);
    shape.columns[i] = static_cast<int>(m.columns);
    shape.first_tile[i] = p.summed ? 0 : column_tiles;
    shape.blocks[i] = static_cast<int>(ceil_div(m.depth, int64_t{kWideDepth}));
    shape.arrivals[i] = m.items.ready + 1;
    if (i == 0 || !p.summed) column_tiles += static_cast<int>(ceil_div(m.columns, int64_t{kN}));
  }
  shape.queue = one.items.ready;
  shape.ranks = one.rank;
  shape.rank_tiles = wide_tiles(one.rank);
  shape.rank_blocks = ceil_div(one.rank, kWideDepth);
  shape.gate_tiles = wide_tiles(one.rows / one.items.layers);
  const int row_items = p.members * shape.rank_tiles;
  shape.by_gate_tiles = Quotient(shape.gate_tiles);
  shape.by_row_items = Quotient(row_items);
  shape.by_rank_tiles = Quotient(shape.rank_tiles);
  if (kNMajor) encoded = encoded && cross_jobs<T, kCluster>(p, &maps, &shape, &crosses);
  if (!encoded) return refused_map(op);
  shape.plan = schedule_of(ceil_div(shape.gate_tiles * one.items.layers, kCluster), column_tiles, row_items, crosses,
                           2 * clusters);
  const unsigned blocks = static_cast<unsigned>(std::min(clusters, shape.plan.works) * kCluster);
  return launch_kernel(op, fused_wide<T, kN, kNMajor, kCluster>, blocks, kFusedThreads, WideSize<kN, kNMajor>::bytes,
                       kCluster, follows, stream, maps, shape);
}

// Tiles of 160 columns read less a column, unless W is read along n, by boxes of 64; of 128 where those have much past
// the end.
int tile_columns(const Products& p) {
  if (const char* wish = std::getenv("FERA_EXPERT_TILE")) {  // for tests and timings
    const int columns = std::atoi(wish);
    if (columns == 128 || columns == 160) return columns;
  }
  int64_t of_128 = 0, of_160 = 0;
  for (int i = 0; i < (p.summed ? 1 : p.members); ++i) {
    of_128 += ceil_div(p.member[i].columns, int64_t{128}) * 128;
    of_160 += ceil_div(p.member[i].columns, int64_t{160}) * 160;
  }
  return of_160 <= (p.member[0].n_major ? of_128 - of_128 / 10 : of_128 + of_128 / 20) ? 160 : 128;
}

template <class T, int kN, bool kNMajor>
fera_status launch_cluster(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  const char* wish = std::getenv("FERA_EXPERT_CLUSTER");  // for tests and timings
  // Where works are few, two blocks that wait for each other cost more than the loads they share.
  int64_t tiles = 0;
  for (int i = 0; i < (p.summed ? 1 : p.members); ++i)
    tiles += ceil_div(p.member[i].rows, int64_t{kWideTile}) * ceil_div(p.member[i].columns, int64_t{kN});
  const int cluster = wish ? std::atoi(wish) : tiles >= 2 * hopper() ? 2 : 1;
  return cluster == 1 ? launch<T, kN, kNMajor, 1>(op, p, follows, stream)
                      : launch<T, kN, kNMajor, 2>(op, p, follows, stream);
}
template <class T, int kN>
fera_status launch_width(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  return p.member[0].n_major ? launch_cluster<T, kN, true>(op, p, follows, stream)
                             : launch_cluster<T, kN, false>(op, p, follows, stream);
}
template <class T>
fera_status launch_type(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  return tile_columns(p) == 160 ? launch_width<T, 160>(op, p, follows, stream)
                                : launch_width<T, 128>(op, p, follows, stream);
}

}  // namespace

fera_status launch_wide_products(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  return p.member[0].x.dtype == FERA_BF16 ? launch_type<Bfloat>(op, p, follows, stream)
                                          : launch_type<Half>(op, p, follows, stream);
}

}  // namespace fera::cuda
