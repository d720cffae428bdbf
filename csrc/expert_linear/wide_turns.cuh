// How the warps of a block of fused_wide.cuh wait for one another, and for the rows that other blocks make.
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
  __device__ uint32_t order(int group) const { return at + 32 + group * 8; }
  __device__ uint32_t cleared() const { return at + 48; }  // what the turn reads of u is there
  __device__ uint32_t slot(int group) const { return at + 64 + group * 16; }
  __device__ void init() const {
    for (int g = 0; g < 2; ++g) {
      barrier_init(full(g), 1);
      barrier_init(empty(g), kGroupWarps + 1);
      barrier_init(order(g), kGroupWarps);
    }
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
  // The warpgroup's turn number `turn` of its own.
  __device__ Turn take(int group, int turn, int lane) const {
    barrier_wait(full(group), turn % 2);
    int index, stage, unused;
    uint32_t parity;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(index), "=r"(stage), "=r"(parity), "=r"(unused)
                 : "r"(slot(group))
                 : "memory");
    index = uniform(index), stage = uniform(stage), parity = static_cast<uint32_t>(uniform(static_cast<int>(parity)));
    if (lane == 0) barrier_arrive(empty(group));
    if (index >= 0 && turn + group > 0) barrier_wait(order(group), (turn + group - 1) % 2);
    return {index, stage, parity};
  }
  __device__ void hand_over(int group, int lane) const {
    if (lane == 0) barrier_arrive(order(group ^ 1));
  }
};
#endif  // FERA_SM90A

}  // namespace fera::cuda
