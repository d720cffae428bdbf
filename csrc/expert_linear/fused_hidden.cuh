// What the fused product (fused.cuh) knows of h: gates, and rows of h as they leave a warpgroup's accumulators.
#pragma once

#include "expert_linear/hopper.cuh"

namespace fera::cuda {

constexpr int kFusedRows = 128, kFusedDepth = 64, kFusedThreads = 384;
constexpr int kMembers = FERA_MAX_GROUP;

// What kInside and kBeside need beside the maps.
struct Hidden {
  const float* gate;
  int rows_per_gate, experts, rank;
  float scale;
  void* h;  // forward: to be written, (T, R) in x's dtype
};

// gate * scale of this thread's rows of h, `row` and `row` + 8, and columns 8 n + 2 (lane % 4) + {0, 1}; read before
// the loop over k, so that nobody waits for it after.
template <int kInside>
struct Factors {
  float at[2][kInside == 0 ? 1 : kInside / 8][2];
  __device__ void load(const Hidden& hidden, int row, int rows, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = min(row + half * 8, rows - 1);
      const float* gate = hidden.gate + static_cast<int64_t>(t / hidden.rows_per_gate) * hidden.experts;
#pragma unroll
      for (int n = 0; n < kInside / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int expert = (n * 8 + 2 * (lane % 4) + i) / hidden.rank;
          at[half][n][i] = expert < hidden.experts ? gate[expert] * hidden.scale : 0.f;
        }
    }
  }
};

// Rounded h at a row `t` and ranks q, q + 1 of (T, stacked).
template <class T>
__device__ inline void write_hidden(const Hidden& hidden, int stacked, int t, int q, float2 v) {
  T* out = static_cast<T*>(hidden.h) + static_cast<int64_t>(t) * stacked + q;
  if (q < stacked) out[0] = narrow<T>(v.x);
  if (q + 1 < stacked) out[1] = narrow<T>(v.y);
}

// h of the same rows and columns, the end of `sum`: rounded, written where it is wanted, and as the operand gate scale
// h put into the shared rows `to` (64 of 128 bytes, swizzled).
template <class T, int kInside, int kCount>
__device__ inline void hidden_rows(const Hidden& hidden, const Factors<kInside>& factors, const float (&sum)[kCount],
                                   int row, int rows, int place, uint32_t to, int lane, bool write) {
  constexpr int kOffset = kCount - kInside / 2;
  const int stacked = hidden.experts * hidden.rank;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = row + half * 8, r = place + half * 8;
#pragma unroll
    for (int n = 0; n < kInside / 8; ++n) {
      const int q = n * 8 + 2 * (lane % 4);
      float2 v = make_float2(sum[kOffset + n * 4 + half * 2], sum[kOffset + n * 4 + half * 2 + 1]);
      v = unpack<T>(pack<T>(v.x, v.y));
      const uint32_t packed = pack<T>(v.x * factors.at[half][n][0], v.y * factors.at[half][n][1]);
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + r * 128 + ((n ^ r % 8) * 16) + lane % 4 * 4), "r"(packed)
                   : "memory");
      if (write && t < rows) write_hidden<T>(hidden, stacked, t, q, v);
    }
  }
}

}  // namespace fera::cuda
