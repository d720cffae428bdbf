// Warp-level tensor core instructions (mma.sync, sm_80 and newer) and the copies that feed them.
#pragma once

#include <cstdint>

#include "common/cuda_overlap.cuh"

namespace fera::cuda {

// d (16 x 8, float) += a (16 x 16) b (16 x 8). Lane l holds of d: rows l/4 and l/4 + 8, columns 2(l%4) + {0, 1};
// of a: those rows, columns 2(l%4) + {0, 1} and + 8; of b: rows 2(l%4) + {0, 1} and + 8, column l/4.
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void mma<Bfloat>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Four 8 x 8 tiles; lane l gives the address of row l % 8 of tile l / 8.
__device__ inline void load_tiles(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_tiles_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// 16 bytes to shared memory in the background; zeros where not `present` (then nothing is read).
__device__ inline void copy_async(uint32_t to, const void* from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int Pending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Two numbers in one register, the first in the low half.
template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<Bfloat>(float low, float high) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
template <class T>
__device__ inline float2 unpack(uint32_t v);
template <>
__device__ inline float2 unpack<Bfloat>(uint32_t v) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(v));
}
template <>
__device__ inline float2 unpack<Half>(uint32_t v) {
  return __half22float2(reinterpret_cast<const __half2&>(v));
}

// A tile of rows of `Granules` 16-byte pieces (4 or 8), written so that eight neighbouring rows of one column of
// pieces lie in different banks.
template <int Granules>
__device__ inline uint32_t piece(int row, int granule) {
  static_assert(Granules == 4 || Granules == 8, "a row is 64 or 128 bytes");
  const int turn = Granules == 8 ? row % 8 : row / 2 % 4;
  return static_cast<uint32_t>((row * Granules + (granule ^ turn)) * 16);
}

}  // namespace fera::cuda
