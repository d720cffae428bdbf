// h = x A^T and gated = gate scale h.
#pragma once

#include "expert_linear/skinny.cuh"

namespace fera::cuda {

constexpr int kDownWarps = 16;
constexpr int kDownDepth = 3;  // pieces of 16 tokens x 64 columns a warp keeps in flight, in registers
// 16-byte loads of A a thread keeps in flight: as many as registers hold beside the pieces.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kDownBatch = 4;
#else
constexpr int kDownBatch = 5;
#endif

// A piece reaches the tensor cores straight from its 16-byte loads: lane l has columns 8 (l % 4) to + 7 of a group of
// 32, of which the product takes k = 2 (l % 4) + {0, 1} and + 8 to be columns 8 (l % 4) + 4 e + {0, 1} and + 2, e the
// step. A's fragments lie in shared memory in that order, 16 ranks to 16 bytes a lane. Their rows of 16 lanes' words
// are turned by the step, so that the conversion's stores spread over the banks.
template <int kRank>
__device__ inline int down_fragment(int step, int rank16, int rank8, int k) {
  return (step * (kRank / 16) + rank16) * kWarp + (rank8 ^ step % 8) * 4 + k;
}

template <int kRank>
constexpr size_t down_bytes(int panel) {
  return static_cast<size_t>(panel) * kRank * 2 + size_t{kDownWarps} * 16 * kRank * 4;
}

// 16 warps = 16 / kSplits groups of 16 tokens x kSplits shares of the columns. A block keeps `panel` columns of A (a
// multiple of 64; all of them where they fit) and takes every gridDim.x-th tile of tokens.
template <class T, int kRank, int kSplits, bool kDrops>
__global__ void __launch_bounds__(kDownWarps* kWarp, 1) down(RowsView<const T> x, int tokens, int in, Weights<T> a,
                                                             Gates gates, T* h, T* gated, int panel, Dropout dropout) {
  constexpr int kTokens = 16 * kDownWarps / kSplits, kRankTiles = kRank / 8, kThreads = kDownWarps * kWarp;
  extern __shared__ __align__(128) unsigned char shared[];
  uint2* fragments = reinterpret_cast<uint2*>(shared);
  float* sums = reinterpret_cast<float*>(shared + static_cast<size_t>(panel) * kRank * 2);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = warp / kSplits, split = warp % kSplits;
  const int tiles = ceil_div(tokens, kTokens), panels = ceil_div(in, panel), chunks = panel / 64;
  const int rounds = ceil_div(chunks, kSplits * kDownDepth);  // of kDownDepth pieces, in a panel
  let_next_start();

  // What to load next: pieces of (tile, panel, round).
  int next_tile = blockIdx.x, next_panel = 0, next_round = 0;
  const T* rows[2];
  bool present[2];
  auto aim = [&] {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t t = int64_t{next_tile} * kTokens + group * 16 + half * 8 + lane / 4;
      present[half] = next_tile < tiles && t < tokens;
      rows[half] = x.data + (present[half] ? t * x.stride : 0);
    }
  };
  uint4 buffer[kDownDepth][2][2];  // [piece][group of 32 columns][upper or lower 8 tokens]
  auto load = [&](int s) {
    const int chunk = (next_round * kDownDepth + s) * kSplits + split;
#pragma unroll
    for (int e = 0; e < 2; ++e)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = next_panel * panel + chunk * 64 + e * 32 + lane % 4 * 8;
        buffer[s][e][half] = make_uint4(0u, 0u, 0u, 0u);
        if (present[half] && chunk < chunks && c < in)
          buffer[s][e][half] = __ldg(reinterpret_cast<const uint4*>(rows[half] + c));
      }
  };
  auto advance = [&] {
    if (++next_round < rounds) return;
    next_round = 0;
    if (++next_panel < panels) return;
    next_panel = 0;
    next_tile += gridDim.x;
    aim();
  };

  auto convert_panel = [&](int p) {
    with_masters(a, [&](auto masters) {
      const int items = kRank * ceil_div(panel, 128);
      const auto place = [&](int i, int& q, int& inside) {
        q = (i + i / kRank) % kRank, inside = i / kRank * 128 + lane * 4;  // a rank moves over the warps
        return i < items && inside < panel;
      };
      for (int first = warp; first < items; first += kDownWarps * kDownBatch) {
        typename Weights<T>::template Four<masters.value> raw[kDownBatch];
        int q, inside;
#pragma unroll
        for (int i = 0; i < kDownBatch; ++i) {
          const bool there = place(first + i * kDownWarps, q, inside);
          raw[i] = a.template four<masters.value>(there ? q : kRank, p * panel + inside);
        }
#pragma unroll
        for (int i = 0; i < kDownBatch; ++i) {
          if (!place(first + i * kDownWarps, q, inside)) continue;
          const int step = inside / 32 * 2 + inside / 4 % 2;
          fragments[down_fragment<kRank>(step, q / 16, q % 8, inside % 32 / 8) * 2 + q / 8 % 2] = pack_four<T>(raw[i]);
        }
      }
    });
  };

  aim();
#pragma unroll
  for (int s = 0; s < kDownDepth; ++s) load(s);
  advance();

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sum[kRankTiles][4] = {};
    for (int p = 0; p < panels; ++p) {
      if (panels > 1 || tile == static_cast<int>(blockIdx.x)) {
        __syncthreads();
        convert_panel(p);
        __syncthreads();
      }
      for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int s = 0; s < kDownDepth; ++s) {
          const int chunk = (round * kDownDepth + s) * kSplits + split;
          if (chunk < chunks) {
            if constexpr (kDrops) {
              const Mask mask(dropout);
#pragma unroll
              for (int e = 0; e < 2; ++e)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                  buffer[s][e][half] = mask.apply(buffer[s][e][half], tile * kTokens + group * 16 + half * 8 + lane / 4,
                                                  p * panel + chunk * 64 + e * 32 + lane % 4 * 8);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const uint4 &up = buffer[s][e / 2][0], &low = buffer[s][e / 2][1];
              const uint32_t part[4] = {word(up, e % 2 * 2), word(low, e % 2 * 2), word(up, e % 2 * 2 + 1),
                                        word(low, e % 2 * 2 + 1)};
#pragma unroll
              for (int n = 0; n < kRank / 16; ++n) {
                const uint4 w = reinterpret_cast<const uint4*>(
                    fragments)[down_fragment<kRank>(chunk * 4 + e, n, lane / 4, lane % 4)];
                mma<T>(sum[2 * n], part, {w.x, w.y});
                mma<T>(sum[2 * n + 1], part, {w.z, w.w});
              }
            }
          }
          load(s);
        }
        advance();
      }
    }

    if (tile == static_cast<int>(blockIdx.x)) wait_for_previous();  // this kernel's end must mean that one's
    // The shares of the columns, added in their order. A thread has one rank of kItems tokens.
    constexpr int kItems = (kTokens * kRank + kThreads - 1) / kThreads;
    const int stacked = gates.stacked(), q = threadIdx.x % kRank, expert = q / gates.rank;
    const int row0 = threadIdx.x / kRank;
    float factor[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int row = row0 + i * (kThreads / kRank), t = tile * kTokens + row;
      factor[i] = row < kTokens && t < tokens && q < stacked ? gates.factor(t / gates.rows_per_gate, expert) : 0.f;
    }
#pragma unroll
    for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<float2*>(sums + (warp * 16 + lane / 4 + half * 8) * kRank + n * 8 + 2 * (lane % 4)) =
            make_float2(sum[n][2 * half], sum[n][2 * half + 1]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int row = row0 + i * (kThreads / kRank), t = tile * kTokens + row;
      if (row >= kTokens || t >= tokens) continue;
      float total = 0;
#pragma unroll
      for (int s = 0; s < kSplits; ++s) total += sums[((row / 16 * kSplits + s) * 16 + row % 16) * kRank + q];
      if constexpr (kDrops) total *= static_cast<float>(dropout.scale);
      const T rounded = narrow<T>(total);
      if (q < stacked) h[static_cast<int64_t>(t) * stacked + q] = rounded;
      gated[static_cast<int64_t>(t) * kRank + q] = narrow<T>(q < stacked ? widen(rounded) * factor[i] : 0.f);
    }
    __syncthreads();
  }
}

}  // namespace fera::cuda
