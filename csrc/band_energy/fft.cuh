// Batched complex FFT in shared memory: mixed radix, Stockham (self-sorting), any length to 512.
//
// One stage of radix p on a length n = p*m with stride s (s * n = N):
//   y[q + s (p j + r)] = w_n^{j r} sum_i w_p^{i r} x[q + s (j + i m)],  j < m, q < s, r < p,
// then n -> m, s -> s p. Radices 2, 3, 4, 5, 7 and 8 keep a butterfly in registers; any other prime is a
// direct sum, one output a thread. Lanes (independent transforms) lie next to each other in memory.
#pragma once

#include "common/cuda_common.cuh"

namespace fera::cuda {

template <class Real>
struct alignas(2 * sizeof(Real)) Complex {
  Real re, im;
};
template <class Real>
__device__ inline Complex<Real> operator+(Complex<Real> a, Complex<Real> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class Real>
__device__ inline Complex<Real> operator*(Complex<Real> a, Complex<Real> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class Real>
__device__ inline Complex<Real> conjugate_if(bool yes, Complex<Real> a) {
  return {a.re, yes ? -a.im : a.im};
}

struct FftPlan {
  int length;
  int stages;
  int radix[10];  // 2^9 = 512 has the most factors, and fewer once 8 and 4 are used
};

inline FftPlan make_fft_plan(int length) {
  FftPlan plan{length, 0, {}};
  int rest = length;
  for (int p : {8, 4, 2, 3, 5, 7})
    while (rest % p == 0) {
      plan.radix[plan.stages++] = p;
      rest /= p;
    }
  for (int p = 11; rest > 1; p += 2)
    while (rest % p == 0) {
      plan.radix[plan.stages++] = p;
      rest /= p;
    }
  return plan;
}

// e^{-2 pi i k / length}, k < length
template <class Real>
__device__ inline void make_twiddles(Complex<Real>* twiddle, int length) {
  for (int k = threadIdx.x; k < length; k += blockDim.x) {
    double sine, cosine;
    sincospi(2.0 * k / length, &sine, &cosine);
    twiddle[k] = {static_cast<Real>(cosine), static_cast<Real>(-sine)};
  }
}

template <class Real, int P>
__device__ inline void register_stage(const Complex<Real>* x, Complex<Real>* y, const Complex<Real>* twiddle,
                                      int length, int n, int s, int lanes, int pitch, bool inverse) {
  const int m = n / P;
  for (int t = threadIdx.x; t < m * s * lanes; t += blockDim.x) {
    const int lane = t % lanes, q = (t / lanes) % s, j = t / lanes / s;
    Complex<Real> a[P];
#pragma unroll
    for (int i = 0; i < P; ++i) a[i] = x[(q + s * (j + i * m)) * pitch + lane];
#pragma unroll
    for (int r = 0; r < P; ++r) {
      Complex<Real> sum = a[0];
#pragma unroll
      for (int i = 1; i < P; ++i) sum = sum + conjugate_if(inverse, twiddle[(i * r % P) * (length / P)]) * a[i];
      const Complex<Real> w = conjugate_if(inverse, twiddle[j * r * (length / n)]);
      y[(q + s * (P * j + r)) * pitch + lane] = r == 0 ? sum : w * sum;
    }
  }
}

template <class Real>
__device__ inline void direct_stage(const Complex<Real>* x, Complex<Real>* y, const Complex<Real>* twiddle, int length,
                                    int n, int s, int p, int lanes, int pitch, bool inverse) {
  const int m = n / p;
  for (int t = threadIdx.x; t < n * s * lanes; t += blockDim.x) {
    const int lane = t % lanes, q = (t / lanes) % s, r = (t / lanes / s) % p, j = t / lanes / s / p;
    Complex<Real> sum = x[(q + s * j) * pitch + lane];
    int index = 0;
    for (int i = 1; i < p; ++i) {
      index += r;
      index -= index >= p ? p : 0;
      sum = sum + conjugate_if(inverse, twiddle[index * (length / p)]) * x[(q + s * (j + i * m)) * pitch + lane];
    }
    y[(q + s * (p * j + r)) * pitch + lane] = conjugate_if(inverse, twiddle[j * r * (length / n)]) * sum;
  }
}

// Transforms `lanes` sequences, element e of lane l at a[e * pitch + l], using b as the other buffer;
// returns whichever holds the result. Unscaled in both directions. Starts and ends with a barrier.
template <class Real>
__device__ inline Complex<Real>* fft(Complex<Real>* a, Complex<Real>* b, const Complex<Real>* twiddle,
                                     const FftPlan& plan, int lanes, int pitch, bool inverse) {
  int n = plan.length, s = 1;
  for (int stage = 0; stage < plan.stages; ++stage) {
    const int p = plan.radix[stage];
    __syncthreads();
    switch (p) {
      case 2:
        register_stage<Real, 2>(a, b, twiddle, plan.length, n, s, lanes, pitch, inverse);
        break;
      case 3:
        register_stage<Real, 3>(a, b, twiddle, plan.length, n, s, lanes, pitch, inverse);
        break;
      case 4:
        register_stage<Real, 4>(a, b, twiddle, plan.length, n, s, lanes, pitch, inverse);
        break;
      case 5:
        register_stage<Real, 5>(a, b, twiddle, plan.length, n, s, lanes, pitch, inverse);
        break;
      case 7:
        register_stage<Real, 7>(a, b, twiddle, plan.length, n, s, lanes, pitch, inverse);
        break;
      case 8:
        register_stage<Real, 8>(a, b, twiddle, plan.length, n, s, lanes, pitch, inverse);
        break;
      default:
        direct_stage<Real>(a, b, twiddle, plan.length, n, s, p, lanes, pitch, inverse);
    }
    Complex<Real>* swap = a;
    a = b;
    b = swap;
    n /= p;
    s *= p;
  }
  __syncthreads();
  return a;
}

// Lanes are padded to an odd pitch, so that a walk along a sequence meets every bank.
__host__ __device__ inline int pitch_of(int lanes) { return lanes | 1; }

// Lanes a block transforms at once: `buffers` arrays of length x pitch within 48 KiB, with the twiddles.
template <class Real>
inline int lanes_for(int length, int buffers) {
  const size_t budget = 46 * 1024 - length * sizeof(Complex<Real>);
  int lanes = 16;
  while (lanes > 1 && buffers * static_cast<size_t>(length) * pitch_of(lanes) * sizeof(Complex<Real>) > budget)
    lanes /= 2;
  return lanes;
}

}  // namespace fera::cuda
