// fecl_sample by one warp: lane k takes band k, so that square roots and divisions run side by side.
#pragma once

#include "fecl/fecl_sample.h"

namespace fera::cuda {

// The same arguments and results as fera::fecl_sample; the warp is synchronised on entry and on return.
__device__ inline double fecl_sample_warp(const double* d2, const double* r2, int bands, double eps, double weight,
                                          double* coefficients) {
  const int k = threadIdx.x % 32;
  const bool band = k < bands;
  const double mine_d2 = k <= bands ? d2[k] : 0, mine_r2 = k <= bands ? r2[k] : 0;
  const double dk = sqrt(mine_d2), rk = sqrt(mine_r2);
  const double d = __shfl_sync(0xffffffffu, dk, bands), r = __shfl_sync(0xffffffffu, rk, bands);
  int half = 1;  // of the lanes that have something to add
  while (2 * half <= bands) half *= 2;
  double bands_sum = band ? mine_r2 : 0.0;
#pragma unroll 1
  for (int offset = half; offset > 0; offset /= 2) bands_sum += __shfl_xor_sync(0xffffffffu, bands_sum, offset);
  bands_sum += eps;
  auto inverse = [](double v) { return v > 0 || v != v ? 1 / v : 0; };
  const double inverse_sum = inverse(bands_sum), inverse_d = inverse(d + eps), inverse_r = inverse(r + eps);
  const double gap = dk * inverse_d - rk * inverse_r, pull = band ? mine_r2 * inverse_sum * gap : 0;
  // Three sums at a time: a shuffle waits as long for one as for three.
  double loss = pull * gap, whole_d = -pull * dk, whole_r = pull * rk;
#pragma unroll 1
  for (int offset = half; offset > 0; offset /= 2) {
    loss += __shfl_xor_sync(0xffffffffu, loss, offset);
    whole_d += __shfl_xor_sync(0xffffffffu, whole_d, offset);
    whole_r += __shfl_xor_sync(0xffffffffu, whole_r, offset);
  }
  if (coefficients == nullptr) return loss;
  double c_d, c_r;
  if (band) {
    c_d = dk == 0 ? 0 : pull / dk * inverse_d;
    c_r = (gap * gap - loss) * inverse_sum - (rk == 0 ? 0 : pull / rk * inverse_r);
  } else {
    c_d = d == 0 ? 0 : whole_d * inverse_d * inverse_d / d;
    c_r = r == 0 ? 0 : whole_r * inverse_r * inverse_r / r;
  }
  if (k <= bands) {
    coefficients[k] = 2 * weight * c_d;
    coefficients[bands + 1 + k] = 2 * weight * c_r;
  }
  __syncwarp();
  return loss;
}

}  // namespace fera::cuda
