// Items of work that make u beside the tiles of the fused product, in the same launch (sm_90a). Forward an item is 128
// rows of h = x A^T and of u = gate scale h. Backward it is 128 rows of dh = dy B and of u = gate scale dh, with the
// rows' share of dB = dy^T (gate scale h) while dy is in shared memory, then their share of dA = u^T x, and the sums
// for dgate: dy and x are read once more than the product reads them, and nothing of h's width goes through a pass of
// its own. The items are bound by memory and the tiles by the tensor cores, and they run at the same time.
//
// Clusters take items and tiles from one counter, a row's items before its tiles. So whoever waits for a flag waits for
// a cluster that runs and that waits for nobody: no launch can lock itself up, however few of its blocks are resident.
// Most items are spread among the tiles of rows before theirs (schedule.cuh), and a cluster that takes an item takes
// fewer tiles.
#pragma once

#include "expert_linear/fused_hidden.cuh"
#include "expert_linear/schedule.cuh"

namespace fera::cuda {

// Of one member. NULL: not asked for.
template <class T>
struct Beside {
  const T* h;           // backward: the forward's, (T, R)
  T* u;                 // (T, kBeside)
  float *db, *da;       // (tiles of 128 rows, R, width)
  float* gate_sums;     // (tiles of 16 rows, 2, kBeside): sums of h dh over the tile's first gate row and its next
  int* ready;           // a tile of 128 rows: whether its u is in place; 0 before
  int width, in_width;  // of dy and of x
};

// An item takes its blocks of 64 columns by twos: each warpgroup has one of them to read across the rows, without a
// branch around its products (see `uniform`).
__host__ __device__ inline int pairs_of(int blocks) { return ceil_div(blocks, 2); }

constexpr int kBesideGateRows = 16;  // a warp's rows of a warpgroup product

// A block of an item in the ring: 128 rows of 64 numbers of dy or x, and kBeside rows of as many of B^T or A. A pair of
// them is one stage of the ring where it is large enough, so that more is on its way.
template <int kBeside>
constexpr int kBesideBytes = (kFusedRows + kBeside) * kFusedDepth * 2;
template <class Size, int kBeside>
constexpr bool kPairStage = 2 * kBesideBytes<kBeside> <= Size::stage;

// How the blocks of a cluster learn what to work on: two slots in shared memory, filled by the first block's producer.
// kTakers: of a block, its producer and the warps that take a slot.
template <int kCluster, int kTakers = 9>
struct Queue {
  uint32_t full;  // 2 barriers; then 2 of `empty`, used in the first block, and 2 slots
  __device__ uint32_t full_of(int slot) const { return full + slot * 8; }
  __device__ uint32_t empty_of(int slot) const { return full + 16 + slot * 8; }
  __device__ uint32_t slot_of(int slot) const { return full + 32 + slot * 4; }

  __device__ void init() const {
    for (int s = 0; s < 2; ++s) {
      barrier_init(full_of(s), 1);
      barrier_init(empty_of(s), kTakers * kCluster);
    }
  }
  // By the first block's producer, before its own `receive` of that turn.
  __device__ void offer(int turn, int item) const {
    const int s = turn % 2;
    barrier_wait(empty_of(s), turn / 2 % 2 ^ 1);  // a fresh barrier counts as having completed the phase before
    if constexpr (kCluster == 1) {
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(slot_of(s)), "r"(item) : "memory");
      barrier_arrive(full_of(s), 0);
    } else {
#pragma unroll
      for (int rank = 0; rank < kCluster; ++rank) send(slot_of(s), full_of(s), rank, item);
    }
  }
  // By each block's producer: it is the one that says how many bytes are to come.
  __device__ int receive(int turn) const {
    if constexpr (kCluster > 1) barrier_expect(full_of(turn % 2), 4);
    const int item = read(turn);
    barrier_arrive(empty_of(turn % 2), 0);
    return item;
  }
  // By a warp of a warpgroup.
  __device__ int take(int turn, int lane) const {
    const int item = uniform(lane == 0 ? read(turn) : 0);
    if (lane == 0) barrier_arrive(empty_of(turn % 2), 0);
    return item;
  }

 private:
  __device__ int read(int turn) const {
    const int s = turn % 2;
    barrier_wait(full_of(s), turn / 2 % 2);
    int item;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(item) : "r"(slot_of(s)) : "memory");
    return item;
  }
};

struct BesideShared {
  uint32_t base, full, empty, u;  // the ring, its barriers, and 16 KiB for U: 128 rows of 128 bytes, swizzled
};

// A warpgroup's half of an item: rows `row` + 64 * half on.
template <class T, bool kBack, int kRank, int kCluster, class Size>
__device__ inline void beside_rows(const Hidden& hidden, const Beside<T>& side, int rows, int blocks, int other_blocks,
                                   int row, const BesideShared& shared, int& stage, uint32_t& parity) {
  constexpr int kTiles = kRank / 8, kBoth = 256, kMeet = 3;  // barrier ids 1 and 2 are the warpgroups' own
  const int half = uniform(threadIdx.x / 128) - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int place = half * 64 + warp * 16 + lane / 4, column = 2 * (lane % 4);  // of a thread's accumulators
  const int stacked = hidden.experts * hidden.rank;
  Factors<kRank> factors;
  factors.load(hidden, row + place, rows, lane);

  // f(upper, n, i) of each of a thread's accumulators: number 4 n + 2 upper + i, of the item's row place + 8 upper (or
  // that column of dy or x) and rank 8 n + column + i.
  const auto accumulators = [](auto f) {
#pragma unroll
    for (int upper = 0; upper < 2; ++upper)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) f(upper, n, i);
  };
  // Two of them side by side, as an operand.
  const auto put = [&](int upper, int n, uint32_t pair) {
    const int r = place + upper * 8;
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared.u + r * 128 + ((n ^ r % 8) * 16) + lane % 4 * 4), "r"(pair)
                 : "memory");
  };
  float h[2][kTiles][2];
  if constexpr (kBack) {
    if (lane == 0) wait_stores<0>();  // of the tile before, whose staging area U takes
    warpgroups_meet<kBoth>(kMeet);
    accumulators([&](int upper, int n, int i) {
      const int t = row + place + upper * 8, q = n * 8 + column + i;
      h[upper][n][i] = t < rows && q < stacked ? widen(side.h[static_cast<int64_t>(t) * stacked + q]) : 0.f;
    });
#pragma unroll
    for (int upper = 0; upper < 2; ++upper)
#pragma unroll
      for (int n = 0; n < kTiles; ++n)
        put(upper, n, pack<T>(h[upper][n][0] * factors.at[upper][n][0], h[upper][n][1] * factors.at[upper][n][1]));
    publish_shared();
    warpgroups_meet<kBoth>(kMeet);
  }

  float sum[kRank / 2] = {}, part[kRank / 2] = {};
  uint32_t at[2];  // of a pair of blocks
  constexpr bool kPair = kPairStage<Size, kRank>;
  const auto await_pair = [&] {
#pragma unroll
    for (int i = 0; i < (kPair ? 1 : 2); ++i) {
      barrier_wait(shared.full + stage * 8, parity);
      at[i] = shared.base + stage * Size::stage;
      if (++stage == Size::stages) stage = 0, parity ^= 1;
    }
    if constexpr (kPair) at[1] = at[0] + kBesideBytes<kRank>;
  };
  const auto release_pair = [&] {
    const int second = stage == 0 ? Size::stages - 1 : stage - 1, first = second == 0 ? Size::stages - 1 : second - 1;
    if (lane >= kCluster) return;
    barrier_arrive(shared.empty + second * 8, lane);
    if constexpr (!kPair) barrier_arrive(shared.empty + first * 8, lane);
  };
  // part = (128 rows x 64 columns)^T U, read across the rows of both: n-major.
  const auto across = [&] {
    const uint64_t a = operand(half == 0 ? at[0] : at[1], 8192), b = operand(shared.u, 8192);
#pragma unroll
    for (int k = 0; k < kFusedRows / 16; ++k) NarrowProduct<T, kRank, 1, 1>::run(part, a + k * 128, b + k * 128, k > 0);
  };
  // To (tile of 128 rows, R, width).
  const auto write = [&](float* to, int width, int first) {
    accumulators([&](int upper, int n, int i) {
      const int c = first + warp * 16 + lane / 4 + upper * 8, q = n * 8 + column + i;
      if (c < width && q < stacked && row < rows)
        to[(static_cast<int64_t>(row / kFusedRows) * stacked + q) * width + c] = part[n * 4 + upper * 2 + i];
    });
  };

  for (int i = 0; i < pairs_of(blocks); ++i) {
    await_pair();
    pin(sum);
    pin(part);
    products_begin();
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint64_t a = operand(at[block] + half * 64 * 128, 16);
      const uint64_t b = operand(at[block] + Size::x_bytes, 16);
#pragma unroll
      for (int k = 0; k < kFusedDepth / 16; ++k) NarrowProduct<T, kRank, 0, 0>::run(sum, a + k * 2, b + k * 2, 1);
    }
    if constexpr (kBack) across();
    products_commit();
    products_wait<0>();
    pin(sum);
    pin(part);
    release_pair();
    if (kBack && side.db != nullptr) write(side.db, side.width, (2 * i + half) * 64);
  }

  if constexpr (kBack) warpgroups_meet<kBoth>(kMeet);  // nobody reads the U of h any more
  if (kBack && side.gate_sums != nullptr) {
    const int tile = (row + half * 64) / kBesideGateRows + warp, each = hidden.rows_per_gate;
    const int first = tile * kBesideGateRows / each;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float of[2] = {0.f, 0.f};
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const float v = h[upper][n][i] * sum[n * 4 + upper * 2 + i];
          const bool later = min(row + place + upper * 8, rows - 1) / each > first;
          of[0] += later ? 0.f : v;
          of[1] += later ? v : 0.f;
        }
#pragma unroll
        for (int s = 0; s < 2; ++s) {
#pragma unroll
          for (int across_rows = 4; across_rows < 32; across_rows *= 2)
            of[s] += __shfl_xor_sync(0xffffffffu, of[s], across_rows);
          if (lane < 4 && tile * kBesideGateRows < rows)
            side.gate_sums[(static_cast<int64_t>(tile) * 2 + s) * kRank + n * 8 + column + i] = of[s];
        }
      }
  }
#pragma unroll
  for (int upper = 0; upper < 2; ++upper) {
    const int t = row + place + upper * 8;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int q = n * 8 + column;
      float2 v = make_float2(sum[n * 4 + upper * 2], sum[n * 4 + upper * 2 + 1]);
      if constexpr (!kBack) {
        v = unpack<T>(pack<T>(v.x, v.y));
        if (t < rows) write_hidden<T>(hidden, stacked, t, q, v);
      }
      const uint32_t pair = pack<T>(v.x * factors.at[upper][n][0], v.y * factors.at[upper][n][1]);
      if constexpr (kBack) put(upper, n, pair);
      if (t < rows) *reinterpret_cast<uint32_t*>(side.u + static_cast<int64_t>(t) * kRank + q) = pair;
    }
  }
  publish_global();
  if constexpr (kBack) publish_shared();
  warpgroups_meet<kBoth>(kMeet);
  if (threadIdx.x == 128) raise_flag(side.ready + row / kFusedRows);

  if constexpr (kBack) {
    for (int i = 0; i < pairs_of(other_blocks); ++i) {
      await_pair();
      pin(part);
      products_begin();
      across();
      products_commit();
      products_wait<0>();
      pin(part);
      release_pair();
      write(side.da, side.in_width, (2 * i + half) * 64);
    }
    warpgroups_meet<kBoth>(kMeet);  // the next item writes its U, a tile its results
  }
}

}  // namespace fera::cuda
