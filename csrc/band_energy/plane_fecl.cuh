// FECL by planes: a cluster of 2 S blocks has a pair of planes, the correction's spectrum in the first S and the
// residual's in the others. The gradient is the inverse transform of the sum of both, filtered; as a pair's two signals
// are packed alike, nothing is untangled. Both go back by themselves, and the patches add the two through distributed
// shared memory, half of the rows a block.
#pragma once

#include "band_energy/plane_kernels.cuh"

namespace fera::cuda {

// One launch, or, where the planes do not fit the machine at once, one of energies and one that transforms again: that
// takes less than writing the spectra and reading them.
enum class FeclPart { whole, energies, gradient };

struct PlaneFecl {
  double* partial;  // (N, pairs, S, 2, K+1): the blocks' sums
  double eps, weight;
  double* losses;  // (N)
  float* loss;     // their mean
  Output dz;       // stays divided by factor[n]
  double* factor;  // (N)
};

// The losses of all samples, one a warp in turn, from warp `first` of the block on. scratch: (warps, 2, K+1). `kept`
// takes them too where they fit: from there their mean does not wait for global memory.
constexpr int kKeptLosses = 128;
__device__ __forceinline__ void plane_losses(const PlaneFecl& to, int64_t samples, int blocks, int bands, double scale,
                                             int first, double* scratch, double (&kept)[kKeptLosses]) {
  const int warp = threadIdx.x / 32, entries = bands + 1;
  double* const sums = scratch + warp * 2 * entries;
#pragma unroll 1
  for (int64_t n = warp - first; n < samples; n += blockDim.x / 32 - first) {
    plane_gather(to.partial + n * blocks * 2 * entries, blocks, 2 * entries, scale, sums);
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

// The spectra of the columns, where they lie while the sums meet.
template <class F, int S>
struct PlaneKept {
  const PlaneScene<F, S>& c;

  __device__ __forceinline__ void keep(unsigned at, const float2 (&a)[F::J]) const {
#pragma unroll
    for (int i = 0; i < F::J; ++i) c.columns[i * c.stride + at] = a[i];
  }
  __device__ __forceinline__ void operator()(unsigned at, float2 (&a)[F::J]) const {
#pragma unroll
    for (int i = 0; i < F::J; ++i) a[i] = c.columns[i * c.stride + at];
  }
};

// Whether two blocks share a multiprocessor: FECL of many planes is one launch where all run side by side.
template <class F, int S, int Threads>
constexpr bool kPlanesShare = S == 1 && F::template bytes<S> <= 104 * 1024 && Threads <= 320;

// grid 2 N pairs S; of whole cooperative, of energies in clusters of S, else 2 S.
template <class F, int S, int Threads, bool Ahead, FeclPart Part>
__global__ void __launch_bounds__(Threads, (kPlanesShare<F, S, Threads> ? 2 : 1))
    plane_fecl(const __grid_constant__ Source source, const float* masks, int bands,
               const __grid_constant__ PlaneFecl to) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ double arrived[2 * (FERA_MAX_BANDS + 1) * (Threads / 32)];
  const PlaneScene<F, S> c(raw);
  c.arrive();
  const PlaneKept<F, S> kept{c};
  const int pairs = source.pairs(), blocks = pairs * S, entries = bands + 1, signal = blockIdx.x / S % 2;
  const unsigned which = blockIdx.x / (2 * S), n = which / pairs;
  const int pair = which - n * pairs;
  WeightsAhead<F, S, Ahead> ahead;
  if constexpr (Part != FeclPart::gradient) {
    plane_forward<F, S, 2>(c, source, n, pair, signal);
    ahead.load(masks, bands, c.share, threadIdx.x);
    c.barrier();
    plane_sums<F, S, true>(
        c, masks, bands, ahead,
        [&](unsigned at, const float2(&a)[F::J]) {
          if constexpr (Part == FeclPart::whole) kept.keep(at, a);
        },
        arrived,
        [&](int k, double sum) {
          to.partial[((static_cast<int64_t>(which) * S + c.share) * 2 + signal) * entries + k] = sum;
        });
  }
  if constexpr (Part != FeclPart::energies) {
    __shared__ double sums[2 * (FERA_MAX_BANDS + 1)], raw_coefficients[2 * (FERA_MAX_BANDS + 1)];
    __shared__ double losses[kKeptLosses];
    __shared__ float coefficients[2 * 4 * kQuadruples];
    __shared__ int exponent;
    const double scale = 1.0 / (static_cast<double>(F::H) * F::W);
    if constexpr (Part == FeclPart::whole) {
      ahead.load(masks, bands, c.share, threadIdx.x);
      cooperative_groups::this_grid().sync();
    }
    if (threadIdx.x < 32) {
      plane_gather(to.partial + int64_t{n} * blocks * 2 * entries, blocks, 2 * entries, scale, sums);
      fecl_sample_warp(sums, sums + entries, bands, to.eps, to.weight, raw_coefficients);
      scale_coefficients(raw_coefficients, 2, bands, coefficients, &exponent);
      if (blockIdx.x % (2 * blocks) == 0 && threadIdx.x == 0) to.factor[n] = ldexp(1.0, exponent);
    } else if (blockIdx.x == 0) {
      plane_losses(to, source.n, blocks, bands, scale, 1, arrived, losses);
    }
    if constexpr (Part == FeclPart::gradient) {
      plane_forward<F, S, 2>(c, source, n, pair, signal);
      ahead.load(masks, bands, c.share, threadIdx.x);
      c.barrier();
    } else {
      __syncthreads();
    }
    if (blockIdx.x == 0 && threadIdx.x < 32) plane_mean(to, source.n, losses);
    const float* const mine = coefficients + signal * 4 * (bands / 4 + 1);
    if constexpr (Part == FeclPart::gradient)
      plane_filter<F, S, Ahead>(c, masks, bands, ahead, mine, ColumnsForward<F, S>{c});
    else
      plane_filter<F, S, Ahead>(c, masks, bands, ahead, mine, kept);
    c.barrier();
    plane_lines<F>(c.own, c.count);
    let_next_start();
    __syncwarp();
    cluster_arrive();
    cluster_wait();
    const int half = (c.count + 1) / 2, first = signal * half, end = signal == 0 ? half : c.count;
    const auto other = remote_address(shared_address(c.own), cluster_rank() + (signal == 0 ? S : -S));
    const Scale<float> last(scale);
#pragma unroll 1
    for (int t = first * F::M + threadIdx.x; t < end * F::M; t += blockDim.x) {
      const int j = t / F::M, m = t % F::M;
      const PatchTurn<F> turn(c.first + j, m);
      const unsigned at = j * F::pitch + m;
      float2 a[F::wb][F::hb];
      patch_back<F>(
          [&](unsigned i) {
            const float2 ours = c.own[at + i], theirs = load_remote(other, at + i);
            return float2{ours.x + theirs.x, ours.y + theirs.y};
          },
          turn, a);
      write_patch<F>(source, to.dz, n, pair, c.first + j, m, a, last);
    }
    __syncwarp();              // the cluster's barrier wants whole warps, and the rows may end within one
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
    plane_loss(const __grid_constant__ PlaneFecl to, int64_t samples, int blocks, int bands, double scale) {
  __shared__ double scratch[2 * (FERA_MAX_BANDS + 1) * (kLossThreads / 32)];
  __shared__ double kept[kKeptLosses];
  wait_for_previous();
  plane_losses(to, samples, blocks, bands, scale, 0, scratch, kept);
  __syncthreads();
  if (threadIdx.x < 32) plane_mean(to, samples, kept);
}

}  // namespace fera::cuda
