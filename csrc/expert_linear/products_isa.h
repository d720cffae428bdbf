// Register-blocked products: a tile of Rows x Vectors accumulators, one broadcast of `a` a row and step.
// Included after common/isa_push.h.
#pragma once

#include "common/simd_isa.h"
#include "expert_linear/products_cpu.h"

namespace fera::cpu::FERA_ISA {

// AVX-512 has 32 registers, the others 16.
constexpr int kTall = FERA_VECTOR_BYTES == 64 ? 12 : 6;
constexpr int kMiddle = FERA_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kShort = FERA_VECTOR_BYTES == 64 ? 4 : 2;

template <class T, int Rows, int Vectors, bool Transposed>
__attribute__((noinline)) void tile(const Product<T>& x, int64_t i0, int64_t rows) {
  constexpr int L = lanes_of<T>;
  constexpr int64_t wide = Vectors * L;
  Vec<T> sum[Rows][Vectors];
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int b = 0; b < Vectors; ++b) sum[r][b] = Vec<T>{};
  // The results' lines arrive while the product runs.
  if (x.init != nullptr) {
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int b = 0; b < Vectors; ++b) __builtin_prefetch(x.init + (i0 + (r < rows ? r : 0)) * x.init_stride + b * L);
  }
  const T* panel = x.panel;
  const int64_t step = x.panel_step, a_step = x.a_step, k = x.k;
  if constexpr (Transposed) {
    const T* a = x.a + i0 / kTall * a_step;
    for (int64_t l = 0; l < k; ++l, a += kTall, panel += step) {
      Vec<T> v[Vectors];
#pragma GCC unroll 2
      for (int b = 0; b < Vectors; ++b) load<T>(panel + b * L, v[b]);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int b = 0; b < Vectors; ++b) sum[r][b] += a[r] * v[b];
    }
  } else {
    // Rows past the last repeat it and are not stored.
    const T* a[Rows];
#pragma GCC unroll 12
    for (int r = 0; r < Rows; ++r) a[r] = x.a + (i0 + (r < rows ? r : rows - 1)) * a_step;
    for (int64_t l = 0; l < k; ++l, panel += step) {
      Vec<T> v[Vectors];
#pragma GCC unroll 2
      for (int b = 0; b < Vectors; ++b) load<T>(panel + b * L, v[b]);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int b = 0; b < Vectors; ++b) sum[r][b] += a[r][l] * v[b];
    }
  }
  const bool whole = x.n == wide;
#pragma GCC unroll 12
  for (int r = 0; r < Rows; ++r) {
    if (r >= rows) break;
    T* out = x.out + (i0 + r) * x.out_stride;
    const T* init = x.init == nullptr ? nullptr : x.init + (i0 + r) * x.init_stride;
    if (whole) {
#pragma GCC unroll 2
      for (int b = 0; b < Vectors; ++b) {
        if (init != nullptr) {
          Vec<T> v;
          load<T>(init + b * L, v);
          sum[r][b] += v;
        }
        store<T>(out + b * L, sum[r][b]);
      }
    } else {
      T part[wide];
#pragma GCC unroll 2
      for (int b = 0; b < Vectors; ++b) store<T>(part + b * L, sum[r][b]);
      for (int64_t j = 0; j < x.n; ++j) out[j] = part[j] + (init != nullptr ? init[j] : T{0});
    }
  }
}

template <class T, int Vectors, bool Transposed>
void product_rows(const Product<T>& x) {
  int64_t i = 0;
  for (; i + kTall <= x.m; i += kTall) tile<T, kTall, Vectors, Transposed>(x, i, kTall);
  const int64_t left = x.m - i;
  if (left > kMiddle)
    tile<T, kTall, Vectors, Transposed>(x, i, left);
  else if (left > kShort)
    tile<T, kMiddle, Vectors, Transposed>(x, i, left);
  else if (left > 0)
    tile<T, kShort, Vectors, Transposed>(x, i, left);
}

template <class T, bool Transposed>
void product(const Product<T>& x) {
  if (x.n <= lanes_of<T>)
    product_rows<T, 1, Transposed>(x);
  else
    product_rows<T, 2, Transposed>(x);
}

template <class Through, class S, class T>
FERA_INLINE void widen_through(const S* from, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) {
    Through rounded;
    narrow(static_cast<T>(widen(from[i])), &rounded);
    to[i] = static_cast<T>(widen(rounded));
  }
}

template <class S, class T>
__attribute__((noinline)) void widen_from(const S* from, fera_dtype through, int64_t count, T* to) {
  if constexpr (sizeof(T) == 4) {
    if (through == FERA_F16) return widen_through<Half>(from, count, to);
    if (through == FERA_BF16) return widen_through<Bfloat>(from, count, to);
  }
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i]));
}

template <class T>
void widen_row(const void* from, fera_dtype dtype, fera_dtype through, int64_t offset, int64_t count, T* to) {
  switch (dtype) {
    case FERA_F32:
      return widen_from(static_cast<const float*>(from) + offset, through, count, to);
    case FERA_F64:
      return widen_from(static_cast<const double*>(from) + offset, through, count, to);
    case FERA_F16:
      return widen_from(static_cast<const Half*>(from) + offset, through == FERA_F16 ? FERA_F32 : through, count, to);
    default:
      return widen_from(static_cast<const Bfloat*>(from) + offset, through == FERA_BF16 ? FERA_F32 : through, count,
                        to);
  }
}

template <class S, class T>
__attribute__((noinline)) void narrow_to(const T* from, const S* add, S* to, int64_t count) {
  if (add != nullptr)
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (sizeof(S) == 8)
        narrow(static_cast<double>(from[i] + widen(add[i])), to + i);
      else
        narrow(static_cast<float>(from[i] + widen(add[i])), to + i);
    }
  else
    for (int64_t i = 0; i < count; ++i) {
      if constexpr (sizeof(S) == 8)
        narrow(static_cast<double>(from[i]), to + i);
      else
        narrow(static_cast<float>(from[i]), to + i);
    }
}

template <class T>
void narrow_row(const T* from, const void* add, int64_t add_offset, void* to, int64_t offset, fera_dtype dtype,
                int64_t count) {
  const auto run = [&](auto* typed) {
    using S = std::remove_reference_t<decltype(*typed)>;
    narrow_to(from, add == nullptr ? nullptr : static_cast<const S*>(add) + add_offset, typed + offset, count);
  };
  switch (dtype) {
    case FERA_F32:
      return run(static_cast<float*>(to));
    case FERA_F64:
      return run(static_cast<double*>(to));
    case FERA_F16:
      return run(static_cast<Half*>(to));
    default:
      return run(static_cast<Bfloat*>(to));
  }
}

template <class S, class T>
__attribute__((noinline)) void pack_from(const S* from, int64_t stride, int64_t rows, int64_t columns, T* to,
                                         int64_t panel_step) {
  constexpr int width = 2 * lanes_of<T>;
  for (int64_t t = 0; t < rows; ++t, from += stride, to += width) {
    int64_t c = 0;
    T* out = to;
    for (; c + width <= columns; c += width, out += panel_step)
      for (int j = 0; j < width; ++j) out[j] = static_cast<T>(widen(from[c + j]));
    if (c == columns) continue;
    for (int j = 0; j < width; ++j) out[j] = c + j < columns ? static_cast<T>(widen(from[c + j])) : T{0};
  }
}

template <class T>
void pack_rows(const void* from, fera_dtype dtype, int64_t offset, int64_t stride, int64_t rows, int64_t columns, T* to,
               int64_t panel_step) {
  switch (dtype) {
    case FERA_F32:
      return pack_from(static_cast<const float*>(from) + offset, stride, rows, columns, to, panel_step);
    case FERA_F64:
      return pack_from(static_cast<const double*>(from) + offset, stride, rows, columns, to, panel_step);
    case FERA_F16:
      return pack_from(static_cast<const Half*>(from) + offset, stride, rows, columns, to, panel_step);
    default:
      return pack_from(static_cast<const Bfloat*>(from) + offset, stride, rows, columns, to, panel_step);
  }
}

template <class T>
void multiply_row(const T* a, const T* b, int64_t count, T* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = a[i] * b[i];
}

template <class T>
void grouped_dots(const T* a, const T* b, int groups, int rank, T* to) {
  constexpr int L = lanes_of<T>;
  for (int m = 0; m < groups; ++m, a += rank, b += rank) {
    Vec<T> sums{};
    int i = 0;
    for (; i + L <= rank; i += L) {
      Vec<T> x, y;
      load<T>(a + i, x);
      load<T>(b + i, y);
      sums += x * y;
    }
    T sum = static_cast<T>(sum_lanes<T>(sums));
    for (; i < rank; ++i) sum += a[i] * b[i];
    to[m] = sum;
  }
}

// A lane holds a 32-bit number in its lower half; the upper half is anything.
typedef uint64_t Wide __attribute__((vector_size(FERA_VECTOR_BYTES)));

// Products of the lower halves. Of the same in plain vectors compilers make 64-bit multiplications.
FERA_INLINE void multiply_low(const Wide& a, const Wide& b, Wide& to) {
#if FERA_CPU_X86 && FERA_VECTOR_BYTES == 64
  to = (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // the plain one warns in GCC 12
#elif FERA_CPU_X86 && FERA_VECTOR_BYTES == 32
  to = (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif FERA_CPU_X86
  to = (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  to = (a & 0xffffffffu) * b;
#endif
}

// Counters (c0, c1, stream, 0) become numbers: philox_round in vectors.
constexpr int kMaskBatch = 32;
constexpr int kMaskVectors = kMaskBatch * 8 / FERA_VECTOR_BYTES;
struct MaskBatch {
  Wide c0[kMaskVectors], c1[kMaskVectors], c2[kMaskVectors], c3[kMaskVectors];
};
__attribute__((noinline)) void make_numbers(uint64_t seed, uint32_t stream, MaskBatch& b) {
  const Wide first = Wide{} + kPhilox0, second = Wide{} + kPhilox1;
  for (int v = 0; v < kMaskVectors; ++v) b.c2[v] = Wide{} + stream, b.c3[v] = Wide{};
  for (int v = 0; v < kMaskVectors; v += 2) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int i = 0; i < kDropoutRounds; ++i, key0 += kPhiloxKey0, key1 += kPhiloxKey1) {
#pragma GCC unroll 2
      for (int u = v; u < v + 2; ++u) {
        Wide x, y;
        multiply_low(b.c0[u], first, x);
        multiply_low(b.c2[u], second, y);
        b.c0[u] = (y >> 32) ^ b.c1[u] ^ uint64_t { key0 };
        b.c2[u] = (x >> 32) ^ b.c3[u] ^ uint64_t { key1 };
        b.c1[u] = y;
        b.c3[u] = x;
      }
    }
  }
}

template <class T>
void mask(const Dropout& d, const Masked<T>& m) {
  typedef uint16_t Numbers __attribute__((vector_size(2 * kDropoutColumns)));
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Bit;
  typedef Bit Bits __attribute__((vector_size(kDropoutColumns * sizeof(T))));
  const Numbers threshold = Numbers{} + static_cast<uint16_t>(d.threshold);
  const int64_t first = m.column / kDropoutColumns, last = (m.column + m.columns - 1) / kDropoutColumns;
  const uint64_t seed = static_cast<uint64_t>(*d.seed);
  int64_t row = 0, group = first;
  while (row < m.rows) {
    uint64_t c0[kMaskBatch], c1[kMaskBatch];
    T* to[kMaskBatch];  // of the counter's row
    int64_t column[kMaskBatch];
    int count = 0;
    for (; count < kMaskBatch && row < m.rows; ++count) {
      c0[count] = static_cast<uint64_t>(group);
      c1[count] = static_cast<uint64_t>(m.row + row);
      to[count] = m.data + row * m.stride;
      column[count] = group * kDropoutColumns - m.column;
      if (++group > last) group = first, ++row;
    }
    for (int l = count; l < kMaskBatch; ++l) c0[l] = c1[l] = 0;
    MaskBatch b;
    std::memcpy(b.c0, c0, sizeof c0);
    std::memcpy(b.c1, c1, sizeof c1);
    make_numbers(seed, d.stream, b);
    uint64_t c2[kMaskBatch], c3[kMaskBatch];
    std::memcpy(c0, b.c0, sizeof c0);
    std::memcpy(c1, b.c1, sizeof c1);
    std::memcpy(c2, b.c2, sizeof c2);
    std::memcpy(c3, b.c3, sizeof c3);
    for (int l = 0; l < count; ++l) {
      const uint64_t words[2] = {(c0[l] & 0xffffffffu) | c1[l] << 32, (c2[l] & 0xffffffffu) | c3[l] << 32};
      Numbers number;
      std::memcpy(&number, words, sizeof number);
      const int64_t c = column[l];
      if (c >= 0 && c + kDropoutColumns <= m.columns) {
        T* at = to[l] + c;
        Bits value;
        std::memcpy(&value, at, sizeof value);
        value &= __builtin_convertvector(number >= threshold, Bits);
        std::memcpy(at, &value, sizeof value);
      } else {
        for (int j = 0; j < kDropoutColumns; ++j)
          if (c + j >= 0 && c + j < m.columns && number[j] < d.threshold) to[l][c + j] = T{0};
      }
    }
  }
}

template <class T>
ProductKernels<T> products_of() {
  return {2 * lanes_of<T>, kTall,        product<T, false>, product<T, true>, widen_row<T>,
          narrow_row<T>,   pack_rows<T>, multiply_row<T>,   grouped_dots<T>,  mask<T>};
}

void products(ProductKernels<float>* f, ProductKernels<double>* d) {
  *f = products_of<float>();
  *d = products_of<double>();
}

}  // namespace fera::cpu::FERA_ISA
