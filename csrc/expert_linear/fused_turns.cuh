// y = x W + bias + u V, forward, R <= 32, as fused.cuh with h inside the tiles, by warpgroups in turns (sm_90a): each
// has the whole 128 rows of a tile, so that one multiplies while the other scales h, writes and begins. For short loops
// over k, where the ends of tiles are much of the time; tiles are narrower, so h's columns are a larger share of them.
//
// The order of tiles is known beforehand: a cluster takes every so manyth, its two warpgroups in turns.
#pragma once

#include "expert_linear/fused.cuh"
#include "expert_linear/wide_turns.cuh"

namespace fera::cuda {

template <int kN, int kInside>
struct TurnsSize {
  static constexpr int w_bytes = kN * 128, narrow_bytes = kInside * 128;
  static constexpr int stage = kWideOperand + w_bytes + narrow_bytes;
  static constexpr int buffers = 2, own = buffers * kPieceBytes, staging = kWideWarps * own;  // a warp's 16 rows
  static constexpr int stages = (kFusedShared - 1024 - 256 - staging) / stage;
  static constexpr int bytes = stages * stage + staging + 256 + 1024;  // 1024: to align the start
};

template <class T, int kN, int kCluster, int kInside>
__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_turns(const __grid_constant__ FusedMaps maps, const __grid_constant__ FusedShape<T> shape) {
#if defined(FERA_SM90A)
  using Size = TurnsSize<kN, kInside>;
  constexpr int kStages = Size::stages;
  extern __shared__ unsigned char raw[];
  const uint32_t base = (shared_address(raw) + 1023) / 1024 * 1024;
  const uint32_t staging = base + kStages * Size::stage, full = staging + Size::staging, empty = full + kStages * 8;
  const Order order{empty + kStages * 8};
  const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4), lane = threadIdx.x % 32;
  const int rank = kCluster == 1 ? 0 : cluster_rank();
  const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;

  begin_ring<kStages, kCluster>(full, empty, kGroupWarps * kCluster, [&] { order.init(); });

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int stage = 0;
      uint32_t parity = 1;  // a fresh barrier counts as having completed the phase before its first
      bool waited = false;
      for (int index = cluster; index < shape.plan.tiles; index += clusters) {
        const FusedTile tile = fused_tile<kN, kCluster>(shape, index, rank);
        const int product = shape.blocks[tile.member];
        for (int i = 0; i <= product; ++i) {
          const bool lowrank = i == product;
          const uint32_t to = base + stage * Size::stage, barrier = full + stage * 8;
          const int k = lowrank ? 0 : i * kFusedDepth;
          constexpr int kShare = kN / kCluster;
          barrier_wait(empty + stage * 8, parity);
          barrier_expect(barrier, lowrank ? Size::w_bytes : Size::stage);
          if (!lowrank) load_box<1>(to, maps.x[tile.member], k, tile.row, barrier);
          load_box<kCluster>(to + kWideOperand + rank * kShare * 128,
                             lowrank ? maps.v[tile.member] : maps.w[tile.member], k, tile.column + rank * kShare,
                             barrier);
          if (!lowrank) {
            if (!waited) wait_for_previous();  // A and B are of the kernel before
            waited = true;
            load_box<1>(to + kWideOperand + Size::w_bytes, maps.u[tile.member], k, 0, barrier);
          }
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int mine = group - 1, place = warp * 16 + lane / 4;
    const uint32_t own = staging + (mine * kGroupWarps + warp) * Size::own;
    const auto release = [&](int s) {
      if (lane < kCluster) barrier_arrive(empty + s * 8, lane);
    };
    float upper[(kN + kInside) / 2], lower[(kN + kInside) / 2];  // sums of rows 0 to 63 and 64 to 127, h last
    int first = 0;                                               // stages of the turns before
    int turn = 0;                                                // of this warpgroup's own
    for (int index = cluster, at = 0; index < shape.plan.tiles; index += clusters, at ^= 1) {
      const FusedTile tile = fused_tile<kN, kCluster>(shape, index, rank);
      const int blocks = shape.blocks[tile.member], before = first;
      first += blocks + 1;
      if (at != mine) continue;
      const Hidden& hidden = shape.hidden[tile.member];
      const int row = tile.row + place;
      Factors<kInside> factors, factors_below;
      factors.load(hidden, row, shape.rows, lane);
      factors_below.load(hidden, row + 64, shape.rows, lane);
      order.await(mine, turn++);
      multiply_rows<T, Size, kN + kInside, 0, 0>(base, full, blocks, before % kStages, before / kStages % 2, upper,
                                                 lower, release, [] {});
      const int last = before + blocks, stage = last % kStages;
      barrier_wait(full + stage * 8, last / kStages % 2);  // V; x's place in this stage is free
      order.hand_over(mine, lane);
      const uint32_t to = base + stage * Size::stage;
      hidden_rows<T>(hidden, factors, upper, row, shape.rows, place, to, lane, tile.column == 0);
      hidden_rows<T>(hidden, factors_below, lower, row + 64, shape.rows, place, to + kWideBox, lane, tile.column == 0);
      publish_shared();
      warpgroup_meet(1 + mine);
      const uint64_t a = operand(to, 16), b = operand(to + kWideOperand, 16);
      pin(upper);
      pin(lower);
      products_begin();
#pragma unroll
      for (int k = 0; k < kInside / 16; ++k) {
        WarpgroupProduct<T, kN, 0>::run(upper, a + k * 2, b + k * 2, 1);
        WarpgroupProduct<T, kN, 0>::run(lower, a + (kWideBox >> 4) + k * 2, b + k * 2, 1);
      }
      products_commit();
      products_wait<0>();
      pin(upper);
      pin(lower);
      release(stage);
      const int columns = shape.columns[tile.member] - tile.column;
      if (const T* bias = shape.bias[tile.member]) add_bias<T, kN>(bias + tile.column, columns, upper, lower, lane);
      leave_rows<T, kN, Size::buffers>(own, lane, columns, upper, lower, [&](int half, int c, uint32_t from) {
        store_box(maps.y[tile.member], tile.column + c, tile.row + half * 64 + warp * kPieceRows, from);
      });
    }
    if (lane == 0) wait_stores<0>();
  }
  end_ring<kCluster>();
#else
  __trap();  // the host never launches it here
#endif
}

}  // namespace fera::cuda
