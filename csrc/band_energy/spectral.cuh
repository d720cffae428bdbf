// Spectral filters: E_k = 1/(HW) sum |Z|^2 M_k, and dz = F^-1[(sum_k c_k M_k) Z].
//
// Two real planes of a sample make one complex plane. Every mask is symmetric under w -> -w, so the packed
// plane's masked power is the sum of both planes' and its filtered inverse holds both gradients: nothing is
// untangled. Passes: rows (source -> spectrum along W), columns (along H, then energies or the filter and
// back), inverse rows (gradient only).
#pragma once

#include "band_energy/fft.cuh"
#include "band_energy/source.cuh"

namespace fera::cuda {

constexpr int kThreads = 256;

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
inline size_t spectral_shared_bytes(int length, int lanes, int buffers) {
  return sizeof(Complex<Real>) * length * (1 + static_cast<size_t>(buffers) * pitch_of(lanes));
}

// grid (row tiles, pairs, virtual samples); spectrum (V, pairs, H, W) along W only.
template <class T>
__global__ void __launch_bounds__(kThreads)
    spectral_rows(Source source, FftPlan plan, int lanes, Complex<Compute<T>>* spectrum) {
  using Real = Compute<T>;
  extern __shared__ __align__(16) unsigned char raw[];
  const int pitch = pitch_of(lanes), first = blockIdx.x * lanes, pair = blockIdx.y;
  const int64_t v = blockIdx.z;
  SpectralShared<Real> shared(raw, source.w, pitch);
  make_twiddles(shared.twiddle, source.w);
  const bool two = 2 * pair + 1 < source.p;
  for (int t = threadIdx.x; t < lanes * source.w; t += kThreads) {
    const int x = t % source.w, row = t / source.w;
    Complex<Real> value{0, 0};
    if (first + row < source.h) {
      value.re = read<T>(source, v, 2 * pair, first + row, x);
      if (two) value.im = read<T>(source, v, 2 * pair + 1, first + row, x);
    }
    shared.a[x * pitch + row] = value;
  }
  const Complex<Real>* out = fft(shared.a, shared.b, shared.twiddle, plan, lanes, pitch, false);
  Complex<Real>* to = spectrum + ((v * source.pairs() + pair) * source.h + first) * source.w;
  for (int t = threadIdx.x; t < lanes * source.w; t += kThreads)
    if (first + t / source.w < source.h) to[t] = out[(t % source.w) * pitch + t / source.w];
}

template <class Real>
__device__ inline void load_columns(const Complex<Real>* plane, int h, int w, int first, int lanes, int pitch,
                                    Complex<Real>* to) {
  for (int t = threadIdx.x; t < lanes * h; t += kThreads) {
    const int lane = t % lanes, y = t / lanes;
    to[y * pitch + lane] = first + lane < w ? plane[static_cast<int64_t>(y) * w + first + lane] : Complex<Real>{0, 0};
  }
}

// Where frequency (y, x) of the full spectrum stands in a half-spectrum table of width w/2 + 1.
__device__ inline int64_t half_index(int y, int x, int h, int w) {
  const bool mirrored = x > w / 2;
  const int row = mirrored && y > 0 ? h - y : y;
  return static_cast<int64_t>(row) * (w / 2 + 1) + (mirrored ? w - x : x);
}

// grid (column tiles, pairs, virtual samples); partial (V, pairs, tiles, K+1): masked power of the tile in
// float64, the last entry unmasked (Parseval: the whole norm). The squares are taken after scaling by a power
// of two, so that latents of 1e18 or 1e-20 neither overflow nor vanish.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    spectral_energy(int h, int w, FftPlan plan, int lanes, const Complex<Real>* spectrum, const Real* masks, int bands,
                    double* partial) {
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ Real scratch[32];
  const int pitch = pitch_of(lanes), first = blockIdx.x * lanes;
  const int64_t plane = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
  SpectralShared<Real> shared(raw, h, pitch);
  make_twiddles(shared.twiddle, h);
  load_columns(spectrum + plane * h * w, h, w, first, lanes, pitch, shared.a);
  const Complex<Real>* out = fft(shared.a, shared.b, shared.twiddle, plan, lanes, pitch, false);

  Real largest = 0;
  for (int t = threadIdx.x; t < lanes * h; t += kThreads) {
    const Complex<Real> z = out[(t / lanes) * pitch + t % lanes];
    largest = fmax(largest, fmax(fabs(z.re), fabs(z.im)));
  }
  largest = block_max(largest, scratch);
  const int exponent = largest > 0 && isfinite(largest) ? ilogb(largest) : 0;
  for (int k = 0; k <= bands; ++k) {
    Real sum = 0;
    for (int t = threadIdx.x; t < lanes * h; t += kThreads) {
      const int lane = t % lanes, y = t / lanes, x = first + lane;
      if (x >= w) continue;
      const Complex<Real> z = out[y * pitch + lane];
      const Real re = scalbn(z.re, -exponent), im = scalbn(z.im, -exponent);
      const Real power = re * re + im * im;
      sum += k == bands ? power : power * masks[static_cast<int64_t>(k) * h * (w / 2 + 1) + half_index(y, x, h, w)];
    }
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0)
      partial[(plane * gridDim.x + blockIdx.x) * (bands + 1) + k] = ldexp(static_cast<double>(sum), 2 * exponent);
  }
}

// grid (column tiles, pairs, N): G = sum_s (sum_k c[s][k] M_k + c[s][K]) S_s, inverse along H, written over
// signal 0's spectrum. Signal s of sample n lies at virtual sample s*N + n.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    spectral_filter(int h, int w, FftPlan plan, int lanes, Complex<Real>* spectrum, const Real* masks, int bands,
                    int signals, Coefficients from) {
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
  __shared__ int exponent;
  const int pitch = pitch_of(lanes), first = blockIdx.x * lanes;
  const int64_t n = blockIdx.z, plane = n * gridDim.y + blockIdx.y;
  const int64_t signal_stride = static_cast<int64_t>(gridDim.z) * gridDim.y * h * w;
  SpectralShared<Real> shared(raw, h, pitch);
  make_twiddles(shared.twiddle, h);
  load_coefficients(from, n, bands, signals, c, &exponent);

  Complex<Real>* sum = shared.c;
  for (int s = 0; s < signals; ++s) {
    load_columns(spectrum + s * signal_stride + plane * h * w, h, w, first, lanes, pitch, shared.a);
    const Complex<Real>* out = fft(shared.a, shared.b, shared.twiddle, plan, lanes, pitch, false);
    for (int t = threadIdx.x; t < lanes * h; t += kThreads) {
      const int lane = t % lanes, y = t / lanes, x = first + lane, at = y * pitch + lane;
      if (x >= w) {
        sum[at] = {0, 0};
        continue;
      }
      Real transfer = c[s * (bands + 1) + bands];
      for (int k = 0; k < bands; ++k)
        transfer += c[s * (bands + 1) + k] * masks[static_cast<int64_t>(k) * h * (w / 2 + 1) + half_index(y, x, h, w)];
      const Complex<Real> value{transfer * out[at].re, transfer * out[at].im};
      sum[at] = s == 0 ? value : sum[at] + value;
    }
    __syncthreads();
  }
  const Complex<Real>* out = fft(sum, shared.b, shared.twiddle, plan, lanes, pitch, true);
  for (int t = threadIdx.x; t < lanes * h; t += kThreads) {
    const int lane = t % lanes, y = t / lanes;
    if (first + lane < w) spectrum[plane * h * w + static_cast<int64_t>(y) * w + first + lane] = out[y * pitch + lane];
  }
}

// grid (row tiles, pairs, N): inverse along W, scaled, real part to plane 2q, imaginary part to plane 2q + 1.
template <class T>
__global__ void __launch_bounds__(kThreads)
    spectral_rows_back(Source source, FftPlan plan, int lanes, const Complex<Compute<T>>* spectrum, int bands,
                       Coefficients from, View dz) {
  using Real = Compute<T>;
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
  __shared__ int exponent;
  const int pitch = pitch_of(lanes), first = blockIdx.x * lanes, pair = blockIdx.y, w = source.w, h = source.h;
  const int64_t n = blockIdx.z;
  SpectralShared<Real> shared(raw, w, pitch);
  make_twiddles(shared.twiddle, w);
  load_coefficients(from, n, bands, source.signals, c, &exponent);
  const Complex<Real>* rows = spectrum + ((n * source.pairs() + pair) * h + first) * w;
  for (int t = threadIdx.x; t < lanes * w; t += kThreads)
    shared.a[(t % w) * pitch + t / w] = first + t / w < h ? rows[t] : Complex<Real>{0, 0};
  const Complex<Real>* out = fft(shared.a, shared.b, shared.twiddle, plan, lanes, pitch, true);
  // One rounding in float64: 2^exponent alone may lie outside float32.
  const double factor = ldexp(1.0 / (static_cast<double>(h) * w), exponent);
  for (int t = threadIdx.x; t < lanes * w; t += kThreads) {
    const int x = t % w, y = first + t / w;
    if (y >= h) continue;
    const Complex<Real> value = out[x * pitch + t / w];
    T* to = static_cast<T*>(dz.data);
    to[dz.offset(n, 2 * pair, y, x)] = narrow<T>(static_cast<Real>(value.re * factor));
    if (2 * pair + 1 < source.p) to[dz.offset(n, 2 * pair + 1, y, x)] = narrow<T>(static_cast<Real>(value.im * factor));
  }
}

}  // namespace fera::cuda
