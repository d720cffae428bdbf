// Spectral filters of the usual latent sizes in one launch: a thread block cluster holds a sample in its shared
// memories.
//
// Two real planes of a signal make one complex plane: every mask is symmetric, so nothing is untangled. A cluster of
// S blocks splits every plane: block c transforms rows [c rows, (c+1) rows) along W, hands each frequency to the block
// that owns its column through distributed shared memory, and then transforms columns [c cols, (c+1) cols) along H.
// An axis of n = n1 n2 points is two butterflies in registers, n1 points and then n2, in place: input i of a butterfly
// and its result i lie in the same spot, so the spectrum is in digit-reversed order and never sorted:
//   rows[j + i w2] -> i w2 + j;  rows[b w2 + i] -> frequency b + i w1.
// Samples with many planes are shared by several clusters, which meet at the grid's barrier to add up.
//
// Such a launch lives on latency: with height, width and cluster size known to the compiler, a warp runs some 700
// instructions from its first load to its last barrier at 64 x 64 (2500 with the sizes in registers: README).
// Requires sm_90, unit stride along W and float32, float16 or bfloat16.
#pragma once

#include <cooperative_groups.h>

#include "band_energy/cluster_size.cuh"
#include "band_energy/distributed.cuh"
#include "band_energy/energies.cuh"
#include "band_energy/finish_warp.cuh"

namespace fera::cuda {

constexpr int kClusterThreads = 512;                   // at most: 128 registers a thread
constexpr int kQuadruples = (FERA_MAX_BANDS + 4) / 4;  // of weights, with the whole norm's

// ---- what a launch is told ----
struct ClusterPlan {
  int pairs;          // complex planes a sample and signal
  int pairs_at_once;  // planes of every signal in shared memory together
  int clusters;       // of a sample; each takes pairs_of pairs
  int pairs_of;
};

struct ClusterShared {
  float2 *rows, *columns;  // (signals, pairs_at_once) planes of row_plane, of column_plane elements
  float4* slab;            // (groups, H, cols), by frequency
  double* arrived;         // (S, warps, signals, 4 groups)
};

template <class F>
struct ClusterScene {
  const Source& source;
  const ClusterPlan& plan;
  const float* masks;
  int bands, groups, rank, cluster;  // cluster: which of the sample's
  int64_t n;
  ClusterShared shared;
};

// Blocks and warps times signals times quadruples of sums.
__host__ __device__ constexpr int cluster_sums(int size, int threads, int signals, int bands) {
  return size * (threads / 32) * signals * 4 * (bands / 4 + 1);
}

template <class F>
size_t cluster_shared_bytes(const ClusterPlan& p, int signals, int bands, int threads) {
  return sizeof(float4) * (bands / 4 + 1) * F::H * F::cols +
         sizeof(double) * cluster_sums(F::S, threads, signals, bands) +
         sizeof(float2) * signals * p.pairs_at_once * (F::column_plane + F::row_plane);
}

template <class F>
__device__ __forceinline__ ClusterShared cluster_shared(unsigned char* raw, const ClusterPlan& p, int signals,
                                                        int bands) {
  ClusterShared s;
  s.slab = reinterpret_cast<float4*>(raw);
  s.arrived = reinterpret_cast<double*>(s.slab + (bands / 4 + 1) * F::H * F::cols);
  s.columns = reinterpret_cast<float2*>(s.arrived + cluster_sums(F::S, blockDim.x, signals, bands));
  s.rows = s.columns + signals * p.pairs_at_once * F::column_plane;
  return s;
}

// ---- phases ----

// Weights of the block's columns, on their way to slab[] until await_copies().
template <class F>
__device__ __forceinline__ void cluster_weights(const ClusterScene<F>& c) {
  constexpr int H = F::H, W = F::W, plane = H * (W / 2 + 1);
#pragma unroll 1
  for (int g = 0; g < c.groups; ++g)
#pragma unroll 1
    for (unsigned t = threadIdx.x; t < H * F::cols; t += blockDim.x) {
      const int u = t / F::cols, x = min(c.rank * F::cols + t % F::cols, W - 1);
      float* to = reinterpret_cast<float*>(c.shared.slab + g * H * F::cols + t);
      const bool mirrored = x > W / 2;
      const float* from =
          c.masks + 4 * g * plane + (mirrored && u > 0 ? H - u : u) * (W / 2 + 1) + (mirrored ? W - x : x);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (4 * g + i < c.bands)
          copy_async(to + i, from + i * plane);
        else
          to[i] = 4 * g + i == c.bands ? 1.0f : 0.0f;
      }
    }
}

template <class T, int R, int M>
__device__ __forceinline__ void load_strided(const T* from, float* a, bool subtract) {
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const float v = widen(from[i * M]);
    a[2 * i] = subtract ? a[2 * i] - v : v;
  }
}

// Pairs [first, first + pairs) of signal 0, then of signal 1: global memory -> first butterfly -> lines in rows[].
template <class F>
__device__ __forceinline__ void cluster_rows_first(const ClusterScene<F>& c, int first, int pairs) {
  constexpr int R = F::w1, M = F::w2;
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < unsigned(c.source.signals * pairs * F::rows * M); t += blockDim.x) {
    const unsigned j = t % M, line = t / M, row = line % F::rows, plane = line / F::rows;
    const int s = static_cast<int>(plane) >= pairs, y = c.rank * F::rows + row, p = 2 * (first + plane - s * pairs);
    const bool inside = (F::even_rows || y < F::H) && p < c.source.p, two = p + 1 < c.source.p;
    float2 a[R];
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = {0, 0};
    if (inside) {
      auto load = [&](auto tag) {
        using T = decltype(tag);
        auto from = [&](const View& v) {
          return static_cast<const T*>(v.data) + c.n * v.stride_n + p * v.stride_p + y * v.stride_h + j;
        };
        const T* whole = from(c.source.whole);
        load_strided<T, R, M>(whole, &a[0].x, false);
        if (two) load_strided<T, R, M>(whole + c.source.whole.stride_p, &a[0].y, false);
        if (c.source.signals == 2) {
          const View& other = c.source.minus[s];
          const T* minus = from(other);
          load_strided<T, R, M>(minus, &a[0].x, true);
          if (two) load_strided<T, R, M>(minus + other.stride_p, &a[0].y, true);
        }
      };
      with_element(c.source.dtype, load);
    }
    float2 root[R];
    powers_of<R>(kRoots<F::W>.root[j], root);
    dft<R>(a);
    float2* to = c.shared.rows + plane * F::row_plane + row * F::row_pitch + j;
    to[0] = a[0];
#pragma unroll
    for (int i = 1; i < R; ++i) to[i * F::row_step] = times(a[i], root[i]);
  }
}

// The second butterfly of the same rows -> parcels, in the lines' place, by the block that owns the frequency.
template <class F>
__device__ __forceinline__ void cluster_rows_last(const ClusterScene<F>& c, int planes) {
  constexpr int R = F::w2, B = F::w1;
  const unsigned at_once = blockDim.x / (F::rows * B);
#pragma unroll 1
  for (int done = 0; done < planes; done += at_once) {
    const unsigned t = threadIdx.x, row = t % F::rows, rest = t / F::rows, b = rest % B, plane = done + rest / B;
    const bool mine = rest / B < at_once && plane < static_cast<unsigned>(planes);
    float2* to = c.shared.rows + plane * F::row_plane;
    float2 a[R];
    if (mine) {
      const float2* from = to + row * F::row_pitch + b * F::row_step;
#pragma unroll
      for (int i = 0; i < R; ++i) a[i] = from[i];
      dft<R>(a);
    }
    __syncthreads();
    if (mine)
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const unsigned x = b + i * B;
        to[x / F::cols * F::parcel + x % F::cols * (F::rows | 1) + row] = a[i];
      }
  }
}

// Parcels of `planes` planes to the blocks they are for: to + plane to_plane + sender Parcel, 16 bytes a lane, so that
// what crosses between multiprocessors crosses in large pieces. The block is synchronised on entry.
template <class F, int Parcel>
__device__ __forceinline__ void cluster_send_parcels(const ClusterScene<F>& c, const float2* from, int from_plane,
                                                     float2* to, int to_plane, int planes) {
  constexpr unsigned pieces = Parcel * sizeof(float2) / sizeof(float4);
#pragma unroll 4
  for (unsigned t = threadIdx.x; t < planes * F::S * pieces; t += blockDim.x) {
    const unsigned piece = t % pieces, rest = t / pieces, plane = rest / F::S;
    const int block = (rest + c.rank) % F::S;  // not everyone to the same block first
    const float4 v = reinterpret_cast<const float4*>(from + plane * from_plane + block * Parcel)[piece];
    const uint32_t at = shared_address(to + plane * to_plane + c.rank * Parcel) + piece * sizeof(float4);
    store_remote(remote_address(at, block), v);
  }
  __syncwarp();  // the cluster's barrier, next, wants whole warps
}

// The first butterfly of every column, in place.
template <class F>
__device__ __forceinline__ void cluster_columns_first(const ClusterScene<F>& c, int planes) {
  constexpr int R = F::h1, M = F::h2;
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < unsigned(planes * F::cols * M); t += blockDim.x) {
    const unsigned j = t % M, line = t / M, col = line % F::cols;
    float2* at = c.shared.columns + line / F::cols * F::column_plane;
    float2 a[R], root[R];
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = at[F::column_at(col, i, j)];
    powers_of<R>(kRoots<F::H>.root[j], root);
    dft<R>(a);
#pragma unroll
    for (int i = 0; i < R; ++i) at[F::column_at(col, i, j)] = i == 0 ? a[0] : times(a[i], root[i]);
  }
}

// float32 sums are right as they are while the powers stay clear of the ends of its range, also times a mask's values.
__device__ __forceinline__ bool safe_power(float total) { return total > 1e-16f && total < 1e25f; }

// The powers of a column's values, divided by the square of a power of two, which is returned squared. Whole warps call
// it, lanes without a column inactive.
template <int R>
__device__ __forceinline__ double powers(const float2 (&a)[R], bool active, float (&power)[R]) {
  float total = 0;
  int exponent = 0;
#pragma unroll
  for (int i = 0; i < R; ++i) total += power[i] = fmaf(a[i].x, a[i].x, a[i].y * a[i].y);
  if (!__all_sync(0xffffffffu, safe_power(total) || !active)) {  // far from 1, zero, infinite or NaN
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < R; ++i)
      bits = max(bits, max(__float_as_uint(a[i].x) & 0x7fffffffu, __float_as_uint(a[i].y) & 0x7fffffffu));
    bits = __reduce_max_sync(0xffffffffu, active ? bits : 0);
    exponent = bits == 0 || bits >= 0x7f800000u ? 0 : max(-126, min(120, ilogbf(__uint_as_float(bits)) + 1));
    const float scale = scalbnf(1.0f, -exponent);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const float re = a[i].x * scale, im = a[i].y * scale;
      power[i] = fmaf(re, re, im * im);
    }
  }
  return __hiloint2double((1023 + 2 * exponent) << 20, 0);
}

// A column's last butterfly, of elements at(i), and the powers of its results. Keep writes the results back.
template <int R, bool Keep, class At>
__device__ __forceinline__ double column_powers(const At& at, bool active, float (&power)[R]) {
  float2 a[R];
#pragma unroll
  for (int i = 0; i < R; ++i) a[i] = active ? at(i) : float2{0, 0};
  dft<R>(a);
  if (Keep && active)
#pragma unroll
    for (int i = 0; i < R; ++i) at(i) = a[i];
  return powers(a, active, power);
}

// Four sums over a warp in six shuffles, halving the values while halving the lanes: lanes 0, 8, 16 and 24 have x, y, z
// and w.
__device__ __forceinline__ float warp_sums(float4 sum) {
  const int lane = threadIdx.x % 32;
  const bool high = lane & 16, odd = lane & 8;
  float p = high ? sum.z : sum.x, q = high ? sum.w : sum.y;
  p += __shfl_xor_sync(0xffffffffu, high ? sum.x : sum.z, 16);
  q += __shfl_xor_sync(0xffffffffu, high ? sum.y : sum.w, 16);
  float r = odd ? q : p;
  r += __shfl_xor_sync(0xffffffffu, odd ? p : q, 8);
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) r += __shfl_xor_sync(0xffffffffu, r, offset);
  return r;
}

// The second butterfly of every signal's columns and the weighted powers, added to `carried` (signal, quadruple): lanes
// 0, 8, 16 and 24 of each warp hold bands 4g ... 4g + 3. Keep writes the spectrum back.
template <class F, bool Keep>
__device__ __forceinline__ void cluster_columns_last(const ClusterScene<F>& c, int pairs,
                                                     double (&carried)[2][kQuadruples]) {
  constexpr int R = F::h2, B = F::h1;
  const int lane = threadIdx.x % 32, items = pairs * F::cols * B, warps_of = (items + 31) / 32;
  const int valid = F::even_cols ? F::cols : max(0, min(F::cols, F::W - c.rank * F::cols));
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < c.source.signals * warps_of; i += blockDim.x / 32) {
    const int s = i >= warps_of;
    const unsigned t = 32 * (i - s * warps_of) + lane, col = t % F::cols, rest = t / F::cols, b = rest % B,
                   pair = rest / B;
    const bool active = t < unsigned(items) && (F::even_cols || col < unsigned(valid));
    float power[R];
    float2* const plane = c.shared.columns + (s * pairs + pair) * F::column_plane;
    const auto at = [&](int k) -> float2& { return plane[F::column_at(col, b, k)]; };
    const double back = column_powers<R, Keep>(at, active, power);
#pragma unroll 1
    for (int g = 0; g < c.groups; ++g) {
      const float4* weights = c.shared.slab + (g * F::H + b) * F::cols + col;
      float4 sum{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const float4 w = weights[i * B * F::cols];
        sum = {fmaf(power[i], w.x, sum.x), fmaf(power[i], w.y, sum.y), fmaf(power[i], w.z, sum.z),
               fmaf(power[i], w.w, sum.w)};
      }
      carried[s][g] += warp_sums(sum) * back;
    }
  }
}

// This warp's sums to arrived[] of the first `blocks` blocks.
template <class F>
__device__ __forceinline__ void cluster_send(const ClusterScene<F>& c, const double (&carried)[2][kQuadruples],
                                             int blocks) {
  const int lane = threadIdx.x % 32, warp = c.rank * (blockDim.x / 32) + threadIdx.x / 32;
  if (lane % 8 == 0) {
#pragma unroll 1
    for (int s = 0; s < c.source.signals; ++s)
#pragma unroll 1
      for (int g = 0; g < c.groups; ++g) {
        const double* to = c.shared.arrived + ((warp * c.source.signals + s) * c.groups + g) * 4 + lane / 8;
#pragma unroll 1
        for (int block = 0; block < blocks; ++block)
          store_remote(remote_address(shared_address(to), block), carried[s][g]);
      }
  }
  __syncwarp();
}

// arrived[] -> sums (signals, K+1), by warp 0, in a fixed order.
template <class F>
__device__ __forceinline__ void cluster_add(const ClusterScene<F>& c, double* sums) {
  const int lane = threadIdx.x, per_signal = 4 * c.groups, entries = c.source.signals * per_signal;
  const int slots = F::S * (blockDim.x / 32);
  const double scale = 1.0 / (static_cast<double>(F::H) * F::W);
#pragma unroll 1
  for (int k0 = 0; k0 < entries; k0 += 4) {  // lane: entry k0 + lane % 4, every eighth slot
    double sum = 0;
#pragma unroll 4
    for (int i = lane / 4; i < slots; i += 8) sum += c.shared.arrived[i * entries + k0 + lane % 4];
#pragma unroll
    for (int offset = 16; offset >= 4; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const int s = k0 / per_signal, k = k0 - s * per_signal + lane;
    if (lane < 4 && k <= c.bands) sums[s * (c.bands + 1) + k] = sum * scale;
  }
  __syncwarp();
}

// Sums of a sample that several clusters share, (N, clusters, signals, K+1): this cluster's, by warp 0 of its block 0.
template <class F>
__device__ __forceinline__ void cluster_publish(const ClusterScene<F>& c, const double* sums, double* partial) {
  const int entries = c.source.signals * (c.bands + 1);
  for (int k = threadIdx.x; k < entries; k += 32) partial[(c.n * c.plan.clusters + c.cluster) * entries + k] = sums[k];
}

// partial -> sums (signals, K+1) of sample n, by one warp, after the grid's barrier.
template <class F>
__device__ __forceinline__ void cluster_gather(const ClusterScene<F>& c, int64_t n, const double* partial,
                                               double* sums) {
  const int entries = c.source.signals * (c.bands + 1);
  for (int k = threadIdx.x % 32; k < entries; k += 32) {
    double sum = 0;
#pragma unroll 4
    for (int i = 0; i < c.plan.clusters; ++i) sum += __ldcg(partial + (n * c.plan.clusters + i) * entries + k);
    sums[k] = sum;
  }
  __syncwarp();
}

// From global memory to the columns after their first butterfly, for pairs [first, first + pairs). Every block of the
// cluster has arrived, or will, for the barrier that says that its columns may be written to. beside(thread, threads)
// is run by the warps that have no rows, where they are a quarter or more, else by all, after their rows.
template <class F, class Beside>
__device__ __forceinline__ void cluster_forward(const ClusterScene<F>& c, int first, int pairs, const Beside& beside) {
  const int planes = c.source.signals * pairs;
  const unsigned rows = (planes * F::rows * F::w2 + 31) / 32 * 32, apart = 4 * rows <= 3 * blockDim.x ? rows : 0;
  if (threadIdx.x < rows) cluster_rows_first<F>(c, first, pairs);
  if (threadIdx.x >= apart) beside(threadIdx.x - apart, blockDim.x - apart);
  __syncthreads();
  cluster_rows_last<F>(c, planes);
  __syncthreads();
  cluster_wait();
  cluster_send_parcels<F, F::parcel>(c, c.shared.rows, F::row_plane, c.shared.columns, F::column_plane, planes);
  cluster_arrive();
  await_copies();  // the weights, the first time
  cluster_wait();
  cluster_columns_first<F>(c, planes);
  __syncthreads();
}

// Where this block's part of the spectrum of a pair of a signal lies among those kept:
// (N, signals, pairs, S, column_plane), each as it lies in shared memory.
template <class F>
__device__ __forceinline__ int64_t cluster_kept_at(const ClusterScene<F>& c, int signal, int pair) {
  return (((c.n * c.source.signals + signal) * c.plan.pairs + pair) * F::S + c.rank) * int64_t{F::column_plane};
}

// The spectra in columns[] to kept, or (Back) from there, on their way until await_copies(). The block is synchronised.
template <class F, bool Back>
__device__ __forceinline__ void cluster_keep(const ClusterScene<F>& c, int first, int pairs, float2* kept) {
  constexpr unsigned pieces = F::column_plane * sizeof(float2) / sizeof(float4);
#pragma unroll 1
  for (int plane = 0; plane < c.source.signals * pairs; ++plane) {
    const int s = plane >= pairs;
    float4* const outside = reinterpret_cast<float4*>(kept + cluster_kept_at(c, s, first + plane - s * pairs));
    float4* const inside = reinterpret_cast<float4*>(c.shared.columns + plane * F::column_plane);
#pragma unroll 4
    for (unsigned t = threadIdx.x; t < pieces; t += blockDim.x) {
      if constexpr (Back)
        copy_async(inside + t, outside + t);
      else
        outside[t] = inside[t];
    }
  }
}

// grid N * clusters * S, clusters of S blocks. With several clusters a sample the launch is cooperative and partial
// (N, clusters, signals, K+1) takes each one's sums; the first adds them up. Keep leaves the spectra in kept.
template <class F, bool Keep>
__global__ void __launch_bounds__(kClusterThreads, 1)
    cluster_energies(const __grid_constant__ Source source, const __grid_constant__ ClusterPlan plan,
                     const float* masks, int bands, const __grid_constant__ Finish<float> finish, double* partial,
                     float2* kept) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ double sums[2 * (FERA_MAX_BANDS + 4)];
  __shared__ float indicator[FERA_MAX_BANDS];
  __shared__ FinishShared finish_shared;
  const int which = blockIdx.x / F::S;
  const int64_t n = which / plan.clusters;
  const ClusterScene<F> c{source,
                          plan,
                          masks,
                          bands,
                          bands / 4 + 1,
                          cluster_rank(),
                          which - static_cast<int>(n) * plan.clusters,
                          n,
                          cluster_shared<F>(raw, plan, source.signals, bands)};
  cluster_arrive_relaxed();  // it has started, and may be written to
  cluster_weights<F>(c);
  const bool warp_routes = finish.losses == nullptr && finish.gate != nullptr && WarpRouter::takes(finish.router);
  const bool last = c.rank == 0 && c.cluster == 0;  // the block that finishes the sample
  WarpRouter router;
  if (last && threadIdx.x < 32 && warp_routes) router.load(finish.router);
  double carried[2][kQuadruples] = {};
  const int end = min(plan.pairs, (c.cluster + 1) * plan.pairs_of);
#pragma unroll 1
  for (int first = c.cluster * plan.pairs_of; first < end; first += plan.pairs_at_once) {
    if (first > c.cluster * plan.pairs_of) {
      __syncthreads();
      cluster_arrive();  // its columns may be overwritten
    }
    const int here = min(plan.pairs_at_once, end - first);
    cluster_forward<F>(c, first, here, [](unsigned, unsigned) {});
    cluster_columns_last<F, Keep>(c, here, carried);
    if constexpr (Keep) {
      __syncthreads();
      cluster_keep<F, false>(c, first, here, kept);
    }
  }
  cluster_send<F>(c, carried, 1);
  cluster_arrive();
  if (plan.clusters == 1 && c.rank != 0) return;
  cluster_wait();
  if (c.rank == 0 && threadIdx.x < 32) cluster_add<F>(c, sums);
  if (plan.clusters > 1) {
    if (c.rank == 0 && threadIdx.x < 32) cluster_publish<F>(c, sums, partial);
    cooperative_groups::this_grid().sync();
    if (!last) return;
    if (threadIdx.x < 32) cluster_gather<F>(c, n, partial, sums);
  }
  if (warp_routes) {
    if (threadIdx.x >= 32) return;
    __syncwarp();
    const Indicator share(finish, n, sums);
    router.route(finish.router, share.value, finish.gate + n * finish.router.experts);
  } else {
    __syncthreads();
    finish_sample(finish, n, sums, indicator, finish_shared);
  }
#else
  asm("trap;");  // an older image has no clusters: limits_of never chooses it
#endif
}

}  // namespace fera::cuda
