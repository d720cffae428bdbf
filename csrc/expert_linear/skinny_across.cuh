// The products that contract over tokens, and dh.
#pragma once

#include "expert_linear/skinny.cuh"

namespace fera::cuda {

constexpr int kAcrossWarps = 8;
constexpr int kCopyGroups = 4;    // a warp's rows arrive in so many parts
constexpr int kBlocksAtOnce = 3;  // column blocks of dh that are loaded together
// Tiles of 16 columns of a warp's sums: 8 (R <= 16) or 16 registers each.
template <int kRank>
constexpr int kUnits = kRank == 16 ? 5 : 3;
// The widest column block.
template <int kRank>
constexpr int kAcrossColumns = kAcrossWarps * 16 * kUnits<kRank>;

template <class T>
struct AcrossArgs {
  RowsView<const T> x;  // dy or x, (T, width)
  int width, columns;   // columns of a block: a multiple of 64
  int tokens, tile;     // tokens of a tile: 16, 32, 64 or 128; no more than a gate row has if gate_sums are wanted
  int tiles, tiles_per_slice;
  Gates gates;
  const T* h;         // (T, R)
  Weights<T> b;       // first pass: (width, R)
  float* hidden;      // first pass writes, second reads: (blocks, T, kRank) partial sums of dh
  int hidden_blocks;  // second pass
  T* gated;           // second pass, or NULL: gate scale dh, (T, kRank)
  float* gate_sums;  // second pass, or NULL: (tiles, 2, kRank) sums of h dh over the tile's first gate row and its next
  float* partial;    // (slices, R, width), or NULL
  Dropout dropout;
};

template <int kRank>
constexpr int kHiddenPitch = kRank + 8;  // of U in shared memory, in numbers: rows in different banks

// Shared memory of `across`: the tile, U, B's fragments, sums across warps.
template <int kRank>
constexpr size_t across_bytes(int tile, int columns, bool first_pass) {
  const size_t rows = static_cast<size_t>(tile) * columns * 2,
               hidden = static_cast<size_t>(tile) * kHiddenPitch<kRank> * 2;
  return rows + hidden +
         (first_pass ? static_cast<size_t>(columns) * kRank * 2 + kAcrossWarps * 16 * kRank * 4
                     : static_cast<size_t>(tile) / 8 * 2 * kRank * 4);
}

// Where in a fragment the 16 bytes of a rank (of 8) and k (of 4) lie: turned, so that eight ranks of one k, which the
// conversion writes together, lie in different banks.
__device__ inline int across_fragment(int rank, int k) { return rank * 4 + (k ^ rank / 2); }

// grid (column blocks, slices of tiles). A tile of tokens x columns is resident: each warp copies the rows of a group
// of 16 tokens (and shares the columns with the warps of the same group), and multiplies them by B as they arrive;
// after one barrier each warp multiplies all tokens of every eighth 16 columns by U, and keeps those sums over the
// slice. kFirst: over dy. Else over x, with U from the first pass's partial sums.
template <class T, int kRank, bool kFirst, bool kDrops>
__global__ void __launch_bounds__(kAcrossWarps* kWarp, 2) across(const __grid_constant__ AcrossArgs<T> args) {
  constexpr int kRankTiles = kRank / 8, kThreads = kAcrossWarps * kWarp, kPitch = kHiddenPitch<kRank>;
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int groups = args.tile / 16, splits = kAcrossWarps / groups;
  const int group = warp / splits, split = warp % splits;
  const int column = blockIdx.x * args.columns, columns = min(args.columns, args.width - column);
  const int units = ceil_div(columns, 16), chunks = ceil_div(columns, 64);
  const int shares = ceil_div(chunks, splits * kCopyGroups);  // chunks of 64 columns, of a warp's copy group
  const int stacked = args.gates.stacked();
  const uint32_t tile = shared_address(shared);
  T* hidden = reinterpret_cast<T*>(shared + static_cast<size_t>(args.tile) * args.columns * 2);
  unsigned char* after = reinterpret_cast<unsigned char*>(hidden + args.tile * kPitch);
  uint32_t* fragments = reinterpret_cast<uint32_t*>(after);  // first pass
  float* sums = reinterpret_cast<float*>(after + (kFirst ? static_cast<size_t>(args.columns) * kRank * 2 : 0));
  const int first_tile = blockIdx.y * args.tiles_per_slice;
  const int count = min(args.tiles - first_tile, args.tiles_per_slice);
  // Rows of 128 bytes, a chunk after the other; the rows of a chunk are turned as in piece<8>.
  auto at = [&](int chunk, int row, int granule) {
    return tile + static_cast<uint32_t>((chunk * args.tile + row) * 128 + ((granule ^ row % 8) * 16));
  };
  let_next_start();

  auto copy_rows = [&](int first) {
    const T* source[4];
    uint32_t to[4];
    bool present[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int row = group * 16 + r * 4 + lane / 8, t = first + row;
      present[r] = t < args.tokens;
      source[r] = args.x.data + column + lane % 8 * 8 + (present[r] ? t * args.x.stride : 0);
      to[r] = at(0, row, lane % 8);
    }
#pragma unroll 1
    for (int part = 0, c = split; part < kCopyGroups; ++part) {
#pragma unroll 1
      for (int i = 0; i < shares && c < chunks; ++i, c += splits) {
        const bool inside = c * 64 + lane % 8 * 8 < columns;
#pragma unroll
        for (int r = 0; r < 4; ++r) copy_async(to[r] + c * args.tile * 128, source[r] + c * 64, present[r] && inside);
      }
      commit_copies();
    }
  };

  // What this thread has copied, before others read it.
  auto mask_rows = [&](int first) {
    const Mask mask(args.dropout);
    for (int c = split; c < chunks; c += splits) {
      if (c * 64 + lane % 8 * 8 >= columns) continue;
#pragma unroll 1
      for (int r = 0; r < 4; ++r) {
        const int row = group * 16 + r * 4 + lane / 8;
        uint4* piece = reinterpret_cast<uint4*>(shared + (at(c, row, lane % 8) - tile));
        *piece = mask.apply(*piece, first + row, column + c * 64 + lane % 8 * 8);
      }
    }
  };

  // U of a tile: a thread has one rank of eight tokens.
  const int q = threadIdx.x % kRank, expert = q / args.gates.rank;
  const bool sums_gates = !kFirst && blockIdx.x == 0 && args.gate_sums != nullptr;
  auto fill_hidden = [&](int first) {
    for (int item = threadIdx.x; item < args.tile / 8 * kRank; item += kThreads) {
      const int sub = item / kRank, t0 = first + sub * 8;
      const int rows = q < stacked ? args.tokens - t0 : 0;
      const int g = min(t0, args.tokens - 1) / args.gates.rows_per_gate;
      const int edge = (g + 1) * args.gates.rows_per_gate - t0;  // the eight may reach into the next gate row
      float here = q < stacked ? args.gates.factor(g, expert) : 0.f;
      float next = q < stacked && edge < 8 && t0 + edge < args.tokens ? args.gates.factor(g + 1, expert) : 0.f;
      if constexpr (kDrops) {
        here *= static_cast<float>(args.dropout.scale);
        next *= static_cast<float>(args.dropout.scale);
      }
      float v[8] = {}, before[8] = {};
      if (kFirst || sums_gates) {
        const T* from = args.h + static_cast<int64_t>(t0) * stacked + q;
        T raw[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          raw[i] = T();
          if (i < rows) raw[i] = from[i * stacked];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) before[i] = widen(raw[i]);
      }
      if constexpr (!kFirst) {
        const float* from = args.hidden + static_cast<int64_t>(t0) * kRank + q;
        const int64_t next_block = static_cast<int64_t>(args.tokens) * kRank;
        for (int c = 0; c < args.hidden_blocks; c += kBlocksAtOnce, from += kBlocksAtOnce * next_block) {
          float part[kBlocksAtOnce][8];
#pragma unroll
          for (int b = 0; b < kBlocksAtOnce; ++b)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
              part[b][i] = 0.f;
              if (c + b < args.hidden_blocks && i < rows) part[b][i] = from[b * next_block + i * kRank];
            }
#pragma unroll
          for (int b = 0; b < kBlocksAtOnce; ++b)
#pragma unroll
            for (int i = 0; i < 8; ++i) v[i] += part[b][i];
        }
      }
      float total[2] = {};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const T u = narrow<T>((kFirst ? before[i] : v[i]) * (i < edge ? here : next));
        hidden[(sub * 8 + i) * kPitch + q] = u;
        if constexpr (!kFirst) {
          if (blockIdx.x == 0 && args.gated != nullptr && t0 + i < args.tokens)
            args.gated[static_cast<int64_t>(t0 + i) * kRank + q] = u;
          total[0] += i < edge ? before[i] * v[i] : 0.f;
          total[1] += i < edge ? 0.f : before[i] * v[i];
        }
      }
      if constexpr (!kFirst) {
        const bool later = g > first / args.gates.rows_per_gate;  // then all of it is of the tile's second gate row
        sums[(sub * 2 + 0) * kRank + q] = later ? 0.f : total[0];
        sums[(sub * 2 + 1) * kRank + q] = later ? total[0] : total[1];
      }
    }
  };

  auto convert_weights = [&] {
    // B's fragments: k x rank, 16 ranks to 16 bytes a lane.
    constexpr int kBatch = kRank == 16 ? 5 : 4;
    with_masters(args.b, [&](auto masters) {
      const int words = chunks * 32 * kRank;
      for (int from = threadIdx.x; from < words; from += kThreads * kBatch) {
        float low[kBatch], high[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int pair = (from + i * kThreads) / kRank;  // columns 2 pair and + 1; the rank is q
          const int c = 2 * pair < columns ? column + 2 * pair : args.width;
          low[i] = args.b.template at<masters.value>(c, q), high[i] = args.b.template at<masters.value>(c + 1, q);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int pair = (from + i * kThreads) / kRank;
          if (from + i * kThreads < words)
            fragments[((pair / 8 * (kRank / 16) + q / 16) * kWarp + across_fragment(q % 8, pair % 4)) * 4 +
                      q / 8 % 2 * 2 + pair / 4 % 2] = pack<T>(low[i], high[i]);
        }
      }
    });
  };

  float total[kUnits<kRank>][2][kRank / 16][4] = {};
  for (int j = 0; j < count; ++j) {
    const int first = (first_tile + j) * args.tile;
    if (j > 0) __syncthreads();
    copy_rows(first);
    if (j == 0) {
      if constexpr (kFirst)
        convert_weights();
      else
        wait_for_previous();
    }
    fill_hidden(first);
    if constexpr (kFirst) {
      if (j == 0) __syncthreads();
      float dh[kRankTiles][4] = {};
      auto multiply = [&](int part) {
        __syncwarp();
        for (int i = 0; i < shares; ++i) {
          const int c = (part * shares + i) * splits + split;
          if (c >= chunks) return;
          uint32_t rows[4][4];
#pragma unroll
          for (int k = 0; k < 4; ++k) load_tiles(rows[k], at(c, group * 16 + lane % 16, k * 2 + lane / 16));
#pragma unroll
          for (int k = 0; k < 4; ++k)
#pragma unroll
            for (int n = 0; n < kRank / 16; ++n) {
              const uint4 w = reinterpret_cast<const uint4*>(
                  fragments)[((c * 4 + k) * (kRank / 16) + n) * kWarp + across_fragment(lane / 4, lane % 4)];
              mma<T>(dh[2 * n], rows[k], {w.x, w.y});
              mma<T>(dh[2 * n + 1], rows[k], {w.z, w.w});
            }
        }
      };
      static_assert(kCopyGroups == 4, "the waits below");
#pragma unroll 1
      for (int part = 0; part < kCopyGroups; ++part) {
        if (part == 0) wait_copies<3>();
        if (part == 1) wait_copies<2>();
        if (part == 2) wait_copies<1>();
        if (part == 3) wait_copies<0>();
        multiply(part);
      }
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = lane / 4 + half * 8, t = first + group * 16 + row;
          const float2 v = make_float2(dh[n][2 * half], dh[n][2 * half + 1]);
          if (splits > 1)
            *reinterpret_cast<float2*>(sums + (warp * 16 + row) * kRank + n * 8 + 2 * (lane % 4)) = v;
          else if (t < args.tokens)
            *reinterpret_cast<float2*>(args.hidden + (static_cast<int64_t>(blockIdx.x) * args.tokens + t) * kRank +
                                       n * 8 + 2 * (lane % 4)) = v;
        }
    } else {
      wait_copies<0>();
      if constexpr (kDrops) mask_rows(first);
    }
    __syncthreads();
    if constexpr (kFirst) {
      if (splits > 1)
        for (int i = threadIdx.x; i < args.tile * kRank; i += kThreads) {
          const int row = i / kRank, t = first + row;
          if (t >= args.tokens) break;
          float v = 0;
          for (int s = 0; s < splits; ++s) v += sums[((row / 16 * splits + s) * 16 + row % 16) * kRank + q];
          args.hidden[(static_cast<int64_t>(blockIdx.x) * args.tokens + t) * kRank + q] = v;
        }
    } else {
      if (sums_gates && threadIdx.x < 2 * kRank) {
        float v = 0;
        for (int sub = 0; sub < args.tile / 8; ++sub) v += sums[sub * 2 * kRank + threadIdx.x];
        args.gate_sums[static_cast<int64_t>(first_tile + j) * 2 * kRank + threadIdx.x] = v;
      }
    }
    if (args.partial == nullptr) continue;
    const uint32_t u_address = shared_address(hidden + (lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8);
    // The warp's units are two chunks apart, at the same place within them.
    const uint32_t part_address = at(warp / 4, lane % 16, warp % 4 * 2 + lane / 16);
#pragma unroll 1
    for (int k = 0; k < groups; ++k) {
      uint32_t u[kRank / 16][4], part[kUnits<kRank>][4];
#pragma unroll
      for (int m = 0; m < kRank / 16; ++m)
        load_tiles_transposed(u[m], u_address + (k * 16 * kPitch + m * 16) * static_cast<uint32_t>(sizeof(T)));
      // All loads, then all products: a unit at a time would wait for each load.
#pragma unroll
      for (int i = 0; i < kUnits<kRank>; ++i) {
        if (warp + i * kAcrossWarps < units)
          load_tiles_transposed(part[i], part_address + (i * (kAcrossWarps / 4) * args.tile + k * 16) * 128);
      }
#pragma unroll
      for (int i = 0; i < kUnits<kRank>; ++i) {
        if (warp + i * kAcrossWarps >= units) continue;
#pragma unroll
        for (int m = 0; m < kRank / 16; ++m) {
          mma<T>(total[i][0][m], u[m], {part[i][0], part[i][1]});
          mma<T>(total[i][1][m], u[m], {part[i][2], part[i][3]});
        }
      }
    }
  }
  if constexpr (kFirst) wait_for_previous();  // this kernel's end must mean that one's
  if (args.partial == nullptr) return;
  float* to = args.partial + static_cast<int64_t>(blockIdx.y) * stacked * args.width + column;
#pragma unroll
  for (int i = 0; i < kUnits<kRank>; ++i)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int m = 0; m < kRank / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = (warp + i * kAcrossWarps) * 16 + n * 8 + 2 * (lane % 4), rank = m * 16 + half * 8 + lane / 4;
          if (c < columns && rank < stacked)
            *reinterpret_cast<float2*>(to + static_cast<int64_t>(rank) * args.width + c) =
                make_float2(total[i][n][m][2 * half], total[i][n][m][2 * half + 1]);
        }
}

}  // namespace fera::cuda
