// Separable filters: b_j = L_j z R_j^T, band_k = sum_j mix[k][j] b_j, E_k = |band_k|^2, and their adjoint.
//
// Entries of L_j and R_j farther than reach[j] from the diagonal are zero and skipped. Passes: rows
// (z R_j^T), columns (L_j, bands, then energies or the adjoint's inputs), and for the gradient the same two
// transposed.
#pragma once

#include "band_energy/source.cuh"

namespace fera::cuda {

struct Separable {
  const void *left, *right, *mix;
  int bands, blurs;
  int reach[FERA_MAX_BANDS];
};

constexpr int kTile = 256;

// One row or column of a banded matrix against a line of stride `stride`; transposed reads matrix[i][at].
template <class Real>
__device__ inline Real banded_dot(const Real* matrix, int size, int at, int reach, bool transposed, const Real* line,
                                  int stride) {
  Real sum = 0;
  const int last = min(size - 1, at + reach);
  for (int i = max(0, at - reach); i <= last; ++i)
    sum += (transposed ? matrix[i * size + at] : matrix[at * size + i]) * line[static_cast<int64_t>(i) * stride];
  return sum;
}

// grid (HW tiles, P, V): rows (V, P, J, H, W) = z R_j^T
template <class T>
__global__ void __launch_bounds__(kTile) separable_rows(Source source, Separable f, Compute<T>* rows) {
  using Real = Compute<T>;
  const int h = source.h, w = source.w, at = blockIdx.x * kTile + threadIdx.x;
  if (at >= h * w) return;
  const int y = at / w, x = at % w, p = blockIdx.y;
  const int64_t v = blockIdx.z, plane = v * source.p + p;
  const Real* right = static_cast<const Real*>(f.right);
  for (int j = 0; j < f.blurs; ++j) {
    Real sum = 0;
    const int last = min(w - 1, x + f.reach[j]);
    for (int i = max(0, x - f.reach[j]); i <= last; ++i)
      sum += right[(static_cast<int64_t>(j) * w + x) * w + i] * read<T>(source, v, p, y, i);
    rows[(plane * f.blurs + j) * h * w + at] = sum;
  }
}

// The bands at one pixel, from the row pass.
template <class Real>
__device__ inline void bands_at(const Separable& f, const Real* rows, int64_t plane, int h, int w, int y, int x,
                                Real* band) {
  const Real *left = static_cast<const Real*>(f.left), *mix = static_cast<const Real*>(f.mix);
  for (int k = 0; k < f.bands; ++k) band[k] = 0;
  for (int j = 0; j < f.blurs; ++j) {
    const Real* plane_j = rows + (plane * f.blurs + j) * h * w;
    const Real blur = banded_dot(left + static_cast<int64_t>(j) * h * h, h, y, f.reach[j], false, plane_j + x, w);
    for (int k = 0; k < f.bands; ++k) band[k] += mix[k * f.blurs + j] * blur;
  }
}

// grid (HW tiles, P, V); partial (V, P, tiles, K+1), the last entry |z|^2. Squares are summed in float64.
template <class T>
__global__ void __launch_bounds__(kTile)
    separable_energy(Source source, Separable f, const Compute<T>* rows, double* partial) {
  using Real = Compute<T>;
  __shared__ double scratch[32];
  const int h = source.h, w = source.w, at = blockIdx.x * kTile + threadIdx.x, p = blockIdx.y;
  const int64_t v = blockIdx.z, plane = v * source.p + p;
  const bool inside = at < h * w;
  Real band[FERA_MAX_BANDS];
  if (inside) bands_at(f, rows, plane, h, w, at / w, at % w, band);
  for (int k = 0; k <= f.bands; ++k) {
    double value = 0;
    if (inside) value = k == f.bands ? read<T>(source, v, p, at / w, at % w) : band[k];
    const double sum = block_sum(value * value, scratch);
    if (threadIdx.x == 0) partial[(plane * gridDim.x + blockIdx.x) * (f.bands + 1) + k] = sum;
  }
}

// grid (HW tiles, P, N): adjoint (N, P, J, H, W) = sum_s sum_k c[s][k] mix[k][j] band^s_k
template <class Real>
__global__ void __launch_bounds__(kTile)
    separable_bands(Source source, Separable f, const Real* rows, Coefficients from, Real* adjoint) {
  __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
  __shared__ int exponent;
  const int h = source.h, w = source.w, at = blockIdx.x * kTile + threadIdx.x, p = blockIdx.y;
  const int64_t n = blockIdx.z;
  load_coefficients(from, n, f.bands, source.signals, c, &exponent);
  if (at >= h * w) return;
  Real sum[FERA_MAX_BANDS];
  for (int j = 0; j < f.blurs; ++j) sum[j] = 0;
  for (int s = 0; s < source.signals; ++s) {
    Real band[FERA_MAX_BANDS];
    bands_at(f, rows, (s * source.n + n) * source.p + p, h, w, at / w, at % w, band);
    for (int j = 0; j < f.blurs; ++j)
      for (int k = 0; k < f.bands; ++k)
        sum[j] += c[s * (f.bands + 1) + k] * static_cast<const Real*>(f.mix)[k * f.blurs + j] * band[k];
  }
  for (int j = 0; j < f.blurs; ++j) adjoint[((n * source.p + p) * f.blurs + j) * h * w + at] = sum[j];
}

// grid (HW tiles, P, N): columns (N, P, J, H, W) = L_j^T adjoint_j
template <class Real>
__global__ void __launch_bounds__(kTile)
    separable_columns_back(Source source, Separable f, const Real* adjoint, Real* columns) {
  const int h = source.h, w = source.w, at = blockIdx.x * kTile + threadIdx.x;
  if (at >= h * w) return;
  const int64_t plane = static_cast<int64_t>(blockIdx.z) * source.p + blockIdx.y;
  for (int j = 0; j < f.blurs; ++j) {
    const Real* left = static_cast<const Real*>(f.left) + static_cast<int64_t>(j) * h * h;
    const int64_t base = (plane * f.blurs + j) * h * w;
    columns[base + at] = banded_dot(left, h, at / w, f.reach[j], true, adjoint + base + at % w, w);
  }
}

// grid (HW tiles, P, N): dz = sum_j columns_j R_j + sum_s c[s][K] s
template <class T>
__global__ void __launch_bounds__(kTile)
    separable_rows_back(Source source, Separable f, const Compute<T>* columns, Coefficients from, View dz) {
  using Real = Compute<T>;
  __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
  __shared__ int exponent;
  const int h = source.h, w = source.w, at = blockIdx.x * kTile + threadIdx.x, p = blockIdx.y;
  const int64_t n = blockIdx.z, plane = n * source.p + p;
  load_coefficients(from, n, f.bands, source.signals, c, &exponent);
  if (at >= h * w) return;
  const int y = at / w, x = at % w;
  Real sum = 0;
  for (int s = 0; s < source.signals; ++s) {
    const Real whole = c[s * (f.bands + 1) + f.bands];
    if (whole != 0) sum += whole * read<T>(source, s * source.n + n, p, y, x);
  }
  for (int j = 0; j < f.blurs; ++j) {
    const Real* right = static_cast<const Real*>(f.right) + static_cast<int64_t>(j) * w * w;
    sum += banded_dot(right, w, x, f.reach[j], true, columns + (plane * f.blurs + j) * h * w + y * w, 1);
  }
  static_cast<T*>(dz.data)[dz.offset(n, p, y, x)] =
      narrow<T>(static_cast<Real>(ldexp(static_cast<double>(sum), exponent)));
}

}  // namespace fera::cuda
