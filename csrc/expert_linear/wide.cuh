// What surrounds the two products of fused.cuh at wide ranks (R = 48 to 512, sm_90a):
//   cast     A and B to x's dtype, where they are not
//   project  h = x A^T and gated = gate scale h, or gated dh = gate scale dy B
//   cross    dy^T h and (gated dh)^T x, one partial sum a slice of tokens; of dy^T h also its product with B, whose sum
//            over columns is the gate's gradient, so that neither dh nor h is read for it
//   reduce   the partial sums, in order, to dA, dB and dgate
// A block of project or cross makes one tile of 128 x 128: a warp that starts the copies into a ring of stages, two
// warpgroups of 64 rows each. Two blocks share a multiprocessor: one's epilogue runs beside the other's products.
// With kPair = 2 neighbours in a cluster load one half each, for both, of the operand that their tiles share: what
// blocks read from L2 takes longer than what the device reads from memory.
#pragma once

#include "expert_linear/wide_cross.cuh"
#include "expert_linear/wide_sums.h"

namespace fera::cuda {

struct WideMaps {
  CUtensorMap x, w;         // of project
  CUtensorMap left, right;  // of cross: (column, token of a gate row, gate row)
};

template <class T>
struct WideProject {
  int blocks;                // pairs of row tiles * column tiles (the faster index) * splits * kPair
  int splits, column_tiles;  // splits: pairs of a cluster, each with a share of k
  int depth;                 // blocks of 64 along k
  int tokens, ranks;
  WideGates gates;
  T *h, *gated;  // h: NULL in backward
};

template <class T>
struct WideCross {
  int blocks;  // tiles * slices, of pairs along the longer of rows and columns
  CrossOf<T> of;
};

#if defined(FERA_SM90A)
template <class T>
__device__ inline uint4 pack_eight(const float (&v)[8]) {
  return make_uint4(pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7]));
}
template <class T>
__device__ inline void unpack_eight(const uint4& from, float (&v)[8]) {
  const float2 a = unpack<T>(from.x), b = unpack<T>(from.y), c = unpack<T>(from.z), d = unpack<T>(from.w);
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}

template <class T, int kPair, int kNMajor>
__device__ inline void project(const WideMaps& maps, const WideProject<T>& p, const WideRing& ring) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int mine = ring.rank % kPair, split = ring.rank / kPair, pair = blockIdx.x / (p.splits * kPair);
  const int row = (pair / p.column_tiles * kPair + mine) * kWideTile, column = pair % p.column_tiles * kWideTile;
  const int first = p.depth * split / p.splits, count = p.depth * (split + 1) / p.splits - first;
  if (warp == kWideWarps) {
    if (lane == 0)
      fill_ring(ring, count, [&](int i, uint32_t to, uint32_t barrier) {
        const int k = (first + i) * kWideDepth;
        load_box<1>(to, maps.x, k, row, barrier);
        if constexpr (kPair == 2) {
          const int half = column + mine * 64;
          load_box_for(to + kWideOperand + mine * kWideBox, maps.w, kNMajor ? half : k, kNMajor ? k : half, barrier,
                       static_cast<uint16_t>(3 << split * 2));
        } else {
          load_box<1>(to + kWideOperand, maps.w, kNMajor ? column : k, kNMajor ? k : column, barrier);
          if constexpr (kNMajor) load_box<1>(to + kWideOperand + kWideBox, maps.w, column + 64, k, barrier);
        }
      });
    __syncwarp();
  } else {
    float sum[64];
    int stage = 0;
    uint32_t parity = 0;
    multiply_stages<T, 0, kNMajor, kWideStages, kWideStage>(ring.base, ring.full, count, warp / 4, stage, parity, sum,
                                                            [&](int s) { ring.release<kPair>(s, lane); });
    warpgroups_meet();  // the other's products may still read the stages
    const uint32_t to = ring.base + ((warp * 16 + lane / 4) * kWideRow + lane % 4 * 2) * 4;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + j * 32), "f"(sum[j * 4]), "f"(sum[j * 4 + 1])
                   : "memory");
      asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to + j * 32 + 8 * kWideRow * 4), "f"(sum[j * 4 + 2]),
                   "f"(sum[j * 4 + 3])
                   : "memory");
    }
  }
  if (p.splits == 1)
    __syncthreads();
  else
    cluster_meet();

  // 16 threads a row, eight ranks each; every block of the cluster finishes its share of the rows.
  const int q = column + threadIdx.x % 16 * 8;
  if (warp < kWideWarps && q < p.ranks) {
    int expert[8];
    float factor[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) expert[i] = (q + i) / p.gates.rank;
    int known = -1;
    const int share = kWideTile / p.splits;
    for (int inside = split * share + threadIdx.x / 16; inside < (split + 1) * share; inside += 16) {
      const int t = row + inside;
      if (t >= p.tokens) break;
      const uint32_t from = ring.base + (inside * kWideRow + q - column) * 4;
      float v[8] = {};
      for (int s = 0; s < p.splits; ++s) {
        const bool here = s == split;
        const float4 low = here ? load_shared(from) : load_shared(from, s * kPair + mine);
        const float4 high = here ? load_shared(from + 16) : load_shared(from + 16, s * kPair + mine);
        v[0] += low.x, v[1] += low.y, v[2] += low.z, v[3] += low.w;
        v[4] += high.x, v[5] += high.y, v[6] += high.z, v[7] += high.w;
      }
      const int64_t at = static_cast<int64_t>(t) * p.ranks + q;
      if (p.h != nullptr) {
        const uint4 hidden = pack_eight<T>(v);
        *reinterpret_cast<uint4*>(p.h + at) = hidden;
        unpack_eight<T>(hidden, v);
      }
      const int gate_row = t / p.gates.rows_per_gate;
      if (gate_row != known) {
        known = gate_row;
#pragma unroll
        for (int i = 0; i < 8; ++i) factor[i] = p.gates.factor(gate_row, expert[i]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] *= factor[i];
      *reinterpret_cast<uint4*>(p.gated + at) = pack_eight<T>(v);
    }
  }
}

template <class T, int kPair>
__device__ inline void cross(const WideMaps& maps, const WideCross<T>& c, const WideRing& ring, int index) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = ring.rank % kPair, pair = index / kPair;
  // The tiles along the shorter of rows and columns are neighbours: they share one of the other operand.
  const bool long_rows = c.of.column_tiles <= c.of.row_tiles;
  const int narrow = min(c.of.row_tiles, c.of.column_tiles),
            tiles = narrow * ceil_div(max(c.of.row_tiles, c.of.column_tiles), kPair);
  const int slice = pair / tiles, along = pair % tiles / narrow * kPair + mine, across = pair % narrow;
  const int row_tile = long_rows ? along : across;
  const int row = row_tile * kWideTile, column = (long_rows ? across : along) * kWideTile;
  const int gate_row = slice / c.of.slices_per_gate, first = slice % c.of.slices_per_gate * c.of.steps_per_slice;
  const int count = min(c.of.steps_per_slice, c.of.steps - first);
  if (warp == kWideWarps) {
    if (lane == 0)
      fill_ring(ring, count, [&](int i, uint32_t to, uint32_t barrier) {
        const int token = (first + i) * kWideDepth;
        // Its own operand, and the one that the pair shares.
        const CUtensorMap &own = long_rows ? maps.left : maps.right, &shared = long_rows ? maps.right : maps.left;
        const uint32_t own_to = to + (long_rows ? 0 : kWideOperand), shared_to = to + (long_rows ? kWideOperand : 0);
        const int own_column = long_rows ? row : column, shared_column = long_rows ? column : row;
#pragma unroll
        for (int box = 0; box < 2; ++box) {
          load_cube(own_to + box * kWideBox, own, own_column + box * 64, token, gate_row, barrier);
          if constexpr (kPair == 1)
            load_cube(shared_to + box * kWideBox, shared, shared_column + box * 64, token, gate_row, barrier);
        }
        if constexpr (kPair == 2)
          load_cube_for(shared_to + mine * kWideBox, shared, shared_column + mine * 64, token, gate_row, barrier,
                        static_cast<uint16_t>(3 << ring.rank / 2 * 2));
      });
    return;
  }
  float sum[64];
  int stage = 0;
  uint32_t parity = 0;
  multiply_stages<T, 1, 1, kWideStages, kWideStage>(ring.base, ring.full, count, warp / 4, stage, parity, sum,
                                                    [&](int s) { ring.release<kPair>(s, lane); });
  const CrossTile tile{slice, row_tile, row, column};
  const int at_row = row + warp * 16 + lane / 4;
  write_partial(c.of, tile, at_row, sum, lane);
  if (c.of.gate_sums == nullptr) return;
  float part[32] = {};
  add_gate_part(c.of, tile, at_row, sum, part, lane);
  // The stages are free once every product has read them.
  write_gate_sums<kWideWarps>(c.of, tile, part, warp, lane, ring.base, [] { warpgroups_meet(); });
}
#endif  // FERA_SM90A

// The first p.blocks blocks project; with kBackward those after them cross. A cluster does one of the two.
template <class T, bool kBackward, int kPair>
__global__ void __launch_bounds__(kWideThreads, 2)
    wide(const __grid_constant__ WideMaps maps, const __grid_constant__ WideProject<T> p,
         const __grid_constant__ WideCross<T> c) {
#if defined(FERA_SM90A)
  extern __shared__ unsigned char raw[];
  WideRing ring;
  ring.base = (shared_address(raw) + 1023) / 1024 * 1024;
  ring.full = ring.base + kWideStages * kWideStage;
  ring.empty = ring.full + kWideStages * 8;
  ring.rank = cluster_rank();
  const bool alone = kPair == 1 && p.splits <= 1;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kWideStages; ++s) {
      barrier_init(ring.full + s * 8, 1);
      barrier_init(ring.empty + s * 8, kWideWarps * kPair);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_shared();
  }
  __syncthreads();
  if (!alone) cluster_meet_relaxed();
  let_next_start();
  wait_for_previous();
  const int block = blockIdx.x;
  if (block < p.blocks) {
    project<T, kPair, kBackward>(maps, p, ring);
  } else if constexpr (kBackward) {
    if (block - p.blocks < c.blocks) cross<T, kPair>(maps, c, ring, block - p.blocks);
  }
  __syncwarp();
  if (!alone) cluster_meet_relaxed();
#else
  __trap();  // the host never launches it here
#endif
}

}  // namespace fera::cuda
