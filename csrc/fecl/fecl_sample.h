// The loss of one sample from its energies, and its derivatives; shared by the CPU and the CUDA kernels.
//
//   a_k = |d_k| / (|d| + eps), b_k = |r_k| / (|r| + eps), S = sum_j |r_j|^2 + eps, w_k = |r_k|^2 / S
//   L = sum_k w_k (a_k - b_k)^2
//   dL/d|d_k|^2 = w_k (a_k - b_k) / (|d_k| (|d| + eps))
//   dL/d|d|^2   = -sum_k w_k (a_k - b_k) |d_k| / ((|d| + eps)^2 |d|)
//   dL/d|r_k|^2 = -w_k (a_k - b_k) / (|r_k| (|r| + eps)) + ((a_k - b_k)^2 - L) / S
//   dL/d|r|^2   = sum_k w_k (a_k - b_k) |r_k| / ((|r| + eps)^2 |r|)
// A norm that is zero has a zero gradient. d|H_k s|^2 / ds = 2 H_k^T H_k s, hence the factor 2.
#pragma once

#include <cmath>

#include "common/simplex.h"
#include "fera/fera.h"

namespace fera {

// d2, r2: the K band energies and, at K, the whole norm squared. coefficients: (2, K+1), multiplied by
// 2 * weight, or NULL. Returns L, unweighted.
FERA_HOST_DEVICE inline double fecl_sample(const double* d2, const double* r2, int bands, double eps, double weight,
                                           double* coefficients) {
  const double d = sqrt(d2[bands]), r = sqrt(r2[bands]);
  double bands_sum = eps;
  for (int k = 0; k < bands; ++k) bands_sum += r2[k];
  const double inverse_sum = bands_sum > 0 || bands_sum != bands_sum ? 1 / bands_sum : 0;
  const double inverse_d = d + eps > 0 || d != d ? 1 / (d + eps) : 0;
  const double inverse_r = r + eps > 0 || r != r ? 1 / (r + eps) : 0;
  double loss = 0;
  for (int k = 0; k < bands; ++k) {
    const double gap = sqrt(d2[k]) * inverse_d - sqrt(r2[k]) * inverse_r;
    loss += r2[k] * inverse_sum * gap * gap;
  }
  if (coefficients == nullptr) return loss;
  double* c_d = coefficients;
  double* c_r = coefficients + bands + 1;
  double whole_d = 0, whole_r = 0;
  for (int k = 0; k < bands; ++k) {
    const double dk = sqrt(d2[k]), rk = sqrt(r2[k]);
    const double gap = dk * inverse_d - rk * inverse_r, pull = r2[k] * inverse_sum * gap;
    c_d[k] = 2 * weight * (dk == 0 ? 0 : pull / dk * inverse_d);
    c_r[k] = 2 * weight * ((gap * gap - loss) * inverse_sum - (rk == 0 ? 0 : pull / rk * inverse_r));
    whole_d -= pull * dk;
    whole_r += pull * rk;
  }
  c_d[bands] = 2 * weight * (d == 0 ? 0 : whole_d * inverse_d * inverse_d / d);
  c_r[bands] = 2 * weight * (r == 0 ? 0 : whole_r * inverse_r * inverse_r / r);
  return loss;
}

}  // namespace fera
