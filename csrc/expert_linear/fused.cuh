// y = x W + bias + u V in one kernel (sm_90a): the low-rank term is the last blocks of the base product's loop over k.
// Forward: W is the base weight read along k, V is B. Backward: dx = dy W + (gate scale dh) A, both read along n.
// kInside = 16 or 32 (R padded), forward: h too is made here. A lies beside W as further columns of each product, so
// that x is read once for both; at the end of the loop the block scales its rows of h by the gate and multiplies them
// by B. Every column tile makes h again, and the first of a member writes it. kBeside = 16 or 32: items of work before
// the tiles make u, and backward dB, dA and dgate's sums (fused_beside.cuh); a tile waits for its rows' flag before it
// reads u. Else u comes from another kernel.
//
// The kernel may start while the one before it still runs: it waits for that one before it reads u, or the packed A and
// B, so that x and W are under way by then; nothing is written before.
//
// Members are linears of one input (q, k, v): forward their columns lie side by side, a tile belongs to one; backward
// (summed) their products follow one another in the loop over k, and dx is written once.
//
// A cluster of kCluster blocks works on kCluster tiles of 128 rows and the same kN columns, each loading its share of
// the columns for all. A block: a warp that starts the tensor copies into a ring of stages (128 x 64 of x, 64 x kN of
// W), and two warpgroups of 64 rows each that multiply and write. Blocks are persistent, so the copies of the next
// tile run during the end of the last.
#pragma once

#include <type_traits>

#include "expert_linear/fused_beside.cuh"

namespace fera::cuda {

constexpr int kFusedShared = 227 * 1024;  // a block's on sm_90

struct FusedMaps {
  CUtensorMap x[kMembers], w[kMembers], u[kMembers], v[kMembers], y[kMembers];  // u: A if kInside
  CUtensorMap narrow[kMembers], other;  // kBeside: A forward, B backward; backward the forward's x, if narrow
};

template <class T>
struct FusedShape {
  const T* bias[kMembers];   // (N) or NULL
  int columns[kMembers];     // N
  int first_tile[kMembers];  // column tiles of the members before
  int blocks[kMembers];      // of 64 along k of x W
  int rank_steps[kMembers];  // of 16 of u V
  Hidden hidden[kMembers];
  Beside<T> beside[kMembers];
  int* queue;  // kBeside: what clusters have taken
  int rows;    // T
  int members;
  bool summed;
  Schedule plan;
  int other_blocks;  // of 64 columns of `other`
  int passes;        // over the columns, of whole rows (fused_rows.cuh)
};

// A tile's place, the member that it is written for, and the members [first, last) whose products it sums.
struct FusedTile {
  int row, column, member, first, last;
};

template <int kN, bool kNMajor, int kInside>
struct FusedSize {
  static_assert(kInside == 0 || !kNMajor, "the columns of A lie beside those of W read along k");
  static constexpr int x_bytes = kFusedRows * kFusedDepth * 2;
  static constexpr int boxes = (kN + 63) / 64;  // n-major: of 64 columns
  static constexpr int w_bytes = kNMajor ? boxes * 64 * kFusedDepth * 2 : kN * kFusedDepth * 2;
  static constexpr int narrow_bytes = kInside * kFusedDepth * 2;
  static constexpr int stage = x_bytes + w_bytes + narrow_bytes;
  // Results leave by pieces of 64 columns of a warp's 16 rows. A warp stages all of a tile, so that it waits once,
  // where that leaves four stages to the ring; else two pieces take turns.
  static constexpr int pieces = (kN + 63) / 64;
  static constexpr int stages_beside(int buffers) {
    return (kFusedShared - 1024 - 256 - 8 * buffers * kPieceBytes) / stage;
  }
  static constexpr int buffers = stages_beside(pieces) >= 4 ? pieces : 2;
  static constexpr int own = buffers * kPieceBytes;  // a warp's
  static constexpr int staging = 8 * own;
  static constexpr int stages = stages_beside(buffers);
  static constexpr int bytes = stages * stage + staging + 256 + 1024;  // 1024: to align the start
  static_assert(staging >= 16384, "U of the items beside the tiles lies there too");
};

// Tile `index` of a cluster.
template <int kN, int kCluster, class T>
__device__ inline FusedTile fused_tile(const FusedShape<T>& s, int index, int rank) {
  const TilePlace at = tile_at(s.plan, index);
  int member = 0;
  if (!s.summed)
    while (member + 1 < s.members && at.column >= s.first_tile[member + 1]) ++member;
  return {(at.row * kCluster + rank) * kFusedRows, (at.column - s.first_tile[member]) * kN, member,
          s.summed ? 0 : member, s.summed ? s.members : member + 1};
}

template <class T, int kN, bool kNMajor, int kCluster, int kInside, int kBeside>
__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_product(const __grid_constant__ FusedMaps maps, const __grid_constant__ FusedShape<T> shape) {
#if defined(FERA_SM90A)
  using Size = FusedSize<kN, kNMajor, kInside>;
  constexpr int kStages = Size::stages;
  // Of the 168 a thread that a block gets, so that 128 of these and 256 of the others are no more.
  constexpr int kProducerRegisters = kBeside == 32 ? 40 : 56;
  extern __shared__ unsigned char raw[];
  const uint32_t base = (shared_address(raw) + 1023) / 1024 * 1024;
  const uint32_t staging = base + kStages * Size::stage, full = staging + Size::staging, empty = full + kStages * 8;
  const Queue<kCluster> queue{empty + kStages * 8};
  const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4), lane = threadIdx.x % 32;
  const int rank = kCluster == 1 ? 0 : cluster_rank();
  const int cluster = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;

  // A warp of either warpgroup of each block reads a stage.
  begin_ring<kStages, kCluster>(full, empty, 8 * kCluster, [&] {
    if constexpr (kBeside > 0) queue.init();
  });

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kProducerRegisters));
    if (threadIdx.x == 0) {
      int stage = 0;
      bool waited = false;
      auto wait_once = [&] {
        if (!waited) wait_for_previous();
        waited = true;
      };
      uint32_t parity = 1;  // a fresh barrier counts as having completed the phase before its first
      int turn = 0, claimed = 0;
      if constexpr (kBeside > 0) {
        wait_once();
        if (rank == 0) claimed = atomicAdd(shape.queue, 1);
      }
      for (int next = cluster; kBeside > 0 || next < shape.plan.tiles; next += clusters) {
        int index = next;
        if constexpr (kBeside > 0) {
          if (rank == 0) queue.offer(turn, claimed);
          index = queue.receive(turn++);
          if (index >= shape.plan.works) break;
          if (rank == 0) claimed = atomicAdd(shape.queue, 1);  // on its way while the copies below are started
          const Work work = work_at(shape.plan, index);
          index = work.index;
          if (work.kind == Kind::project) {
            const int member = index % shape.members, row = (index / shape.members * kCluster + rank) * kFusedRows;
            const int first = pairs_of(shape.blocks[member]);
            const int others = kNMajor && shape.beside[member].da != nullptr ? pairs_of(shape.other_blocks) : 0;
            constexpr int kPieces = kPairStage<Size, kBeside> ? 1 : 2, kBlocks = 2 / kPieces;  // of a pair, of each
            for (int i = 0; i < (first + others) * kPieces; ++i) {  // past the end of a row copies bring zeros
              const bool other = i >= first * kPieces;
              const int k = (other ? i - first * kPieces : i) * kFusedDepth * kBlocks;
              const uint32_t barrier = full + stage * 8;
              barrier_wait(empty + stage * 8, parity);
              barrier_expect(barrier, kBlocks * (other ? Size::x_bytes : kBesideBytes<kBeside>));
#pragma unroll
              for (int block = 0; block < kBlocks; ++block) {
                const uint32_t to = base + stage * Size::stage + block * kBesideBytes<kBeside>;
                load_box<1>(to, other ? maps.other : maps.x[member], k + block * kFusedDepth, row, barrier);
                if (!other) load_box<1>(to + Size::x_bytes, maps.narrow[member], k + block * kFusedDepth, 0, barrier);
              }
              if (++stage == kStages) stage = 0, parity ^= 1;
            }
            continue;
          }
        }
        const FusedTile tile = fused_tile<kN, kCluster>(shape, index, rank);
        for (int member = tile.first; member < tile.last; ++member) {
          const int product = shape.blocks[member];
          const int blocks = product + (kInside ? 1 : (shape.rank_steps[member] + 3) / 4);
          for (int i = 0; i < blocks; ++i) {
            const bool lowrank = i >= product;
            const int k = (lowrank ? i - product : i) * kFusedDepth;
            const CUtensorMap& right = lowrank ? maps.v[member] : maps.w[member];
            const uint32_t to = base + stage * Size::stage, barrier = full + stage * 8;
            barrier_wait(empty + stage * 8, parity);
            barrier_expect(barrier, kInside > 0 && lowrank ? Size::w_bytes : Size::stage);
            if (lowrank) {
              wait_once();
              if constexpr (kBeside > 0) await_flag(shape.beside[member].ready + tile.row / kFusedRows);
              if constexpr (kInside == 0) load_box<1>(to, maps.u[member], k, tile.row, barrier);
            } else {
              load_box<1>(to, maps.x[member], k, tile.row, barrier);
            }
            if constexpr (kNMajor) {
#pragma unroll
              for (int box = 0; box < Size::boxes; ++box)
                if (box % kCluster == rank)
                  load_box<kCluster>(to + Size::x_bytes + box * 8192, right, tile.column + box * 64, k, barrier);
            } else {
              constexpr int kShare = kN / kCluster;
              load_box<kCluster>(to + Size::x_bytes + rank * kShare * 128, right, k, tile.column + rank * kShare,
                                 barrier);
            }
            if constexpr (kInside > 0) {
              if (!lowrank) {
                wait_once();
                load_box<1>(to + Size::x_bytes + Size::w_bytes, maps.u[member], k, 0, barrier);
              }
            }
            if (++stage == kStages) stage = 0, parity ^= 1;
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(252 - kProducerRegisters / 2));
    const int half = group - 1;
    int stage = 0;
    uint32_t parity = 0;
    const uint32_t own = staging + (half * 4 + warp) * Size::own;
    auto release = [&](int s) {
      if (lane < kCluster) barrier_arrive(empty + s * 8, lane);
    };
    int turn = 0;
    constexpr int kWhole = kN + kInside;
    float sum[kWhole / 2];  // h last
    for (int next = cluster; kBeside > 0 || next < shape.plan.tiles; next += clusters) {
      int index = next;
      if constexpr (kBeside > 0) {
        index = queue.take(turn++, lane);
        if (index >= shape.plan.works) break;
        const Work work = work_at(shape.plan, index);
        index = work.index;
        if (work.kind == Kind::project) {
          const int member = index % shape.members, row = (index / shape.members * kCluster + rank) * kFusedRows;
          const Beside<T>& side = shape.beside[member];
          beside_rows<T, kNMajor, kBeside, kCluster, Size>(shape.hidden[member], side, shape.rows, shape.blocks[member],
                                                           side.da != nullptr ? shape.other_blocks : 0, row,
                                                           {base, full, empty, staging}, stage, parity);
          continue;
        }
      }
      const FusedTile tile = fused_tile<kN, kCluster>(shape, index, rank);
      int before = -1;
      // One block of the ring: kFixed steps of 16 along k, or `steps` where that is 0. Not as a loop where it can be
      // helped: behind a branch the compiler puts a wait before a product.
      auto multiply = [&](auto width, auto fixed, bool add, int steps = 0) {
        constexpr int kWidth = decltype(width)::value, kFixed = decltype(fixed)::value;
        barrier_wait(full + stage * 8, parity);
        const uint32_t at = base + stage * Size::stage;
        const uint64_t a = operand(at + half * 64 * 128, 16);
        const uint64_t b = operand(at + Size::x_bytes, kNMajor ? 8192 : 16);
        pin(sum);
        products_begin();
#pragma unroll
        for (int k = 0; k < kFixed; ++k)
          WarpgroupProduct<T, kWidth, kNMajor>::run(sum, a + k * 2, b + k * (kNMajor ? 128 : 2), add || k > 0);
#pragma unroll 1
        for (int k = 0; kFixed == 0 && k < steps; ++k) {
          products_begin();
          WarpgroupProduct<T, kWidth, kNMajor>::run(sum, a + k * 2, b + k * (kNMajor ? 128 : 2), 1);
        }
        products_commit();
        pin(sum);
        products_wait<1>();
        if (before >= 0) release(before);
        before = stage;
        if (++stage == kStages) stage = 0, parity ^= 1;
      };
      const int place = warp * 16 + lane / 4;  // this thread's first row of its warpgroup's
      for (int member = tile.first; member < tile.last; ++member) {
        const int blocks = shape.blocks[member];
        Factors<kInside> factors;
        if constexpr (kInside > 0) factors.load(shape.hidden[member], tile.row + half * 64 + place, shape.rows, lane);
        // Whole blocks of u V are like those of x W.
        const int whole = kBeside == 0 && kInside == 0 ? shape.rank_steps[member] / 4 : 0;
        for (int i = 0; i < blocks + whole; ++i)
          multiply(Constant<kWhole>{}, Constant<4>{}, i > 0 || member > tile.first);
        if constexpr (kBeside > 0) {
          multiply(Constant<kN>{}, Constant<kBeside / 16>{}, true);
        } else if constexpr (kBeside == 0 && kInside == 0) {
          const int rest = shape.rank_steps[member] % 4;
          if (rest > 0) multiply(Constant<kN>{}, Constant<0>{}, true, rest);
        } else if constexpr (kInside > 0) {
          products_wait<0>();
          pin(sum);
          release(before);
          before = -1;
          barrier_wait(full + stage * 8, parity);  // V; x's place in this stage is free
          const Hidden& hidden = shape.hidden[member];
          hidden_rows<T>(hidden, factors, sum, tile.row + half * 64 + place, shape.rows, place,
                         base + stage * Size::stage + half * 64 * 128, lane, tile.column == 0);
          publish_shared();
          warpgroup_meet(1 + half);
          multiply(Constant<kN>{}, Constant<kInside / 16>{}, true);
        }
      }
      products_wait<0>();
      pin(sum);
      release(before);

      const int columns = shape.columns[tile.member];
      if (const T* bias = shape.bias[tile.member]) {
        const int first = tile.column + 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kN / 8; ++n) {
          float2 v = make_float2(0.f, 0.f);
          if (first + n * 8 < columns) v = unpack<T>(*reinterpret_cast<const uint32_t*>(bias + first + n * 8));
          sum[n * 4] += v.x, sum[n * 4 + 1] += v.y, sum[n * 4 + 2] += v.x, sum[n * 4 + 3] += v.y;
        }
      }
      const int row = tile.row + half * 64 + warp * kPieceRows;
#pragma unroll
      for (int first = 0; first < Size::pieces; first += Size::buffers) {
        if (lane == 0) wait_stores<0>();  // of what was in the buffers before
        __syncwarp();
#pragma unroll
        for (int p = first; p < first + Size::buffers && p < Size::pieces; ++p)
          stage_piece(own + (p - first) * kPieceBytes, lane, kN - p * 64, [&](int c, int upper) {
            const int at = p * 32 + c / 2 + upper * 2;
            return pack<T>(sum[at], sum[at + 1]);
          });
        publish_shared();
        __syncwarp();
        if (lane == 0) {
#pragma unroll
          for (int c = first * 64; c < (first + Size::buffers) * 64 && c < kN; c += 32)
            if (tile.column + c < columns)
              store_box(maps.y[tile.member], tile.column + c, row, own + (c - first * 64) / 32 * (kPieceBytes / 2));
          commit_stores();
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
