// Planes in and out: any strides and dtype <-> a padded plane in the compute dtype, scaled by a power of two so
// that no square overflows or underflows. Included after common/isa_push.h.
#pragma once

#include "band_energy/energies_cpu.h"
#include "common/simd_isa.h"

namespace fera::cpu::FERA_ISA {

template <class S, class T>
FERA_INLINE void read_row(const fera_latent& z, int64_t n, int64_t p, int64_t h, T* row) {
  const S* from = static_cast<const S*>(z.data) + n * z.stride_n + p * z.stride_p + h * z.stride_h;
  const int w = static_cast<int>(z.w);
  if (z.stride_w == 1)
    for (int i = 0; i < w; ++i) row[i] = widen(from[i]);
  else
    for (int i = 0; i < w; ++i) row[i] = widen(from[i * z.stride_w]);
}

template <class S, class T>
FERA_INLINE void subtract_row(const fera_latent& z, int64_t n, int64_t p, int64_t h, T* row) {
  const S* from = static_cast<const S*>(z.data) + n * z.stride_n + p * z.stride_p + h * z.stride_h;
  const int w = static_cast<int>(z.w);
  if (z.stride_w == 1)
    for (int i = 0; i < w; ++i) row[i] -= widen(from[i]);
  else
    for (int i = 0; i < w; ++i) row[i] -= widen(from[i * z.stride_w]);
}

// Rows are `pitch` apart and zero beyond w. Returns the bits of the largest magnitude (a NaN is the largest).
template <class S, class T, class Bits>
__attribute__((noinline)) Bits stage_plane(const Source& source, int signal, int64_t n, int64_t p, T* out, int pitch) {
  const int h = static_cast<int>(source.whole.h), w = static_cast<int>(source.whole.w);
  Bits largest = 0;
  for (int i = 0; i < h; ++i) {
    T* row = out + int64_t{i} * pitch;
    read_row<S, T>(source.whole, n, p, i, row);
    if (source.signals == 2) subtract_row<S, T>(source.minus[signal], n, p, i, row);
    for (int l = w; l < pitch; ++l) row[l] = 0;
    Bits most = 0;
    for (int l = 0; l < pitch; ++l) {
      const Bits bits = as_bits(row[l]) & (~Bits{0} >> 1);
      most = most > bits ? most : bits;
    }
    largest = largest > most ? largest : most;
  }
  return largest;
}

inline int exponent_of(uint32_t bits) {
  const int e = static_cast<int>(bits >> 23);
  return bits == 0 || e == 255 ? 0 : (e == 0 ? 1 : e > 253 ? 253 : e) - 127;
}
inline int exponent_of(uint64_t bits) {
  const int e = static_cast<int>(bits >> 52);
  return bits == 0 || e == 2047 ? 0 : (e == 0 ? 1 : e > 2045 ? 2045 : e) - 1023;
}
template <class T>
T power_of_two(int e);
template <>
inline float power_of_two<float>(int e) {
  return as_float(static_cast<uint32_t>(e + 127) << 23);
}
template <>
inline double power_of_two<double>(int e) {
  const uint64_t bits = static_cast<uint64_t>(e + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}

// Stages one plane in the dtype of the source.
template <class T>
int64_t stage(const Job<T>& job, int signal, int64_t n, int64_t p, T* out) {
  if constexpr (sizeof(T) == 8) {
    return static_cast<int64_t>(stage_plane<double, double, uint64_t>(job.source, signal, n, p, out, job.padded_w));
  } else {
    switch (job.source.whole.dtype) {
      case FERA_F16:
        return stage_plane<Half, float, uint32_t>(job.source, signal, n, p, out, job.padded_w);
      case FERA_BF16:
        return stage_plane<Bfloat, float, uint32_t>(job.source, signal, n, p, out, job.padded_w);
      default:
        return stage_plane<float, float, uint32_t>(job.source, signal, n, p, out, job.padded_w);
    }
  }
}

// The exponent of the larger of two staged planes.
template <class T>
int exponent_of_planes(int64_t a, int64_t b) {
  const int64_t bits = a > b ? a : b;
  if constexpr (sizeof(T) == 8)
    return exponent_of(static_cast<uint64_t>(bits));
  else
    return exponent_of(static_cast<uint32_t>(bits));
}

template <class S, class T>
__attribute__((noinline)) void write_plane(const fera_latent& dz, int64_t n, int64_t p, const T* from, int pitch,
                                           double factor) {
  const int h = static_cast<int>(dz.h), w = static_cast<int>(dz.w);
  const T narrow_factor = static_cast<T>(factor);
  const bool exact = static_cast<double>(narrow_factor) == factor && factor >= 1e-37;
  for (int i = 0; i < h; ++i) {
    S* row = static_cast<S*>(dz.data) + n * dz.stride_n + p * dz.stride_p + i * dz.stride_h;
    const T* x = from + int64_t{i} * pitch;
    const int64_t step = dz.stride_w;
    if (!exact)
      for (int l = 0; l < w; ++l) narrow(static_cast<T>(x[l] * factor), row + l * step);
    else if (step == 1)
      for (int l = 0; l < w; ++l) narrow(x[l] * narrow_factor, row + l);
    else
      for (int l = 0; l < w; ++l) narrow(x[l] * narrow_factor, row + l * step);
  }
}

// What sample n's values are multiplied by on the way out; they stand divided by 2^common.
template <class T>
double output_factor(const Job<T>& job, int64_t n, int common) {
  return std::ldexp(job.factor == nullptr ? 1.0 : 1.0 / job.factor[n], common);
}

template <class T>
void unstage(const Job<T>& job, int64_t n, int64_t p, const T* from, double factor) {
  if constexpr (sizeof(T) == 8) {
    write_plane<double, double>(job.dz, n, p, from, job.padded_w, factor);
  } else {
    switch (job.dz.dtype) {
      case FERA_F16:
        return write_plane<Half, float>(job.dz, n, p, from, job.padded_w, factor);
      case FERA_BF16:
        return write_plane<Bfloat, float>(job.dz, n, p, from, job.padded_w, factor);
      default:
        return write_plane<float, float>(job.dz, n, p, from, job.padded_w, factor);
    }
  }
}

// The coefficients of a signal staged with `exponent`, brought to the common power of two `common`.
template <class T>
void scaled_coefficients(const double* c, int count, int exponent, int common, double factor, double* out) {
  for (int k = 0; k < count; ++k) out[k] = std::ldexp(c[k] * factor, exponent - common);
}

// The power of two that brings every coefficient of every signal to at most 1.
inline int common_exponent(const double* c, int count, const int* exponents, int signals) {
  bool any = false;
  int most = 0;
  for (int s = 0; s < signals; ++s)
    for (int k = 0; k < count; ++k) {
      const double value = c[s * count + k];
      if (value == 0 || !std::isfinite(value)) continue;
      const int e = std::ilogb(value) + 1 + exponents[s];
      most = any ? (most > e ? most : e) : e;
      any = true;
    }
  return most;
}

}  // namespace fera::cpu::FERA_ISA
