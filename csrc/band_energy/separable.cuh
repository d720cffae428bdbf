// Separable filters: b_j = L_j z R_j^T, band_k = sum_j mix[k][j] b_j, E_k = |band_k|^2, and their adjoint.
//
// Passes: rows (z R_j^T), columns (L_j, bands, then energies or the adjoint's inputs), and for the gradient the same
// two transposed. Every pass multiplies banded matrices: a tile is 32 lines by 32 positions along them, a warp's lanes
// are lines and a thread holds 4 neighbouring positions, so that a coefficient is read once, as a broadcast, for 32
// lines. Entries of L_j and R_j farther than reach[j] from the diagonal are zero and skipped.
#pragma once

#include "band_energy/energies.cuh"

namespace fera::cuda {

constexpr int kSide = 32;   // lines and positions of a tile
constexpr int kEach = 4;    // positions a thread
constexpr int kDepth = 32;  // matrix columns in shared memory together
constexpr int kSeparableThreads = kSide * kSide / kEach;
constexpr int kSlotBlocks = 512;  // at most, where slots lie in the workspace

template <class Real>
struct Separable {
  const Real *left, *right, *mix;  // (J, H, H) (J, W, W) (K, J)
  int bands, blurs;
  int reach[FERA_MAX_BANDS];
  int tiles_h, tiles_w;  // a plane
  Real* rows;            // (V, P, J, H, W)
  Real* adjoint;         // (N, P, J, H, W)
  double* partial;       // (V, P, tiles, K+1)
  Real* slots;           // (blocks, slots, kSide * kSide) where shared memory does not hold them, else NULL

  __host__ __device__ int tiles() const { return tiles_h * tiles_w; }
};

template <class Real>
struct alignas(16) FourReals {
  Real at[kEach];
};

template <class Real>
struct SeparableShared {
  Real line[kDepth][kSide + 1];
  FourReals<Real> coefficient[kDepth][kSide / kEach + 1];  // the last is padding
};

// A thread's values of one tile, one after the other for every blur and band.
template <class Real>
struct Slots {
  Real* data;
  __device__ Slots(const Separable<Real>& f, int count, unsigned char* raw)
      : data(f.slots != nullptr ? f.slots + static_cast<int64_t>(blockIdx.x) * count * kSide * kSide
                                : reinterpret_cast<Real*>(raw + sizeof(SeparableShared<Real>))) {}
  __device__ Real& at(int slot, int u) const { return data[(slot * kEach + u) * kSeparableThreads + threadIdx.x]; }
};

// Where a tile lies.
struct TilePlace {
  int64_t plane;
  int j, y, x;  // y, x: its first
  __device__ TilePlace(int64_t tile, int blurs, int tiles_h, int tiles_w) {
    const int64_t plane_j = tile / (tiles_h * tiles_w);
    const int rest = static_cast<int>(tile - plane_j * (tiles_h * tiles_w));
    plane = plane_j / blurs;
    j = static_cast<int>(plane_j - plane * blurs);
    y = rest / tiles_w * kSide;
    x = rest % tiles_w * kSide;
  }
};

// sum[u] += sum_i m(first + 4 warp + u, i) line(i, lane), m(a, i) = matrix[a][i] or, transposed, matrix[i][a].
// load(at, end) fills shared.line with lines' elements at ... at + kDepth - 1, zero from `end` on.
template <bool Transposed, class Real, class Load>
__device__ inline void banded_product(const Real* matrix, int size, int reach, int first, SeparableShared<Real>& shared,
                                      Real (&sum)[kEach], Load&& load) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, mine = first + kEach * warp;
  const int end = min(size, first + kSide + reach);
  for (int at = max(0, first - reach); at < end; at += kDepth) {
    __syncthreads();
    load(at, end);
#pragma unroll
    for (int e = warp; e < kSide; e += kSeparableThreads / 32) {
      const int d = Transposed ? e : lane, position = Transposed ? lane : e;
      const int i = at + d, a = first + position;
      const bool inside = i < end && a < size;
      shared.coefficient[d][position / kEach].at[position % kEach] =
          inside ? matrix[Transposed ? i * size + a : a * size + i] : Real(0);
    }
    __syncthreads();
    const int last = min(min(end - at, kDepth), mine + kEach + reach - at);
    for (int d = max(0, mine - reach - at); d < last; ++d) {
      const Real value = shared.line[d][lane];
      const FourReals<Real> coefficient = shared.coefficient[d][warp];
#pragma unroll
      for (int u = 0; u < kEach; ++u) sum[u] += coefficient.at[u] * value;
    }
  }
}

// Fills line[d][lane] from plane[y + lane][at + d].
template <class Real, class At>
__device__ inline void load_rows(SeparableShared<Real>& shared, int y, int h, int at, int end, At&& element) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int e = warp; e < kSide; e += kSeparableThreads / 32)
    shared.line[lane][e] = at + lane < end && y + e < h ? element(y + e, at + lane) : Real(0);
}

// Fills line[d][lane] from plane[at + d][x + lane].
template <class Real>
__device__ inline void load_columns(SeparableShared<Real>& shared, const Real* plane, int x, int w, int at, int end) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int d = warp; d < kDepth; d += kSeparableThreads / 32)
    shared.line[d][lane] = at + d < end && x + lane < w ? plane[(at + d) * w + x + lane] : Real(0);
}

// A tile whose lanes are rows, turned so that neighbouring lanes write neighbouring columns: write(y, x, value).
template <class Real, class Write>
__device__ inline void write_rows(SeparableShared<Real>& shared, const Real (&sum)[kEach], int y, int h, int x, int w,
                                  Write&& write) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kEach; ++u) shared.line[kEach * warp + u][lane] = sum[u];
  __syncthreads();
#pragma unroll
  for (int e = warp; e < kSide; e += kSeparableThreads / 32)
    if (y + e < h && x + lane < w) write(y + e, x + lane, shared.line[lane][e]);
}

// rows_j = z R_j^T
template <class T>
__device__ inline void separable_rows(const Source& source, const Separable<Compute<T>>& f, unsigned char* raw) {
  using Real = Compute<T>;
  SeparableShared<Real>& shared = *reinterpret_cast<SeparableShared<Real>*>(raw);
  const int h = source.h, w = source.w;
  const int64_t tiles = source.virtual_samples() * source.p * f.blurs * f.tiles();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const TilePlace at(tile, f.blurs, f.tiles_h, f.tiles_w);
    const int64_t v = at.plane / source.p;
    const Plane<T> plane(source, v, static_cast<int>(at.plane - v * source.p));
    Real sum[kEach] = {};
    banded_product<false>(f.right + static_cast<int64_t>(at.j) * w * w, w, f.reach[at.j], at.x, shared, sum,
                          [&](int i, int end) { load_rows(shared, at.y, h, i, end, plane); });
    Real* to = f.rows + (at.plane * f.blurs + at.j) * h * w;
    write_rows(shared, sum, at.y, h, at.x, w, [&](int y, int x, Real value) { to[y * w + x] = value; });
  }
}

// The blurs of a tile, lanes along x and positions along y, to slots 0 ... J - 1; returns their largest magnitude.
template <class Real>
__device__ inline Real blur_columns(const Separable<Real>& f, int64_t plane, int h, int w, const TilePlace& at,
                                    SeparableShared<Real>& shared, const Slots<Real>& slots) {
  Real largest = 0;
  for (int j = 0; j < f.blurs; ++j) {
    const Real* from = f.rows + (plane * f.blurs + j) * h * w;
    Real sum[kEach] = {};
    banded_product<false>(f.left + static_cast<int64_t>(j) * h * h, h, f.reach[j], at.y, shared, sum,
                          [&](int i, int end) { load_columns(shared, from, at.x, w, i, end); });
#pragma unroll
    for (int u = 0; u < kEach; ++u) {
      slots.at(j, u) = sum[u];
      largest = fmax(largest, fabs(sum[u]));
    }
  }
  return largest;
}

template <class Real>
__device__ inline Real band_at(const Separable<Real>& f, const Slots<Real>& slots, int k, int u) {
  Real band = 0;
  for (int j = 0; j < f.blurs; ++j) band += f.mix[k * f.blurs + j] * slots.at(j, u);
  return band;
}

// partial: each tile's energies; the last entry |s|^2 where there are two signals.
template <class T>
__device__ inline void separable_energy(const Source& source, const Separable<Compute<T>>& f, unsigned char* raw) {
  using Real = Compute<T>;
  SeparableShared<Real>& shared = *reinterpret_cast<SeparableShared<Real>*>(raw);
  const Slots<Real> slots(f, f.blurs, raw);
  const int h = source.h, w = source.w, bands = f.bands;
  const bool whole = source.signals == 2;
  const int64_t tiles = source.virtual_samples() * source.p * f.tiles();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const TilePlace at(tile, 1, f.tiles_h, f.tiles_w);
    const int64_t v = at.plane / source.p;
    const int y = at.y + kEach * (threadIdx.x / 32), x = at.x + threadIdx.x % 32;
    Real largest = blur_columns(f, at.plane, h, w, at, shared, slots), z[kEach] = {};
    if (whole && x < w) {
      const Plane<T> plane(source, v, static_cast<int>(at.plane - v * source.p));
#pragma unroll
      for (int u = 0; u < kEach; ++u) {
        z[u] = y + u < h ? plane(y + u, x) : Real(0);
        largest = fmax(largest, fabs(z[u]));
      }
    }
    const int exponent = block_exponent(largest);
    const Real scale = scalbn(Real(1), -exponent);
    // Beyond the plane's edges every blur is 0.
    for (int k0 = 0; k0 <= bands; k0 += kSums) {
      Real sum[kSums] = {};
#pragma unroll
      for (int i = 0; i < kSums; ++i)
        if (k0 + i <= bands)
#pragma unroll
          for (int u = 0; u < kEach; ++u) {
            const Real value = scale * (k0 + i == bands ? z[u] : band_at(f, slots, k0 + i, u));
            sum[i] += value * value;
          }
      write_partials(sum, k0, bands, exponent, f.partial + tile * (bands + 1));
    }
  }
}

// adjoint_j = sum_s sum_k c[s][k] mix[k][j] band^s_k
template <class Real>
__device__ inline void separable_bands(const Source& source, const Separable<Real>& f, const Coefficients& from,
                                       unsigned char* raw) {
  __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
  __shared__ int exponent;
  SeparableShared<Real>& shared = *reinterpret_cast<SeparableShared<Real>*>(raw);
  const Slots<Real> slots(f, f.blurs + f.bands, raw);
  const int h = source.h, w = source.w, bands = f.bands, blurs = f.blurs;
  const int64_t tiles = source.n * source.p * f.tiles();
  int64_t loaded = -1;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const TilePlace at(tile, 1, f.tiles_h, f.tiles_w);
    const int64_t n = at.plane / source.p;
    const int y = at.y + kEach * (threadIdx.x / 32), x = at.x + threadIdx.x % 32;
    if (n != loaded) load_coefficients(from, n, bands, source.signals, c, &exponent);
    loaded = n;
    for (int s = 0; s < source.signals; ++s) {
      blur_columns(f, s * source.n * source.p + at.plane, h, w, at, shared, slots);
      for (int k = 0; k < bands; ++k)
#pragma unroll
        for (int u = 0; u < kEach; ++u) slots.at(blurs + k, u) = c[s * (bands + 1) + k] * band_at(f, slots, k, u);
      for (int j = 0; j < blurs; ++j) {
        Real* to = f.adjoint + (at.plane * blurs + j) * h * w;
#pragma unroll
        for (int u = 0; u < kEach; ++u) {
          if (y + u >= h || x >= w) continue;
          Real sum = s > 0 ? to[(y + u) * w + x] : Real(0);
          for (int k = 0; k < bands; ++k) sum += f.mix[k * blurs + j] * slots.at(blurs + k, u);
          to[(y + u) * w + x] = sum;
        }
      }
    }
  }
}

// columns_j = L_j^T adjoint_j, over signal 0's rows
template <class Real>
__device__ inline void separable_columns_back(const Source& source, const Separable<Real>& f, unsigned char* raw) {
  SeparableShared<Real>& shared = *reinterpret_cast<SeparableShared<Real>*>(raw);
  const int h = source.h, w = source.w;
  const int64_t tiles = source.n * source.p * f.blurs * f.tiles();
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const TilePlace at(tile, f.blurs, f.tiles_h, f.tiles_w);
    const int64_t base = (at.plane * f.blurs + at.j) * h * w;
    const int y = at.y + kEach * (threadIdx.x / 32), x = at.x + threadIdx.x % 32;
    Real sum[kEach] = {};
    banded_product<true>(f.left + static_cast<int64_t>(at.j) * h * h, h, f.reach[at.j], at.y, shared, sum,
                         [&](int i, int end) { load_columns(shared, f.adjoint + base, at.x, w, i, end); });
#pragma unroll
    for (int u = 0; u < kEach; ++u)
      if (y + u < h && x < w) f.rows[base + (y + u) * w + x] = sum[u];
  }
}

// dz = sum_j columns_j R_j + sum_s c[s][K] s
template <class T>
__device__ inline void separable_rows_back(const Source& source, const Separable<Compute<T>>& f,
                                           const Coefficients& from, const Output& dz, unsigned char* raw) {
  using Real = Compute<T>;
  __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
  __shared__ int exponent;
  SeparableShared<Real>& shared = *reinterpret_cast<SeparableShared<Real>*>(raw);
  const int h = source.h, w = source.w, bands = f.bands;
  const int64_t tiles = source.n * source.p * f.tiles();
  int64_t loaded = -1;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const TilePlace at(tile, 1, f.tiles_h, f.tiles_w);
    const int64_t n = at.plane / source.p;
    const int p = static_cast<int>(at.plane - n * source.p);
    if (n != loaded) load_coefficients(from, n, bands, source.signals, c, &exponent);
    loaded = n;
    Real sum[kEach] = {};
    for (int j = 0; j < f.blurs; ++j) {
      const Real* columns = f.rows + (at.plane * f.blurs + j) * h * w;
      banded_product<true>(f.right + static_cast<int64_t>(j) * w * w, w, f.reach[j], at.x, shared, sum,
                           [&](int i, int end) {
                             load_rows(shared, at.y, h, i, end, [&](int y, int x) { return columns[y * w + x]; });
                           });
    }
    const Scale<Real> scale(from.factor != nullptr ? 1.0 : ldexp(1.0, exponent));
    write_rows(shared, sum, at.y, h, at.x, w, [&](int y, int x, Real value) {
      for (int s = 0; s < source.signals; ++s) {
        const Real whole = c[s * (bands + 1) + bands];
        if (whole != 0) value += whole * Plane<T>(source, s * source.n + n, p)(y, x);
      }
      store<T>(dz, dz.view.offset(n, p, y, x), scale(value));
    });
  }
}

}  // namespace fera::cuda
