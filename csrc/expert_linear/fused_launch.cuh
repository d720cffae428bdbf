// Host side of the fused product for one place of h: tensor maps, the tile it takes for a size, the launch.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <string>
#include <utility>

#include "expert_linear/fused.cuh"
#include "expert_linear/fused.h"
#include "expert_linear/fused_host.h"
#include "expert_linear/launch.h"

namespace fera::cuda {

// kNarrow: R padded, where this kernel makes u; 0 where another does.
template <int kN, bool kNMajor, int kCluster, Place kPlace, int kNarrow>
bool encode(FusedMaps* maps, int i, const Product& p) {
  const fera_dtype t = p.x.dtype;
  const int64_t stride = p.weight.stride;
  constexpr int kShare = kN / kCluster;
  const auto narrow = [&](CUtensorMap* map) {
    return encode_rows(map, t, p.narrow.a, p.depth, kNarrow, p.depth, 64, kNarrow);
  };
  return encode_rows(&maps->x[i], t, p.x.data, p.depth, p.rows, p.x.stride, 64, kFusedRows) &&
         (kPlace == Place::inside ? narrow(&maps->u[i])
                                  : encode_rows(&maps->u[i], t, p.u, p.rank, p.rows, p.rank, 64, kFusedRows)) &&
         (kPlace != Place::beside || narrow(&maps->narrow[i])) &&
         encode_rows(&maps->y[i], t, p.y.data, p.columns, p.rows, p.y.stride, 32, kPieceRows) &&
         (kNMajor ? encode_rows(&maps->w[i], t, p.weight.data, p.columns, p.depth, stride, 64, 64) &&
                        encode_rows(&maps->v[i], t, p.v, p.columns, p.rank, p.columns, 64, 64)
                  : encode_rows(&maps->w[i], t, p.weight.data, p.depth, p.columns, stride, 64, kShare) &&
                        encode_rows(&maps->v[i], t, p.v, p.rank, p.columns, p.rank, 64, kShare));
}

// The kernel's arguments; a sentence in fera_last_error where CUDA refuses a tensor map.
template <int kN, bool kNMajor, int kCluster, Place kPlace, int kNarrow, class T>
fera_status prepare(const char* op, const Products& p, FusedMaps* maps, FusedShape<T>* shape) {
  constexpr bool kBeside = kPlace == Place::beside;
  bool encoded = true;
  int column_tiles = 0;
  shape->members = p.members;
  shape->summed = p.summed;
  for (int i = 0; i < p.members; ++i) {
    const Product& m = p.member[i];
    encoded = encoded && encode<kN, kNMajor, kCluster, kPlace, kNarrow>(maps, i, m);
    shape->bias[i] = static_cast<const T*>(m.bias);
    shape->columns[i] = static_cast<int>(m.columns);
    shape->first_tile[i] = p.summed ? 0 : column_tiles;
    shape->blocks[i] = static_cast<int>(ceil_div(m.depth, int64_t{kFusedDepth}));
    shape->rank_steps[i] = ceil_div(m.rank, 16);
    const Narrow& in = m.narrow;
    shape->hidden[i] = {in.gate, in.rows_per_gate, in.experts, in.each, in.scale, in.h};
    if (i == 0 || !p.summed) column_tiles += static_cast<int>(ceil_div(m.columns, int64_t{kN}));
    if constexpr (kBeside) {
      const Items& items = m.items;
      shape->beside[i] = {static_cast<const T*>(items.h),
                          static_cast<T*>(const_cast<void*>(m.u)),
                          items.db,
                          items.da,
                          items.gate_sums,
                          items.ready + 1,
                          static_cast<int>(m.depth),
                          static_cast<int>(p.other_columns)};
    }
  }
  const Product& one = p.member[0];
  shape->rows = static_cast<int>(one.rows);
  const int row_tiles = static_cast<int>(ceil_div(one.rows, int64_t{kFusedRows * kCluster}));
  shape->plan = schedule_of(row_tiles, column_tiles, kBeside ? p.members : 0, 0, hopper() / kCluster);
  if constexpr (kBeside) {
    shape->queue = one.items.ready;
    shape->other_blocks = static_cast<int>(ceil_div(p.other_columns, int64_t{kFusedDepth}));
    if (kNMajor)
      encoded = encoded && encode_rows(&maps->other, p.other.dtype, p.other.data, p.other_columns, one.rows,
                                       p.other.stride, 64, kFusedRows);
  }
  return encoded ? FERA_OK : refused_map(op);
}

template <class T, int kN, bool kNMajor, int kCluster, Place kPlace, int kNarrow>
fera_status launch(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  constexpr int kInside = kPlace == Place::inside ? kNarrow : 0, kBeside = kPlace == Place::beside ? kNarrow : 0;
  FusedMaps maps;
  FusedShape<T> shape{};
  FERA_RETURN_IF_ERROR((prepare<kN, kNMajor, kCluster, kPlace, kNarrow>(op, p, &maps, &shape)));
  const int blocks = std::min(hopper() / kCluster, shape.plan.works) * kCluster;
  return launch_kernel(op, fused_product<T, kN, kNMajor, kCluster, kInside, kBeside>, static_cast<unsigned>(blocks),
                       kFusedThreads, FusedSize<kN, kNMajor, kInside>::bytes, kCluster, follows, stream, maps, shape);
}

// Widths of tiles there are kernels for.
template <int kCluster, bool kInside>
struct Widths {
  using type = std::integer_sequence<int, 192, 160>;
};
template <>
struct Widths<2, false> {
  using type = std::integer_sequence<int, 256, 224, 192, 160, 128>;
};
template <>
struct Widths<2, true> {  // an instruction has at most 256 columns, those of h with them
  using type = std::integer_sequence<int, 224, 192, 160, 128>;
};

// When `slots` clusters that take items one by one, those of time `side` first, have done them all.
inline double finish(int64_t slots, int64_t sides, double side, int64_t tiles, double tile) {
  const int64_t more = sides % slots;  // clusters that take one item more than the others
  double early = static_cast<double>(sides / slots) * side, late = early + (more > 0 ? side : 0);
  while (tiles > 0) {
    double& next = more == 0 || early <= late ? early : late;
    tiles -= &next == &early ? slots - more : more;
    next += tile;
  }
  return std::max(early, late);
}

// Microseconds of a tile of 128 rows, `width` columns, `depth` numbers along k, and of an item beside the tiles that
// reads 128 rows of `columns` numbers. Measured on an H200: of a wave of tiles without items at K 640 and 3072, five
// widths; with items fitted to both passes of five layers (640 to 12288 wide) at five widths, to 8 % of the time; the
// width it then chooses is within 1 % of the best of the five in each.
template <Place kPlace>
double tile_time(int width, double depth) {
  if constexpr (kPlace != Place::beside) return 1.05 + 4.8e-5 * width * depth;
  const double each = width <= 128   ? 5.6e-3
                      : width <= 160 ? 6.7e-3
                      : width <= 192 ? 7.45e-3
                      : width <= 224 ? 8.9e-3
                                     : 10.2e-3;
  return 3.35 + each * depth;
}
inline double item_time(int width, double columns) { return 4.1 + (width < 192 ? 3.1e-3 : 5.6e-3) * columns; }

// Of the widths the one that takes least time.
template <Place kPlace, int... kWidths>
int tile_columns(const Products& p, int cluster, int narrow, std::integer_sequence<int, kWidths...>) {
  const char* wish = std::getenv("FERA_EXPERT_TILE");  // for tests and timings: a width, where there is one
  const int forced = wish == nullptr ? 0 : std::atoi(wish);
  int best = 0;
  double least = 1e30;
  const int64_t rows = ceil_div(p.member[0].rows, int64_t{cluster} * kFusedRows);
  double depth = static_cast<double>(p.member[0].depth);
  const double read = depth + static_cast<double>(p.other_columns);  // beside: dy and x, or x alone
  for (int i = 1; i < p.members && p.summed; ++i) depth += static_cast<double>(p.member[i].depth);
  for (const int width : {kWidths...}) {
    int64_t tiles = 0;
    for (int i = 0; i < (p.summed ? 1 : p.members); ++i) tiles += rows * ceil_div(p.member[i].columns, int64_t{width});
    const double time =
        finish(hopper() / cluster, kPlace == Place::beside ? rows * p.members : 0, item_time(width, read), tiles,
               tile_time<kPlace>(width + (kPlace == Place::inside ? narrow : 0), depth));
    if (width == forced) return width;
    if (time < least) best = width, least = time;
  }
  return best;
}

template <class T, bool kNMajor, int kCluster, Place kPlace, int kNarrow, int... kWidths>
fera_status launch_width(const char* op, const Products& p, bool follows, cudaStream_t stream,
                         std::integer_sequence<int, kWidths...> widths) {
  const int columns = tile_columns<kPlace>(p, kCluster, kNarrow, widths);
  fera_status status = FERA_OK;
  ((columns == kWidths &&
    (status = launch<T, kWidths, kNMajor, kCluster, kPlace, kNarrow>(op, p, follows, stream), true)) ||
   ...);
  return status;
}

// f(std::integral_constant) for one of two values.
template <int kFirst, int kSecond, class F>
fera_status either(bool first, F f) {
  return first ? f(std::integral_constant<int, kFirst>{}) : f(std::integral_constant<int, kSecond>{});
}

template <Place kPlace, class T>
fera_status launch_products(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  const Product& first = p.member[0];
  // Where the loop over k is short, two blocks that wait for each other cost more than the loads they share.
  return either<1, 2>(first.depth <= 384, [&](auto cluster) {
    constexpr int kCluster = decltype(cluster)::value;
    constexpr typename Widths<kCluster, kPlace == Place::inside>::type kWidths{};
    const auto run = [&](auto n_major, auto narrow) {
      return launch_width<T, decltype(n_major)::value != 0, kCluster, kPlace, decltype(narrow)::value>(op, p, follows,
                                                                                                       stream, kWidths);
    };
    if constexpr (kPlace == Place::inside)
      return either<16, 32>(first.rank == 16, [&](auto narrow) { return run(Constant<0>{}, narrow); });
    else
      return either<1, 0>(first.n_major, [&](auto n_major) {
        if constexpr (kPlace == Place::outside)
          return run(n_major, Constant<0>{});
        else
          return either<16, 32>(first.rank == 16, [&](auto narrow) { return run(n_major, narrow); });
      });
  });
}
template <Place kPlace>
fera_status launch_products(const char* op, const Products& p, bool follows, cudaStream_t stream) {
  return p.member[0].x.dtype == FERA_BF16 ? launch_products<kPlace, Bfloat>(op, p, follows, stream)
                                          : launch_products<kPlace, Half>(op, p, follows, stream);
}

// One file each, so that they compile side by side.
extern template fera_status launch_products<Place::outside>(const char*, const Products&, bool, cudaStream_t);
extern template fera_status launch_products<Place::inside>(const char*, const Products&, bool, cudaStream_t);
extern template fera_status launch_products<Place::beside>(const char*, const Products&, bool, cudaStream_t);

}  // namespace fera::cuda
