// Discrete Fourier transforms of a few points in registers, their constants folded in at compile time.
//
// dft<R>(a): a[r] <- sum_i w_R^{ir} a[i], w_R = exp(-2 pi i / R). A composite R = A B is A transforms of B points
// after B of A, all in registers; an odd prime pairs i with R - i, so that every product is real times complex.
#pragma once

#include "common/cuda_common.cuh"

namespace fera::cuda {

// An int of the compiler's, as a value that device code may convert.
template <int I>
struct Index {
  static constexpr int value = I;
  __host__ __device__ constexpr operator int() const { return I; }
};

namespace radix_detail {

// cos and sin of x for 0 <= x <= pi/4 by Taylor's series: constant expressions, exact to float64.
constexpr double cosine(double x) {
  double term = 1, sum = 1;
  for (int i = 1; i < 12; ++i) {
    term *= -x * x / ((2 * i - 1) * (2 * i));
    sum += term;
  }
  return sum;
}
constexpr double sine(double x) {
  double term = x, sum = x;
  for (int i = 1; i < 12; ++i) {
    term *= -x * x / ((2 * i) * (2 * i + 1));
    sum += term;
  }
  return sum;
}
constexpr double kPi = 3.14159265358979323846;

// cos(2 pi k / n), reduced by integers to the first octant, so that 0 and 1 come out exactly.
constexpr double cosine_of(int k, int n) {
  k %= n;
  if (2 * k > n) k = n - k;                            // cos(2 pi - t) = cos t
  if (4 * k > n) return -cosine_of(n - 2 * k, 2 * n);  // cos(pi - t) = -cos t
  return 8 * k > n ? sine(2 * kPi * (n - 4 * k) / (4.0 * n)) : cosine(2 * kPi * k / n);
}
constexpr double sine_of(int k, int n) { return cosine_of(4 * k + 3 * n, 4 * n); }  // sin t = cos(t - pi/2)

template <int N, int K>
struct Root {  // exp(-2 pi i K / N)
  static constexpr double re = cosine_of(K % N, N), im = -sine_of(K % N, N);
};

template <int N, class F, int... I>
__device__ __forceinline__ void static_for(F&& f, std::integer_sequence<int, I...>) {
  (f(Index<I>{}), ...);
}

}  // namespace radix_detail

// f(Index<i>) for i = 0 ... N - 1, unrolled.
template <int N, class F>
__device__ __forceinline__ void static_for(F&& f) {
  radix_detail::static_for<N>(f, std::make_integer_sequence<int, N>{});
}

__device__ __forceinline__ float2 operator+(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ float2 operator-(float2 a, float2 b) { return {a.x - b.x, a.y - b.y}; }
__device__ __forceinline__ float2 times(float2 a, float2 b) {
  return {fmaf(a.x, b.x, -a.y * b.y), fmaf(a.x, b.y, a.y * b.x)};
}

// a w_N^K; quarter turns cost nothing.
template <int N, int K>
__device__ __forceinline__ float2 turn(float2 a) {
  constexpr int k = K % N;
  using W = radix_detail::Root<N, k>;
  if constexpr (k == 0) return a;
  if constexpr (4 * k == N) return {a.y, -a.x};
  if constexpr (2 * k == N) return {-a.x, -a.y};
  if constexpr (4 * k == 3 * N) return {-a.y, a.x};
  return times(a, float2{static_cast<float>(W::re), static_cast<float>(W::im)});
}

// 4 where it leaves something over, else the smallest prime factor (2 to 7), else R.
template <int R>
__host__ __device__ constexpr int first_factor() {
  return R % 4 == 0 && R > 4 ? 4 : R % 2 == 0 ? 2 : R % 3 == 0 ? 3 : R % 5 == 0 ? 5 : R % 7 == 0 ? 7 : R;
}

template <int R>
__device__ __forceinline__ void dft(float2 (&a)[R]) {
  constexpr int A = first_factor<R>(), B = R / A;
  if constexpr (R == 1) {
  } else if constexpr (R == 2) {
    const float2 s = a[0] + a[1];
    a[1] = a[0] - a[1];
    a[0] = s;
  } else if constexpr (R == 4) {
    const float2 s0 = a[0] + a[2], d0 = a[0] - a[2], s1 = a[1] + a[3], d1 = a[1] - a[3];
    a[0] = s0 + s1;
    a[1] = {d0.x + d1.y, d0.y - d1.x};
    a[2] = s0 - s1;
    a[3] = {d0.x - d1.y, d0.y + d1.x};
  } else if constexpr (B == 1) {  // an odd prime
    constexpr int H = (R - 1) / 2;
    float2 s[H], d[H], total = a[0];
    static_for<H>([&](auto i) {
      s[i] = a[i + 1] + a[R - 1 - i];
      d[i] = a[i + 1] - a[R - 1 - i];
      total = total + s[i];
    });
    const float2 first = a[0];
    static_for<H>([&](auto r) {
      float2 c = first, e{0, 0};
      static_for<H>([&](auto i) {
        using W = radix_detail::Root<R, (i + 1) * (r + 1) % R>;
        c = {fmaf(float(W::re), s[i].x, c.x), fmaf(float(W::re), s[i].y, c.y)};
        e = {fmaf(float(W::im), d[i].x, e.x), fmaf(float(W::im), d[i].y, e.y)};
      });
      a[r + 1] = {c.x - e.y, c.y + e.x};
      a[R - 1 - r] = {c.x + e.y, c.y - e.x};
    });
    a[0] = total;
  } else {
    float2 t[B][A];
    static_for<B>([&](auto j) {
      static_for<A>([&](auto i) { t[j][i] = a[j + i * B]; });
      dft<A>(t[j]);
      static_for<A>([&](auto r) { t[j][r] = turn<R, j * r>(t[j][r]); });
    });
    static_for<A>([&](auto r) {
      float2 u[B];
      static_for<B>([&](auto j) { u[j] = t[j][r]; });
      dft<B>(u);
      static_for<B>([&](auto k) { a[r + A * k] = u[k]; });
    });
  }
}

}  // namespace fera::cuda
