// y = base + gated V, and the sums of partial sums: one launch may do both.
#pragma once

#include "expert_linear/skinny.cuh"

namespace fera::cuda {

constexpr int kUpThreads = 256;
constexpr int kReduceBatch = 16, kGateBatch = 4;  // loads a thread keeps in flight

// One of the two results of `reduce`: sum of the slices of partial (slices, R, width).
struct Reduced {
  const float* partial;
  int slices, width;
  void* out;  // element (i, q) of (width, R) at i * stride_i + q * stride_q
  fera_dtype dtype;
  int64_t stride_i, stride_q;
  int blocks;  // ceil(width R / 64), or 0
};

struct ReduceArgs {
  Reduced a, b;
  const float* gate_sums;  // (tiles, 2, kRank)
  int tile, gate_blocks;   // tokens of a tile; a gate row and expert a block
  Gates gates;
  float* dgate;
  __host__ __device__ int blocks() const { return a.blocks + b.blocks + gate_blocks; }
};

constexpr int kUpGroup = 64;  // columns of a block of `up`

template <class T>
struct UpArgs {
  const T* gated;  // (T, kRank)
  Weights<T> v;    // (rank, column)
  RowsView<const T> base;
  RowsView<T> y;
  int tokens, width, columns;  // blocks of 64 columns
  int tiles_per_slice;         // of 16 tokens
  int blocks;                  // or 0
  Dropout dropout;             // of the product
};

// A warp adds every eighth slice of 32 pairs of numbers, then the first warp adds the warps.
template <int kRank>
__device__ inline void reduce_block(const ReduceArgs& args, int block) {
  constexpr int kWarps = kUpThreads / kWarp;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (block >= args.a.blocks + args.b.blocks) {
    __shared__ double scratch[32];
    block -= args.a.blocks + args.b.blocks;
    const int g = block / args.gates.experts, m = block % args.gates.experts, each = args.gates.rows_per_gate;
    const int rank = args.gates.rank, first = g * each / args.tile, last = ((g + 1) * each - 1) / args.tile;
    const int items = (last - first + 1) * rank;
    double v = 0;
    for (int from = threadIdx.x; from < items; from += kGateBatch * kUpThreads) {
      float part[kGateBatch];
#pragma unroll
      for (int i = 0; i < kGateBatch; ++i) {
        const int at = from + i * kUpThreads, tile = first + at / rank;
        const int slot = tile * args.tile / each == g ? 0 : 1;
        part[i] = 0.f;
        if (at < items)
          part[i] = args.gate_sums[(static_cast<int64_t>(tile) * 2 + slot) * kRank + m * rank + at % rank];
      }
#pragma unroll
      for (int i = 0; i < kGateBatch; ++i) v += part[i];
    }
    v = block_sum(v, scratch);
    if (threadIdx.x == 0) args.dgate[block] = static_cast<float>(v * args.gates.scale);
    return;
  }
  __shared__ float2 shared[kWarps][kWarp];
  const bool first = block < args.a.blocks;
  const Reduced& r = first ? args.a : args.b;
  const int at = (first ? block : block - args.a.blocks) * kWarp + lane, pairs = r.width * args.gates.stacked() / 2;
  float2 v = make_float2(0.f, 0.f);
  if (at < pairs) {
    const float2* from = reinterpret_cast<const float2*>(r.partial) + at;
    for (int s = warp; s < r.slices; s += kReduceBatch * kWarps) {
      float2 part[kReduceBatch];
#pragma unroll
      for (int i = 0; i < kReduceBatch; ++i) {
        const int slice = s + i * kWarps;
        part[i] = make_float2(0.f, 0.f);
        if (slice < r.slices) part[i] = from[static_cast<int64_t>(slice) * pairs];
      }
#pragma unroll
      for (int i = 0; i < kReduceBatch; ++i) v.x += part[i].x, v.y += part[i].y;
    }
  }
  shared[warp][lane] = v;
  __syncthreads();
  if (warp != 0 || at >= pairs) return;
#pragma unroll
  for (int s = 1; s < kWarps; ++s) v.x += shared[s][lane].x, v.y += shared[s][lane].y;
  const int q = 2 * at / r.width, i = 2 * at % r.width;
  store_any(r.out, r.dtype, i * r.stride_i + q * r.stride_q, v.x);
  store_any(r.out, r.dtype, (i + 1) * r.stride_i + q * r.stride_q, v.y);
}

// A block has 64 columns and a slice of the tokens, a warp every eighth 16 tokens of it. Of 32 columns a lane reads and
// writes eight side by side: columns 2 (l % 4) + {0, 1} of mma tile n are its numbers 2 n + {0, 1}. Likewise the ranks
// that are its k in the product are side by side in gated.
template <class T, int kRank, bool kDrops>
__device__ inline void up_block(const UpArgs<T>& args, int block) {
  constexpr int kSteps = kRank / 16, kRanks = kRank / 4;  // a lane's ranks
  constexpr int kDepth = kRank == 16 ? 3 : 2;             // pieces of 16 tokens a warp keeps in flight
  constexpr int kWarps = kUpThreads / kWarp;
  __shared__ uint32_t fragments[kSteps * 2 * 2 * kWarp * 4];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column = block % args.columns * kUpGroup;
  const int tiles = ceil_div(args.tokens, 16);
  const int first = block / args.columns * args.tiles_per_slice, last = min(tiles, first + args.tiles_per_slice);

  // base is older than every kernel of the call: it is read before the wait, gated after it.
  uint4 before[kDepth][2][2];  // [piece][group of 32 columns][upper or lower 8 tokens]
  auto load_base = [&](int s, int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = tile * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const int c = column + group * 32 + lane % 4 * 8;
        before[s][group][half] = make_uint4(0u, 0u, 0u, 0u);
        if (args.base.data != nullptr && tile < last && t < args.tokens && c < args.width)
          before[s][group][half] = *reinterpret_cast<const uint4*>(args.base.data + t * args.base.stride + c);
      }
    }
  };
  uint2 u[kDepth][2][kSteps];
  auto load_gated = [&](int s, int tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int t = tile * 16 + half * 8 + lane / 4;
#pragma unroll
      for (int k = 0; k < kSteps; ++k) u[s][half][k] = make_uint2(0u, 0u);
      if (tile >= last || t >= args.tokens) continue;
      const T* from = args.gated + static_cast<int64_t>(t) * kRank + lane % 4 * kRanks;
      if constexpr (kSteps == 1) {
        u[s][half][0] = *reinterpret_cast<const uint2*>(from);
      } else {
        const uint4 v = *reinterpret_cast<const uint4*>(from);
        u[s][half][0] = make_uint2(v.x, v.y), u[s][half][kSteps - 1] = make_uint2(v.z, v.w);
      }
    }
  };

#pragma unroll
  for (int s = 0; s < kDepth; ++s) load_base(s, first + warp + s * kWarps);
  // V's fragments, k x column; neighbouring threads read neighbouring numbers of B (out, R) or A (R, in).
  constexpr int kWords = kUpGroup * kRank / 2 / kUpThreads;
  const auto place = [&](int i, int& q, int& c) {
    const int at = threadIdx.x + i * kUpThreads;
    if (args.v.stride_i == 1)
      q = at % (kRank / 2) * 2, c = at / (kRank / 2);
    else
      q = at / kUpGroup * 2, c = at % kUpGroup;
  };
  with_masters(args.v, [&](auto masters) {
    float low[kWords], high[kWords];
    int q, c;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      place(i, q, c);
      low[i] = args.v.template at<masters.value>(q, column + c);
      high[i] = args.v.template at<masters.value>(q + 1, column + c);
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      place(i, q, c);
      const int step = q % kRanks / 4, half = q / 2 % 2, n = c % 8 / 2, j = c % 32 / 8 * 2 + c % 2;
      fragments[(((step * 2 + c / 32) * 2 + n / 2) * kWarp + j * 4 + q / kRanks) * 4 + n % 2 * 2 + half] =
          pack<T>(low[i], high[i]);
    }
  });
  __syncthreads();
  uint32_t w[kSteps][2][4][2];
#pragma unroll
  for (int k = 0; k < kSteps; ++k)
#pragma unroll
    for (int group = 0; group < 2; ++group)
#pragma unroll
      for (int n = 0; n < 4; n += 2) {
        const uint4 v = reinterpret_cast<const uint4*>(fragments)[((k * 2 + group) * 2 + n / 2) * kWarp + lane];
        w[k][group][n][0] = v.x, w[k][group][n][1] = v.y, w[k][group][n + 1][0] = v.z, w[k][group][n + 1][1] = v.w;
      }
  wait_for_previous();
#pragma unroll
  for (int s = 0; s < kDepth; ++s) load_gated(s, first + warp + s * kWarps);

  for (int tile0 = first + warp; tile0 < last; tile0 += kDepth * kWarps) {
#pragma unroll
    for (int s = 0; s < kDepth; ++s) {
      const int tile = tile0 + s * kWarps;
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        float sum[4][4] = {};
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
          const uint32_t part[4] = {u[s][0][k].x, u[s][1][k].x, u[s][0][k].y, u[s][1][k].y};
#pragma unroll
          for (int n = 0; n < 4; ++n) mma<T>(sum[n], part, w[k][group][n]);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int t = tile * 16 + half * 8 + lane / 4, c = column + group * 32 + lane % 4 * 8;
          if (tile >= last || t >= args.tokens || c >= args.width) continue;
          if constexpr (kDrops) {
            const uint4 kept = Mask(args.dropout).words(t, c);
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              if ((word(kept, n) & 1u) == 0) sum[n][half * 2] = 0.f;
              if ((word(kept, n) >> 16) == 0) sum[n][half * 2 + 1] = 0.f;
            }
          }
          uint32_t now[4];
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            const float2 was = unpack<T>(word(before[s][group][half], n));
            now[n] = pack<T>(was.x + sum[n][half * 2], was.y + sum[n][half * 2 + 1]);
          }
          *reinterpret_cast<uint4*>(args.y.data + t * args.y.stride + c) = make_uint4(now[0], now[1], now[2], now[3]);
        }
      }
      load_base(s, tile + kDepth * kWarps);
      load_gated(s, tile + kDepth * kWarps);
    }
  }
}

// grid: the blocks of `up`, column blocks x slices of tokens, then those of `reduce`; either may be none. `up` comes
// first because it has something to read before the wait.
template <class T, int kRank, bool kDrops>
__global__ void __launch_bounds__(kUpThreads, 2)
    finish(const __grid_constant__ UpArgs<T> up, const __grid_constant__ ReduceArgs sums) {
  const int block = blockIdx.x;
  let_next_start();
  if (block < up.blocks) {
    up_block<T, kRank, kDrops>(up, block);
  } else {
    wait_for_previous();
    reduce_block<kRank>(sums, block - up.blocks);
  }
}

}  // namespace fera::cuda
