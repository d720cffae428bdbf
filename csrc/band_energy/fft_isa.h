// Mixed-radix Stockham FFT of sizes 1 to 512: `lanes` independent transforms at a time, one in each lane.
// Included after common/isa_push.h.
#pragma once

#include "band_energy/energies_cpu.h"
#include "common/simd_isa.h"

namespace fera::cpu::FERA_ISA {

template <class T>
struct Complex {
  Vec<T> re, im;
};

// a_k = sum_j a_j e^(-2 pi i jk/R) in place.
template <class T>
FERA_INLINE void butterfly2(Complex<T>* a) {
  const Complex<T> x = a[0], y = a[1];
  a[0] = {x.re + y.re, x.im + y.im};
  a[1] = {x.re - y.re, x.im - y.im};
}

template <class T>
FERA_INLINE void butterfly4(Complex<T>* a) {
  const Vec<T> sr = a[0].re + a[2].re, si = a[0].im + a[2].im, dr = a[0].re - a[2].re, di = a[0].im - a[2].im;
  const Vec<T> tr = a[1].re + a[3].re, ti = a[1].im + a[3].im, er = a[1].re - a[3].re, ei = a[1].im - a[3].im;
  a[0] = {sr + tr, si + ti};
  a[1] = {dr + ei, di - er};
  a[2] = {sr - tr, si - ti};
  a[3] = {dr - ei, di + er};
}

template <class T>
FERA_INLINE void butterfly8(Complex<T>* a) {
  constexpr T h = static_cast<T>(0.70710678118654752440);
  Complex<T> e[4] = {a[0], a[2], a[4], a[6]}, o[4] = {a[1], a[3], a[5], a[7]};
  butterfly4<T>(e);
  butterfly4<T>(o);
  // e^(-i pi/4) (x + iy) = h ((x + y) + i (y - x)), e^(-3i pi/4) (x + iy) = h ((y - x) - i (x + y)).
  const Complex<T> o1 = {h * (o[1].re + o[1].im), h * (o[1].im - o[1].re)};
  const Complex<T> o3 = {h * (o[3].im - o[3].re), -h * (o[3].re + o[3].im)};
  a[0] = {e[0].re + o[0].re, e[0].im + o[0].im};
  a[4] = {e[0].re - o[0].re, e[0].im - o[0].im};
  a[1] = {e[1].re + o1.re, e[1].im + o1.im};
  a[5] = {e[1].re - o1.re, e[1].im - o1.im};
  a[2] = {e[2].re + o[2].im, e[2].im - o[2].re};
  a[6] = {e[2].re - o[2].im, e[2].im + o[2].re};
  a[3] = {e[3].re + o3.re, e[3].im + o3.im};
  a[7] = {e[3].re - o3.re, e[3].im - o3.im};
}

// Odd R: with s_j = a_j + a_{R-j}, d_j = a_j - a_{R-j}, c = cos(2 pi jk/R), s = sin(2 pi jk/R):
// A_k = a_0 + sum_j c s_j, B_k = sum_j s d_j, and out_k = A_k - i B_k, out_{R-k} = A_k + i B_k.
template <class T, int R>
FERA_INLINE void butterfly_odd(Complex<T>* a, const T* cosine, const T* sine, int unit) {
  constexpr int half = (R - 1) / 2;
  Complex<T> s[half], d[half], all = a[0];
#pragma GCC unroll 8
  for (int j = 1; j <= half; ++j) {
    s[j - 1] = {a[j].re + a[R - j].re, a[j].im + a[R - j].im};
    d[j - 1] = {a[j].re - a[R - j].re, a[j].im - a[R - j].im};
    all.re += s[j - 1].re;
    all.im += s[j - 1].im;
  }
  const Complex<T> first = a[0];
  a[0] = all;
#pragma GCC unroll 8
  for (int k = 1; k <= half; ++k) {
    Complex<T> even = first, odd = {Vec<T>{}, Vec<T>{}};
#pragma GCC unroll 8
    for (int j = 1; j <= half; ++j) {
      const T c = cosine[(j * k % R) * unit], m = -sine[(j * k % R) * unit];
      even.re += c * s[j - 1].re;
      even.im += c * s[j - 1].im;
      odd.re += m * d[j - 1].re;
      odd.im += m * d[j - 1].im;
    }
    a[k] = {even.re + odd.im, even.im - odd.re};
    a[R - k] = {even.re - odd.im, even.im + odd.re};
  }
}

template <class T, int R>
FERA_INLINE void butterfly(Complex<T>* a, const T* cosine, const T* sine, int unit) {
  if constexpr (R == 2)
    butterfly2<T>(a);
  else if constexpr (R == 4)
    butterfly4<T>(a);
  else if constexpr (R == 8)
    butterfly8<T>(a);
  else
    butterfly_odd<T, R>(a, cosine, sine, unit);
}

// One pass, decimation in frequency, self-sorting; n = length * stride, m = length / R:
// y[q + stride (R p + k)] = w_length^(pk) sum_j x[q + stride (p + m j)] w_R^(jk).
template <class T, int R>
__attribute__((noinline)) void pass(const FftPlan<T>& plan, int length, int stride, const Complex<T>* x,
                                    Complex<T>* y) {
  const int m = length / R, unit = plan.n / R;
  const T *cosine = plan.cosine, *sine = plan.sine;
  for (int q = 0; q < stride; ++q) {
    Complex<T> a[R];
#pragma GCC unroll 8
    for (int j = 0; j < R; ++j) a[j] = x[q + stride * m * j];
    butterfly<T, R>(a, cosine, sine, unit);
#pragma GCC unroll 8
    for (int k = 0; k < R; ++k) y[q + stride * k] = a[k];
  }
  for (int p = 1; p < m; ++p) {
    T wr[R], wi[R];
#pragma GCC unroll 8
    for (int k = 1; k < R; ++k) {
      wr[k] = cosine[stride * p * k];
      wi[k] = sine[stride * p * k];
    }
    const Complex<T>* from = x + stride * p;
    Complex<T>* to = y + stride * R * p;
    for (int q = 0; q < stride; ++q) {
      Complex<T> a[R];
#pragma GCC unroll 8
      for (int j = 0; j < R; ++j) a[j] = from[q + stride * m * j];
      butterfly<T, R>(a, cosine, sine, unit);
      to[q] = a[0];
#pragma GCC unroll 8
      for (int k = 1; k < R; ++k)
        to[q + stride * k] = {a[k].re * wr[k] - a[k].im * wi[k], a[k].im * wr[k] + a[k].re * wi[k]};
    }
  }
}

// Any odd radix, with the sums and differences in `spare` (radix - 1 values); Block outputs at a time.
template <class T>
__attribute__((noinline)) void pass_any(const FftPlan<T>& plan, int radix, int length, int stride, const Complex<T>* x,
                                        Complex<T>* y, Complex<T>* spare) {
  constexpr int Block = FERA_VECTOR_BYTES == 64 ? 4 : 2;
  const int m = length / radix, unit = plan.n / radix, half = (radix - 1) / 2;
  const T *cosine = plan.cosine, *sine = plan.sine;
  Complex<T>*s = spare, *d = spare + half;
  for (int p = 0; p < m; ++p)
    for (int q = 0; q < stride; ++q) {
      const Complex<T>* from = x + q + stride * p;
      Complex<T>* to = y + q + stride * radix * p;
      const int64_t step = int64_t{stride} * m;
      const Complex<T> first = from[0];
      Complex<T> all = first;
      for (int j = 1; j <= half; ++j) {
        const Complex<T> a = from[step * j], b = from[step * (radix - j)];
        s[j - 1] = {a.re + b.re, a.im + b.im};
        d[j - 1] = {a.re - b.re, a.im - b.im};
        all.re += s[j - 1].re;
        all.im += s[j - 1].im;
      }
      to[0] = all;
      for (int k0 = 1; k0 <= half; k0 += Block) {
        Complex<T> even[Block], odd[Block];
        int at[Block];
#pragma GCC unroll 4
        for (int b = 0; b < Block; ++b) {
          even[b] = first;
          odd[b] = {Vec<T>{}, Vec<T>{}};
          at[b] = 0;
        }
        for (int j = 0; j < half; ++j) {
          const Complex<T> sj = s[j], dj = d[j];
#pragma GCC unroll 4
          for (int b = 0; b < Block; ++b) {
            at[b] += k0 + b;  // (j + 1) k mod radix; k0 + b may pass half but stays below radix
            at[b] = at[b] >= radix ? at[b] - radix : at[b];
            const T c = cosine[at[b] * unit], n = sine[at[b] * unit];
            even[b].re += c * sj.re;
            even[b].im += c * sj.im;
            odd[b].re -= n * dj.re;
            odd[b].im -= n * dj.im;
          }
        }
#pragma GCC unroll 4
        for (int b = 0; b < Block; ++b) {
          const int k = k0 + b;
          if (k > half) break;
          const Complex<T> u = {even[b].re + odd[b].im, even[b].im - odd[b].re};
          const Complex<T> v = {even[b].re - odd[b].im, even[b].im + odd[b].re};
          const T ur = cosine[stride * p * k], ui = sine[stride * p * k];
          const T vr = cosine[stride * p * (radix - k)], vi = sine[stride * p * (radix - k)];
          to[stride * k] = {u.re * ur - u.im * ui, u.im * ur + u.re * ui};
          to[stride * (radix - k)] = {v.re * vr - v.im * vi, v.im * vr + v.re * vi};
        }
      }
    }
}

// Forward transform of x (n values of `lanes` transforms); returns x or y, whichever holds the result, in order.
// The inverse is this one with real and imaginary parts exchanged before and after.
template <class T>
Complex<T>* fft(const FftPlan<T>& plan, Complex<T>* x, Complex<T>* y, Complex<T>* spare) {
  int length = plan.n, stride = 1;
  for (int i = 0; i < plan.passes; ++i) {
    const int radix = plan.radix[i];
    switch (radix) {
      case 2:
        pass<T, 2>(plan, length, stride, x, y);
        break;
      case 3:
        pass<T, 3>(plan, length, stride, x, y);
        break;
      case 4:
        pass<T, 4>(plan, length, stride, x, y);
        break;
      case 5:
        pass<T, 5>(plan, length, stride, x, y);
        break;
      case 7:
        pass<T, 7>(plan, length, stride, x, y);
        break;
      case 8:
        pass<T, 8>(plan, length, stride, x, y);
        break;
      default:
        pass_any<T>(plan, radix, length, stride, x, y, spare);
    }
    length /= radix;
    stride *= radix;
    Complex<T>* const done = y;
    y = x;
    x = done;
  }
  return x;
}

}  // namespace fera::cpu::FERA_ISA
