// The kernels of plane.cuh for one signal: energies with whatever follows, and the adjoint.
#pragma once

#include "band_energy/plane.cuh"

namespace fera::cuda {

// Blocks a multiprocessor has room for at least: of small ones two, so that it does not matter how the clusters come to
// lie.
template <int S>
constexpr int kPlaneBlocks = S == 4 ? 2 : 1;

// grid N * pairs * S, clusters of S. The filters' adjoint.
template <class F, int S, int Threads, bool Ahead>
__global__ void __launch_bounds__(Threads, kPlaneBlocks<S>)
    plane_gradient(const __grid_constant__ Source source, const float* masks, int bands,
                   const __grid_constant__ Coefficients from, const __grid_constant__ Output dz) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ float coefficients[FERA_MAX_BANDS + 1];
  __shared__ int exponent;
  const PlaneScene<F, S> c(raw);
  c.arrive();
  const int pairs = source.pairs();
  const unsigned which = blockIdx.x / S, n = which / pairs;
  const int pair = which - n * pairs;
  const bool last = threadIdx.x / 32 == blockDim.x / 32 - 1;
  EarlyCoefficients early;
  if (last) early.read(from, n, bands);
  plane_forward<F, S, 1>(c, source, n, pair, 0);
  WeightsAhead<F, S, Ahead> ahead;
  ahead.load(masks, bands, c.share, threadIdx.x);
  if (last) early.write(from, bands, bands + 1, coefficients, &exponent);
  c.barrier();
  plane_filter<F, S, Ahead>(c, masks, bands, ahead, coefficients, ColumnsForward<F, S>{c});
  c.barrier();
  const Scale<float> scale(1.0 / (static_cast<double>(F::H) * F::W) * power_of_two(exponent));
  plane_rows<F, S, true>(
      c,
      [&](int j, int m, const PatchTurn<F>& turn) {
        const float2* const at = c.own + j * F::pitch + m;
        float2 a[F::wb][F::hb];
        patch_back<F>([&](unsigned i) { return at[i]; }, turn, a);
        write_patch<F>(source, dz, n, pair, c.first + j, m, a, scale);
      },
      [](int, int, int) {});
#else
  asm("trap;");  // plane_takes never chooses an older image
#endif
}

// sums[e] = scale sum_i from[i entries + e], i < count, by one warp, in a fixed order.
__device__ __forceinline__ void plane_gather(const double* from, int count, int entries, double scale, double* sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int e0 = 0; e0 < entries; e0 += 8) {  // lane: entry e0 + lane % 8, every fourth part
    const int e = e0 + lane % 8;
    double sum = 0;
    if (e < entries)
#pragma unroll 8
      for (int i = lane / 8; i < count; i += 4) sum += __ldcg(from + static_cast<int64_t>(i) * entries + e);
#pragma unroll
    for (int offset = 16; offset >= 8; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane < 8 && e < entries) sums[e] = sum * scale;
  }
  __syncwarp();
}

// A plane on its way to L2, where its rows are contiguous: by one thread.
__device__ __forceinline__ void prefetch_plane(const Source& source, int64_t n, int p) {
  if (threadIdx.x != 0 || source.whole.stride_h != source.w) return;
  const unsigned size = source.dtype == FERA_F32 ? 4 : 2;
  prefetch_l2(
      static_cast<const char*>(source.whole.data) + (n * source.whole.stride_n + p * source.whole.stride_p) * size,
      source.h * source.w * size);
}
// Both of pair i of the samples' pairs.
__device__ __forceinline__ void prefetch_planes(const Source& source, unsigned i) {
  const unsigned pairs = source.pairs(), n = i / pairs, p = 2 * (i - n * pairs);
  if (n >= source.n) return;
  prefetch_plane(source, n, p);
  if (p + 1 < unsigned(source.p)) prefetch_plane(source, n, p + 1);
}

constexpr int kPlaneCluster = 16;  // blocks of a cluster, at most

// Where a sample's sums meet, in shared memory.
struct PlaneMeeting {
  double sums[FERA_MAX_BANDS], gathered[kPlaneCluster][FERA_MAX_BANDS];  // by rank
  float indicator[FERA_MAX_BANDS];
  FinishShared shared;
};

// The sums of a sample's `blocks` parts, each times scale, meet, and what follows of them is done: through partial
// (N, blocks, K) at the grid's barrier, or (together) in gathered[] of the cluster's first block. The kernel's end.
__device__ __forceinline__ void plane_finish(int64_t samples, int bands, const Finish<float>& finish,
                                             const double* partial, bool together, int rank, int blocks, double scale,
                                             PlaneMeeting& m) {
  const bool warp_routes = finish.gate != nullptr && WarpRouter::takes(finish.router);
  WarpRouter router;
  if (warp_routes && threadIdx.x < 32) router.load(finish.router);
  if (together) {
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    if (rank != 0) return;
  } else {
    cooperative_groups::this_grid().sync();
  }
  const int64_t first = together ? blockIdx.x / blocks : blockIdx.x, step = together ? samples : gridDim.x;
#pragma unroll 1
  for (int64_t n = first; n < samples; n += step) {
    if (threadIdx.x < 32) {
      if (!together) {
        plane_gather(partial + n * blocks * bands, blocks, bands, scale, m.sums);
      } else if (static_cast<int>(threadIdx.x) < bands) {
        double sum = 0;
        for (int i = 0; i < blocks; ++i) sum += m.gathered[i][threadIdx.x];
        m.sums[threadIdx.x] = sum * scale;
      }
      __syncwarp();
    }
    if (warp_routes) {
      if (threadIdx.x >= 32) return;
      const Indicator share(finish, n, m.sums);
      router.route(finish.router, share.value, finish.gate + n * finish.router.experts);
      __syncwarp();
    } else {
      __syncthreads();
      finish_sample(finish, n, m.sums, m.indicator, m.shared);
      __syncthreads();
    }
  }
}

// Clusters of S blocks, a plane each at a time, in turn; the launch is cooperative, and the sums meet through partial
// (N, pairs, S, K) at the grid's barrier. Or (together) a cluster of pairs * S blocks has a sample, and the sums meet
// in its first one.
template <class F, int S, int Threads, bool Ahead>
__global__ void __launch_bounds__(Threads, kPlaneBlocks<S>)
    plane_energies(const __grid_constant__ Source source, const float* masks, int bands,
                   const __grid_constant__ Finish<float> finish, double* partial, bool together) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ double arrived[FERA_MAX_BANDS * (Threads / 32)];
  __shared__ PlaneMeeting meeting;
  const PlaneScene<F, S> c(raw);
  c.arrive();
  const int pairs = source.pairs(), rank = cluster_rank();
  if (S == 1 && together) cluster_arrive_relaxed();  // it has started, and may be written to
#pragma unroll 1
  for (unsigned i = blockIdx.x / S; i < source.n * pairs; i += gridDim.x / S) {
    const unsigned n = i / pairs;
    if (i >= gridDim.x / S) c.arrive();  // the columns of the one before have been read
    prefetch_planes(source, i + gridDim.x / S);
    plane_forward<F, S, 1>(c, source, n, i - n * pairs, 0);
    WeightsAhead<F, S, Ahead> ahead;
    ahead.load(masks, bands, c.share, threadIdx.x);
    c.barrier();
    if (S == 1 && together) cluster_wait();
    plane_sums<F, S, false>(
        c, masks, bands, ahead, [](unsigned, const float2(&)[F::J]) {}, arrived,
        [&](int k, double sum) {
          if (together)
            store_remote(remote_address(shared_address(&meeting.gathered[rank][k]), 0), sum);
          else
            partial[(static_cast<int64_t>(i) * S + c.share) * bands + k] = sum;
        });
  }
  plane_finish(source.n, bands, finish, partial, together, rank, pairs * S, 1.0 / (static_cast<double>(F::H) * F::W),
               meeting);
#else
  asm("trap;");  // plane_takes never chooses an older image
#endif
}

}  // namespace fera::cuda
