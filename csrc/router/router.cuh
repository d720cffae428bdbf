// The router's forward for one sample, by one block: gate = softmax((W2 relu(W1 e + b1) + b2) / tau).
#pragma once

#include "common/cuda_common.cuh"

namespace fera::cuda {

template <class Real>
struct Router {
  const Real *w1, *b1, *w2, *b2;
  int bands, hidden, experts;
  Real inverse_tau;

  explicit Router(const fera_router& r)
      : w1(static_cast<const Real*>(r.w1)),
        b1(static_cast<const Real*>(r.b1)),
        w2(static_cast<const Real*>(r.w2)),
        b2(static_cast<const Real*>(r.b2)),
        bands(r.bands),
        hidden(r.hidden),
        experts(r.experts),
        inverse_tau(static_cast<Real>(1.0 / r.tau)) {}

  // W1 e + b1 for hidden unit i, before the relu.
  __device__ Real unit(const Real* energy, int i) const {
    Real sum = b1[i];
    for (int k = 0; k < bands; ++k) sum += w1[i * bands + k] * energy[k];
    return sum;
  }
};

// relu that keeps NaN, so that a NaN latent gives a NaN gate.
template <class Real>
__device__ inline Real relu(Real v) {
  return v < 0 ? Real(0) : v;
}

template <class Real>
struct RouterShared {
  Real hidden[FERA_MAX_HIDDEN];
  Real logits[FERA_MAX_EXPERTS];
};

// energy (K) may lie in shared or global memory; gate (E) in global. The block is synchronised on entry.
template <class Real>
__device__ inline void route(const Router<Real>& router, const Real* energy, RouterShared<Real>& shared, Real* gate) {
  for (int i = threadIdx.x; i < router.hidden; i += blockDim.x) shared.hidden[i] = relu(router.unit(energy, i));
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int e = warp; e < router.experts; e += warps) {
    Real sum = 0;
    for (int i = lane; i < router.hidden; i += 32) sum += router.w2[e * router.hidden + i] * shared.hidden[i];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) shared.logits[e] = (sum + router.b2[e]) * router.inverse_tau;
  }
  __syncthreads();
  if (warp == 0) {
    const bool mine = lane < router.experts;
    const Real logit = mine ? shared.logits[lane] : -INFINITY;
    Real largest = logit;
    for (int offset = 16; offset > 0; offset /= 2)
      largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
    const Real power = mine ? exp(logit - largest) : Real(0);
    Real sum = power;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (mine) gate[lane] = power / sum;
  }
}

}  // namespace fera::cuda
