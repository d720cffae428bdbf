// Separable filters on sm_90: the blurs of a strip of rows by one block, a sample by one thread block cluster.
//
// Everything is in groups of four: a strip is `groups` groups of rows, the banded matrices are cut into blocks of
// 4 x 4, and a thread makes 4 x 4 results as a sum of outer products, two loads of 16 bytes for 16 multiply-adds. Down
// the columns (strips_down) it reads four neighbouring columns of one row at a time; what it makes is stored by
// columns, four rows to a float4, so that along the rows (strips_along) it reads four rows of one column at a time.
// Blocks of a matrix farther from the diagonal than its reach are skipped, and so are rows and columns outside the
// plane.
//
// A line is one group of rows, a float4 a column; every fourth column is followed by a gap of one, or lanes four
// columns apart would meet in the same banks. Threads come in teams; a team takes a blur, a thread one 4 x 4 tile.
#pragma once

#include "band_energy/distributed.cuh"
#include "band_energy/energies.cuh"
#include "band_energy/fft.cuh"

namespace fera::cuda {

constexpr int kStripBlurs = 4;      // at most
constexpr int kStripThreads = 768;  // at most

struct StripsPlan {
  const float *left, *right, *mix;                 // (J, H, H) (J, W, W) (K, J)
  int bands, blurs;                                // K, J
  int reach_h[kStripBlurs], reach_w[kStripBlurs];  // in groups
  int high, wide;                                  // a plane's groups of rows and of columns
  int groups, strips;                              // of a strip; of a plane
  int size, clusters, planes_of;                   // blocks a cluster; clusters a sample; planes a cluster
  int team, teams;                                 // threads of a team
  bool vector_in, vector_out;                      // sources and gradient can be moved four columns at a time
  double* partial;                                 // (N, clusters, signals, K+1), with several clusters
  float4* kept;                                    // (V, P, J, high, W): blurs from energies to adjoint, or NULL
  float4* back;                                    // (N, P, J, 4 high, wide): c_j R_j

  // Sizes in float4.
  __host__ __device__ int line() const { return 5 * wide; }
  __host__ __device__ int lines() const { return blurs * groups * line(); }
  __host__ __device__ int right_pitch() const { return wide | 1; }
  __host__ __device__ int right_of(int j) const { return 4 * (2 * reach_w[j] + 1) * right_pitch(); }
  __host__ __device__ int left_of(int j) const { return 4 * (2 * reach_h[j] + 1) * groups; }
  // Of rows that reach `more` groups to both sides of a strip.
  __host__ __device__ int tile(int more) const {
    const int all = groups + 2 * more;
    return 4 * wide * (all < high ? all : high);
  }
  __host__ __device__ int right_size() const {
    int sum = 0;
    for (int j = 0; j < blurs; ++j) sum += right_of(j);
    return sum;
  }
  __host__ __device__ int left_size() const {
    int sum = 0;
    for (int j = 0; j < blurs; ++j) sum += left_of(j);
    return sum;
  }
  __host__ __device__ int widest() const {
    int most = 0;
    for (int j = 0; j < blurs; ++j) most = reach_h[j] > most ? reach_h[j] : most;
    return most;
  }
};

// Of a sum's slots: a signal's K + 1 in quadruples.
__host__ __device__ constexpr int strips_padded(int bands) { return 4 * (bands / 4 + 1); }

// A thread's place in a strip.
struct StripsPlace {
  int team, group, column;  // column: of groups
  bool active;
  __device__ explicit StripsPlace(const StripsPlan& f) {
    const int t = threadIdx.x;
    team = t / f.team;
    const int rest = t - team * f.team;
    group = rest / f.wide;
    column = rest - group * f.wide;
    active = group < f.groups;
  }
  // The blur of its team in some round, the widest first; negative when there is none left.
  __device__ int blur(const StripsPlan& f, int round) const { return f.blurs - 1 - (round * f.teams + team); }
};

// ---- coefficients ----

// to[item group_step + (4 (q - at) + 4 reach + e) step], component u = m(4 at + u, 4 q + e) for the groups
// at = first + item, item < count, and q within `reach` groups; m = matrix or its transpose, 0 outside. A warp's lanes
// are 4 rows by 8 columns: their copies meet no bank twice, whether step is odd or 1. On their way until
// await_copies().
template <bool Transposed>
__device__ __forceinline__ void strips_coefficients(const float* matrix, int size, int reach, int first, int count,
                                                    float4* to, int group_step, int step) {
  const int lane = threadIdx.x % 32, u = lane / 8;
#pragma unroll 1
  for (int item = threadIdx.x / 32; item < count; item += blockDim.x / 32) {
    const int a = 4 * (first + item) + u, start = 4 * (first + item - reach);
#pragma unroll 2
    for (int d = lane % 8; d < 4 * (2 * reach + 1); d += 8) {
      const int i = start + d;
      float* at = reinterpret_cast<float*>(to + item * group_step + d * step) + u;
      if (a < size && i >= 0 && i < size)
        copy_async(at, matrix + (Transposed ? i * size + a : a * size + i));
      else
        *at = 0;
    }
  }
}

template <bool Transposed>
__device__ __forceinline__ void strips_right(const StripsPlan& f, int w, float4* to) {
#pragma unroll 1
  for (int j = 0; j < f.blurs; ++j) {
    strips_coefficients<Transposed>(f.right + j * w * w, w, f.reach_w[j], 0, f.wide, to, 1, f.right_pitch());
    to += f.right_of(j);
  }
}
template <bool Transposed>
__device__ __forceinline__ void strips_left(const StripsPlan& f, int h, int first, float4* to) {
#pragma unroll 1
  for (int j = 0; j < f.blurs; ++j) {
    strips_coefficients<Transposed>(f.left + j * h * h, h, f.reach_h[j], first, f.groups, to,
                                    4 * (2 * f.reach_h[j] + 1), 1);
    to += f.left_of(j);
  }
}
// The first coefficient of blur j among those of all.
__device__ __forceinline__ int right_offset(const StripsPlan& f, int j) {
  int sum = 0;
  for (int i = 0; i < j; ++i) sum += f.right_of(i);
  return sum;
}
__device__ __forceinline__ int left_offset(const StripsPlan& f, int j) {
  int sum = 0;
  for (int i = 0; i < j; ++i) sum += f.left_of(i);
  return sum;
}

// ---- products ----

__device__ __forceinline__ void add_scaled(float4& sum, float k, const float4& v) {
  sum = {fmaf(k, v.x, sum.x), fmaf(k, v.y, sum.y), fmaf(k, v.z, sum.z), fmaf(k, v.w, sum.w)};
}
// sum[u] += k[u] v, the outer product of both
__device__ __forceinline__ void add_outer(float4 (&sum)[4], const float4& k, const float4& v) {
  add_scaled(sum[0], k.x, v);
  add_scaled(sum[1], k.y, v);
  add_scaled(sum[2], k.z, v);
  add_scaled(sum[3], k.w, v);
}
__device__ __forceinline__ void transpose(float4 (&a)[4]) {
  const float4 x{a[0].x, a[1].x, a[2].x, a[3].x}, y{a[0].y, a[1].y, a[2].y, a[3].y}, z{a[0].z, a[1].z, a[2].z, a[3].z},
      w{a[0].w, a[1].w, a[2].w, a[3].w};
  a[0] = x;
  a[1] = y;
  a[2] = z;
  a[3] = w;
}

// sum[u] (row u, four columns) += sum_i m(4 at + u, i) row i; tile holds rows from group `first` on. coefficients: of
// group `at` at this strip.
__device__ __forceinline__ void strips_down(const float4* tile, int first, int wide, int high, int column, int at,
                                            int reach, const float4* coefficients, float4 (&sum)[4]) {
  const int begin = max(0, at - reach), end = min(high, at + reach + 1);
  const float4* value = tile + 4 * (begin - first) * wide + column;
  const float4* k = coefficients + 4 * (begin - at + reach);
#pragma unroll 1
  for (int q = begin; q < end; ++q) {
#pragma unroll
    for (int e = 0; e < 4; ++e) add_outer(sum, k[e], value[e * wide]);
    value += 4 * wide;
    k += 4;
  }
}

// sum[u] (column u, four rows) += sum_i m(4 at + u, i) column i of a line.
__device__ __forceinline__ void strips_along(const float4* line, int wide, int at, int reach,
                                             const float4* coefficients, int pitch, float4 (&sum)[4]) {
  const int begin = max(0, at - reach), end = min(wide, at + reach + 1);
  const float4* value = line + 5 * begin;
  const float4* k = coefficients + 4 * (begin - at + reach) * pitch + at;
#pragma unroll 1
  for (int q = begin; q < end; ++q) {
#pragma unroll
    for (int e = 0; e < 4; ++e) add_outer(sum, k[e * pitch], value[e]);
    value += 5;
    k += 4 * pitch;
  }
}

// ---- four neighbouring elements ----

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

template <class T>
__device__ __forceinline__ float4 load_four(const T* row, int64_t step, int x, int w, bool vector) {
  if (vector) {
    const Four<T> v = *reinterpret_cast<const Four<T>*>(row + x);
    return {widen(v.at[0]), widen(v.at[1]), widen(v.at[2]), widen(v.at[3])};
  }
  float4 v{0, 0, 0, 0};
  v.x = widen(row[x * step]);
  if (x + 1 < w) v.y = widen(row[(x + 1) * step]);
  if (x + 2 < w) v.z = widen(row[(x + 2) * step]);
  if (x + 3 < w) v.w = widen(row[(x + 3) * step]);
  return v;
}

template <class T>
__device__ __forceinline__ float4 load_four(const Plane<T>& plane, int y, int x, int w, bool vector) {
  float4 v = load_four(plane.whole + y * plane.whole_h, plane.whole_w, x, w, vector);
  if (plane.minus == nullptr) return v;
  const float4 other = load_four(plane.minus + y * plane.minus_h, plane.minus_w, x, w, vector);
  return {v.x - other.x, v.y - other.y, v.z - other.z, v.w - other.w};
}

template <class T>
__device__ __forceinline__ void store_four(T* row, int64_t step, int x, int w, bool vector, const float4& v) {
  if (vector) {
    *reinterpret_cast<Four<T>*>(row + x) = {narrow<T>(v.x), narrow<T>(v.y), narrow<T>(v.z), narrow<T>(v.w)};
    return;
  }
  row[x * step] = narrow<T>(v.x);
  if (x + 1 < w) row[(x + 1) * step] = narrow<T>(v.y);
  if (x + 2 < w) row[(x + 2) * step] = narrow<T>(v.z);
  if (x + 3 < w) row[(x + 3) * step] = narrow<T>(v.w);
}

// ---- blurs of a strip ----

// Rows of a plane, groups [first, last), to tile, 0 beyond the plane's edges.
template <class T>
__device__ __forceinline__ void strips_tile(const Plane<T>& plane, const StripsPlan& f, int h, int w, int first,
                                            int last, float4* tile) {
  const Quotient by_wide(f.wide);
  const int count = 4 * (last - first) * f.wide, step = blockDim.x;
#pragma unroll 1
  for (int t0 = threadIdx.x; t0 < count; t0 += 4 * step) {
    float4 v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int t = t0 + i * step, row = by_wide(t), y = 4 * first + row;
      v[i] = {0, 0, 0, 0};
      if (t < count && y < h) v[i] = load_four(plane, y, 4 * (t - row * f.wide), w, f.vector_in);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (t0 + i * step < count) tile[t0 + i * step] = v[i];
  }
}

// The blurs of the strip at group `at` to lines. The tile and both coefficients are there, and the block is
// synchronised on entry and on return.
__device__ __forceinline__ void strips_blur(const StripsPlan& f, const StripsPlace& place, int at, const float4* tile,
                                            const float4* left, const float4* right, float4* lines) {
  const int first = max(0, at - f.widest());
#pragma unroll 1
  for (int round = 0; round * f.teams < f.blurs; ++round) {
    const int j = place.blur(f, round);
    if (j < 0 || !place.active) continue;
    float4 sum[4] = {};
    const int reach = f.reach_h[j];
    strips_down(tile, first, f.wide, f.high, place.column, at + place.group, reach,
                left + left_offset(f, j) + place.group * 4 * (2 * reach + 1), sum);
    transpose(sum);
    float4* to = lines + (j * f.groups + place.group) * f.line() + 5 * place.column;
#pragma unroll
    for (int u = 0; u < 4; ++u) to[u] = sum[u];
  }
  __syncthreads();
#pragma unroll 1
  for (int round = 0; round * f.teams < f.blurs; ++round) {  // in place: one blur is one team's
    const int j = place.blur(f, round);
    const bool mine = j >= 0 && place.active;
    float4 sum[4] = {};
    float4* line = lines + ((mine ? j : 0) * f.groups + place.group) * f.line();
    if (mine) strips_along(line, f.wide, place.column, f.reach_w[j], right + right_offset(f, j), f.right_pitch(), sum);
    __syncthreads();
    if (mine)
#pragma unroll
      for (int u = 0; u < 4; ++u) line[5 * place.column + u] = sum[u];
  }
  __syncthreads();
}

// mix (K, J) to rows of kStripBlurs, 0 where there is no blur.
__device__ __forceinline__ void strips_mix(const StripsPlan& f, float* mix) {
  for (int i = threadIdx.x; i < f.bands * kStripBlurs; i += blockDim.x) {
    const int k = i / kStripBlurs, j = i - k * kStripBlurs;
    mix[i] = j < f.blurs ? f.mix[k * f.blurs + j] : 0.0f;
  }
}
__device__ __forceinline__ float4 band_of(const float* mix, int k, const float4 (&blur)[kStripBlurs]) {
  float4 band{0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < kStripBlurs; ++j) add_scaled(band, mix[k * kStripBlurs + j], blur[j]);
  return band;
}

}  // namespace fera::cuda
