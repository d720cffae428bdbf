// dx = dy W + (gate scale dh) A, backward, R <= 16, with everything that makes dh, dB, dA and dgate's sums, by rows
// (sm_90a): a block has 128 rows and all columns of dx, or one of a few shares of them, and makes its rows' dh itself,
// so that nothing passes between blocks, no flag, no queue.
//
//   first pass    320 columns of dx = dy W; beside each 64 columns of dy, while they lie in shared memory, dh += dy B
//                 and the rows' part of dB = dy^T (gate scale h), which shares of the columns divide among them
//   its end       the sums for dgate; u = gate scale dh stays in shared memory; dx += u A
//   further ones  the next 320 columns each
//   after them    the rows' part of dA = u^T x in the share's columns, while dx still leaves
//
// dy is read once a pass, x and W once a block: clusters that share W's columns were not faster. For sizes whose blocks
// run all at once, or in full waves of short ones: there a block's loads, products and ends are the whole kernel, and
// the item's reads of fused_beside.cuh are saved. Members of a group (summed) follow one another in the loop over k;
// their u lie side by side, 16 columns each, and are one block of 64 along k of u A, one operand of u^T x.
#pragma once

#include "expert_linear/fused.cuh"
#include "expert_linear/wide_ring.cuh"

namespace fera::cuda {

constexpr int kRowsRank = 16;                    // R padded
constexpr int kRowsGates = kFusedRows / 16 + 1;  // gate rows, of 16 tokens at least, that a block may meet

template <bool kGroup>
struct RowsSize {
  static constexpr int left = 192, right = 128, columns = left + right;  // of a pass, by two products
  static constexpr int boxes = columns / 64;
  static constexpr int x_bytes = kFusedRows * kFusedDepth * 2, w_bytes = boxes * kWideBox;
  static constexpr int narrow_bytes = kRowsRank * kFusedDepth * 2;
  static constexpr int stage = x_bytes + w_bytes + narrow_bytes, stages = 3;
  static constexpr int box_rank = kRowsRank * 128;  // bytes of a member's ranks of 64 columns of A
  static constexpr int operand_bytes = kFusedRows * 128, staging = 8 * kPieceBytes;
  static constexpr int across = kGroup ? kMembers * kRowsRank : kRowsRank;  // columns of u^T x
  static_assert(boxes <= 2 + stages && 2 * x_bytes + staging <= stage, "buffers beside x, in the stages");
  static_assert(kMembers * kRowsRank <= 64, "u of all members lies in rows of 128 bytes");
  static_assert(staging == operand_bytes, "the place of gate scale h is the second buffer of results");
  static constexpr int factor_bytes = kRowsGates * kRowsRank * 4;
  static constexpr int bytes =
      stages * stage + 2 * operand_bytes + staging + factor_bytes + 64 + 1024;  // 1024: to align the start
  static_assert(bytes <= kFusedShared, "a block's shared memory");
};

template <class T, bool kGroup>
__global__ void __launch_bounds__(kFusedThreads, 1)
    fused_rows(const __grid_constant__ FusedMaps maps, const __grid_constant__ FusedShape<T> shape) {
#if defined(FERA_SM90A)
  using Size = RowsSize<kGroup>;
  constexpr int kStages = Size::stages, kMembersHere = kGroup ? kMembers : 1;
  extern __shared__ unsigned char raw[];
  const uint32_t base = (shared_address(raw) + 1023) / 1024 * 1024;
  // gated: gate scale h of a member, then the second buffer of results; u: of all members.
  const uint32_t staging = base + kStages * Size::stage, gated = staging + Size::staging,
                 u = gated + Size::operand_bytes;
  const uint32_t full = u + Size::operand_bytes, empty = full + kStages * 8, factors = full + 64;
  const int group = uniform(threadIdx.x / 128), warp = uniform(threadIdx.x / 32 % 4), lane = threadIdx.x % 32;
  const TilePlace tile = tile_at(shape.plan, blockIdx.x);
  const int row = tile.row * kFusedRows, share = tile.column, shares = shape.plan.column_tiles;
  const int members = kGroup ? shape.members : 1;
  const int first_column = share * shape.passes * Size::columns, columns = shape.columns[0] - first_column;
  const int passes = min(shape.passes, ceil_div(columns, Size::columns));
  const int others =
      min(passes * Size::boxes, min(ceil_div(columns, 64), shape.other_blocks));  // of x, none without dA

  // A member's h, of this thread's two rows and, of each eight, its two ranks; and one of its gates' factors. On their
  // way before all of the block's copies, which they would wait behind.
  constexpr int kTiles = kRowsRank / 8, kBoth = 256;
  const int half = group - 1, place = half * 64 + warp * 16 + lane / 4, rank_column = 2 * (lane % 4);
  const int each = shape.hidden[0].rows_per_gate, first_gate = min(row, shape.rows - 1) / each;
  uint32_t h[2][kTiles];
  float factor = 0.f;
  const auto fetch = [&](int m) {
    const Hidden& hidden = shape.hidden[m];
    const int stacked = hidden.experts * hidden.rank, index = threadIdx.x - 128;
    const T* const from = shape.beside[m].h;
#pragma unroll
    for (int upper = 0; upper < 2; ++upper)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const int t = row + place + upper * 8, q = n * 8 + rank_column;
        const int64_t at = static_cast<int64_t>(t) * stacked + q;
        const bool present = t < shape.rows;
        h[upper][n] = pack<T>(present && q < stacked ? widen(from[at]) : 0.f,
                              present && q + 1 < stacked ? widen(from[at + 1]) : 0.f);
      }
    const int gate = min(first_gate + index / kRowsRank, (shape.rows - 1) / each);
    const int expert = index % kRowsRank / hidden.rank;
    if (index < kRowsGates * kRowsRank)
      factor = expert < hidden.experts
                   ? hidden.gate[static_cast<int64_t>(gate) * hidden.experts + expert] * hidden.scale
                   : 0.f;
  };
  if (group > 0) fetch(0);

  begin_ring<kStages, 1>(full, empty, 8, [&] {
    for (int m = 0; m < members; ++m) {
      prefetch_map(maps.x[m]);
      prefetch_map(maps.w[m]);
      prefetch_map(maps.narrow[m]);
      prefetch_map(maps.v[m]);
    }
    prefetch_map(maps.y[0]);
    if (others > 0) prefetch_map(maps.other);
  });

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int stage = 0;
      uint32_t parity = 1;  // a fresh barrier counts as having completed the phase before its first
      const auto start = [&](int bytes, auto copies) {
        const uint32_t to = base + stage * Size::stage, barrier = full + stage * 8;
        barrier_wait(empty + stage * 8, parity);
        barrier_expect(barrier, bytes);
        copies(to, barrier);
        if (++stage == kStages) stage = 0, parity ^= 1;
      };
      for (int pass = 0; pass < passes; ++pass) {
        const int column = first_column + pass * Size::columns;
        for (int m = 0; m < members; ++m)
          for (int i = 0; i < shape.blocks[m]; ++i) {
            const int k = i * kFusedDepth;
            start(Size::x_bytes + Size::w_bytes + (pass == 0 ? Size::narrow_bytes : 0),
                  [&](uint32_t to, uint32_t barrier) {
                    load_box<1>(to, maps.x[m], k, row, barrier);
#pragma unroll
                    for (int box = 0; box < Size::boxes; ++box)
                      load_box<1>(to + Size::x_bytes + box * kWideBox, maps.w[m], column + box * 64, k, barrier);
                    if (pass > 0) return;
                    if (m == 0 && i == 0) wait_for_previous();  // A and B are of the kernel before
                    load_box<1>(to + Size::x_bytes + Size::w_bytes, maps.narrow[m], k, 0, barrier);
                  });
          }
        start(members * Size::boxes * Size::box_rank, [&](uint32_t to, uint32_t barrier) {
          for (int m = 0; m < members; ++m)
#pragma unroll
            for (int box = 0; box < Size::boxes; ++box)
              load_box<1>(to + Size::x_bytes + box * kWideBox + m * Size::box_rank, maps.v[m], column + box * 64, 0,
                          barrier);
        });
      }
      for (int block = 0; block < others; block += 2)
        start(2 * Size::x_bytes, [&](uint32_t to, uint32_t barrier) {
          load_box<1>(to, maps.other, first_column + block * 64, row, barrier);
          load_box<1>(to + Size::x_bytes, maps.other, first_column + block * 64 + 64, row, barrier);
        });
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    constexpr int kMeet = 3;  // a barrier's id
    const uint32_t own = (half * 4 + warp) * kPieceBytes;
    int stage = 0, held = -1;
    uint32_t parity = 0;
    float left[Size::left / 2], right[Size::right / 2];  // sums of dx
    const auto release = [&](int s) {
      if (lane == 0) barrier_arrive(empty + s * 8);
    };
    const auto next = [&] {
      held = stage;
      if (++stage == kStages) stage = 0, parity ^= 1;
    };
    const auto drain = [&] {
      products_wait<0>();
      pin(left);
      pin(right);
      if (held >= 0) release(held);
      held = -1;
    };
    // dx += a times the stage's columns, kSteps of 16 along k or `steps`.
    const auto multiply = [&](uint32_t rows_at, uint32_t at, auto steps_of, int steps, bool add) {
      constexpr int kSteps = decltype(steps_of)::value;
      const uint64_t a = operand(rows_at + half * 64 * 128, 16), b = operand(at + Size::x_bytes, kWideBox);
      const uint64_t c = b + (Size::left / 64 * kWideBox >> 4);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        if (k >= steps) break;
        WarpgroupProduct<T, Size::left, 1>::run(left, a + k * 2, b + k * 128, add || k > 0);
        WarpgroupProduct<T, Size::right, 1>::run(right, a + k * 2, c + k * 128, add || k > 0);
      }
    };
    // Numbers 4 n + 2 upper + i of `sums`: column `first` + warp * 16 + lane / 4 + 8 upper, rank 8 n + 2 (lane % 4) +
    // i; to (tile of 128 rows, R, width).
    const auto write = [&](float* to, int width, int first, int stacked, const float* sums) {
      const int c = first + warp * 16 + lane / 4;
      to += (static_cast<int64_t>(row / kFusedRows) * stacked + rank_column) * width + c;
      if (row >= shape.rows) return;
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (c + upper * 8 < width && n * 8 + rank_column + i < stacked)
              to[(n * 8 + i) * width + upper * 8] = sums[n * 4 + upper * 2 + i];
    };
    // Two numbers side by side of an operand of 128 rows of 128 bytes, swizzled; n: of 8 columns.
    const auto put = [&](uint32_t to, int upper, int n, uint32_t pair) {
      const int r = place + upper * 8;
      asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + r * 128 + ((n ^ r % 8) * 16) + lane % 4 * 4), "r"(pair)
                   : "memory");
    };

    // Gate rows of the block are numbered from its first one: of this thread's two rows, of its warp's first.
    const auto gate_row = [&](int r) { return min(row + r, shape.rows - 1) / each - first_gate; };
    const int gate_rows[2] = {gate_row(place), gate_row(place + 8)};
    const auto factor_pair = [&](int upper, int n) {
      float2 v;
      asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                   : "=f"(v.x), "=f"(v.y)
                   : "r"(factors + (gate_rows[upper] * kRowsRank + n * 8 + rank_column) * 4)
                   : "memory");
      return v;
    };

    // ---- the first pass ----
    for (int m = 0; m < members; ++m) {
      const Hidden& hidden = shape.hidden[m];
      const Beside<T>& side = shape.beside[m];
      const int stacked = hidden.experts * hidden.rank, blocks = shape.blocks[m];
      if (m > 0) {
        fetch(m);
        warpgroups_meet<kBoth>(kMeet);  // nobody reads the member's before
      }
      if (threadIdx.x - 128 < kRowsGates * kRowsRank)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(factors + (threadIdx.x - 128) * 4), "f"(factor) : "memory");
      warpgroups_meet<kBoth>(kMeet);
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 v = unpack<T>(h[upper][n]), f = factor_pair(upper, n);
          put(gated, upper, n, pack<T>(v.x * f.x, v.y * f.y));
        }
      publish_shared();
      warpgroups_meet<kBoth>(kMeet);
      float dh[kRowsRank / 2], part[kRowsRank / 2];
      const auto step = [&](auto crosses, int i) {
        barrier_wait(full + stage * 8, parity);
        const uint32_t at = base + stage * Size::stage;
        pin(left);
        pin(right);
        pin(dh);
        if constexpr (decltype(crosses)::value != 0) pin(part);
        products_begin();
        multiply(at, at, Constant<4>{}, 4, m > 0 || i > 0);
        const uint64_t a = operand(at + half * 64 * 128, 16), b = operand(at + Size::x_bytes + Size::w_bytes, 16);
#pragma unroll
        for (int k = 0; k < kFusedDepth / 16; ++k)
          NarrowProduct<T, kRowsRank, 0, 0>::run(dh, a + k * 2, b + k * 2, i > 0 || k > 0);
        if constexpr (decltype(crosses)::value != 0) {
          const uint64_t across = operand(at, kWideBox), g = operand(gated, kWideBox);
#pragma unroll
          for (int k = 0; k < kFusedRows / 16; ++k)
            NarrowProduct<T, kRowsRank, 1, 1>::run(part, across + k * 128, g + k * 128, k > 0);
        }
        products_commit();
        pin(left);
        pin(right);
        pin(dh);
        if constexpr (decltype(crosses)::value != 0) {
          // No sum may be read while others are made, or the compiler waits for each product: the other warpgroup
          // multiplies meanwhile.
          products_wait<0>();
          pin(part);
          if (held >= 0) release(held);
          release(stage);
          next();
          held = -1;
          if (side.db != nullptr) write(side.db, side.width, i * 64, stacked, part);
        } else {
          products_wait<1>();
          if (held >= 0) release(held);
          next();
        }
      };
      // This share's blocks of dB, a warpgroup each of two. Not as a branch around products: behind one the compiler
      // waits for them.
      const int twos = ceil_div(blocks, 2), first = share * twos / shares * 2;
      const int last = min((share + 1) * twos / shares * 2, blocks);
      int i = 0;
      for (; i < first; ++i) step(Constant<0>{}, i);
      if (half == 0) {
        for (; i < last; i += 2) {
          step(Constant<1>{}, i);
          if (i + 1 < last) step(Constant<0>{}, i + 1);
        }
      } else {
        for (; i < last; i += 2) {
          step(Constant<0>{}, i);
          if (i + 1 < last) step(Constant<1>{}, i + 1);
        }
      }
      for (i = last; i < blocks; ++i) step(Constant<0>{}, i);
      drain();
      pin(dh);

      if (share == 0 && side.gate_sums != nullptr) {
        // Sums over the warp's 16 rows: those of its first gate row, and those of the next.
        const int first_row = row + half * 64 + warp * kBesideGateRows, first = gate_row(first_row - row);
        float* const to = side.gate_sums + static_cast<int64_t>(first_row / kBesideGateRows) * 2 * kRowsRank;
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          float of[2][2] = {};
#pragma unroll
          for (int upper = 0; upper < 2; ++upper) {
            const float2 v = unpack<T>(h[upper][n]);
            const bool later = gate_rows[upper] > first;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float product = (i == 0 ? v.x : v.y) * dh[n * 4 + upper * 2 + i];
              of[0][i] += later ? 0.f : product;
              of[1][i] += later ? product : 0.f;
            }
          }
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
#pragma unroll
              for (int across_rows = 4; across_rows < 32; across_rows *= 2)
                of[s][i] += __shfl_xor_sync(0xffffffffu, of[s][i], across_rows);
              if (lane < 4 && first_row < shape.rows) to[s * kRowsRank + n * 8 + rank_column + i] = of[s][i];
            }
        }
      }
#pragma unroll
      for (int upper = 0; upper < 2; ++upper)
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
          const float2 f = factor_pair(upper, n);
          put(u, upper, m * kTiles + n, pack<T>(dh[n * 4 + upper * 2] * f.x, dh[n * 4 + upper * 2 + 1] * f.y));
        }
    }
    publish_shared();
    warpgroups_meet<kBoth>(kMeet);  // u is whole, and nobody reads gate scale h any more

    // ---- ends of passes, and further passes ----
    for (int pass = 0;; ++pass) {
      barrier_wait(full + stage * 8, parity);
      pin(left);
      pin(right);
      products_begin();
      multiply(u, base + stage * Size::stage, Constant<kMembersHere>{}, members, true);
      products_commit();
      next();
      drain();
      const int column = first_column + pass * Size::columns, first_row = row + half * 64 + warp * kPieceRows;
      const auto stage_at = [&](int p, uint32_t from) {
        stage_piece(from + own, lane, 64, [&](int c, int upper) {
          const int at = p * 32 % (Size::left / 2) + c / 2 + upper * 2;
          return p < Size::left / 64 ? pack<T>(left[at], left[at + 1]) : pack<T>(right[at], right[at + 1]);
        });
      };
      const auto store = [&](int p, uint32_t from) {
#pragma unroll
        for (int c = 0; c < 64; c += 32)
          if (column + p * 64 + c < shape.columns[0])
            store_box(maps.y[0], column + p * 64 + c, first_row, from + own + c / 32 * (kPieceBytes / 2));
      };
      // Pieces [first, last) of 64 columns. After the last pass all at once, with buffers where W was in the ring's
      // stages: a warp that publishes what it staged waits for the stores before.
      const auto leave = [&](int first, int last, auto buffer) {
        if (lane == 0) wait_stores<0>();  // of what was in the buffers before
        __syncwarp();
#pragma unroll
        for (int p = first; p < last; ++p) stage_at(p, buffer(p - first));
        publish_shared();
        __syncwarp();
        if (lane == 0) {
#pragma unroll
          for (int p = first; p < last; ++p) store(p, buffer(p - first));
          commit_stores();
        }
      };
      const bool last_pass = pass + 1 == passes;
      if (last_pass) {
        warpgroups_meet<kBoth>(kMeet);  // nobody reads W or A any more
        leave(0, Size::boxes, [&](int i) {
          return i == 0 ? staging : i == 1 ? gated : base + (i - 2) * Size::stage + 2 * Size::x_bytes;
        });
      } else {
#pragma unroll
        for (int p = 0; p < Size::boxes; p += 2)
          leave(p, p + 2 < Size::boxes ? p + 2 : Size::boxes, [&](int i) { return i == 0 ? staging : gated; });
      }
      if (last_pass) break;
      for (int m = 0; m < members; ++m)
        for (int i = 0; i < shape.blocks[m]; ++i) {
          barrier_wait(full + stage * 8, parity);
          const uint32_t at = base + stage * Size::stage;
          pin(left);
          pin(right);
          products_begin();
          multiply(at, at, Constant<4>{}, 4, m > 0 || i > 0);
          products_commit();
          pin(left);
          pin(right);
          products_wait<1>();
          if (held >= 0) release(held);
          next();
        }
      drain();
    }

    // ---- dA ----
    for (int block = 0; block < others; block += 2) {
      float part[Size::across / 2];
      barrier_wait(full + stage * 8, parity);
      const uint64_t a = operand(base + stage * Size::stage + half * Size::x_bytes, kWideBox);
      const uint64_t b = operand(u, kWideBox);
      pin(part);
      products_begin();
#pragma unroll
      for (int k = 0; k < kFusedRows / 16; ++k)
        NarrowProduct<T, Size::across, 1, 1>::run(part, a + k * 128, b + k * 128, k > 0);
      products_commit();
      next();
      products_wait<0>();
      pin(part);
      release(held);
#pragma unroll
      for (int m = 0; m < kMembersHere; ++m) {
        if (m >= members) break;
        const Beside<T>& side = shape.beside[m];
        if (side.da != nullptr && block + half < others)
          write(side.da, side.in_width, first_column + (block + half) * 64,
                shape.hidden[m].experts * shape.hidden[m].rank, part + m * (kRowsRank / 2));
      }
    }
    if (lane == 0) wait_stores<0>();
  }
#else
  __trap();  // the host never launches it here
#endif
}

}  // namespace fera::cuda
