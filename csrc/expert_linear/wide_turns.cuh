// What kernels share whose warpgroups take works by turns, 128 rows each (fused_wide.cuh, fused_turns.cuh): how they
// wait for one another and for the rows that other blocks make, the loop over k, and how results leave.
#pragma once

#include "expert_linear/wide_ring.cuh"

namespace fera::cuda {

#if defined(FERA_SM90A)
constexpr int kGroupWarps = 4;
// How many arrivals a tile of rows of u counts: of each warp that writes a share of its rows, and each tile of ranks.
__device__ inline int arrivals(int rank_tiles) { return kGroupWarps * rank_tiles; }
__device__ inline void arrive_at(int* count) {
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(count) : "memory");
}
__device__ inline void await_count(const int* count, int all) {
  int now = 0;
  while (now < all) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(now) : "l"(count) : "memory");
}
// Until each of `n` numbers has reached `all`.
__device__ inline void await_counts(const int* counts, int n, int all) {
  constexpr int kBatch = 8;
  for (int i = 0; i < n; i += kBatch) {
    int least;
    do {
      int now[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j)
        asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(now[j]) : "l"(counts + min(i + j, n - 1)) : "memory");
      least = now[0];
#pragma unroll
      for (int j = 1; j < kBatch; ++j) least = min(least, now[j]);
    } while (least < all);
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// A warpgroup starts when the other has all stages of the turn before: sooner it would take a phase of a stage's
// barrier for the next but one, which has the same parity.
struct Order {
  uint32_t at;  // 2 barriers
  __device__ void init() const {
    for (int g = 0; g < 2; ++g) barrier_init(at + g * 8, kGroupWarps);
  }
  // Before the warpgroup's turn number `turn` of its own.
  __device__ void await(int group, int turn) const {
    if (turn + group > 0) barrier_wait(at + group * 8, (turn + group - 1) % 2);
  }
  __device__ void hand_over(int group, int lane) const {
    if (lane == 0) barrier_arrive(at + (group ^ 1) * 8);
  }
};

// What a warpgroup works on next: two slots in shared memory, one a warpgroup, filled by the block's producer with the
// number of the work and where in the ring its stages begin. A warpgroup starts when the other has all stages of the
// turn before: sooner it would take a phase of a stage's barrier for the next but one, which has the same parity.
struct Turns {
  uint32_t at;  // 7 barriers, then the slots
  struct Turn {
    int index, stage;
    uint32_t parity;
  };
  __device__ uint32_t full(int group) const { return at + group * 8; }
  __device__ uint32_t empty(int group) const { return at + 16 + group * 8; }
  __device__ Order order() const { return {at + 32}; }
  __device__ uint32_t cleared() const { return at + 48; }  // what the turn reads of u is there
  __device__ uint32_t slot(int group) const { return at + 64 + group * 16; }
  __device__ void init() const {
    for (int g = 0; g < 2; ++g) {
      barrier_init(full(g), 1);
      barrier_init(empty(g), kGroupWarps + 1);
    }
    order().init();
    barrier_init(cleared(), 1);
  }
  __device__ void give(int turn, const Turn& t) const {
    const int g = turn % 2;
    barrier_wait(empty(g), turn / 2 % 2 ^ 1);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, 0};" ::"r"(slot(g)), "r"(t.index), "r"(t.stage), "r"(t.parity)
                 : "memory");
    barrier_arrive(full(g));
  }
  // A slot's turn number `turn`, by one lane of the watching warp.
  __device__ int watch(int group, int turn) const {
    barrier_wait(full(group), turn % 2);
    int index;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(index) : "r"(slot(group)) : "memory");
    barrier_arrive(empty(group));
    return index;
  }
  // The warpgroup's turn number `turn` of its own. One lane reads the slot, and only then gives it back.
  __device__ Turn take(int group, int turn, int lane) const {
    int index = 0, stage = 0, parity = 0, unused;
    if (lane == 0) {
      barrier_wait(full(group), turn % 2);
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(index), "=r"(stage), "=r"(parity), "=r"(unused)
                   : "r"(slot(group))
                   : "memory");
      barrier_arrive(empty(group));
    }
    index = uniform(index), stage = uniform(stage), parity = uniform(parity);
    if (index >= 0) order().await(group, turn);
    return {index, stage, static_cast<uint32_t>(parity)};
  }
};

// sum (128 x kWidth of a warpgroup, 64 rows each) = the products of `count` stages from `stage` on. `release` is called
// with each stage that no product reads any more, `arrived` when the last one is there.
template <class T, class Size, int kWidth, int kMMajor, int kNMajor, int kCount, class Release, class Arrived>
__device__ inline void multiply_rows(uint32_t base, uint32_t full, int count, int stage, uint32_t parity,
                                     float (&upper)[kCount], float (&lower)[kCount], Release release, Arrived arrived) {
  int before = -1;
  for (int i = 0; i < count; ++i) {
    barrier_wait(full + stage * 8, parity);
    if (i == count - 1) arrived();
    const uint32_t at = base + stage * Size::stage;
    const uint64_t a = operand(at, kMMajor ? kWideBox : 16), second = a + (kWideBox >> 4);  // 64 rows: 8 KB either way
    const uint64_t b = operand(at + kWideOperand, kNMajor ? kWideBox : 16);
    pin(upper);
    pin(lower);
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      constexpr int kA = kMMajor ? 128 : 2, kB = kNMajor ? 128 : 2;
      if constexpr (kWidth == kWideTile) {
        WideProduct<T, kMMajor, kNMajor>::run(upper, a + k * kA, b + k * kB, i > 0 || k > 0);
        WideProduct<T, kMMajor, kNMajor>::run(lower, second + k * kA, b + k * kB, i > 0 || k > 0);
      } else {
        static_assert(kMMajor == 0, "rows along k");
        WarpgroupProduct<T, kWidth, kNMajor>::run(upper, a + k * kA, b + k * kB, i > 0 || k > 0);
        WarpgroupProduct<T, kWidth, kNMajor>::run(lower, second + k * kA, b + k * kB, i > 0 || k > 0);
      }
    }
    products_commit();
    pin(upper);
    pin(lower);
    products_wait<1>();
    if (i > 0) release(before);
    before = stage;
    if (++stage == Size::stages) stage = 0, parity ^= 1;
  }
  products_wait<0>();
  pin(upper);
  pin(lower);
  release(before);
}

// kColumns of those sums, of `width` that are left, through the warp's own kBuffers pieces of shared memory: its 16
// rows of each half; store(half, column, from) starts the copy of a box of 32 columns.
template <class T, int kColumns, int kBuffers, int kCount, class Store>
__device__ inline void leave_rows(uint32_t own, int lane, int width, const float (&upper)[kCount],
                                  const float (&lower)[kCount], Store store) {
  constexpr int kPieces = (kColumns + 63) / 64;
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int first = 0; first < kPieces; first += kBuffers) {
      if (lane == 0) wait_stores<0>();  // of what was in the buffers before
      __syncwarp();
#pragma unroll
      for (int p = first; p < first + kBuffers && p < kPieces; ++p)
        stage_piece(own + (p - first) * kPieceBytes, lane, kColumns - p * 64, [&](int c, int below) {
          const int at = p * 32 + c / 2 + below * 2;
          return half == 0 ? pack<T>(upper[at], upper[at + 1]) : pack<T>(lower[at], lower[at + 1]);
        });
      publish_shared();
      __syncwarp();
      if (lane == 0) {
#pragma unroll
        for (int c = first * 64; c < (first + kBuffers) * 64 && c < kColumns; c += 32)
          if (c < width) store(half, c, own + (c - first * 64) / 32 * (kPieceBytes / 2));
        commit_stores();
      }
    }
}

// Of columns 2 (lane % 4) on, `columns` in all; nothing is read past them.
template <class T, int kColumns, int kCount>
__device__ inline void add_bias(const T* bias, int columns, float (&upper)[kCount], float (&lower)[kCount], int lane) {
  const int first = 2 * (lane % 4);
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
    float2 v = make_float2(0.f, 0.f);
    if (first + n * 8 < columns) v = unpack<T>(*reinterpret_cast<const uint32_t*>(bias + first + n * 8));
    upper[n * 4] += v.x, upper[n * 4 + 1] += v.y, upper[n * 4 + 2] += v.x, upper[n * 4 + 3] += v.y;
    lower[n * 4] += v.x, lower[n * 4 + 1] += v.y, lower[n * 4 + 2] += v.x, lower[n * 4 + 3] += v.y;
  }
}
#endif  // FERA_SM90A

}  // namespace fera::cuda
