// FECL by a plane a block: a cluster of two blocks has a pair of planes, the correction's spectrum in the first and the
// residual's in the second. The gradient is the inverse transform of the sum of both, filtered; as a pair's two signals
// are packed alike, nothing is untangled. Each block goes back with its own, and the last butterfly of the rows adds
// the two through distributed shared memory, half of the rows a block.
#pragma once

#include "band_energy/plane.cuh"

namespace fera::cuda {

// One launch, or, where the planes do not fit the machine at once, one of energies and one that transforms again: that
// takes less than writing the spectra and reading them.
enum class FeclPart { whole, energies, gradient };

struct PlaneFecl {
  double* partial;  // (N, pairs, 2, K+1): the planes' sums
  double eps, weight;
  double* losses;  // (N)
  float* loss;     // their mean
  Output dz;       // stays divided by factor[n]
  double* factor;  // (N)
};

// partial -> sums (2, K+1) of sample n, by one warp, in order.
__device__ __forceinline__ void plane_gather(const double* partial, int64_t n, int pairs, int entries, double scale,
                                             double* sums) {
  for (int k = threadIdx.x % 32; k < 2 * entries; k += 32) {
    const double* from = partial + n * pairs * 2 * entries + k;
    double sum = 0;
#pragma unroll 8
    for (int i = 0; i < pairs; ++i) sum += __ldcg(from + static_cast<int64_t>(i) * 2 * entries);
    sums[k] = sum * scale;
  }
  __syncwarp();
}

// The losses of all samples, one a warp in turn, from warp `first` of the block on. scratch: (warps, 2, K+1). `kept`
// takes them too where they fit: from there their mean does not wait for global memory.
constexpr int kKeptLosses = 128;
__device__ __forceinline__ void plane_losses(const PlaneFecl& to, int64_t samples, int pairs, int bands, double scale,
                                             int first, double* scratch, double (&kept)[kKeptLosses]) {
  const int warp = threadIdx.x / 32, entries = bands + 1;
  double* const sums = scratch + warp * 2 * entries;
#pragma unroll 1
  for (int64_t n = warp - first; n < samples; n += blockDim.x / 32 - first) {
    plane_gather(to.partial, n, pairs, entries, scale, sums);
    const double loss = fecl_sample_warp(sums, sums + entries, bands, to.eps, to.weight, nullptr);
    if (threadIdx.x % 32 == 0) {
      to.losses[n] = loss;
      if (n < kKeptLosses) kept[n] = loss;
    }
    __syncwarp();
  }
}
// After a barrier, by one warp.
__device__ __forceinline__ void plane_mean(const PlaneFecl& to, int64_t samples, const double (&kept)[kKeptLosses]) {
  mean_of_losses(samples, samples <= kKeptLosses ? kept : to.losses, to.loss);
}

// grid 2 N pairs; of whole and gradient in clusters of two, of whole cooperative.
template <class F, int Threads, FeclPart Part>
__global__ void __launch_bounds__(Threads, 1) plane_fecl(const __grid_constant__ Source source, const float* masks,
                                                         int bands, const __grid_constant__ PlaneFecl to) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ double arrived[2 * (FERA_MAX_BANDS + 1) * (Threads / 32)];
  float2* const plane = reinterpret_cast<float2*>(raw);
  const int pairs = source.pairs(), entries = bands + 1, signal = blockIdx.x % 2;
  const int64_t which = blockIdx.x / 2, n = which / pairs;
  const int pair = static_cast<int>(which - n * pairs);
  if constexpr (Part != FeclPart::gradient) {
    plane_forward<F, 2>(source, n, pair, signal, plane);
    plane_sums<F, Part == FeclPart::whole, true>(plane, masks, bands, arrived,
                                                 to.partial + static_cast<int64_t>(blockIdx.x) * entries);
  }
  if constexpr (Part != FeclPart::energies) {
    __shared__ double sums[2 * (FERA_MAX_BANDS + 1)], raw_coefficients[2 * (FERA_MAX_BANDS + 1)];
    __shared__ double kept[kKeptLosses];
    __shared__ float coefficients[2 * 4 * kQuadruples];
    __shared__ int exponent;
    const double scale = 1.0 / (static_cast<double>(F::H) * F::W);
    if constexpr (Part == FeclPart::whole) cooperative_groups::this_grid().sync();
    if (threadIdx.x < 32) {
      plane_gather(to.partial, n, pairs, entries, scale, sums);
      fecl_sample_warp(sums, sums + entries, bands, to.eps, to.weight, raw_coefficients);
      scale_coefficients(raw_coefficients, 2, bands, coefficients, &exponent);
      if (pair == 0 && signal == 0 && threadIdx.x == 0) to.factor[n] = ldexp(1.0, exponent);
    } else if (blockIdx.x == 0) {
      plane_losses(to, source.n, pairs, bands, scale, 1, arrived, kept);
    }
    if constexpr (Part == FeclPart::gradient) plane_forward<F, 2>(source, n, pair, signal, plane);
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x < 32) plane_mean(to, source.n, kept);
    plane_filter<F, Part == FeclPart::whole>(plane, masks, bands, coefficients + signal * 4 * (bands / 4 + 1));
    plane_columns_back<F>(plane);
    plane_row_blocks<F>(plane);
    let_next_start();
    cluster_arrive();
    cluster_wait();
    const auto other = remote_address(shared_address(plane), 1 - signal);
    constexpr int half = F::H / 2;
    plane_rows_out<F>(source, to.dz, n, pair, signal * half, signal == 0 ? half : F::H - half, Scale<float>(scale),
                      [&](unsigned at) {
                        const float2 mine = plane[at], theirs = load_remote(other, at);
                        return float2{mine.x + theirs.x, mine.y + theirs.y};
                      });
    __syncwarp();              // the cluster's barrier wants whole warps, and half of the rows may end within one
    cluster_arrive_relaxed();  // neither leaves while the other reads
    cluster_wait();
  }
#else
  asm("trap;");  // plane_takes never chooses an older image
#endif
}

// The loss alone, after the energies: one block.
constexpr int kLossThreads = 256;
__global__ void __launch_bounds__(kLossThreads)
    plane_loss(const __grid_constant__ PlaneFecl to, int64_t samples, int pairs, int bands, double scale) {
  __shared__ double scratch[2 * (FERA_MAX_BANDS + 1) * (kLossThreads / 32)];
  __shared__ double kept[kKeptLosses];
  wait_for_previous();
  plane_losses(to, samples, pairs, bands, scale, 0, scratch, kept);
  __syncthreads();
  if (threadIdx.x < 32) plane_mean(to, samples, kept);
}

}  // namespace fera::cuda
