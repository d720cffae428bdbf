// Separable form: b_j = L_j z R_j^T, bands mixed from the b_j. Four rows at a time: down the columns with
// coefficients broadcast from L_j, then along the rows with the diagonals of R_j as vectors.
// Included after common/isa_push.h.
#pragma once

#include "band_energy/stage_isa.h"

namespace fera::cpu::FERA_ISA {

constexpr int kRows = 4;

template <class T>
struct SeparableScratch {
  T* staged;   // (H, padded_w)
  T* out;      // (H, padded_w): the adjoint
  T* mixed;    // (J, H, padded_w): the adjoint's c_j
  T* tall;     // (kRows, pitch): rows after L_j, zero for `margin` to both sides
  T* blurred;  // (J, kRows, padded_w)
  int margin, pitch;
};

template <class T>
SeparableScratch<T> carve_separable(const Job<T>& job, void* scratch, bool adjoint) {
  SeparableScratch<T> s;
  const int64_t plane = int64_t{job.h} * job.padded_w;
  const int blurs = job.filters.blurs;
  s.margin = job.padded_w;
  s.pitch = 3 * job.padded_w;
  T* at = static_cast<T*>(scratch);
  s.tall = at;
  at += int64_t{kRows} * s.pitch;
  s.blurred = at;
  at += int64_t{blurs} * kRows * job.padded_w;
  s.staged = at;
  at += plane;
  s.out = adjoint ? at : nullptr;
  s.mixed = adjoint ? at + plane : nullptr;
  std::memset(static_cast<void*>(s.tall), 0, sizeof(T) * kRows * s.pitch);
  return s;
}

// tall[r][:] = sum_i left(i0 + r, i) x[i][:], i within reach; left(i, i') = left[i row_step + i' step].
// Rows past H repeat the last one and are not used.
template <class T, int Vectors>
FERA_INLINE void down_block(const T* left, int64_t row_step, int64_t step, int reach, int h, int i0, const T* x,
                            int pitch_x, T* tall, int pitch) {
  constexpr int L = lanes_of<T>;
  Vec<T> sum[kRows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < Vectors; ++b) sum[r][b] = Vec<T>{};
  const T* row[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) row[r] = left + (i0 + r < h ? i0 + r : h - 1) * row_step;
  const int begin = i0 > reach ? i0 - reach : 0;
  const int end = i0 + kRows + reach < h ? i0 + kRows + reach : h;
  for (int i = begin; i < end; ++i) {
    Vec<T> v[Vectors];
#pragma GCC unroll 4
    for (int b = 0; b < Vectors; ++b) load<T>(x + int64_t{i} * pitch_x + b * L, v[b]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const T c = row[r][i * step];
#pragma GCC unroll 4
      for (int b = 0; b < Vectors; ++b) sum[r][b] += c * v[b];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < Vectors; ++b) store<T>(tall + int64_t{r} * pitch + b * L, sum[r][b]);
}

template <class T>
__attribute__((noinline)) void down(const T* left, int64_t row_step, int64_t step, int reach, const Job<T>& job, int i0,
                                    const T* x, const SeparableScratch<T>& s) {
  constexpr int L = lanes_of<T>;
  int w = 0;
  T* tall = s.tall + s.margin;
  for (; w + 4 * L <= job.padded_w; w += 4 * L)
    down_block<T, 4>(left, row_step, step, reach, job.h, i0, x + w, job.padded_w, tall + w, s.pitch);
  for (; w + 2 * L <= job.padded_w; w += 2 * L)
    down_block<T, 2>(left, row_step, step, reach, job.h, i0, x + w, job.padded_w, tall + w, s.pitch);
  for (; w < job.padded_w; w += L)
    down_block<T, 1>(left, row_step, step, reach, job.h, i0, x + w, job.padded_w, tall + w, s.pitch);
}

// out[r][w] (+)= sum_d diagonals[d][w] tall[r][w + d - reach]
template <class T, int Vectors, bool Add>
FERA_INLINE void along_block(const T* diagonals, int padded_w, int reach, const T* tall, int pitch, T* out) {
  constexpr int L = lanes_of<T>;
  Vec<T> sum[kRows][Vectors];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < Vectors; ++b) {
      if constexpr (Add)
        load<T>(out + r * padded_w + b * L, sum[r][b]);
      else
        sum[r][b] = Vec<T>{};
    }
  for (int d = 0; d <= 2 * reach; ++d) {
    Vec<T> c[Vectors];
#pragma GCC unroll 4
    for (int b = 0; b < Vectors; ++b) load<T>(diagonals + int64_t{d} * padded_w + b * L, c[b]);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < Vectors; ++b) {
        Vec<T> v;
        load<T>(tall + int64_t{r} * pitch + b * L + d - reach, v);
        sum[r][b] += c[b] * v;
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int b = 0; b < Vectors; ++b) store<T>(out + r * padded_w + b * L, sum[r][b]);
}

template <class T, bool Add>
__attribute__((noinline)) void along(const T* diagonals, int reach, const Job<T>& job, const SeparableScratch<T>& s,
                                     T* out) {
  constexpr int L = lanes_of<T>;
  const T* tall = s.tall + s.margin;
  int w = 0;
  for (; w + 2 * L <= job.padded_w; w += 2 * L)
    along_block<T, 2, Add>(diagonals + w, job.padded_w, reach, tall + w, s.pitch, out + w);
  for (; w < job.padded_w; w += L)
    along_block<T, 1, Add>(diagonals + w, job.padded_w, reach, tall + w, s.pitch, out + w);
}

// blurred[j] = rows i0 .. i0 + 3 of b_j
template <class T>
void blur_rows(const Job<T>& job, int i0, const SeparableScratch<T>& s) {
  for (int j = 0; j < job.filters.blurs; ++j) {
    const T* left = static_cast<const T*>(job.filters.table) + int64_t{j} * job.h * job.h;
    down<T>(left, job.h, 1, job.reach_h[j], job, i0, s.staged, s);
    along<T, false>(job.right_diagonals[j], job.reach_w[j], job, s, s.blurred + int64_t{j} * kRows * job.padded_w);
  }
}

template <class T>
int stage_scaled(const Job<T>& job, int signal, int64_t n, int p, T* staged) {
  const int exponent = exponent_of_planes<T>(stage<T>(job, signal, n, p, staged), 0);
  const T scale = power_of_two<T>(-exponent);
  const int64_t count = int64_t{job.h} * job.padded_w;
  for (int64_t i = 0; i < count; ++i) staged[i] *= scale;
  return exponent;
}

// sum of squares of a row of vectors
template <class T>
FERA_INLINE double square_sum(const T* x, int count) {
  Vec<T> sum{};
  for (int i = 0; i < count; i += lanes_of<T>) {
    Vec<T> v;
    load<T>(x + i, v);
    sum += v * v;
  }
  return sum_lanes<T>(sum);
}

template <class T>
void separable_energies(const Job<T>& job, int64_t unit, void* scratch, double* partial, int* exponent) {
  constexpr int L = lanes_of<T>;
  const SeparableScratch<T> s = carve_separable(job, scratch, false);
  const int64_t sample = unit / job.planes, samples = job.source.whole.n;
  const int bands = job.filters.bands, blurs = job.filters.blurs;
  const T* mix = static_cast<const T*>(job.filters.mix);
  *exponent = stage_scaled(job, static_cast<int>(sample / samples), sample % samples,
                           static_cast<int>(unit % job.planes), s.staged);
  for (int k = 0; k <= bands; ++k) partial[k] = 0;
  for (int i0 = 0; i0 < job.h; i0 += kRows) {
    const int rows = job.h - i0 < kRows ? job.h - i0 : kRows;
    blur_rows(job, i0, s);
    for (int k = 0; k < bands; ++k) {
      Vec<T> sum{};
      for (int64_t i = 0; i < int64_t{rows} * job.padded_w; i += L) {
        Vec<T> band{};
        for (int j = 0; j < blurs; ++j) {
          Vec<T> b;
          load<T>(s.blurred + int64_t{j} * kRows * job.padded_w + i, b);
          band += mix[k * blurs + j] * b;
        }
        sum += band * band;
      }
      partial[k] += sum_lanes<T>(sum);
    }
    if (job.source.signals == 2)
      for (int r = 0; r < rows; ++r)
        partial[bands] += square_sum(s.staged + int64_t{i0 + r} * job.padded_w, job.padded_w);
  }
}

// dz = sum_j L_j^T c_j R_j + whole, c_j = sum_s sum_k mix_kj c[s]_k band_k of signal s. The bands are formed before
// they are weighted: where two blurs are equal their band is exactly 0, however large its coefficient.
template <class T>
void separable_adjoint(const Job<T>& job, int64_t unit, void* scratch) {
  constexpr int L = lanes_of<T>;
  const SeparableScratch<T> s = carve_separable(job, scratch, true);
  const int64_t n = unit / job.planes;
  const int p = static_cast<int>(unit % job.planes);
  const int bands = job.filters.bands, blurs = job.filters.blurs, signals = job.source.signals;
  const int64_t plane = int64_t{job.h} * job.padded_w;
  const T* mix = static_cast<const T*>(job.filters.mix);
  const double* from = job.coefficients + n * signals * (bands + 1);
  // The scales of both signals come before either is blurred: the mixture has one power of two.
  int exponents[2] = {0, 0};
  for (int signal = signals - 1; signal >= 0; --signal) exponents[signal] = stage_scaled(job, signal, n, p, s.staged);
  const int common = common_exponent(from, bands + 1, exponents, signals);
  for (int signal = 0; signal < signals; ++signal) {
    if (signal > 0) stage_scaled(job, signal, n, p, s.staged);
    double c[FERA_MAX_BANDS + 1] = {};
    scaled_coefficients<T>(from + signal * (bands + 1), bands + 1, exponents[signal], common, 1.0, c);
    const T whole = static_cast<T>(c[bands]);
    for (int64_t i = 0; i < plane; ++i) s.out[i] = whole * s.staged[i] + (signal > 0 ? s.out[i] : T{0});
    for (int i0 = 0; i0 < job.h; i0 += kRows) {
      const int rows = job.h - i0 < kRows ? job.h - i0 : kRows;
      blur_rows(job, i0, s);
      T* to = s.mixed + int64_t{i0} * job.padded_w;
      for (int64_t at = 0; at < int64_t{rows} * job.padded_w; at += L) {
        Vec<T> blur[FERA_MAX_BANDS], sum[FERA_MAX_BANDS];
        for (int j = 0; j < blurs; ++j) {
          load<T>(s.blurred + int64_t{j} * kRows * job.padded_w + at, blur[j]);
          sum[j] = Vec<T>{};
          if (signal > 0) load<T>(to + j * plane + at, sum[j]);
        }
        for (int k = 0; k < bands; ++k) {
          Vec<T> band{};
          for (int j = 0; j < blurs; ++j) band += mix[k * blurs + j] * blur[j];
          band *= static_cast<T>(c[k]);
          for (int j = 0; j < blurs; ++j) sum[j] += mix[k * blurs + j] * band;
        }
        for (int j = 0; j < blurs; ++j) store<T>(to + j * plane + at, sum[j]);
      }
    }
  }
  for (int i0 = 0; i0 < job.h; i0 += kRows) {
    const int rows = job.h - i0 < kRows ? job.h - i0 : kRows;
    T* to = s.out + int64_t{i0} * job.padded_w;
    // The last rows of a plane are completed in `blurred`, which has room for all kRows.
    std::memcpy(s.blurred, to, sizeof(T) * rows * job.padded_w);
    for (int j = 0; j < blurs; ++j) {
      const T* left = static_cast<const T*>(job.filters.table) + int64_t{j} * job.h * job.h;
      down<T>(left, 1, job.h, job.reach_h[j], job, i0, s.mixed + j * plane, s);
      along<T, true>(job.right_adjoint[j], job.reach_w[j], job, s, s.blurred);
    }
    std::memcpy(to, s.blurred, sizeof(T) * rows * job.padded_w);
  }
  unstage<T>(job, n, p, s.out, output_factor(job, n, common));
}

}  // namespace fera::cpu::FERA_ISA
