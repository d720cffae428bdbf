// Vectors of FERA_VECTOR_BYTES; included after common/isa_push.h.
#pragma once

#if !defined(FERA_ISA_OPEN)
#error "include between common/isa_push.h and common/isa_pop.h"
#endif

namespace fera::cpu::FERA_ISA {

template <class T>
struct Simd {
  static constexpr int lanes = FERA_VECTOR_BYTES / static_cast<int>(sizeof(T));
  typedef T V __attribute__((vector_size(FERA_VECTOR_BYTES)));
};
template <class T>
using Vec = typename Simd<T>::V;
template <class T>
constexpr int lanes_of = Simd<T>::lanes;

template <class T>
FERA_INLINE void load(const T* from, Vec<T>& v) {
  std::memcpy(&v, from, sizeof v);
}
template <class T>
FERA_INLINE void store(T* to, const Vec<T>& v) {
  std::memcpy(to, &v, sizeof v);
}
template <class T>
FERA_INLINE void load_part(const T* from, int count, Vec<T>& v) {
  v = Vec<T>{};
  for (int l = 0; l < count; ++l) v[l] = from[l];
}

template <class T>
FERA_INLINE double sum_lanes(const Vec<T>& v) {
  T part[lanes_of<T>];
  store<T>(part, v);
  for (int half = lanes_of<T> / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) part[l] += part[l + half];
  return static_cast<double>(part[0]);
}

// (a0 b0 a1 b1 ...) of the lower and of the upper halves.
#if defined(__clang__)
template <class T>
FERA_INLINE void interleave(const Vec<T>& a, const Vec<T>& b, Vec<T>& low, Vec<T>& high) {
  constexpr int half = lanes_of<T> / 2;
  Vec<T> x{}, y{};
#pragma clang loop unroll(full)
  for (int l = 0; l < half; ++l) {
    x[2 * l] = a[l];
    x[2 * l + 1] = b[l];
    y[2 * l] = a[half + l];
    y[2 * l + 1] = b[half + l];
  }
  low = x;
  high = y;
}
#else
template <int Lanes, class I>
struct Order {
  typedef I M __attribute__((vector_size(Lanes * sizeof(I))));
  static FERA_INLINE M make(int from) {
    M m{};
    for (int l = 0; l < Lanes / 2; ++l) {
      m[2 * l] = static_cast<I>(from + l);
      m[2 * l + 1] = static_cast<I>(Lanes + from + l);
    }
    return m;
  }
};
template <class T>
struct Index {
  using type = int32_t;
};
template <>
struct Index<double> {
  using type = int64_t;
};
template <class T>
FERA_INLINE void interleave(const Vec<T>& a, const Vec<T>& b, Vec<T>& low, Vec<T>& high) {
  using O = Order<lanes_of<T>, typename Index<T>::type>;
  const Vec<T> x = __builtin_shuffle(a, b, O::make(0)), y = __builtin_shuffle(a, b, O::make(lanes_of<T> / 2));
  low = x;
  high = y;
}
#endif

// Square transpose of lanes x lanes: each perfect shuffle of the vectors rotates the bits of the flat index by one.
template <class T>
FERA_INLINE void transpose(Vec<T>* r) {
  constexpr int lanes = lanes_of<T>;
  Vec<T> t[lanes];
#pragma GCC unroll 4
  for (int step = 1; step < lanes; step *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) interleave<T>(r[i], r[i + lanes / 2], t[2 * i], t[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) r[i] = t[i];
  }
}

}  // namespace fera::cpu::FERA_ISA
