// dB = dy^T (gate scale h) and dA = (gate scale dh)^T x, with dgate's sums of h dh, where another kernel has made dh
// (sm_90a). All they read is at hand, so every pass of every member runs at once, a block of the grid each: one
// multiprocessor's share of the tokens times up to 640 columns. A warp copies tiles of 32 tokens into a ring of shared
// memory; eight warps turn h or dh into U, the narrow side, a tile ahead, and multiply: each has every eighth 16
// columns.
#pragma once

#include "expert_linear/hopper.cuh"
#include "expert_linear/skinny_up.cuh"

namespace fera::cuda {

constexpr int kSumsTokens = 32, kSumsWarps = 8, kSumsThreads = (kSumsWarps + 1) * kWarp;
constexpr int kSumsBox = kSumsTokens * 128;  // bytes of 64 columns of a tile
constexpr int kSumsStages = 8;               // at most
constexpr int kSumsRing = 176 * 1024;
constexpr int kSumsAhead = 4;                  // tiles whose h and dh a thread loads together
constexpr int kSumsJobs = 2 * FERA_MAX_GROUP;  // of each member one over dy and one over x

// Tiles of 16 columns a warp keeps sums of: 8 (R <= 16) or 16 registers each.
template <int kRank>
constexpr int kSumsUnits = kRank == 16 ? 5 : 3;
template <int kRank>
constexpr int kSumsColumns = kSumsWarps * 16 * kSumsUnits<kRank>;
template <int kRank>
constexpr int kSumsPitch = kRank + 8;  // of U in shared memory, in numbers: rows in different banks

template <class T>
struct SumsJob {
  const T* h;           // (T, R)
  const float* hidden;  // dh (T, kRank); NULL: U is of h
  float* gate_sums;     // or NULL: (tiles, 2, kRank) sums of h dh over the tile's first gate row and its next
  float* partial;       // (slices, R, width), or NULL
  Gates gates;
  int tokens, width, columns;  // columns of a block: a multiple of 64
  int blocks;                  // of columns
  int tiles, tiles_per_slice, stages;
  int count;  // blocks of the grid: blocks x slices
};
template <class T>
struct SumsArgs {
  int jobs;
  SumsJob<T> job[kSumsJobs];
};
struct SumsMaps {
  CUtensorMap rows[kSumsJobs];  // dy or x, in boxes of 64 columns
};

template <int kRank>
constexpr int kSumsChunk = kRank == 16 ? 16 : 8;  // tiles that U is made for at once

template <int kRank>
struct SumsShared {  // behind the ring
  alignas(16) uint16_t u[kSumsChunk<kRank>][kSumsTokens * kSumsPitch<kRank>];
  float gate[kSumsChunk<kRank>][kSumsWarps][2][kRank];
  alignas(8) uint64_t full[kSumsStages], empty[kSumsStages];
};
template <int kRank>
constexpr int kSumsBytes = 1024 + kSumsRing + static_cast<int>(sizeof(SumsShared<kRank>));  // 1024: to align the start

// A thread's numbers of U: kPer ranks of one token of a tile.
template <class T, int kRank>
struct SumsHidden {
  static constexpr int kPer = kRank / 8;
  float back[kPer], before[kPer], factor[kPer];
  bool later;  // of the tile's second gate row

  __device__ void load(const SumsJob<T>& job, int tile, int token, int rank, bool gates) {
    const int t = tile * kSumsTokens + token, each = job.gates.rows_per_gate, stacked = job.gates.stacked();
    const bool present = t < job.tokens;
    const int row = (present ? t : job.tokens - 1) / each;
    later = row > tile * kSumsTokens / each;
    T raw[kPer];
    const bool reads = gates || job.hidden == nullptr;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      raw[i] = T();
      if (reads && present && rank + i < stacked) raw[i] = job.h[static_cast<int64_t>(t) * stacked + rank + i];
      back[i] = 0;
      factor[i] = rank + i < stacked ? job.gates.factor(row, (rank + i) / job.gates.rank) : 0.f;
    }
    if (job.hidden != nullptr && present) {
      const float* from = job.hidden + static_cast<int64_t>(t) * kRank + rank;
#pragma unroll
      for (int i = 0; i < kPer; i += 2) {
        const float2 v = *reinterpret_cast<const float2*>(from + i);
        back[i] = v.x, back[i + 1] = v.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) before[i] = widen(raw[i]);
  }

  // U, and the warp's sums of h dh: of 4 tokens.
  __device__ void store(bool forward, T* u, int token, int rank, bool gates, float (&sums)[kSumsWarps][2][kRank]) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kPer; i += 2)
      *reinterpret_cast<uint32_t*>(u + token * kSumsPitch<kRank> + rank + i) =
          pack<T>((forward ? before[i] : back[i]) * factor[i], (forward ? before[i + 1] : back[i + 1]) * factor[i + 1]);
    if (!gates) return;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float v = before[i] * back[i];
      float of[2] = {later ? 0.f : v, later ? v : 0.f};
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        of[s] += __shfl_xor_sync(0xffffffffu, of[s], 8);
        of[s] += __shfl_xor_sync(0xffffffffu, of[s], 16);
        if (lane < 8) sums[warp][s][rank + i] = of[s];
      }
    }
  }
};

template <class T, int kRank>
__global__ void __launch_bounds__(kSumsThreads, 1)
    fused_sums(const __grid_constant__ SumsMaps maps, const __grid_constant__ SumsArgs<T> args) {
#if defined(FERA_SM90A)
  extern __shared__ unsigned char raw[];
  const uint32_t ring = (shared_address(raw) + 1023) / 1024 * 1024;
  auto& shared = *reinterpret_cast<SumsShared<kRank>*>(raw + (ring - shared_address(raw)) + kSumsRing);
  const uint32_t full = shared_address(shared.full), empty = shared_address(shared.empty);
  int which = 0, block = blockIdx.x;
  while (block >= args.job[which].count) block -= args.job[which++].count;
  const SumsJob<T>& job = args.job[which];
  const int column = block % job.blocks * job.columns, slice = block / job.blocks;
  const int first = slice * job.tiles_per_slice, count = min(job.tiles - first, job.tiles_per_slice);
  const int columns = min(job.columns, job.width - column), stage_bytes = job.columns / 64 * kSumsBox;
  const bool sums = job.partial != nullptr;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kSumsStages; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, kSumsWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_shared();
  }
  let_next_start();
  __syncthreads();

  if (warp == kSumsWarps) {
    if (lane != 0 || !sums) return;
    const int boxes = ceil_div(columns, 64);
    int stage = 0;
    uint32_t parity = 1;  // a fresh barrier counts as having completed the phase before its first
    for (int j = 0; j < count; ++j) {
      barrier_wait(empty + stage * 8, parity);
      barrier_expect(full + stage * 8, boxes * kSumsBox);
      for (int box = 0; box < boxes; ++box)
        load_box<1>(ring + stage * stage_bytes + box * kSumsBox, maps.rows[which], column + box * 64,
                    (first + j) * kSumsTokens, full + stage * 8);
      if (++stage == job.stages) stage = 0, parity ^= 1;
    }
    return;
  }

  const bool gates = job.gate_sums != nullptr && column == 0;
  const int token = threadIdx.x / 8, rank = threadIdx.x % 8 * (kRank / 8);
  if (job.hidden != nullptr) wait_for_previous();
  // U of the tiles from `from` on.
  auto prepare = [&](int from) {
    constexpr int kChunk = kSumsChunk<kRank>;
    const int tiles = min(kChunk, count - from);
    for (int j = 0; j < tiles; j += kSumsAhead) {
      SumsHidden<T, kRank> hidden[kSumsAhead];
#pragma unroll
      for (int i = 0; i < kSumsAhead; ++i) hidden[i].load(job, first + from + j + i, token, rank, gates);
#pragma unroll
      for (int i = 0; i < kSumsAhead; ++i)
        hidden[i].store(job.hidden == nullptr, reinterpret_cast<T*>(shared.u[j + i]), token, rank, gates,
                        shared.gate[j + i]);
    }
    warpgroups_meet<kSumsWarps * kWarp>(1);
    for (int i = threadIdx.x; gates && i < tiles * 2 * kRank; i += kSumsWarps * kWarp) {
      const int j = i / (2 * kRank), at = i % (2 * kRank);
      float v = 0;
#pragma unroll
      for (int w = 0; w < kSumsWarps; ++w) v += shared.gate[j][w][at / kRank][at % kRank];
      job.gate_sums[static_cast<int64_t>(first + from + j) * 2 * kRank + at] = v;
    }
  };
  constexpr int kUnits = kSumsUnits<kRank>, kPitch = kSumsPitch<kRank>;
  const int units = ceil_div(columns, 16);
  // The warp's units are two boxes apart, at the same place within them.
  const uint32_t part_at =
      static_cast<uint32_t>(warp / 4 * kSumsBox + lane % 16 * 128 + (((warp % 4 * 2 + lane / 16) ^ lane % 8) * 16));
  const uint32_t u_at = static_cast<uint32_t>(((lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 8) * 2);
  float total[kUnits][2][kRank / 16][4] = {};
  int stage = 0;
  uint32_t parity = 0;
  for (int j = 0; j < count; ++j) {
    if (j % kSumsChunk<kRank> == 0) {
      if (j > 0) warpgroups_meet<kSumsWarps * kWarp>(1);  // nobody reads the U before
      prepare(j);
    }
    if (sums) {
      const uint32_t u_address = shared_address(shared.u[j % kSumsChunk<kRank>]) + u_at;
      barrier_wait(full + stage * 8, parity);
#pragma unroll
      for (int k = 0; k < kSumsTokens / 16; ++k) {
        uint32_t u[kRank / 16][4], part[kUnits][4];
#pragma unroll
        for (int m = 0; m < kRank / 16; ++m) load_tiles_transposed(u[m], u_address + (k * 16 * kPitch + m * 16) * 2);
        // All loads, then all products: a unit at a time would wait for each load.
#pragma unroll
        for (int i = 0; i < kUnits; ++i)
          if (warp + i * kSumsWarps < units)
            load_tiles_transposed(part[i], ring + stage * stage_bytes + part_at + i * 2 * kSumsBox + k * 16 * 128);
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
          if (warp + i * kSumsWarps >= units) continue;
#pragma unroll
          for (int m = 0; m < kRank / 16; ++m) {
            mma<T>(total[i][0][m], u[m], {part[i][0], part[i][1]});
            mma<T>(total[i][1][m], u[m], {part[i][2], part[i][3]});
          }
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(empty + stage * 8, 0);
      if (++stage == job.stages) stage = 0, parity ^= 1;
    }
  }
  wait_for_previous();  // this kernel's end must mean that one's
  if (!sums) return;
  const int stacked = job.gates.stacked();
  float* to = job.partial + static_cast<int64_t>(slice) * stacked * job.width + column;
#pragma unroll
  for (int i = 0; i < kUnits; ++i)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int m = 0; m < kRank / 16; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int c = (warp + i * kSumsWarps) * 16 + n * 8 + 2 * (lane % 4), rank = m * 16 + half * 8 + lane / 4;
          if (c < columns && rank < stacked)
            *reinterpret_cast<float2*>(to + static_cast<int64_t>(rank) * job.width + c) =
                make_float2(total[i][n][m][2 * half], total[i][n][m][2 * half + 1]);
        }
#else
  __trap();  // the host never launches it here
#endif
}

// The partial sums of up to four linears, in order.
struct ReduceAllArgs {
  int members;
  ReduceArgs member[FERA_MAX_GROUP];
};
template <int kRank>
__global__ void __launch_bounds__(kUpThreads, 2) reduce_all(const __grid_constant__ ReduceAllArgs args) {
  wait_for_previous();
  int block = blockIdx.x, which = 0;
  while (block >= args.member[which].blocks()) block -= args.member[which++].blocks();
  reduce_block<kRank>(args.member[which], block);
}

}  // namespace fera::cuda
