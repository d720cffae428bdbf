// The loop that every tile of wide.cuh is made by: a ring of stages that one thread fills with tensor copies and two
// warpgroups multiply.
#pragma once

#include "expert_linear/hopper.cuh"

namespace fera::cuda {

constexpr int kWideTile = 128, kWideDepth = 64, kWideStages = 3;
constexpr int kWideWarps = 8, kWideThreads = (kWideWarps + 1) * 32;
constexpr int kWideBox = 64 * 64 * 2, kWideOperand = kWideTile * kWideDepth * 2, kWideStage = 2 * kWideOperand;
constexpr int kWideRow = kWideTile + 8;  // floats between rows of a tile in shared memory: rows in different banks
constexpr int kWideBytes = 1024 + kWideStages * kWideStage + 2 * kWideStages * 8;  // 1024: to align the start
static_assert(kWideTile * kWideRow * 4 <= kWideStages * kWideStage, "a tile of floats fits where the stages were");

#if defined(FERA_SM90A)
__device__ inline void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void warpgroups_meet() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// Without the order of what was written, for which cluster_meet waits: at the start there are only barriers, which have
// a fence of their own; at the end no block may leave while another reads its memory or arrives at its barriers.
__device__ inline void cluster_meet_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ inline void load_cube(uint32_t to, const CUtensorMap& map, int column, int row, int layer,
                                 uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
          "r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(layer), "r"(barrier)
      : "memory");
}
// To the blocks of `mask`, at the same place in each.
__device__ inline void load_box_for(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier,
                                    uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(mask)
      : "memory");
}
__device__ inline void load_cube_for(uint32_t to, const CUtensorMap& map, int column, int row, int layer,
                                     uint32_t barrier, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(layer), "r"(barrier), "h"(mask)
      : "memory");
}
__device__ inline float4 load_shared(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
// At the same place in block `rank` of the cluster.
__device__ inline float4 load_shared(uint32_t address, int rank) {
  float4 v;
  asm volatile(
      "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %4, %5;\n"
      " ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
  return v;
}

// d (64 x 128) = [d +] a b as WarpgroupProduct, a stored along k or along m; d may hold more than it takes.
template <class T, int kMMajor, int kNMajor>
struct WideProduct;
// clang-format off
#define FERA_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FERA_F16(d, i) FERA_F4(d, i), FERA_F4(d, i + 4), FERA_F4(d, i + 8), FERA_F4(d, i + 12)
#define FERA_WIDE_PRODUCT(type, name)                                                                                \
  template <int kMMajor, int kNMajor>                                                                                \
  struct WideProduct<type, kMMajor, kNMajor> {                                                                       \
    template <int kCount>                                                                                            \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                                \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"                                                    \
                   " wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {"                                \
                   "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"  \
                   "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,"    \
                   "%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, %67, %68;\n}"   \
                   : FERA_F16(d, 0), FERA_F16(d, 16), FERA_F16(d, 32), FERA_F16(d, 48)                               \
                   : "l"(a), "l"(b), "r"(add), "n"(kMMajor), "n"(kNMajor));                                          \
    }                                                                                                                \
  };
FERA_WIDE_PRODUCT(Bfloat, "bf16")
FERA_WIDE_PRODUCT(Half, "f16")
#undef FERA_WIDE_PRODUCT
#undef FERA_F16
#undef FERA_F4
// clang-format on

struct WideRing {
  uint32_t base, full, empty;
  int rank;  // of the block in its cluster
  // By a warp: no product of its reads the stage any more.
  template <int kPair>
  __device__ void release(int stage, int lane) const {
    if constexpr (kPair == 1) {
      if (lane == 0) barrier_arrive(empty + stage * 8);
    } else {
      if (lane < 2) barrier_arrive(empty + stage * 8, rank / 2 * 2 + lane);
    }
  }
};

// One thread: load(i, to, barrier) starts the copies of stage i.
template <class Load>
__device__ inline void fill_ring(const WideRing& ring, int count, Load load) {
  int stage = 0;
  uint32_t parity = 1;  // a fresh barrier counts as having completed the phase before its first
  for (int i = 0; i < count; ++i) {
    barrier_wait(ring.empty + stage * 8, parity);
    barrier_expect(ring.full + stage * 8, kWideStage);
    load(i, ring.base + stage * kWideStage, ring.full + stage * 8);
    if (++stage == kWideStages) stage = 0, parity ^= 1;
  }
}

// sum (64 x 128 of each of two warpgroups) = the products of `count` stages of a ring, kBytes each: the left operand,
// then the right one, kWideOperand bytes. `release` is called with each stage that no product reads any more. `sum` may
// hold more than the 64 numbers of a tile.
template <class T, int kMMajor, int kNMajor, int kStages, int kBytes, int kCount, class Release>
__device__ inline void multiply_stages(uint32_t base, uint32_t full, int count, int half, int& stage, uint32_t& parity,
                                       float (&sum)[kCount], Release release) {
  int before = -1;
  for (int i = 0; i < count; ++i) {
    barrier_wait(full + stage * 8, parity);
    const uint32_t at = base + stage * kBytes;
    const uint64_t a = operand(at + half * kWideBox, kMMajor ? kWideBox : 16);  // 64 rows: 8 KB either way
    const uint64_t b = operand(at + kWideOperand, kNMajor ? kWideBox : 16);
    pin(sum);
    products_begin();
#pragma unroll
    for (int k = 0; k < 4; ++k)
      WideProduct<T, kMMajor, kNMajor>::run(sum, a + k * (kMMajor ? 128 : 2), b + k * (kNMajor ? 128 : 2),
                                            i > 0 || k > 0);
    products_commit();
    pin(sum);
    products_wait<1>();
    if (i > 0) release(before);
    before = stage;
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  products_wait<0>();
  pin(sum);
  release(before);
}

#endif  // FERA_SM90A

}  // namespace fera::cuda
