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

// f(T{}) for the element type of a dtype that is not float64.
template <class F>
__device__ __forceinline__ void with_element(fera_dtype dtype, F&& f) {
  if (dtype == FERA_F32)
    f(float{});
  else if (dtype == FERA_BF16)
    f(Bfloat{});
  else
    f(Half{});
}

// One plane of a virtual sample: its base pointers and strides, worked out once.
template <class T>
struct Plane {
  const T *whole, *minus;
  int64_t whole_h, whole_w, minus_h, minus_w;

  __device__ Plane(const Source& s, int64_t v, int p) : whole_h(s.whole.stride_h), whole_w(s.whole.stride_w) {
    const int signal = s.signals == 2 && v >= s.n;
    const int64_t n = v - signal * s.n;
    const View& other = s.minus[signal];
    whole = static_cast<const T*>(s.whole.data) + s.whole.offset(n, p, 0, 0);
    minus = s.signals == 2 ? static_cast<const T*>(other.data) + other.offset(n, p, 0, 0) : nullptr;
    minus_h = other.stride_h;
    minus_w = other.stride_w;
  }
  __device__ Compute<T> operator()(int h, int w) const {
    Compute<T> value = widen(whole[h * whole_h + w * whole_w]);
    if (minus != nullptr) value -= widen(minus[h * minus_h + w * minus_w]);
    return value;
  }
};

// Where frequency (y, x) of the full spectrum stands in a half-spectrum table of width w/2 + 1.
__device__ inline int64_t half_index(int y, int x, int h, int w) {
  const bool mirrored = x > w / 2;
  const int row = mirrored && y > 0 ? h - y : y;
  return static_cast<int64_t>(row) * (w / 2 + 1) + (mirrored ? w - x : x);
}

// Where a gradient goes.
struct Output {
  View view;
  bool wide;  // in the compute dtype, not in the source's
};

template <class T>
__device__ inline void store(const Output& out, int64_t offset, Compute<T> value) {
  if (out.wide)
    static_cast<Compute<T>*>(out.view.data)[offset] = value;
  else
    static_cast<T*>(out.view.data)[offset] = narrow<T>(value);
}

// value * factor, rounded once, also where a factor of 2^exponent alone lies outside float32.
template <class Real>
struct Scale {
  double exact;
  Real plain;
  bool fits;
  __device__ explicit Scale(double factor)
      : exact(factor), plain(static_cast<Real>(factor)), fits(factor >= 1e-37 && factor <= 1e37) {}
  __device__ Real operator()(Real value) const { return fits ? value * plain : static_cast<Real>(value * exact); }
  // The same where `fits` has been asked once for many.
  template <bool Fits>
  __device__ Real apply(std::bool_constant<Fits>, Real value) const {
    return Fits ? value * plain : static_cast<Real>(value * exact);
  }
};

// Where the gradient's coefficients come from: dz = sum_s (sum_k c[s][k] H_k^T H_k s + c[s][K] s).
struct Coefficients {
  const double* table;    // FECL: (N, 2, K+1)
  const void* grad;       // band energies: (N, K), compute dtype
  const void* indicator;  // with grad: (N, K), or NULL
  const double* total;    // with grad: (N), or NULL
  double eps;             // with indicator
  double* factor;         // (N) or NULL: takes the coefficients' power of two, by which dz's values stay divided
};

// Writes the signals*(K+1) coefficients of sample n, scaled by a power of two to at most 1, to `c`;
// returns the exponent. Every thread of the block calls it; `c` is shared, `exponent` one shared int. Starts and ends
// with a barrier.
template <class Real>
__device__ inline int load_coefficients(const Coefficients& from, int64_t n, int bands, int signals, Real* c,
                                        int* exponent) {
  __shared__ double raw[2 * (FERA_MAX_BANDS + 1)];
  const int count = signals * (bands + 1);
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    double value = 0;
    if (from.table != nullptr) {
      value = from.table[n * count + i];
    } else if (i < bands) {
      const Real* grad = static_cast<const Real*>(from.grad) + n * bands;
      const Real* indicator = static_cast<const Real*>(from.indicator) + n * bands;
      if (from.indicator == nullptr)
        value = 2 * static_cast<double>(grad[i]);
      else if (from.total[n] != 0)  // a latent of 0 and an eps of 0 has no gradient
        value = 2 * (above_mean(indicator, grad, bands, i) + grad[i] * (from.eps / from.total[n])) / from.total[n];
    }
    raw[i] = value;
  }
  __syncthreads();
  double largest = 0;
  for (int i = 0; i < count; ++i)
    if (isfinite(raw[i])) largest = fmax(largest, fabs(raw[i]));
  const int e = largest > 0 ? ilogb(largest) + 1 : 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) c[i] = static_cast<Real>(ldexp(raw[i], -e));
  if (threadIdx.x == 0) *exponent = e;
  __syncthreads();
  return e;
}

}  // namespace fera::cuda
