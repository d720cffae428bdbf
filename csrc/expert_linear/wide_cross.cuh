// left^T right of wide ranks, dy^T h and dh^T x: how it is cut, and what becomes of a tile of 128 x 128.
#pragma once

#include "expert_linear/wide_ring.cuh"

namespace fera::cuda {

// A slice of tokens gives a partial sum of its own; of dy^T h also its product with B, whose sum over columns is the
// gate's gradient, so that neither dh nor h is read for it.
template <class T>
struct CrossOf {
  int row_tiles, column_tiles;  // of left^T right
  int rows, columns;
  int steps, steps_per_slice, slices_per_gate;  // a step: 64 tokens of a gate row
  int slices;
  float* partial;    // [slice][rows][columns]
  const T* b;        // (rows, columns), like the product
  float* gate_sums;  // [slice][row tile][columns]: sums over rows of b times the product; or NULL
};
struct CrossTile {
  int slice, row_tile, row, column;
};

#if defined(FERA_SM90A)
// A warpgroup's sums of 64 rows, as a product leaves them; `row` is this lane's first.
template <class T, int kCount>
__device__ inline void write_partial(const CrossOf<T>& c, const CrossTile& tile, int row, const float (&sum)[kCount],
                                     int lane) {
  if (tile.slice >= c.slices) return;
  const int column = tile.column + lane % 4 * 2;
  float* const out = c.partial + (static_cast<int64_t>(tile.slice) * c.rows + row) * c.columns + column;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    if (column + j * 8 >= c.columns) continue;
    if (row < c.rows) *reinterpret_cast<float2*>(out + j * 8) = make_float2(sum[j * 4], sum[j * 4 + 1]);
    if (row + 8 < c.rows)
      *reinterpret_cast<float2*>(out + int64_t{8} * c.columns + j * 8) = make_float2(sum[j * 4 + 2], sum[j * 4 + 3]);
  }
}

// The same sums times B, added over this lane's two rows: columns 8 j + 2 (lane % 4) + {0, 1} of the tile.
template <class T, int kCount>
__device__ inline void add_gate_part(const CrossOf<T>& c, const CrossTile& tile, int row, const float (&sum)[kCount],
                                     float (&part)[32], int lane) {
  constexpr int kBatch = kCount > 64 ? 4 : 8;  // pairs of loads in flight
  const int column = tile.column + lane % 4 * 2;
  const T* const b = c.b + static_cast<int64_t>(row) * c.columns + column;
#pragma unroll
  for (int first = 0; first < 16; first += kBatch) {
    uint32_t upper[kBatch], lower[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int at = (first + i) * 8;
      upper[i] = lower[i] = 0;  // two zeros
      if (column + at >= c.columns) continue;
      if (row < c.rows) upper[i] = *reinterpret_cast<const uint32_t*>(b + at);
      if (row + 8 < c.rows) lower[i] = *reinterpret_cast<const uint32_t*>(b + int64_t{8} * c.columns + at);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int j = first + i;
      const float2 u = unpack<T>(upper[i]), l = unpack<T>(lower[i]);
      part[j * 2] += sum[j * 4] * u.x + sum[j * 4 + 2] * l.x;
      part[j * 2 + 1] += sum[j * 4 + 1] * u.y + sum[j * 4 + 3] * l.y;
    }
  }
}

// Adds over lanes that differ in bit kMask; each keeps half of the values, the upper one the upper half.
template <int kCount, int kMask>
__device__ inline void fold(float (&v)[32], int lane) {
  const bool upper = (lane & kMask) != 0;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float keep = upper ? v[i + kCount / 2] : v[i], send = upper ? v[i] : v[i + kCount / 2];
    v[i] = keep + __shfl_xor_sync(0xffffffffu, send, kMask);
  }
}
// The sum of those over lanes and kWarps warps; `scratch` is 512 bytes a warp of shared memory, which nobody reads any
// more once all have met.
template <int kWarps, class T, class Meet>
__device__ inline void write_gate_sums(const CrossOf<T>& c, const CrossTile& tile, float (&part)[32], int warp,
                                       int lane, uint32_t scratch, Meet meet) {
  fold<32, 16>(part, lane);
  fold<16, 8>(part, lane);
  fold<8, 4>(part, lane);
  meet();
  const int value = (lane & 16) + (lane & 8) + (lane & 4);  // the first of this lane's four, as it was numbered above
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = warp * kWideTile + (value + i) / 2 * 8 + lane % 4 * 2 + i % 2;
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(scratch + at * 4), "f"(part[i]) : "memory");
  }
  meet();
  const int thread = warp * 32 + lane;
  if (thread < kWideTile && tile.slice < c.slices && tile.row_tile < c.row_tiles && tile.column + thread < c.columns) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) {
      float v;
      asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(scratch + (w * kWideTile + thread) * 4) : "memory");
      total += v;
    }
    c.gate_sums[(static_cast<int64_t>(tile.slice) * c.row_tiles + tile.row_tile) * c.columns + tile.column + thread] =
        total;
  }
}
#endif  // FERA_SM90A

}  // namespace fera::cuda
