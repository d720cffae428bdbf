// Which of a persistent launch's works comes when: tiles of a product, and items of work beside them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/cuda_common.cuh"

namespace fera::cuda {

// n / divisor for 0 <= n < 2^31, without a division: factor = ceil(2^(32 + shift) / divisor), 2^shift >= divisor / 2.
struct Quotient {
  uint32_t divisor, factor, shift;
  Quotient() = default;
  explicit Quotient(int by) : divisor(static_cast<uint32_t>(by)), factor(0), shift(0) {
    if (by == 1) return;
    while ((2u << shift) < divisor) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << (32 + shift)) + divisor - 1) / divisor);
  }
  __device__ int operator()(int n) const {
    return divisor == 1 ? n : static_cast<int>(__umulhi(static_cast<uint32_t>(n), factor) >> shift);
  }
};

// What a number of the queue is: a tile; an item that makes rows of u for the tiles of its rows; or, of wide ranks, an
// item of the sums for dA and dB (fused_wide.cuh). `index` among its kind.
enum class Kind { tile, project, cross };
struct Work {
  Kind kind;
  int index;
};

// Rows are counted in tiles of a cluster's blocks. `lead` items come first, then tiles and items in proportion, a row's
// tiles to a row's items: as `lead` is a multiple of a row tile's items and at least a band's, every item comes before
// the tiles of its rows. Those of row tile q start at the q-th period, when lead + q * row_items items are out, and a
// band's rows are taken together. Items that cross are spread among what follows the last item that projects, less
// densely than needed, so that some are left to fill the end.
struct Schedule {
  int row_tiles, column_tiles, tiles;
  int bands, height;  // of row tiles; the last band may be lower
  Quotient by_band, by_height, by_last_height;
  int items, lead, row_items;  // row_items: of a row tile
  int periods;                 // of tiles and items by turns
  Quotient by_period;
  int made, crosses, gap;  // made: numbers until every item that projects is out; gap: numbers between two that cross
  Quotient by_gap;         // gap + 1
  int works;               // all numbers of the queue
};

// `slots`: works at one time.
inline Schedule schedule_of(int row_tiles, int column_tiles, int row_items, int crosses, int slots) {
  Schedule s{};
  s.row_tiles = row_tiles;
  s.column_tiles = column_tiles;
  s.tiles = row_tiles * column_tiles;
  // Rows go in bands of at most ten, columns within a band, so that the tiles at work at one time share both in L2.
  s.height = ceil_div(row_tiles, ceil_div(row_tiles, 10));
  s.bands = ceil_div(row_tiles, s.height);
  s.by_band = Quotient(s.height * std::max(column_tiles, 1));
  s.by_height = Quotient(s.height);
  s.by_last_height = Quotient(row_tiles - (s.bands - 1) * s.height);
  s.row_items = row_items;
  s.items = row_tiles * row_items;
  // Items come before the tiles of the same rows by twice what is done at one time, else tiles, which may be shorter,
  // would wait for them.
  const int period = column_tiles + row_items, ahead = 2 * ceil_div(slots, std::max(period, 1));
  s.lead = std::min(row_tiles, s.height + ahead) * row_items;
  s.periods = row_items > 0 ? (s.items - s.lead) / row_items : 0;
  s.by_period = Quotient(std::max(period, 1));
  const int others = s.items + s.tiles;
  s.made = s.lead + s.periods * period;
  s.crosses = crosses;
  s.gap = crosses > 0 ? static_cast<int>(int64_t{others - s.made} * 4 / (3 * int64_t{crosses})) : others;
  s.by_gap = Quotient(s.gap + 1);
  s.works = others + crosses;
  return s;
}

struct TilePlace {
  int row, column;
};
__device__ inline TilePlace tile_at(const Schedule& s, int index) {
  const int band = s.by_band(index), inside = index - band * s.height * s.column_tiles;
  const bool last = band == s.bands - 1;
  const int column = last ? s.by_last_height(inside) : s.by_height(inside);
  return {band * s.height + inside - column * (last ? s.row_tiles - band * s.height : s.height), column};
}

__device__ inline Work work_at(const Schedule& s, int at) {
  if (at >= s.made) {
    const int later = at - s.made, others = s.items + s.tiles - s.made, before = s.by_gap(later);
    if (later - before >= others) return {Kind::cross, later - others};
    if (before < s.crosses && later - before * (s.gap + 1) == s.gap) return {Kind::cross, before};
    at -= min(before, s.crosses);
  }
  if (at < s.lead) return {Kind::project, at};
  at -= s.lead;
  const int period = s.by_period(at), rest = at - period * (s.column_tiles + s.row_items);
  if (period >= s.periods) return {Kind::tile, at - s.periods * s.row_items};
  const int before = s.by_period(rest * s.row_items);
  const bool item = s.by_period((rest + 1) * s.row_items) > before;
  return {item ? Kind::project : Kind::tile,
          item ? s.lead + period * s.row_items + before : at - period * s.row_items - before};
}

}  // namespace fera::cuda
