// What the filters act on: a latent z, or FECL's two differences fera - base and fera - target.
// A "signal" s is one of them; the virtual sample v = s * N + n numbers all of them.
#pragma once

#include "common/cuda_common.cuh"
#include "common/simplex.h"

namespace fera::cuda {

struct View {  // a strided (N, P, H, W) tensor
  void* data;
  int64_t stride_n, stride_p, stride_h, stride_w;

  __host__ __device__ int64_t offset(int64_t n, int64_t p, int h, int w) const {
    return n * stride_n + p * stride_p + h * stride_h + w * stride_w;
  }
};

inline View view_of(const fera_latent& z) { return {z.data, z.stride_n, z.stride_p, z.stride_h, z.stride_w}; }

struct Source {
  View whole;     // z, or fera
  View minus[2];  // base and target (signals == 2)
  int64_t n;
  int p, h, w, signals;
  fera_dtype dtype;

  __host__ __device__ int64_t virtual_samples() const { return n * signals; }
  __host__ __device__ int pairs() const { return (p + 1) / 2; }
};

inline Source source_of(const fera_latent& z) {
  return {view_of(z), {}, z.n, static_cast<int>(z.p), static_cast<int>(z.h), static_cast<int>(z.w), 1, z.dtype};
}
inline Source source_of(const fera_latent& base, const fera_latent& fera, const fera_latent& target) {
  Source s = source_of(fera);
  s.minus[0] = view_of(base);
  s.minus[1] = view_of(target);
  s.signals = 2;
  return s;
}

// Element (h, w) of plane p of virtual sample v; T is the storage type.
template <class T>
__device__ inline Compute<T> read(const Source& s, int64_t v, int p, int h, int w) {
  const int64_t n = v % s.n;
  Compute<T> value = widen(static_cast<const T*>(s.whole.data)[s.whole.offset(n, p, h, w)]);
  if (s.signals == 2) {
    const View& other = s.minus[v / s.n];
    value -= widen(static_cast<const T*>(other.data)[other.offset(n, p, h, w)]);
  }
  return value;
}

// Where the gradient's coefficients come from: dz = sum_s (sum_k c[s][k] H_k^T H_k s + c[s][K] s).
struct Coefficients {
  const double* table;    // FECL: (N, 2, K+1); scaled by *grad_loss
  const void* grad_loss;  // FECL: scalar, compute dtype
  const void* grad;       // band energies: (N, K), compute dtype
  const void* indicator;  // with grad: (N, K), or NULL
  const double* total;    // with grad: (N), or NULL
  double eps;             // with indicator
};

// Writes the signals*(K+1) coefficients of sample n, scaled by a power of two to at most 1, to `c`;
// returns the exponent. Every thread of the block calls it; `c` is shared, `exponent` one shared int.
template <class Real>
__device__ inline int load_coefficients(const Coefficients& from, int64_t n, int bands, int signals, Real* c,
                                        int* exponent) {
  if (threadIdx.x == 0) {
    double raw[2 * (FERA_MAX_BANDS + 1)];
    const int count = signals * (bands + 1);
    double largest = 0;
    for (int i = 0; i < count; ++i) {
      double value = 0;
      if (from.table != nullptr)
        value = from.table[n * count + i] * static_cast<double>(*static_cast<const Real*>(from.grad_loss));
      else if (i < bands) {
        const Real* grad = static_cast<const Real*>(from.grad) + n * bands;
        const Real* indicator = static_cast<const Real*>(from.indicator) + n * bands;
        if (from.indicator == nullptr)
          value = 2 * static_cast<double>(grad[i]);
        else if (from.total[n] != 0)  // a latent of 0 and an eps of 0 has no gradient
          value = 2 * (above_mean(indicator, grad, bands, i) + grad[i] * (from.eps / from.total[n])) / from.total[n];
      }
      raw[i] = value;
      if (isfinite(value)) largest = fmax(largest, fabs(value));
    }
    const int e = largest > 0 ? ilogb(largest) + 1 : 0;
    for (int i = 0; i < count; ++i) c[i] = static_cast<Real>(ldexp(raw[i], -e));
    *exponent = e;
  }
  __syncthreads();
  return *exponent;
}

}  // namespace fera::cuda
