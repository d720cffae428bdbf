// 16-bit storage types of the CPU kernels. Branch-free integer conversions, so loops over them vectorise.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__)
#define FERA_INLINE inline __attribute__((always_inline))
#else
#define FERA_INLINE inline
#endif

namespace fera::cpu {

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

FERA_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
FERA_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
FERA_INLINE uint64_t as_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return bits;
}

FERA_INLINE float widen(float x) { return x; }
FERA_INLINE double widen(double x) { return x; }
FERA_INLINE float widen(Bfloat x) { return as_float(uint32_t{x.bits} << 16); }
FERA_INLINE float widen(Half x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t shifted = (x.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + (112u << 23);
  const uint32_t special = normal + (112u << 23);  // infinity, NaN
  // Subnormal: 2^-14 (1 + m/1024) - 2^-14.
  const uint32_t subnormal = as_bits(as_float(normal + (1u << 23)) - as_float(113u << 23));
  const uint32_t magnitude = exponent == 0x0f800000u ? special : exponent == 0 ? subnormal : normal;
  return as_float(magnitude | sign);
}

// Round to nearest even.
FERA_INLINE void narrow(float x, float* out) { *out = x; }
FERA_INLINE void narrow(double x, double* out) { *out = x; }
FERA_INLINE void narrow(float x, Bfloat* out) {
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->bits = static_cast<uint16_t>(nan ? 0x7fc0u : rounded);
}
FERA_INLINE void narrow(float x, Half* out) {
  const uint32_t all = as_bits(x);
  const uint32_t sign = (all >> 16) & 0x8000u;
  const uint32_t bits = all & 0x7fffffffu;
  const uint32_t normal = (bits + 0xc8000fffu + ((bits >> 13) & 1u)) >> 13;
  const uint32_t magic = 126u << 23;  // 0.5: its unit in the last place is half's smallest subnormal
  const uint32_t subnormal = as_bits(as_float(bits) + as_float(magic)) - magic;
  const uint32_t special = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t magnitude = bits >= (143u << 23) ? special : bits < (113u << 23) ? subnormal : normal;
  out->bits = static_cast<uint16_t>(magnitude | sign);
}

}  // namespace fera::cpu
