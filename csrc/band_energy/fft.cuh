// Batched complex FFT in shared memory: mixed radix, Stockham (self-sorting), any length to 512.
//
// One stage of radix p on a length n = p*m with stride s (s * n = N):
//   y[q + s (p j + r)] = w_n^{j r} sum_i w_p^{i r} x[q + s (j + i m)],  j < m, q < s, r < p,
// then n -> m, s -> s p; w_n = w_N^s. Radices 2, 3, 4, 5, 7 and 8 are butterflies in registers; any other prime is a
// sum over the pairs i, p - i, outputs r and p - r by one thread. Lanes (independent transforms) lie next to each other
// in memory. Only the forward transform exists: the inverse is a forward one with real and imaginary parts exchanged
// before and after, which costs nothing where values are read or written anyway.
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
__device__ inline Complex<Real> operator-(Complex<Real> a, Complex<Real> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class Real>
__device__ inline Complex<Real> operator*(Complex<Real> a, Complex<Real> b) {
  return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
// -i a
template <class Real>
__device__ inline Complex<Real> turned(Complex<Real> a) {
  return {a.im, -a.re};
}

struct FftPlan {
  int length;
  int stages;
  int radix[10];
};

// 16 = 4 4 and 128 = 8 4 4 rather than a pass of 2.
inline FftPlan make_fft_plan(int length) {
  FftPlan plan{length, 0, {}};
  int rest = length, twos = 0;
  for (; rest % 2 == 0; rest /= 2) ++twos;
  const auto add = [&](int radix) { plan.radix[plan.stages++] = radix; };
  if (twos == 1) add(2);
  const int fours = twos > 1 ? (3 - twos % 3) % 3 : 0;
  for (int i = 0; i < (twos > 1 ? (twos - 2 * fours) / 3 : 0); ++i) add(8);
  for (int i = 0; i < fours; ++i) add(4);
  for (int p = 3; rest > 1; p += 2)
    for (; rest % p == 0; rest /= p) add(p);
  return plan;
}

// t / divisor for 0 <= t < 2^20: (t + 1/2) / divisor is at least 1 / (2 divisor) away from an integer, more than
// float's error.
struct Quotient {
  float inverse;
  __device__ explicit Quotient(int divisor) : inverse(1.0f / static_cast<float>(divisor)) {}
  __device__ int operator()(int t) const { return static_cast<int>((static_cast<float>(t) + 0.5f) * inverse); }
};

__device__ inline void sine_cosine(float x, float* sine, float* cosine) { sincospif(x, sine, cosine); }
__device__ inline void sine_cosine(double x, double* sine, double* cosine) { sincospi(x, sine, cosine); }

// e^{-2 pi i k / length}, k < length. Integers reduce k to the first octant, so that the argument's rounding is
// relative to an angle of at most pi/4.
template <class Real>
__device__ inline void make_twiddles(Complex<Real>* twiddle, int length) {
  for (int k = threadIdx.x; k < length; k += blockDim.x) {
    const int octant = 8 * k / length, rest = 8 * k - octant * length;
    const bool odd = octant % 2 != 0;
    Real sine, cosine;
    sine_cosine(static_cast<Real>(odd ? length - rest : rest) / static_cast<Real>(4 * length), &sine, &cosine);
    if ((octant + 1) / 2 % 2 != 0) {  // octants 1, 2, 5 and 6: the sine is the larger
      const Real swap = sine;
      sine = cosine;
      cosine = swap;
    }
    twiddle[k] = {octant >= 2 && octant < 6 ? -cosine : cosine, octant < 4 ? -sine : sine};
  }
}

// cos and sin of 2 pi k / P for 0 < k < P / 2
template <int P>
__device__ constexpr double root_cosine(int k) {
  return P == 3   ? -0.5
         : P == 5 ? (k == 1 ? 0.30901699437494742410 : -0.80901699437494742410)
         : k == 1 ? 0.62348980185873353053
         : k == 2 ? -0.22252093395631440429
                  : -0.90096886790241912624;
}
template <int P>
__device__ constexpr double root_sine(int k) {
  return P == 3   ? 0.86602540378443864676
         : P == 5 ? (k == 1 ? 0.95105651629515357212 : 0.58778525229247312917)
         : k == 1 ? 0.78183148246802980871
         : k == 2 ? 0.97492791218182360702
                  : 0.43388373911755812048;
}

// a[r] <- sum_i w_P^{ir} a[i] for P = 3, 5, 7, by the sums and differences of a[i] and a[P - i].
template <int P, class Real>
__device__ inline void butterfly_odd(Complex<Real>* a) {
  constexpr int H = P / 2;
  Complex<Real> sum[H], difference[H], first = a[0];
#pragma unroll
  for (int i = 0; i < H; ++i) {
    sum[i] = a[i + 1] + a[P - 1 - i];
    difference[i] = a[i + 1] - a[P - 1 - i];
    first = first + sum[i];
  }
#pragma unroll
  for (int r = 1; r <= H; ++r) {
    Complex<Real> even = a[0], odd{0, 0};
#pragma unroll
    for (int i = 1; i <= H; ++i) {
      const int k = i * r % P, folded = k <= H ? k : P - k;
      const Real cosine = static_cast<Real>(root_cosine<P>(folded));
      const Real sine = static_cast<Real>(k <= H ? root_sine<P>(folded) : -root_sine<P>(folded));
      even.re += cosine * sum[i - 1].re;
      even.im += cosine * sum[i - 1].im;
      odd.re += sine * difference[i - 1].re;
      odd.im += sine * difference[i - 1].im;
    }
    a[r] = even + turned(odd);
    a[P - r] = even - turned(odd);
  }
  a[0] = first;
}

template <class Real>
__device__ inline void butterfly_four(Complex<Real>& a, Complex<Real>& b, Complex<Real>& c, Complex<Real>& d) {
  const Complex<Real> ac = a + c, a_c = a - c, bd = b + d, b_d = turned(b - d);
  a = ac + bd;
  b = a_c + b_d;
  c = ac - bd;
  d = a_c - b_d;
}

template <int P, class Real>
__device__ inline void butterfly(Complex<Real>* a) {
  if constexpr (P == 2) {
    const Complex<Real> b = a[1];
    a[1] = a[0] - b;
    a[0] = a[0] + b;
  } else if constexpr (P == 4) {
    butterfly_four(a[0], a[1], a[2], a[3]);
  } else if constexpr (P == 8) {
    const Real half = static_cast<Real>(0.70710678118654752440);
    butterfly_four(a[0], a[2], a[4], a[6]);
    butterfly_four(a[1], a[3], a[5], a[7]);
    const Complex<Real> o1{half * (a[3].re + a[3].im), half * (a[3].im - a[3].re)},
        o2 = turned(a[5]), o3{half * (a[7].im - a[7].re), -half * (a[7].re + a[7].im)};
    const Complex<Real> e0 = a[0], e1 = a[2], e2 = a[4], e3 = a[6], o0 = a[1];
    a[0] = e0 + o0;
    a[1] = e1 + o1;
    a[2] = e2 + o2;
    a[3] = e3 + o3;
    a[4] = e0 - o0;
    a[5] = e1 - o1;
    a[6] = e2 - o2;
    a[7] = e3 - o3;
  } else {
    butterfly_odd<P>(a);
  }
}

// One item: u = q + s j < m s, and a lane.
template <class Real, int P>
__device__ inline void register_stage(const Complex<Real>* x, Complex<Real>* y, const Complex<Real>* twiddle, int m,
                                      int s, int log_lanes, int pitch) {
  const Quotient by_s(s);
  for (int t = threadIdx.x; t < (m * s) << log_lanes; t += blockDim.x) {
    const int lane = t & ((1 << log_lanes) - 1), u = t >> log_lanes, j = by_s(u);
    const Complex<Real>* from = x + u * pitch + lane;
    Complex<Real> a[P];
#pragma unroll
    for (int i = 0; i < P; ++i) a[i] = from[i * m * s * pitch];
    butterfly<P>(a);
    Complex<Real>* to = y + (u + s * (P - 1) * j) * pitch + lane;
    to[0] = a[0];
#pragma unroll
    for (int r = 1; r < P; ++r) to[r * s * pitch] = m > 1 ? twiddle[j * r * s] * a[r] : a[r];
  }
}

template <class Real>
__device__ inline void direct_stage(const Complex<Real>* x, Complex<Real>* y, const Complex<Real>* twiddle, int length,
                                    int m, int s, int p, int log_lanes, int pitch) {
  const Quotient by_s(s), by_ms(m * s);
  const int pairs = (p + 1) / 2, spread = length / p;
  for (int t = threadIdx.x; t < (pairs * m * s) << log_lanes; t += blockDim.x) {
    const int lane = t & ((1 << log_lanes) - 1), v = t >> log_lanes, r = by_ms(v), u = v - r * m * s, j = by_s(u);
    const Complex<Real>*low = x + u * pitch + lane, *high = low + p * m * s * pitch;
    Complex<Real> even = *low, odd{0, 0};
    int index = 0;
    for (int i = 1; i < pairs; ++i) {
      index += r;
      index -= index >= p ? p : 0;
      const Complex<Real> a = low[i * m * s * pitch], b = high[-i * m * s * pitch], w = twiddle[index * spread];
      even.re += w.re * (a.re + b.re);
      even.im += w.re * (a.im + b.im);
      odd.re += w.im * (a.re - b.re);
      odd.im += w.im * (a.im - b.im);
    }
    // The table holds -sin: odd is minus the sum of the sines' terms.
    Complex<Real>* to = y + (u + s * (p - 1) * j) * pitch + lane;
    to[r * s * pitch] = twiddle[j * r * s] * (even - turned(odd));
    if (r > 0) to[(p - r) * s * pitch] = twiddle[j * (p - r) * s] * (even + turned(odd));
  }
}

// Transforms 2^log_lanes sequences, element e of lane l at a[e * pitch + l], using b as the other buffer; returns
// whichever holds the result. Unscaled. Starts and ends with a barrier.
template <class Real>
__device__ inline Complex<Real>* fft(Complex<Real>* a, Complex<Real>* b, const Complex<Real>* twiddle,
                                     const FftPlan& plan, int log_lanes, int pitch) {
  int m = plan.length, s = 1;
  for (int stage = 0; stage < plan.stages; ++stage) {
    const int p = plan.radix[stage];
    m /= p;
    __syncthreads();
    switch (p) {
#define FERA_STAGE(P)                                               \
  case P:                                                           \
    register_stage<Real, P>(a, b, twiddle, m, s, log_lanes, pitch); \
    break;
      FERA_STAGE(2)
      FERA_STAGE(3)
      FERA_STAGE(4)
      FERA_STAGE(5)
      FERA_STAGE(7)
      FERA_STAGE(8)
#undef FERA_STAGE
      default:
        direct_stage<Real>(a, b, twiddle, plan.length, m, s, p, log_lanes, pitch);
    }
    Complex<Real>* swap = a;
    a = b;
    b = swap;
    s *= p;
  }
  __syncthreads();
  return a;
}

// Lanes are padded to an odd pitch, so that a walk along a sequence meets every bank.
__host__ __device__ inline int pitch_of(int log_lanes) { return (1 << log_lanes) | 1; }

}  // namespace fera::cuda
