// The router's forward for one sample, by one block: gate = softmax((W2 relu(W1 e + b1) + b2) / tau).
// A few hundred multiply-adds a sample: they are done in float64, and only stored in the compute dtype. In
// float32 the differences in the softmax's gradient cost two digits of the latent's.
#pragma once

#include "common/cuda_common.cuh"

namespace fera::cuda {

template <class Real>
struct Router {
  const Real *w1, *b1, *w2, *b2;
  int bands, hidden, experts;
  double inverse_tau;

  Router() = default;
  explicit Router(const fera_router& r)
      : w1(static_cast<const Real*>(r.w1)),
        b1(static_cast<const Real*>(r.b1)),
        w2(static_cast<const Real*>(r.w2)),
        b2(static_cast<const Real*>(r.b2)),
        bands(r.bands),
        hidden(r.hidden),
        experts(r.experts),
        inverse_tau(1.0 / r.tau) {}

  // W1 e + b1 for hidden unit i, before the relu.
  __device__ double unit(const Real* energy, int i) const {
    double sum = b1[i];
    for (int k = 0; k < bands; ++k) sum += static_cast<double>(w1[i * bands + k]) * energy[k];
    return sum;
  }
};

// relu that keeps NaN, so that a NaN latent gives a NaN gate.
__device__ inline double relu(double v) { return v < 0 ? 0 : v; }

struct RouterShared {
  double hidden[FERA_MAX_HIDDEN];
  double logits[FERA_MAX_EXPERTS];
};

// energy (K) may lie in shared or global memory; gate (E) in global. The block is synchronised on entry.
template <class Real>
__device__ inline void route(const Router<Real>& router, const Real* energy, RouterShared& shared, Real* gate) {
  for (int i = threadIdx.x; i < router.hidden; i += blockDim.x) shared.hidden[i] = relu(router.unit(energy, i));
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int e = warp; e < router.experts; e += warps) {
    double sum = 0;
    for (int i = lane; i < router.hidden; i += 32)
      sum += static_cast<double>(router.w2[e * router.hidden + i]) * shared.hidden[i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) shared.logits[e] = (sum + router.b2[e]) * router.inverse_tau;
  }
  __syncthreads();
  if (warp == 0) {
    const bool mine = lane < router.experts;
    const double logit = mine ? shared.logits[lane] : -INFINITY;
    double largest = logit;
    for (int offset = 16; offset > 0; offset /= 2)
      largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    const double power = mine ? exp(logit - largest) : 0;
    double sum = power;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (mine) gate[lane] = static_cast<Real>(power / sum);
  }
}

}  // namespace fera::cuda
