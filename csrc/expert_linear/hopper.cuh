// Hopper's asynchronous instructions (sm_90a): warpgroup products, tensor copies, and the barriers they meet at.
#pragma once

#include <cuda.h>

#include <type_traits>

#include "common/cuda_overlap.cuh"
#include "expert_linear/tensor_core.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FERA_SM90A 1
#endif

namespace fera::cuda {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// ---- barriers in shared memory: addresses are shared_address(...) ----
__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// At the same barrier of block `rank` of the cluster. Without a wider scope: that would put a fence of the whole GPU
// (about a thousand cycles) before every arrival, and what the arrivals order here are copies and products, which
// have completed by then.
__device__ inline void barrier_arrive(uint32_t barrier, int rank) {
  asm volatile(
      "{\n .reg .b32 there;\n mapa.shared::cluster.u32 there, %0, %1;\n"
      " mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// Until the phase of that parity has completed.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
}
__device__ inline void cluster_meet() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ inline int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
// The 128 threads of a warpgroup; ids from 1 (0 is __syncthreads).
__device__ inline void warpgroup_meet(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }
// Likewise kThreads threads, whole warps.
template <int kThreads>
__device__ inline void warpgroups_meet(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// ---- between blocks ----
// `value` to shared memory of block `rank` of the cluster; its four bytes are counted by `barrier` there.
__device__ inline void send(uint32_t to, uint32_t barrier, int rank, int value) {
  asm volatile(
      "{\n .reg .b32 there, meet;\n mapa.shared::cluster.u32 there, %0, %2;\n mapa.shared::cluster.u32 meet, %1, %2;\n"
      " st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %3, [meet];\n}" ::"r"(to),
      "r"(barrier), "r"(rank), "r"(value)
      : "memory");
}
// What this thread wrote to global memory may be read by tensor copies, of whoever learns of it.
__device__ inline void publish_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  __threadfence();
}
__device__ inline void raise_flag(int* flag) {
  asm volatile("st.release.gpu.global.b32 [%0], 1;" ::"l"(flag) : "memory");
}
// Until the flag is up; tensor copies that follow read what was published before.
__device__ inline void await_flag(const int* flag) {
  int up = 0;
  while (up == 0) asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(up) : "l"(flag) : "memory");
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

// ---- tensor copies ----
// The box at (column, row) to shared memory, of this block or, by `mask`, of every block of the cluster at the same
// place; the bytes are counted by the barrier at the same place there.
template <int kCluster>
__device__ inline void load_box(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  if constexpr (kCluster == 1)
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(
            to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
  else
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
        " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<uint16_t>((1 << kCluster) - 1))
        : "memory");
}
// The map itself, which the first copy would wait for.
__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ inline void store_box(const CUtensorMap& map, int column, int row, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}
__device__ inline void store_cube(const CUtensorMap& map, int column, int row, int layer, uint32_t from) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(&map),
               "r"(column), "r"(row), "r"(layer), "r"(from)
               : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until at most `Pending` groups of stores still read shared memory.
template <int Pending>
__device__ inline void wait_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}
// Until all stores of this thread are in global memory.
__device__ inline void stores_done() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// What this thread wrote to shared memory is seen by copies and products that are issued after the next barrier.
__device__ inline void publish_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The start of a kernel that passes kStages stages of shared memory around: a barrier of each that says that its bytes
// are there, one that `readers` warps are done with it; `more` is what else one thread does first. Where it returns,
// all blocks of the cluster may use them.
template <int kStages, int kCluster, class More>
__device__ inline void begin_ring(uint32_t full, uint32_t empty, int readers, const More& more) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, readers);
    }
    more();
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    publish_shared();
  }
  let_next_start();
  __syncwarp();  // what one lane did is behind its warp before the aligned barriers
  if constexpr (kCluster == 1)
    __syncthreads();
  else
    cluster_meet();
}

// Its end: no block of the cluster leaves while another may still write into its stages or arrive at its barriers.
template <int kCluster>
__device__ inline void end_ring() {
  __syncwarp();
  if constexpr (kCluster > 1) cluster_meet();
}

// Four 8 x 8 tiles of 16-bit numbers; lane l gives the address of row l % 8 of tile l / 8.
__device__ inline void store_tiles(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// 16 rows of at most 64 columns, from a warp's accumulators to `buffer` as two boxes of 32 columns, for store_box: of
// every 16 columns f(c, upper) is the pair of this lane's numbers in columns c and c + 8, of its first row or the one
// eight below.
constexpr int kPieceRows = 16, kPieceBytes = kPieceRows * 64 * 2;
template <class F>
__device__ inline void stage_piece(uint32_t buffer, int lane, int columns, F f) {
#pragma unroll
  for (int c = 0; c < 64; c += 16)
    if (c < columns)
      store_tiles(buffer + c / 32 * (kPieceBytes / 2) + piece<4>(lane % 16, c / 16 % 2 * 2 + lane / 16), f(c, 0),
                  f(c, 1), f(c + 8, 0), f(c + 8, 1));
}
// ---- warpgroup products: d (64 x N, float) = [d +] a (64 x 16) b (16 x N), operands in shared memory ----
// Operands are tiles of 128-byte rows, swizzled by 128 bytes. k-major: rows of 64 numbers along k, eight rows a
// kilobyte. n-major: rows of 64 numbers along n; `leading` bytes to the next 64 columns.
__device__ inline uint64_t operand(uint32_t address, int leading) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}
__device__ inline void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ inline void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// A number that all threads of the warp have, so that the compiler knows it: products behind a branch that it takes for
// divergent are executed one at a time, with a wait after each.
__device__ inline int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }
// Keeps the compiler from moving accesses of accumulators over the instructions above.
template <int kCount>
__device__ inline void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// clang-format off: one instruction a width, its accumulators listed by a macro; d may hold more than it takes.
template <class T, int N, int kNMajor>
struct WarpgroupProduct;
#define FERA_F4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FERA_F8(d, i) FERA_F4(d, i), FERA_F4(d, i + 4)
#define FERA_REGISTERS_128 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define FERA_PRODUCT_128(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 128, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n128k16.f32." name "." name " {" FERA_REGISTERS_128 "},"   \
                   " %64, %65, p, 1, 1, 0, %67;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_128(Bfloat, "bf16")
FERA_PRODUCT_128(Half, "f16")
#undef FERA_PRODUCT_128
#undef FERA_REGISTERS_128
#define FERA_REGISTERS_144 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71"
#define FERA_PRODUCT_144(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 144, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %74, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n144k16.f32." name "." name " {" FERA_REGISTERS_144 "},"   \
                   " %72, %73, p, 1, 1, 0, %75;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56), FERA_F8(d, 64)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_144(Bfloat, "bf16")
FERA_PRODUCT_144(Half, "f16")
#undef FERA_PRODUCT_144
#undef FERA_REGISTERS_144
#define FERA_REGISTERS_160 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%7" \
  "7,%78,%79"
#define FERA_PRODUCT_160(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 160, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %82, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n160k16.f32." name "." name " {" FERA_REGISTERS_160 "},"   \
                   " %80, %81, p, 1, 1, 0, %83;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56), FERA_F8(d, 64), FERA_F8(d, 72)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_160(Bfloat, "bf16")
FERA_PRODUCT_160(Half, "f16")
#undef FERA_PRODUCT_160
#undef FERA_REGISTERS_160
#define FERA_REGISTERS_176 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%7" \
  "7,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87"
#define FERA_PRODUCT_176(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 176, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %90, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n176k16.f32." name "." name " {" FERA_REGISTERS_176 "},"   \
                   " %88, %89, p, 1, 1, 0, %91;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56), FERA_F8(d, 64), FERA_F8(d, 72), FERA_F8(d, 80)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_176(Bfloat, "bf16")
FERA_PRODUCT_176(Half, "f16")
#undef FERA_PRODUCT_176
#undef FERA_REGISTERS_176
#define FERA_REGISTERS_192 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%7" \
  "7,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define FERA_PRODUCT_192(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 192, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %98, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n192k16.f32." name "." name " {" FERA_REGISTERS_192 "},"   \
                   " %96, %97, p, 1, 1, 0, %99;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56), FERA_F8(d, 64), FERA_F8(d, 72), FERA_F8(d, 80), FERA_F8(d, 88)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_192(Bfloat, "bf16")
FERA_PRODUCT_192(Half, "f16")
#undef FERA_PRODUCT_192
#undef FERA_REGISTERS_192
#define FERA_REGISTERS_208 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%7" \
  "7,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101," \
  "%102,%103"
#define FERA_PRODUCT_208(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 208, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %106, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n208k16.f32." name "." name " {" FERA_REGISTERS_208 "},"   \
                   " %104, %105, p, 1, 1, 0, %107;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56), FERA_F8(d, 64), FERA_F8(d, 72), FERA_F8(d, 80), FERA_F8(d, 88), FERA_F8(d, 96)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_208(Bfloat, "bf16")
FERA_PRODUCT_208(Half, "f16")
#undef FERA_PRODUCT_208
#undef FERA_REGISTERS_208
#define FERA_REGISTERS_224 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%7" \
  "7,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101," \
  "%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define FERA_PRODUCT_224(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 224, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %114, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n224k16.f32." name "." name " {" FERA_REGISTERS_224 "},"   \
                   " %112, %113, p, 1, 1, 0, %115;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56), FERA_F8(d, 64), FERA_F8(d, 72), FERA_F8(d, 80), FERA_F8(d, 88), FERA_F8(d, 96), FERA_F8(d, 104)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_224(Bfloat, "bf16")
FERA_PRODUCT_224(Half, "f16")
#undef FERA_PRODUCT_224
#undef FERA_REGISTERS_224
#define FERA_REGISTERS_240 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%7" \
  "7,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101," \
  "%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119"
#define FERA_PRODUCT_240(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 240, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %122, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n240k16.f32." name "." name " {" FERA_REGISTERS_240 "},"   \
                   " %120, %121, p, 1, 1, 0, %123;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56), FERA_F8(d, 64), FERA_F8(d, 72), FERA_F8(d, 80), FERA_F8(d, 88), FERA_F8(d, 96), FERA_F8(d, 104), FERA_F8(d, 112)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_240(Bfloat, "bf16")
FERA_PRODUCT_240(Half, "f16")
#undef FERA_PRODUCT_240
#undef FERA_REGISTERS_240
#define FERA_REGISTERS_256 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%2" \
  "7,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%5" \
  "2,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%7" \
  "7,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101," \
  "%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121," \
  "%122,%123,%124,%125,%126,%127"
#define FERA_PRODUCT_256(type, name)                                                                  \
  template <int kNMajor>                                                                                        \
  struct WarpgroupProduct<type, 256, kNMajor> {                                                                \
    template <int kCount>                                                                                       \
    static __device__ void run(float (&d)[kCount], uint64_t a, uint64_t b, int add) {                          \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %130, 0;\n"                                         \
                   " wgmma.mma_async.sync.aligned.m64n256k16.f32." name "." name " {" FERA_REGISTERS_256 "},"   \
                   " %128, %129, p, 1, 1, 0, %131;\n}"                                                    \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24), FERA_F8(d, 32), FERA_F8(d, 40), FERA_F8(d, 48), FERA_F8(d, 56), FERA_F8(d, 64), FERA_F8(d, 72), FERA_F8(d, 80), FERA_F8(d, 88), FERA_F8(d, 96), FERA_F8(d, 104), FERA_F8(d, 112), FERA_F8(d, 120)                                                                                    \
                   : "l"(a), "l"(b), "r"(add), "n"(kNMajor));                                                   \
    }                                                                                                          \
  };
FERA_PRODUCT_256(Bfloat, "bf16")
FERA_PRODUCT_256(Half, "f16")
#undef FERA_PRODUCT_256
#undef FERA_REGISTERS_256
// Likewise for N = 16, 32 and 64, where either operand may be stored along its other axis: m-major, a has rows of 64 numbers
// along m, as an n-major b has along n.
template <class T, int N, int kMMajor, int kNMajor>
struct NarrowProduct;
#define FERA_NARROW_16(type, name)                                                                              \
  template <int kMMajor, int kNMajor>                                                                           \
  struct NarrowProduct<type, 16, kMMajor, kNMajor> {                                                            \
    static __device__ void run(float (&d)[8], uint64_t a, uint64_t b, int add) {                                \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %10, 0;\n"                                              \
                   " wgmma.mma_async.sync.aligned.m64n16k16.f32." name "." name " {%0,%1,%2,%3,%4,%5,%6,%7},"   \
                   " %8, %9, p, 1, 1, %11, %12;\n}"                                                             \
                   : FERA_F8(d, 0)                                                                              \
                   : "l"(a), "l"(b), "r"(add), "n"(kMMajor), "n"(kNMajor));                                     \
    }                                                                                                           \
  };
FERA_NARROW_16(Bfloat, "bf16")
FERA_NARROW_16(Half, "f16")
#undef FERA_NARROW_16
#define FERA_NARROW_32(type, name)                                                                              \
  template <int kMMajor, int kNMajor>                                                                           \
  struct NarrowProduct<type, 32, kMMajor, kNMajor> {                                                            \
    static __device__ void run(float (&d)[16], uint64_t a, uint64_t b, int add) {                               \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %18, 0;\n"                                              \
                   " wgmma.mma_async.sync.aligned.m64n32k16.f32." name "." name                                 \
                   " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},"                                  \
                   " %16, %17, p, 1, 1, %19, %20;\n}"                                                           \
                   : FERA_F8(d, 0), FERA_F8(d, 8)                                                               \
                   : "l"(a), "l"(b), "r"(add), "n"(kMMajor), "n"(kNMajor));                                     \
    }                                                                                                           \
  };
FERA_NARROW_32(Bfloat, "bf16")
FERA_NARROW_32(Half, "f16")
#undef FERA_NARROW_32
#define FERA_NARROW_64(type, name)                                                                              \
  template <int kMMajor, int kNMajor>                                                                           \
  struct NarrowProduct<type, 64, kMMajor, kNMajor> {                                                            \
    static __device__ void run(float (&d)[32], uint64_t a, uint64_t b, int add) {                               \
      asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"                                              \
                   " wgmma.mma_async.sync.aligned.m64n64k16.f32." name "." name                                 \
                   " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"   \
                   "%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, p, 1, 1, %35, %36;\n}"                          \
                   : FERA_F8(d, 0), FERA_F8(d, 8), FERA_F8(d, 16), FERA_F8(d, 24)                               \
                   : "l"(a), "l"(b), "r"(add), "n"(kMMajor), "n"(kNMajor));                                     \
    }                                                                                                           \
  };
FERA_NARROW_64(Bfloat, "bf16")
FERA_NARROW_64(Half, "f16")
#undef FERA_NARROW_64
#undef FERA_F8
#undef FERA_F4
// clang-format on

}  // namespace fera::cuda
