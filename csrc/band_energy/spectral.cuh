// Spectral filters in three passes over tiles: E_k = 1/(HW) sum |Z|^2 M_k, and dz = F^-1[(sum_k c_k M_k) Z].
//
// Two real planes of a sample make one complex plane. Every mask is symmetric under w -> -w, so the packed
// plane's masked power is the sum of both planes' and its filtered inverse holds both gradients: nothing is
// untangled. Passes: rows (source -> spectrum along W), columns (along H, then energies or the filter and
// back), inverse rows (gradient only). A tile is a few rows or columns of one plane; blocks walk the tiles, and the
// grid's barrier lies between two passes.
#pragma once

#include "band_energy/energies.cuh"
#include "band_energy/fft.cuh"

namespace fera::cuda {

template <class Real>
struct Spectral {
  FftPlan row, column;
  int row_lanes, column_lanes;  // log2 of the rows and columns a tile
  int row_tiles, column_tiles;  // a plane
  Complex<Real>* spectrum;      // (V, pairs, H, W)
  double* partial;              // (V, pairs, column tiles, K+1)
  const Real* masks;            // (K, H, W/2+1)
  int bands;
};

template <class Real>
struct SpectralShared {
  Complex<Real>*twiddle, *a, *b, *c;
  __device__ SpectralShared(unsigned char* raw, int length, int pitch) {
    twiddle = reinterpret_cast<Complex<Real>*>(raw);
    a = twiddle + length;
    b = a + length * pitch;
    c = b + length * pitch;
  }
};

template <class Real>
inline size_t spectral_shared_bytes(int length, int log_lanes, int buffers) {
  return sizeof(Complex<Real>) * length * (1 + static_cast<size_t>(buffers) * pitch_of(log_lanes));
}

// As many lanes as fit in `budget` bytes, at most 16; fewer, but not below the four that make a sector of a column,
// where the tiles would not fill a machine.
template <class Real>
inline int spectral_lanes(int length, int lines, int buffers, int64_t planes, size_t budget) {
  constexpr int64_t kTiles = 256;
  int lanes = 4;
  while (lanes > 0 && spectral_shared_bytes<Real>(length, lanes, buffers) > budget) --lanes;
  while (lanes > 2 && planes * ceil_div(lines, 1 << lanes) < kTiles) --lanes;
  return lanes;
}

// spectrum of every virtual sample, along W only.
template <class T>
__device__ inline void spectral_rows(const Source& source, const Spectral<Compute<T>>& f, unsigned char* raw) {
  using Real = Compute<T>;
  const int w = source.w, h = source.h, pairs = source.pairs(), log_lanes = f.row_lanes, pitch = pitch_of(log_lanes);
  const SpectralShared<Real> shared(raw, w, pitch);
  const Quotient by_w(w);
  make_twiddles(shared.twiddle, w);
  const int64_t tiles = source.virtual_samples() * pairs * f.row_tiles;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t plane = tile / f.row_tiles, v = plane / pairs;
    const int pair = static_cast<int>(plane - v * pairs), first = static_cast<int>(tile - plane * f.row_tiles)
                                                                  << log_lanes;
    const bool two = 2 * pair + 1 < source.p;
    const Plane<T> real(source, v, 2 * pair), imaginary(source, v, two ? 2 * pair + 1 : 2 * pair);
    for (int t = threadIdx.x; t < w << log_lanes; t += blockDim.x) {
      const int row = by_w(t), x = t - row * w;
      Complex<Real> value{0, 0};
      if (first + row < h) {
        value.re = real(first + row, x);
        if (two) value.im = imaginary(first + row, x);
      }
      shared.a[x * pitch + row] = value;
    }
    const Complex<Real>* out = fft(shared.a, shared.b, shared.twiddle, f.row, log_lanes, pitch);
    Complex<Real>* to = f.spectrum + (plane * h + first) * w;
    for (int t = threadIdx.x; t < w << log_lanes; t += blockDim.x) {
      const int row = by_w(t);
      if (first + row < h) to[t] = out[(t - row * w) * pitch + row];
    }
    __syncthreads();
  }
}

template <class Real>
__device__ inline void load_columns(const Complex<Real>* plane, int h, int w, int first, int log_lanes, int pitch,
                                    Complex<Real>* to) {
  for (int t = threadIdx.x; t < h << log_lanes; t += blockDim.x) {
    const int lane = t & ((1 << log_lanes) - 1), y = t >> log_lanes;
    to[y * pitch + lane] = first + lane < w ? plane[y * w + first + lane] : Complex<Real>{0, 0};
  }
}

// partial: masked power of each tile in float64, the last entry unmasked (Parseval: the whole norm). The squares are
// taken after scaling by a power of two, so that latents of 1e18 or 1e-20 neither overflow nor vanish.
template <class Real>
__device__ inline void spectral_energy(const Source& source, const Spectral<Real>& f, unsigned char* raw) {
  const int w = source.w, h = source.h, log_lanes = f.column_lanes, pitch = pitch_of(log_lanes), bands = f.bands;
  const int elements = h << log_lanes, table = h * (w / 2 + 1);
  const SpectralShared<Real> shared(raw, h, pitch);
  if (h != w) make_twiddles(shared.twiddle, h);
  const int64_t tiles = source.virtual_samples() * source.pairs() * f.column_tiles;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t plane = tile / f.column_tiles;
    const int first = static_cast<int>(tile - plane * f.column_tiles) << log_lanes;
    load_columns(f.spectrum + plane * h * w, h, w, first, log_lanes, pitch, shared.a);
    const Complex<Real>* out = fft(shared.a, shared.b, shared.twiddle, f.column, log_lanes, pitch);
    Real largest = 0;
    for (int t = threadIdx.x; t < elements; t += blockDim.x) {
      const Complex<Real> z = out[(t >> log_lanes) * pitch + (t & ((1 << log_lanes) - 1))];
      largest = fmax(largest, fmax(fabs(z.re), fabs(z.im)));
    }
    const int exponent = block_exponent(largest);
    const Real scale = scalbn(Real(1), -exponent);
    for (int k0 = 0; k0 <= bands; k0 += kSums) {
      Real sum[kSums] = {};
      for (int t = threadIdx.x; t < elements; t += blockDim.x) {
        const int lane = t & ((1 << log_lanes) - 1), y = t >> log_lanes, x = first + lane;
        if (x >= w) continue;
        const Complex<Real> z = out[y * pitch + lane];
        const Real re = scale * z.re, im = scale * z.im, power = re * re + im * im;
        const Real* mask = f.masks + half_index(y, x, h, w);
#pragma unroll
        for (int i = 0; i < kSums; ++i)
          if (k0 + i <= bands) sum[i] += k0 + i == bands ? power : power * mask[(k0 + i) * table];
      }
      write_partials(sum, k0, bands, exponent, f.partial + tile * (bands + 1));
    }
  }
}

// G = sum_s (sum_k c[s][k] M_k + c[s][K]) S_s, inverse along H, written over signal 0's spectrum with real and
// imaginary parts exchanged. Signal s of sample n lies at virtual sample s*N + n.
template <class Real>
__device__ inline void spectral_filter(const Source& source, const Spectral<Real>& f, const Coefficients& from,
                                       unsigned char* raw) {
  __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
  __shared__ int exponent;
  const int w = source.w, h = source.h, pairs = source.pairs(), log_lanes = f.column_lanes;
  const int pitch = pitch_of(log_lanes), bands = f.bands, elements = h << log_lanes, table = h * (w / 2 + 1);
  const int64_t signal_stride = source.n * pairs * h * w, tiles = source.n * pairs * f.column_tiles;
  const SpectralShared<Real> shared(raw, h, pitch);
  if (h != w) make_twiddles(shared.twiddle, h);
  int64_t loaded = -1;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t plane = tile / f.column_tiles, n = plane / pairs;
    const int first = static_cast<int>(tile - plane * f.column_tiles) << log_lanes;
    if (n != loaded) load_coefficients(from, n, bands, source.signals, c, &exponent);
    loaded = n;
    Complex<Real>*sum = shared.c, *spare = shared.b;
    for (int s = 0; s < source.signals; ++s) {
      load_columns(f.spectrum + s * signal_stride + plane * h * w, h, w, first, log_lanes, pitch, shared.a);
      const Complex<Real>* out = fft(shared.a, shared.b, shared.twiddle, f.column, log_lanes, pitch);
      if (source.signals == 1) {
        sum = out == shared.a ? shared.a : shared.b;
        spare = out == shared.a ? shared.b : shared.a;
      }
      for (int t = threadIdx.x; t < elements; t += blockDim.x) {
        const int lane = t & ((1 << log_lanes) - 1), y = t >> log_lanes, x = first + lane, at = y * pitch + lane;
        const Real* mask = f.masks + half_index(y, x < w ? x : 0, h, w);
        Real transfer = c[s * (bands + 1) + bands];
        for (int k = 0; k < bands; ++k) transfer += c[s * (bands + 1) + k] * mask[k * table];
        const Complex<Real> z = out[at], value{transfer * z.im, transfer * z.re};
        sum[at] = s == 0 ? value : sum[at] + value;
      }
      __syncthreads();
    }
    const Complex<Real>* out = fft(sum, spare, shared.twiddle, f.column, log_lanes, pitch);
    for (int t = threadIdx.x; t < elements; t += blockDim.x) {
      const int lane = t & ((1 << log_lanes) - 1), y = t >> log_lanes;
      if (first + lane < w) f.spectrum[plane * h * w + y * w + first + lane] = out[y * pitch + lane];
    }
    __syncthreads();
  }
}

// Inverse along W, scaled; the exchanged imaginary part to plane 2q, the real part to plane 2q + 1.
template <class T>
__device__ inline void spectral_rows_back(const Source& source, const Spectral<Compute<T>>& f, const Coefficients& from,
                                          const Output& dz, unsigned char* raw) {
  using Real = Compute<T>;
  __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
  __shared__ int exponent;
  const int w = source.w, h = source.h, pairs = source.pairs(), log_lanes = f.row_lanes, pitch = pitch_of(log_lanes);
  const SpectralShared<Real> shared(raw, w, pitch);
  const Quotient by_w(w);
  if (h != w) make_twiddles(shared.twiddle, w);
  const int64_t tiles = source.n * pairs * f.row_tiles;
  int64_t loaded = -1;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t plane = tile / f.row_tiles, n = plane / pairs;
    const int pair = static_cast<int>(plane - n * pairs), first = static_cast<int>(tile - plane * f.row_tiles)
                                                                  << log_lanes;
    if (n != loaded) load_coefficients(from, n, f.bands, source.signals, c, &exponent);
    loaded = n;
    const Complex<Real>* rows = f.spectrum + (plane * h + first) * w;
    for (int t = threadIdx.x; t < w << log_lanes; t += blockDim.x) {
      const int row = by_w(t);
      shared.a[(t - row * w) * pitch + row] = first + row < h ? rows[t] : Complex<Real>{0, 0};
    }
    const Complex<Real>* out = fft(shared.a, shared.b, shared.twiddle, f.row, log_lanes, pitch);
    const double pixels = static_cast<double>(h) * w;
    const Scale<Real> scale(from.factor != nullptr ? 1.0 / pixels : ldexp(1.0 / pixels, exponent));
    for (int t = threadIdx.x; t < w << log_lanes; t += blockDim.x) {
      const int row = by_w(t), x = t - row * w, y = first + row;
      if (y >= h) continue;
      const Complex<Real> value = out[x * pitch + row];
      store<T>(dz, dz.view.offset(n, 2 * pair, y, x), scale(value.im));
      if (2 * pair + 1 < source.p) store<T>(dz, dz.view.offset(n, 2 * pair + 1, y, x), scale(value.re));
    }
    __syncthreads();
  }
}

}  // namespace fera::cuda
