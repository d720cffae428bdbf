// What the variants with thread block clusters share: distributed shared memory, the cluster's barrier, asynchronous
// copies, and the mean that ends FECL. sm_90 and newer, but for the copies.
#pragma once

#include "common/cuda_overlap.cuh"

namespace fera::cuda {

// Of a launch in clusters of so many blocks.
inline cudaLaunchAttribute cluster_of(int blocks) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  return attribute;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ uint32_t remote_address(uint32_t local, int rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  return remote;
}
__device__ __forceinline__ void store_remote(uint32_t address, float4 v) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z),
               "f"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_remote(uint32_t address, double v) {
  asm volatile("st.shared::cluster.f64 [%0], %1;" ::"r"(address), "d"(v) : "memory");
}
// Element i from there on.
__device__ __forceinline__ void store_remote(uint32_t address, unsigned i, float2 v) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address + i * static_cast<unsigned>(sizeof(float2))),
               "f"(v.x), "f"(v.y)
               : "memory");
}
__device__ __forceinline__ float2 load_remote(uint32_t address, unsigned i) {
  float2 v;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(v.x), "=f"(v.y)
               : "r"(address + i * static_cast<unsigned>(sizeof(float2)))
               : "memory");
  return v;
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_relaxed() {  // for blocks that have nothing to show yet
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ void copy_async(float* to, const float* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Past L1, where what other blocks have just written does not lie.
__device__ __forceinline__ void copy_async(float4* to, const float4* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// So many bytes, a multiple of 16, from an address of 16; where that is odd, none.
__device__ __forceinline__ void prefetch_l2(const void* from, unsigned bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && bytes % 16 == 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

// Of what is read once: L1 keeps what it has.
template <class T>
__device__ __forceinline__ T load_once(const T* from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 2, "float32 and 16-bit types");
  T value;
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.global.L1::no_allocate.b32 %0, [%1];" : "=r"(reinterpret_cast<uint32_t&>(value)) : "l"(from));
  else
    asm volatile("ld.global.L1::no_allocate.b16 %0, [%1];" : "=h"(reinterpret_cast<uint16_t&>(value)) : "l"(from));
  return value;
}

// The mean of the samples' losses. One block of one warp, or one warp of a larger one.
__device__ inline void mean_of_losses(int64_t samples, const double* losses, float* loss) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < samples; i += 32) sum += losses[i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (threadIdx.x == 0) *loss = static_cast<float>(sum / static_cast<double>(samples));
}

}  // namespace fera::cuda
