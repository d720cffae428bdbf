// Spectral form: two real planes of a sample make one complex plane; rows, then columns, then the masks.
// Included after common/isa_push.h.
//
// Between the two directions the plane lies in strips of `lanes` columns, [strip][h] vectors: strip s < strips
// holds columns s lanes + l, strip `strips` + s their mirror images W - u (in lane 0 of the first, for which that
// is no column, the Nyquist column of an even W). As masks are symmetric, a mirrored strip uses the same mask
// values as its strip, in row -v mod H: the half-spectrum table is read in place, in contiguous vectors.
#pragma once

#include "band_energy/fft_isa.h"
#include "band_energy/stage_isa.h"

namespace fera::cpu::FERA_ISA {

// Column of lane l of a strip, or -1.
template <class T>
FERA_INLINE int column_of(const Job<T>& job, int strip, int l) {
  const int mirrored = strip >= job.strips;
  const int i = (strip - mirrored * job.strips) * lanes_of<T> + l;
  if (i >= job.half) return -1;
  if (!mirrored) return i;
  if (i > 0) return job.w - i;
  return job.w % 2 == 0 ? job.w / 2 : -1;
}

template <class T>
struct SpectralScratch {
  T* staged[2];           // (padded_h, padded_w)
  Complex<T>* strips[2];  // (2 strips, H); the second only for two signals' adjoint
  Complex<T>*x, *y, *spare;
};

template <class T>
SpectralScratch<T> carve(const Job<T>& job, void* scratch) {
  SpectralScratch<T> s;
  T* at = static_cast<T*>(scratch);
  const int64_t plane = int64_t{job.padded_h} * job.padded_w;
  s.staged[0] = at;
  s.staged[1] = at + plane;
  at += 2 * plane;
  const int64_t line = (job.padded_w > job.h ? job.padded_w : job.h);
  s.x = reinterpret_cast<Complex<T>*>(at);
  s.y = s.x + line;
  s.spare = s.y + line;
  s.strips[0] = s.spare + line;
  s.strips[1] = s.strips[0] + int64_t{2} * job.strips * job.h;
  return s;
}

// Transforms the rows of the staged pair into strips.
template <class T>
void rows_forward(const Job<T>& job, const SpectralScratch<T>& s, int planes, T scale, Complex<T>* strips) {
  constexpr int L = lanes_of<T>;
  for (int h0 = 0; h0 < job.h; h0 += L) {
    for (int u0 = 0; u0 < job.padded_w; u0 += L) {
      Vec<T> r[L];
      const T* from = s.staged[0] + int64_t{h0} * job.padded_w + u0;
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) load<T>(from + int64_t{l} * job.padded_w, r[l]);
      transpose<T>(r);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) s.x[u0 + l].re = r[l] * scale;
      if (planes < 2) {
        for (int l = 0; l < L; ++l) s.x[u0 + l].im = Vec<T>{};
        continue;
      }
      from = s.staged[1] + int64_t{h0} * job.padded_w + u0;
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) load<T>(from + int64_t{l} * job.padded_w, r[l]);
      transpose<T>(r);
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) s.x[u0 + l].im = r[l] * scale;
    }
    const Complex<T>* z = fft<T>(job.fft_w, s.x, s.y, s.spare);
    const int rows = job.h - h0 < L ? job.h - h0 : L;
    for (int strip = 0; strip < 2 * job.strips; ++strip) {
      Complex<T>* to = strips + int64_t{strip} * job.h + h0;
      Vec<T> re[L], im[L];
      for (int l = 0; l < L; ++l) {
        const int u = column_of(job, strip, l);
        re[l] = u < 0 ? Vec<T>{} : z[u].re;
        im[l] = u < 0 ? Vec<T>{} : z[u].im;
      }
      transpose<T>(re);
      transpose<T>(im);
      for (int l = 0; l < rows; ++l) to[l] = {re[l], im[l]};
    }
  }
}

// The inverse along rows of exchanged strips, exchanged back into the staged pair.
template <class T>
void rows_inverse(const Job<T>& job, const SpectralScratch<T>& s, int planes, const Complex<T>* strips) {
  constexpr int L = lanes_of<T>;
  for (int h0 = 0; h0 < job.h; h0 += L) {
    const int rows = job.h - h0 < L ? job.h - h0 : L;
    for (int strip = 0; strip < 2 * job.strips; ++strip) {
      const Complex<T>* from = strips + int64_t{strip} * job.h + h0;
      Vec<T> re[L], im[L];
      for (int l = 0; l < L; ++l) {
        re[l] = l < rows ? from[l].re : Vec<T>{};
        im[l] = l < rows ? from[l].im : Vec<T>{};
      }
      transpose<T>(re);
      transpose<T>(im);
      for (int l = 0; l < L; ++l) {
        const int u = column_of(job, strip, l);
        if (u >= 0) s.x[u] = {re[l], im[l]};
      }
    }
    const Complex<T>* z = fft<T>(job.fft_w, s.x, s.y, s.spare);
    for (int plane = 0; plane < planes; ++plane)
      for (int u0 = 0; u0 < job.padded_w; u0 += L) {
        Vec<T> r[L];
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) r[l] = plane == 0 ? z[u0 + l].im : z[u0 + l].re;
        transpose<T>(r);
        T* to = s.staged[plane] + int64_t{h0} * job.padded_w + u0;
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) store<T>(to + int64_t{l} * job.padded_w, r[l]);
      }
  }
}

// Reads mask vectors of one strip.
template <class T>
struct Masks {
  const T* table;
  int64_t total, band, row;  // elements in all, in a band, in a row
  int first, nyquist;        // the strip's first column; the Nyquist column if lane 0 holds it, else 0

  FERA_INLINE Vec<T> at(int k, int v) const {
    const int64_t offset = k * band + v * row + first;
    Vec<T> m;
    if (offset + lanes_of<T> <= total)
      load<T>(table + offset, m);
    else
      load_part<T>(table + offset, static_cast<int>(total - offset), m);
    if (nyquist) m[0] = table[k * band + v * row + nyquist];
    return m;
  }
};

template <class T>
Masks<T> masks_of(const Job<T>& job, int strip) {
  const int row = job.w / 2 + 1;
  const bool mirrored = strip >= job.strips;
  const int s = mirrored ? strip - job.strips : strip;
  return {static_cast<const T*>(job.filters.table),
          int64_t{job.filters.bands} * job.h * row,
          int64_t{job.h} * row,
          row,
          s * lanes_of<T>,
          mirrored && s == 0 && job.w % 2 == 0 ? job.w / 2 : 0};
}

// sum_v mask_k |Z|^2 for Bands bands from k0 on (Bands = 0: sum_v |Z|^2), float sums of at most 32 rows.
template <class T, int Bands>
void add_powers(const Masks<T>& masks, int k0, bool mirrored, const Complex<T>* z, int h, double* partial) {
  constexpr int Sums = Bands == 0 ? 1 : Bands;
  for (int v0 = 0; v0 < h; v0 += 32) {
    const int end = v0 + 32 < h ? v0 + 32 : h;
    Vec<T> sum[Sums];
#pragma GCC unroll 4
    for (int k = 0; k < Sums; ++k) sum[k] = Vec<T>{};
    for (int v = v0; v < end; ++v) {
      const Vec<T> power = z[v].re * z[v].re + z[v].im * z[v].im;
      const int row = mirrored && v > 0 ? h - v : v;
      if constexpr (Bands == 0)
        sum[0] += power;
      else {
#pragma GCC unroll 4
        for (int k = 0; k < Bands; ++k) sum[k] += power * masks.at(k0 + k, row);
      }
    }
#pragma GCC unroll 4
    for (int k = 0; k < Sums; ++k) partial[k] += sum_lanes<T>(sum[k]);
  }
}

// Pair `pair` of sample n of signal s; returns the number of its planes.
template <class T>
int stage_pair(const Job<T>& job, int signal, int64_t n, int pair, const SpectralScratch<T>& s, int* exponent) {
  const int planes = 2 * pair + 1 < job.planes ? 2 : 1;
  int64_t bits[2] = {0, 0};
  for (int i = 0; i < planes; ++i) bits[i] = stage<T>(job, signal, n, 2 * pair + i, s.staged[i]);
  for (int i = 0; i < planes; ++i)
    std::memset(static_cast<void*>(s.staged[i] + int64_t{job.h} * job.padded_w), 0,
                sizeof(T) * (job.padded_h - job.h) * job.padded_w);
  *exponent = exponent_of_planes<T>(bits[0], bits[1]);
  return planes;
}

template <class T>
void spectral_energies(const Job<T>& job, int64_t unit, void* scratch, double* partial, int* exponent) {
  const SpectralScratch<T> s = carve(job, scratch);
  const int pairs = (job.planes + 1) / 2, bands = job.filters.bands;
  const int64_t sample = unit / pairs, samples = job.source.whole.n;
  const int planes = stage_pair(job, static_cast<int>(sample / samples), sample % samples,
                                static_cast<int>(unit % pairs), s, exponent);
  rows_forward(job, s, planes, power_of_two<T>(-*exponent), s.strips[0]);
  for (int k = 0; k <= bands; ++k) partial[k] = 0;
  for (int strip = 0; strip < 2 * job.strips; ++strip) {
    const Complex<T>* z = fft<T>(job.fft_h, s.strips[0] + int64_t{strip} * job.h, s.x, s.spare);
    const Masks<T> masks = masks_of(job, strip);
    const bool mirrored = strip >= job.strips;
    int k = 0;
    for (; k + 3 <= bands; k += 3) add_powers<T, 3>(masks, k, mirrored, z, job.h, partial + k);
    if (bands - k == 2) add_powers<T, 2>(masks, k, mirrored, z, job.h, partial + k);
    if (bands - k == 1) add_powers<T, 1>(masks, k, mirrored, z, job.h, partial + k);
    if (job.source.signals == 2) add_powers<T, 0>(masks, 0, mirrored, z, job.h, partial + bands);
  }
  for (int k = 0; k <= bands; ++k) partial[k] /= static_cast<double>(job.h) * job.w;
}

template <class T>
void spectral_adjoint(const Job<T>& job, int64_t unit, void* scratch) {
  const SpectralScratch<T> s = carve(job, scratch);
  const int pairs = (job.planes + 1) / 2, bands = job.filters.bands, signals = job.source.signals;
  const int64_t n = unit / pairs;
  const int pair = static_cast<int>(unit % pairs);
  int exponents[2] = {0, 0}, planes = 1;
  for (int signal = 0; signal < signals; ++signal) {
    planes = stage_pair(job, signal, n, pair, s, &exponents[signal]);
    rows_forward(job, s, planes, power_of_two<T>(-exponents[signal]), s.strips[signal]);
  }
  const double* from = job.coefficients + n * signals * (bands + 1);
  const int common = common_exponent(from, bands + 1, exponents, signals);
  T c[2][FERA_MAX_BANDS + 1];
  for (int signal = 0; signal < signals; ++signal) {
    double scaled[FERA_MAX_BANDS + 1];
    scaled_coefficients<T>(from + signal * (bands + 1), bands + 1, exponents[signal], common,
                           1.0 / (static_cast<double>(job.h) * job.w), scaled);
    for (int k = 0; k <= bands; ++k) c[signal][k] = static_cast<T>(scaled[k]);
  }
  for (int strip = 0; strip < 2 * job.strips; ++strip) {
    const Masks<T> masks = masks_of(job, strip);
    const bool mirrored = strip >= job.strips;
    Complex<T>* const home = s.strips[0] + int64_t{strip} * job.h;
    for (int signal = 0; signal < signals; ++signal) {
      const Complex<T>* z = fft<T>(job.fft_h, s.strips[signal] + int64_t{strip} * job.h, s.x, s.spare);
      for (int v = 0; v < job.h; ++v) {
        const int row = mirrored && v > 0 ? job.h - v : v;
        Vec<T> m = Vec<T>{} + c[signal][bands];
        for (int k = 0; k < bands; ++k) m += c[signal][k] * masks.at(k, row);
        // Exchanged: the inverse is a forward transform of it.
        const Complex<T> out = {m * z[v].im, m * z[v].re};
        home[v] = signal == 0 ? out : Complex<T>{home[v].re + out.re, home[v].im + out.im};
      }
    }
    const Complex<T>* done = fft<T>(job.fft_h, home, s.x, s.spare);
    if (done != home) std::memcpy(static_cast<void*>(home), done, sizeof(Complex<T>) * job.h);
  }
  rows_inverse(job, s, planes, s.strips[0]);
  for (int i = 0; i < planes; ++i) unstage<T>(job, n, 2 * pair + i, s.staged[i], output_factor(job, n, common));
}

}  // namespace fera::cpu::FERA_ISA
