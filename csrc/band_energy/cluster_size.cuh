// What the compiler works out for one latent size of cluster.cuh: radices, shares, where things lie, roots of unity.
#pragma once

#include "band_energy/radix.cuh"

namespace fera::cuda {

// ---- the split of an axis into two radices ----
__host__ __device__ constexpr bool cluster_radix(int r) { return r <= 10 || r == 12 || r == 13 || r == 16 || r == 19; }
__host__ __device__ constexpr int smaller_radix(int n) {
  int best = 0;
  for (int a = 1; a * a <= n; ++a)
    if (n % a == 0 && cluster_radix(a) && cluster_radix(n / a)) best = a;
  return best;
}

template <int Height, int Width, int Size>
struct ClusterSize {
  static constexpr int H = Height, W = Width, S = Size;
  static constexpr int rows = (H + S - 1) / S, cols = (W + S - 1) / S;  // a block's share
  static constexpr int w1 = smaller_radix(W), w2 = W / w1, h1 = smaller_radix(H), h2 = H / h1;
  // Lines of rows before they are handed over: block b of a line (what the second butterfly takes) begins at b
  // row_step, line l at l row_pitch. A step of 16 would meet the same banks again and again; an odd pitch spreads the
  // lines.
  static constexpr int row_step = w2 + (w2 % 16 == 0), row_pitch = (w1 * row_step) | 1;
  // A parcel is what one block has for another: (cols, rows) on the way to the columns, (rows, cols) on the way back,
  // the inner axis padded to an odd number, the whole to 16 bytes. A plane is S parcels, by sender or by receiver.
  // On the way back, where lanes read x = i + j w1 of a row, parcels of a multiple of 4 would share banks.
  static constexpr int parcel = (cols * (rows | 1) + 1) / 2 * 2, back_even = (rows * (cols | 1) + 1) / 2 * 2,
                       back_parcel = back_even + (back_even % 4 == 0 ? 2 : 0);
  static constexpr int larger_parcel = parcel > back_parcel ? parcel : back_parcel;
  static constexpr int column_plane = S * larger_parcel;
  static constexpr int row_plane =
      rows * row_pitch > S* larger_parcel ? (rows * row_pitch + 1) / 2 * 2 : S * larger_parcel;

  // Element `offset` of block `block` (of h2) of column col among the parcels of a plane.
  __host__ __device__ static constexpr unsigned column_at(unsigned col, unsigned block, unsigned offset) {
    constexpr unsigned n = rows, stride = rows | 1;
    if (h2 % rows == 0) return block * (h2 / n) * parcel + offset / n * parcel + col * stride + offset % n;
    const unsigned y = block * h2 + offset;
    return y / n * parcel + col * stride + y % n;
  }
  // Element x of row `row` among the parcels of a plane on the way back.
  __host__ __device__ static constexpr unsigned row_at(unsigned row, unsigned x) {
    constexpr unsigned n = cols, stride = cols | 1;
    return x / n * back_parcel + row * stride + x % n;
  }
  // Item t of the last butterflies of the rows: where a row has 16, half a warp takes 8 of each of two rows, whose
  // parcels' even pitch and the rows' odd one meet all banks.
  __host__ __device__ static constexpr unsigned back_item(unsigned t) {
    return w2 == 16 && rows % 2 == 0 ? (t & ~24u) | (t & 8u) << 1 | (t & 16u) >> 1 : t;
  }
  static constexpr int row_butterflies = rows * (w1 > w2 ? w1 : w2), column_butterflies = cols * (h1 > h2 ? h1 : h2),
                       butterflies = row_butterflies > column_butterflies ? row_butterflies : column_butterflies;
  static constexpr bool shifts = (cols & (cols - 1)) == 0;  // a block's columns are told apart without divisions
  static constexpr bool even_rows = H % S == 0, even_cols = W % S == 0;
  static_assert(w1 > 0 && h1 > 0, "no two radices make this size");
  static_assert(rows * w1 <= 256 && cols * h2 <= 256, "a plane's last butterflies must fit a block");
};

// ---- roots of unity, at compile time ----
template <int N>
struct RootTable {
  float2 root[N];
};
template <int N>
constexpr RootTable<N> make_roots() {
  RootTable<N> table{};
  for (int k = 0; k < N; ++k)
    table.root[k] = {static_cast<float>(radix_detail::cosine_of(k, N)),
                     static_cast<float>(-radix_detail::sine_of(k, N))};
  return table;
}
template <int N>
__device__ const RootTable<N> kRoots = make_roots<N>();

// root[i] = w^i for i < R by products, at most four deep: one load, where a table's entries of stride j would be R - 1
// loads of many cache lines.
template <int R>
__device__ __forceinline__ void powers_of(float2 w, float2 (&root)[R]) {
  if constexpr (R > 1) root[1] = w;
#pragma unroll
  for (int i = 2; i < R; ++i) root[i] = times(root[i / 2], root[i - i / 2]);
}

}  // namespace fera::cuda
