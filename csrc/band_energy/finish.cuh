// What becomes of one sample's summed energies: the energies themselves, the indicator, the router's gate, or
// FECL's loss and coefficients. Every variant of the energy kernels ends here, one block a sample.
#pragma once

#include "common/cuda_common.cuh"
#include "fecl/fecl_sample.cuh"
#include "router/router.cuh"

namespace fera::cuda {

// A NULL output is not computed.
template <class Real>
struct Finish {
  int bands;  // K
  double eps;
  Real *energy, *indicator;  // (N, K)
  double* total;             // (N)
  Router<Real> router;       // with gate
  Real* gate;                // (N, E)
  double* losses;            // (N), FECL: each sample's loss; its mean is the caller's
  double* coefficients;      // (N, 2, K+1), FECL, with losses
  double weight;             // of a sample's coefficients: 1 / N
};

union FinishShared {
  RouterShared router;
};

// The whole block calls it and is synchronised on entry. sums (signals, K+1) lie in shared memory.
template <class Real>
__device__ inline void finish_sample(const Finish<Real>& f, int64_t n, const double* sums, Real* indicator,
                                     FinishShared& shared) {
  if (f.losses != nullptr) {
    if (threadIdx.x >= 32) return;
    const double loss = fecl_sample_warp(sums, sums + f.bands + 1, f.bands, f.eps, f.weight,
                                         f.coefficients == nullptr ? nullptr : f.coefficients + n * 2 * (f.bands + 1));
    if (threadIdx.x == 0) f.losses[n] = loss;
    return;
  }
  const int k = threadIdx.x;
  if (k < f.bands) {
    double sum = f.eps;
    for (int i = 0; i < f.bands; ++i) sum += sums[i];
    // 0/0 only when eps is 0 and the latent is 0: no energy, no share.
    const Real share = static_cast<Real>(sum == 0 ? 0 : sums[k] / sum);
    indicator[k] = share;
    if (f.energy != nullptr) f.energy[n * f.bands + k] = static_cast<Real>(sums[k]);
    if (f.indicator != nullptr) f.indicator[n * f.bands + k] = share;
    if (k == 0 && f.total != nullptr) f.total[n] = sum;
  }
  if (f.gate == nullptr) return;
  __syncthreads();
  route(f.router, indicator, shared.router, f.gate + n * f.router.experts);
}

}  // namespace fera::cuda
