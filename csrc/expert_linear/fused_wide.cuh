// y = x W + bias + u V of wide ranks (R > 32) with everything that makes u, dA and dB, in one launch (sm_90a). Works
// are tiles of 128 rows:
//   project  128 ranks of h = x A^T, or of dh = dy B; u is h or dh itself
//   tile     kN columns of y, or of dx; the low-rank term is the last blocks of the loop over k
//   cross    backward: 128 x 128 of dy^T h or dh^T x, a partial sum a slice of tokens (wide_cross.cuh)
// Gate and scale are not applied to h and dh but to the weights that multiply them next, one copy a gate row (B' and
// A', wide_members.cu), and to the sums of slices, which do not cross gate rows. So tiles of rows do not either: tensor
// maps have gate rows as their third axis, copies past a gate row's end bring zeros and write nothing.
//
// A block: a warp that starts the tensor copies into a ring of stages, one that watches for the rows that these read,
// and two warpgroups that take works by turns, each the whole 128 rows (two products of 64 an instruction of 16 along
// k). While one multiplies, the other writes what it has; the tensor cores do not wait for the ends of tiles. A cluster
// of blocks has as many row tiles and the same columns, and each block loads a share of these for all; of V too, unless
// the rows are of two gate rows.
//
// Clusters take works from one counter (schedule.cuh): items that project before the tiles of their rows, those of dA
// when all that project are out. Whoever reads h or dh waits until its rows have counted all arrivals: for a work that
// was taken earlier, whose copies nothing later holds up. Among the works that wait, the earliest waits for one whose
// producer is not waiting: no launch can lock itself up, however few of its blocks are resident.
#pragma once

#include "expert_linear/fused_beside.cuh"
#include "expert_linear/wide_cross.cuh"
#include "expert_linear/wide_turns.cuh"

namespace fera::cuda {

constexpr int kMostCrosses = 2 * kMembers;

struct WideProductMaps {
  CUtensorMap x[kMembers], w[kMembers], y[kMembers];      // x, y: (column, row of a gate row, gate row)
  CUtensorMap first[kMembers];                            // A forward, B backward
  CUtensorMap u[kMembers], u_out[kMembers], v[kMembers];  // (.., .., gate row)
  CUtensorMap left[kMostCrosses], right[kMostCrosses];    // likewise
};

// dB's of the members, then dA's. Blocks' parts of items are numbered through.
template <class T>
struct CrossJob {
  CrossOf<T> of;
  int first;                     // number of its first part, a multiple of the cluster's blocks
  const int* arrivals;           // of the rows of dh where it is the left operand, else NULL
  Quotient tiles, rows, slices;  // by its tiles, its tiles along rows, its slices of a gate row
};

template <class T>
struct WideShape {
  const T* bias[kMembers];   // (N) or NULL
  int columns[kMembers];     // N
  int first_tile[kMembers];  // column tiles of the members before
  int blocks[kMembers];      // of 64 along k of x W
  int* arrivals[kMembers];   // of a tile of 128 rows of u
  int members;
  bool summed;
  int ranks, rank_tiles, rank_blocks;  // R; tiles of 128; blocks of 64 along k of u V
  int gate_tiles;                      // tiles of 128 rows of a gate row
  Quotient by_gate_tiles, by_row_items, by_rank_tiles;
  Schedule plan;
  int* queue;
  int jobs;
  CrossJob<T> job[kMostCrosses];
};

template <int kN, bool kNMajor>
struct WideSize {
  static constexpr int boxes = (kN + 63) / 64;
  static constexpr int w_bytes = kNMajor ? boxes * kWideBox : kN * 128;
  static constexpr int stage = kWideOperand + w_bytes;
  static constexpr int own = boxes * kPieceBytes, staging = kWideWarps * own;  // a warp's 16 rows
  static constexpr int stages = (227 * 1024 - 1024 - 512 - staging) / stage;
  static constexpr int bytes = stages * stage + staging + 512 + 1024;  // 1024: to align the start
  // Of the 168 a thread that a block gets, so that 128 of these and 256 of the others are no more.
  static constexpr int producer_registers = kN > 128 && kNMajor ? 40 : 56;
};

#if defined(FERA_SM90A)
// A block's tile of rows: its gate row, its first row there, its number among all.
struct RowPlace {
  int layer, row, tile;
};
template <int kCluster, class T>
__device__ inline RowPlace row_place(const WideShape<T>& s, int cluster_tile, int rank) {
  const int tile = cluster_tile * kCluster + rank, layer = s.by_gate_tiles(tile);
  return {layer, (tile - layer * s.gate_tiles) * kWideTile, tile};
}

struct ProjectPlace {
  int member, column;  // column: the first of 128 ranks
  RowPlace rows;
};
template <int kCluster, class T>
__device__ inline ProjectPlace project_place(const WideShape<T>& s, int index, int rank) {
  const int cluster_tile = s.by_row_items(index), inside = index - cluster_tile * s.plan.row_items;
  const int member = s.by_rank_tiles(inside);
  return {member, (inside - member * s.rank_tiles) * kWideTile, row_place<kCluster>(s, cluster_tile, rank)};
}

// A tile's place, the member that it is written for, and the members [first, last) whose products it sums.
struct WideTilePlace {
  int member, column, first, last;
  RowPlace rows;
};
template <int kN, int kCluster, class T>
__device__ inline WideTilePlace wide_tile(const WideShape<T>& s, int index, int rank) {
  const TilePlace at = tile_at(s.plan, index);
  int member = 0;
  if (!s.summed)
    while (member + 1 < s.members && at.column >= s.first_tile[member + 1]) ++member;
  return {member, (at.column - s.first_tile[member]) * kN, s.summed ? 0 : member, s.summed ? s.members : member + 1,
          row_place<kCluster>(s, at.row, rank)};
}

struct CrossPlace {
  int job, layer, step;  // step: of 64 tokens of the gate row, the first
  CrossTile tile;
};
// A block past the last slice of its job finds zeros and writes nothing.
template <int kCluster, class T>
__device__ inline CrossPlace cross_place(const WideShape<T>& s, int index, int rank) {
  int job = 0;  // a cluster's, without its rank: the compiler must know that all threads go through as many steps
  while (job + 1 < s.jobs && index * kCluster >= s.job[job + 1].first) ++job;
  const CrossJob<T>& j = s.job[job];
  const int inside = index * kCluster + rank - j.first, slice = j.tiles(inside);
  const int tile = inside - slice * j.of.row_tiles * j.of.column_tiles, column = j.rows(tile);
  const int row = tile - column * j.of.row_tiles, layer = j.slices(slice);
  return {job,
          layer,
          (slice - layer * j.of.slices_per_gate) * j.of.steps_per_slice,
          {slice, row, row * kWideTile, column * kWideTile}};
}
#endif  // FERA_SM90A

template <class T, int kN, bool kNMajor, int kCluster>
__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_wide(const __grid_constant__ WideProductMaps maps, const __grid_constant__ WideShape<T> shape) {
#if defined(FERA_SM90A)
  using Size = WideSize<kN, kNMajor>;
  constexpr int kStages = Size::stages;
  extern __shared__ unsigned char raw[];
  const uint32_t base = (shared_address(raw) + 1023) / 1024 * 1024;
  const uint32_t staging = base + kStages * Size::stage, full = staging + Size::staging, empty = full + kStages * 8;
  const Queue<kCluster, 1> queue{empty + kStages * 8};
  const Turns turns{queue.full + 48};
  const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4), lane = threadIdx.x % 32;
  const int rank = kCluster == 1 ? 0 : cluster_rank();

  begin_ring<kStages, kCluster>(full, empty, kGroupWarps * kCluster, [&] {
    queue.init();
    turns.init();
  });

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Size::producer_registers));
    if (threadIdx.x == 0) {
      int stage = 0;
      uint32_t parity = 1;  // a fresh barrier counts as having completed the phase before its first
      const auto start = [&](int bytes, auto copies) {
        const uint32_t to = base + stage * Size::stage, barrier = full + stage * 8;
        barrier_wait(empty + stage * 8, parity);
        barrier_expect(barrier, bytes);
        copies(to, to + kWideOperand, barrier);
        if (++stage == kStages) stage = 0, parity ^= 1;
      };
      // kWidth columns of the right operand, which the blocks of a cluster share.
      const auto load_right = [&](auto width, uint32_t to, const CUtensorMap& map, int column, int k,
                                  uint32_t barrier) {
        constexpr int kWidth = decltype(width)::value;
        if constexpr (kNMajor) {
#pragma unroll
          for (int box = 0; box < (kWidth + 63) / 64; ++box)
            if (box % kCluster == rank) load_box<kCluster>(to + box * kWideBox, map, column + box * 64, k, barrier);
        } else {
          constexpr int kShare = kWidth / kCluster;
          load_box<kCluster>(to + rank * kShare * 128, map, k, column + rank * kShare, barrier);
        }
      };
      const auto await_rows = [&](int turn) {
        barrier_wait(turns.cleared(), turn % 2);
        asm volatile("fence.proxy.async.global;" ::: "memory");
      };
      wait_for_previous();
      int claimed = rank == 0 ? atomicAdd(shape.queue, 1) : 0;
      for (int turn = 0;; ++turn) {
        if (rank == 0) queue.offer(turn, claimed);
        const int index = queue.receive(turn);
        const bool ends = index >= shape.plan.works;
        turns.give(turn, {ends ? -1 : index, stage, parity ^ 1});
        if (ends) {
          turns.give(turn + 1, {-1, 0, 0});
          break;
        }
        if (rank == 0) claimed = atomicAdd(shape.queue, 1);  // on its way while the copies below are started
        const Work work = work_at(shape.plan, index);
        if (work.kind == Kind::tile) {
          const WideTilePlace at = wide_tile<kN, kCluster>(shape, work.index, rank);
          for (int member = at.first; member < at.last; ++member) {
            for (int i = 0; i < shape.blocks[member]; ++i)
              start(Size::stage, [&](uint32_t left, uint32_t right, uint32_t barrier) {
                load_cube(left, maps.x[member], i * kWideDepth, at.rows.row, at.rows.layer, barrier);
                load_right(Constant<kN>{}, right, maps.w[member], at.column, i * kWideDepth, barrier);
              });
            if (member == at.first) await_rows(turn);
            // Whether the cluster's rows are of one gate row, so that each block loads its share for all.
            const int first = at.rows.tile - rank;
            const bool one = shape.by_gate_tiles(first) == shape.by_gate_tiles(first + kCluster - 1);
            for (int i = 0; i < shape.rank_blocks; ++i)
              start(Size::stage, [&](uint32_t left, uint32_t right, uint32_t barrier) {
                const int k = i * kWideDepth, layer = at.rows.layer;
                const uint16_t mask = static_cast<uint16_t>(one ? (1 << kCluster) - 1 : 1 << rank);
                load_cube(left, maps.u[member], k, at.rows.row, layer, barrier);
                if constexpr (kNMajor) {
#pragma unroll
                  for (int box = 0; box < Size::boxes; ++box)
                    if (!one || box % kCluster == rank)
                      load_cube_for(right + box * kWideBox, maps.v[member], at.column + box * 64, k, layer, barrier,
                                    mask);
                } else {
                  constexpr int kShare = kN / kCluster;
                  for (int share = one ? rank : 0; share < (one ? rank + 1 : kCluster); ++share)
                    load_cube_for(right + share * kShare * 128, maps.v[member], k, at.column + share * kShare, layer,
                                  barrier, mask);
                }
              });
          }
        } else if (work.kind == Kind::project) {
          const ProjectPlace at = project_place<kCluster>(shape, work.index, rank);
          for (int i = 0; i < shape.blocks[at.member]; ++i)
            start(2 * kWideOperand, [&](uint32_t left, uint32_t right, uint32_t barrier) {
              load_cube(left, maps.x[at.member], i * kWideDepth, at.rows.row, at.rows.layer, barrier);
              load_right(Constant<kWideTile>{}, right, maps.first[at.member], at.column, i * kWideDepth, barrier);
            });
          await_rows(turn);  // of every turn: else its parity would say nothing of the next one
        } else if constexpr (kNMajor) {
          const CrossPlace at = cross_place<kCluster>(shape, work.index, rank);
          const CrossJob<T>& job = shape.job[at.job];
          await_rows(turn);
          for (int i = 0; i < job.of.steps_per_slice; ++i)
            start(2 * kWideOperand, [&](uint32_t left, uint32_t right, uint32_t barrier) {
              const int token = (at.step + i) * kWideDepth;
#pragma unroll
              for (int box = 0; box < 2; ++box) {
                load_cube(left + box * kWideBox, maps.left[at.job], at.tile.row + box * 64, token, at.layer, barrier);
                load_cube(right + box * kWideBox, maps.right[at.job], at.tile.column + box * 64, token, at.layer,
                          barrier);
              }
            });
        }
      }
    }
    if (threadIdx.x == 32) {
      for (int turn = 0;; ++turn) {
        const int index = turns.watch(turn % 2, turn / 2);
        if (index < 0) break;
        const Work work = work_at(shape.plan, index);
        if (work.kind == Kind::tile) {
          const WideTilePlace at = wide_tile<kN, kCluster>(shape, work.index, rank);
          for (int member = at.first; member < at.last; ++member)
            await_count(shape.arrivals[member] + at.rows.tile, arrivals(shape.rank_tiles));
        } else if (kNMajor && work.kind == Kind::cross) {
          const CrossPlace at = cross_place<kCluster>(shape, work.index, rank);
          const CrossJob<T>& job = shape.job[at.job];
          if (job.arrivals != nullptr && at.tile.slice < job.of.slices) {
            const int first = at.step * kWideDepth / kWideTile;
            const int last = ceil_div(min(at.step + job.of.steps_per_slice, job.of.steps) * kWideDepth, kWideTile);
            await_counts(job.arrivals + at.layer * shape.gate_tiles + first, last - first, arrivals(shape.rank_tiles));
          }
        }
        barrier_arrive(turns.cleared());
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(252 - Size::producer_registers / 2));
    const int mine = group - 1;
    const uint32_t own = staging + (mine * kGroupWarps + warp) * Size::own;
    const auto release = [&](int s) {
      if (lane < kCluster) barrier_arrive(empty + s * 8, lane);
    };
    const auto arrived = [&] { turns.order().hand_over(mine, lane); };
    float upper[kN / 2], lower[kN / 2];  // sums of rows 0 to 63 and 64 to 127
    const auto leave = [&](auto columns_of, const CUtensorMap& map, int column, const RowPlace& rows, int width) {
      leave_rows<T, decltype(columns_of)::value, Size::boxes>(
          own, lane, width - column, upper, lower, [&](int half, int c, uint32_t from) {
            store_cube(map, column + c, rows.row + half * 64 + warp * kPieceRows, rows.layer, from);
          });
    };
    for (int turn = 0;; ++turn) {
      const Turns::Turn now = turns.take(mine, turn, lane);
      if (now.index < 0) break;
      const Work work = work_at(shape.plan, now.index);
      if (work.kind == Kind::tile) {
        const WideTilePlace at = wide_tile<kN, kCluster>(shape, work.index, rank);
        int count = 0;
        for (int member = at.first; member < at.last; ++member) count += shape.blocks[member] + shape.rank_blocks;
        multiply_rows<T, Size, kN, 0, kNMajor>(base, full, count, now.stage, now.parity, upper, lower, release,
                                               arrived);
        const int columns = shape.columns[at.member];
        if (const T* bias = shape.bias[at.member])
          add_bias<T, kN>(bias + at.column, columns - at.column, upper, lower, lane);
        leave(Constant<kN>{}, maps.y[at.member], at.column, at.rows, columns);
      } else if (work.kind == Kind::project) {
        const ProjectPlace at = project_place<kCluster>(shape, work.index, rank);
        multiply_rows<T, Size, kWideTile, 0, kNMajor>(base, full, shape.blocks[at.member], now.stage, now.parity, upper,
                                                      lower, release, arrived);
        leave(Constant<kWideTile>{}, maps.u_out[at.member], at.column, at.rows, shape.ranks);
        // At once: the producer may wait for it before it starts any copy of this warpgroup's next work.
        if (lane == 0) {
          stores_done();
          arrive_at(shape.arrivals[at.member] + at.rows.tile);
        }
      } else if constexpr (kNMajor) {
        const CrossPlace at = cross_place<kCluster>(shape, work.index, rank);
        const CrossOf<T>& c = shape.job[at.job].of;
        multiply_rows<T, Size, kWideTile, 1, 1>(base, full, c.steps_per_slice, now.stage, now.parity, upper, lower,
                                                release, arrived);
        const int row = at.tile.row + warp * 16 + lane / 4;
        write_partial(c, at.tile, row, upper, lane);
        write_partial(c, at.tile, row + 64, lower, lane);
        if (c.gate_sums != nullptr) {
          float part[32] = {};
          add_gate_part(c, at.tile, row, upper, part, lane);
          add_gate_part(c, at.tile, row + 64, lower, part, lane);
          if (lane == 0) wait_stores<0>();  // of the tile before: the scratch is its staging
          const auto meet = [&] { warpgroup_meet(1 + mine); };
          write_gate_sums<kGroupWarps>(c, at.tile, part, warp, lane, staging + mine * kGroupWarps * Size::own, meet);
          meet();  // a tile writes its results there
        }
      }
    }
    if (lane == 0) wait_stores<0>();
  }
  end_ring<kCluster>();
#else
  __trap();  // the host never launches it here
#endif
}

}  // namespace fera::cuda
