// The two kernels of strips.cuh.
//
// Energies: every block makes the blurs of strips of its sample and sums the bands' squares; the cluster's first block
// adds up and finishes. For FECL it keeps the blurs of both signals in the workspace, where the adjoint finds them.
// Adjoint: c_j = sum_s sum_k c[s][k] mix[k][j] band^s_k of a strip and c_j R_j to the workspace; after the cluster's
// barrier the rows around the strip come back for sum_j L_j^T (c_j R_j).
#pragma once

#include <cooperative_groups.h>

#include "band_energy/finish_warp.cuh"
#include "band_energy/strips.cuh"

namespace fera::cuda {

// ---- where things lie in shared memory ----

// Sums of a block's warps, and of the cluster's blocks; in doubles.
__host__ __device__ inline int strips_sums(const StripsPlan& f, int signals, int threads) {
  return (threads / 32 + f.size) * signals * strips_padded(f.bands);
}
inline size_t strips_energies_bytes(const StripsPlan& f, int signals, int threads) {
  return sizeof(double) * strips_sums(f, signals, threads) +
         sizeof(float4) * (f.right_size() + f.left_size() + f.lines() + f.tile(f.widest()));
}
inline size_t strips_gradient_bytes(const StripsPlan& f, int signals) {
  const int blurs = signals == 1 ? f.right_size() + f.left_size() + f.tile(f.widest()) : 0;
  int rows = 0;
  for (int j = 0; j < f.blurs; ++j) rows += f.tile(f.reach_h[j]);
  const int along = f.right_size() + f.lines() + blurs, down = f.left_size() + rows + f.teams * f.groups * 4 * f.wide;
  return sizeof(float4) * static_cast<size_t>(along > down ? along : down);
}

// Strips of a cluster, which its blocks take in turn.
struct StripsUnit {
  int signal, plane, at;  // plane: of the sample; at: its first group
};
__device__ __forceinline__ StripsUnit strips_unit(const StripsPlan& f, int unit, int first_plane, int planes) {
  const int plane = unit / f.strips, signal = plane / planes;
  return {signal, first_plane + plane - signal * planes, (unit - plane * f.strips) * f.groups};
}

// Sums of squares of the bands of a strip, added to own (signals, padded) of this warp. Values are divided by the power
// of two of the warp's largest before they are squared; from a warp's sum on it is float64.
__device__ __forceinline__ void strips_powers(const Source& source, const StripsPlan& f, const StripsUnit& unit,
                                              int64_t n, const float4* lines, const float4* tile, const float* mix,
                                              double* own) {
  const int w = source.w, lane = threadIdx.x % 32, items = f.groups * w, padded = strips_padded(f.bands);
  const Quotient by_w(w);
  const int64_t plane = (unit.signal * source.n + n) * source.p + unit.plane;
  const float* z = reinterpret_cast<const float*>(tile) + (unit.at - max(0, unit.at - f.widest())) * 16 * f.wide;
#pragma unroll 1
  for (int base = threadIdx.x - lane; base < items; base += blockDim.x) {
    const int t = base + lane, g = by_w(t), x = t - g * w;
    const bool active = t < items && unit.at + g < f.high;
    float4 blur[kStripBlurs];
#pragma unroll
    for (int j = 0; j < kStripBlurs; ++j) {
      blur[j] = {0, 0, 0, 0};
      if (active && j < f.blurs) {
        blur[j] = lines[(j * f.groups + g) * f.line() + x + x / 4];
        if (f.kept != nullptr) f.kept[((plane * f.blurs + j) * f.high + unit.at + g) * w + x] = blur[j];
      }
    }
#pragma unroll 1
    for (int q = 0; q < padded; q += 4) {
      float4 value[4];
      float largest = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        value[i] = {0, 0, 0, 0};
        if (q + i < f.bands) {
          value[i] = band_of(mix, q + i, blur);
        } else if (q + i == f.bands && source.signals == 2 && active) {
          const float* rows = z + 16 * g * f.wide + x;
          value[i] = {rows[0], rows[4 * f.wide], rows[8 * f.wide], rows[12 * f.wide]};
        }
        largest = fmaxf(
            largest, fmaxf(fmaxf(fabsf(value[i].x), fabsf(value[i].y)), fmaxf(fabsf(value[i].z), fabsf(value[i].w))));
      }
      // fmaxf leaves NaN out; an infinity is left as it is.
      const unsigned bits = __reduce_max_sync(0xffffffffu, __float_as_uint(largest));
      const int exponent = bits == 0 || bits >= 0x7f800000u ? 0 : max(-126, ilogbf(__uint_as_float(bits)));
      const float scale = scalbnf(1.0f, -exponent);
      float sum[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float a = scale * value[i].x, b = scale * value[i].y, c = scale * value[i].z, d = scale * value[i].w;
        sum[i] = fmaf(a, a, fmaf(b, b, fmaf(c, c, d * d)));
      }
      // Four sums in six shuffles: halve the values while halving the lanes.
      const bool high = lane & 16, odd = lane & 8;
      float p = high ? sum[2] : sum[0], r = high ? sum[3] : sum[1];
      p += __shfl_xor_sync(0xffffffffu, high ? sum[0] : sum[2], 16);
      r += __shfl_xor_sync(0xffffffffu, high ? sum[1] : sum[3], 16);
      float one = odd ? r : p;
      one += __shfl_xor_sync(0xffffffffu, odd ? p : r, 8);
#pragma unroll
      for (int offset = 4; offset > 0; offset /= 2) one += __shfl_xor_sync(0xffffffffu, one, offset);
      if (lane % 8 == 0)
        own[unit.signal * padded + q + lane / 8] += one * __hiloint2double((1023 + 2 * exponent) << 20, 0);
    }
  }
}

// grid N * clusters * size, clusters of `size` blocks. With several clusters a sample the launch is cooperative; the
// first adds up all their sums.
__global__ void __launch_bounds__(kStripThreads, 1)
    strips_energies(const __grid_constant__ Source source, const __grid_constant__ StripsPlan f,
                    const __grid_constant__ Finish<float> finish) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ double sums[2 * (FERA_MAX_BANDS + 4)];
  __shared__ float indicator[FERA_MAX_BANDS], mix[FERA_MAX_BANDS * kStripBlurs];
  __shared__ FinishShared finish_shared;
  const int which = blockIdx.x / f.size, rank = cluster_rank(), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t n = which / f.clusters;
  const int cluster = which - static_cast<int>(n) * f.clusters, warps = blockDim.x / 32;
  const int padded = strips_padded(f.bands), entries = source.signals * padded;
  double* const own = reinterpret_cast<double*>(raw);
  double* const arrived = own + warps * entries;
  float4* const right = reinterpret_cast<float4*>(arrived + f.size * entries);
  float4* const left = right + f.right_size();
  float4* const lines = left + f.left_size();
  float4* const tile = lines + f.lines();
  cluster_arrive_relaxed();  // it has started, and may be written to
  strips_right<false>(f, source.w, right);
  strips_mix(f, mix);
  for (int i = lane; i < entries; i += 32) own[warp * entries + i] = 0;
  const StripsPlace place(f);
  const int first_plane = cluster * f.planes_of, planes = min(f.planes_of, source.p - first_plane);
  int loaded = -1;
#pragma unroll 1
  for (int i = rank; i < source.signals * planes * f.strips; i += f.size) {
    const StripsUnit unit = strips_unit(f, i, first_plane, planes);
    __syncthreads();  // the last unit's lines, tile and coefficients have been read
    if (unit.at != loaded) strips_left<false>(f, source.h, unit.at, left);
    loaded = unit.at;
    const int first = max(0, unit.at - f.widest()), last = min(f.high, unit.at + f.groups + f.widest());
    with_element(source.dtype, [&](auto tag) {
      const Plane<decltype(tag)> plane(source, unit.signal * source.n + n, unit.plane);
      strips_tile(plane, f, source.h, source.w, first, last, tile);
    });
    await_copies();
    __syncthreads();
    strips_blur(f, place, unit.at, tile, left, right, lines);
    strips_powers(source, f, unit, n, lines, tile, mix, own + warp * entries);
  }
  const bool warp_routes = finish.losses == nullptr && finish.gate != nullptr && WarpRouter::takes(finish.router);
  const bool last = rank == 0 && cluster == 0;  // the block that finishes the sample
  WarpRouter router;
  if (last && threadIdx.x < 32 && warp_routes) router.load(finish.router);
  await_copies();  // where a block has no unit, nothing waited for its coefficients
  __syncthreads();
  cluster_wait();
  for (int e = threadIdx.x; e < entries; e += blockDim.x) {
    double sum = 0;
#pragma unroll 4
    for (int i = 0; i < warps; ++i) sum += own[i * entries + e];
    store_remote(remote_address(shared_address(arrived + rank * entries + e), 0), sum);
  }
  __syncwarp();
  cluster_arrive();
  if (f.clusters == 1 && rank != 0) return;
  cluster_wait();
  if (rank == 0 && threadIdx.x < 32) {
    for (int e = lane; e < entries; e += 32) {
      double sum = 0;
#pragma unroll 8
      for (int i = 0; i < f.size; ++i) sum += arrived[i * entries + e];
      const int s = e >= padded, k = e - s * padded;
      if (k <= f.bands) sums[s * (f.bands + 1) + k] = sum;
    }
    __syncwarp();
  }
  if (f.clusters > 1) {
    const int count = source.signals * (f.bands + 1);
    if (rank == 0 && threadIdx.x < 32)
      for (int k = lane; k < count; k += 32) f.partial[(n * f.clusters + cluster) * count + k] = sums[k];
    cooperative_groups::this_grid().sync();
    if (!last) return;
    if (threadIdx.x < 32) {
      for (int k = lane; k < count; k += 32) {
        double sum = 0;
#pragma unroll 4
        for (int i = 0; i < f.clusters; ++i) sum += __ldcg(f.partial + (n * f.clusters + i) * count + k);
        sums[k] = sum;
      }
      __syncwarp();
    }
  }
  if (warp_routes) {
    if (threadIdx.x >= 32) return;
    const Indicator share(finish, n, sums);
    router.route(finish.router, share.value, finish.gate + n * finish.router.experts);
  } else {
    __syncthreads();
    finish_sample(finish, n, sums, indicator, finish_shared);
  }
#else
  asm("trap;");  // an older image has no clusters: it is never chosen
#endif
}

// Where the gradient goes, and what it is of.
struct StripsGradient {
  Output dz;
  Coefficients from;
  const double* means;  // their mean (N) goes to loss; or NULL
  float* loss;
};

// c_j of a strip to lines: from the blurs in lines, or from both signals' in the workspace. c (signals, K+1).
__device__ __forceinline__ void strips_bands(const Source& source, const StripsPlan& f, const StripsUnit& unit,
                                             int64_t n, const float* mix, const float* c, float4* lines) {
  const int columns = 4 * f.wide, items = f.groups * columns, w = source.w;
  const Quotient by_columns(columns);
#pragma unroll 1
  for (int t = threadIdx.x; t < items; t += blockDim.x) {
    const int g = by_columns(t), x = t - g * columns;
    float4* const at = lines + g * f.line() + x + x / 4;
    const int blur_step = f.groups * f.line();
    float4 sum[kStripBlurs] = {};
    if (x < w && unit.at + g < f.high) {
#pragma unroll 1
      for (int s = 0; s < source.signals; ++s) {
        const int64_t plane = (s * source.n + n) * source.p + unit.plane;
        float4 blur[kStripBlurs] = {};
#pragma unroll
        for (int j = 0; j < kStripBlurs; ++j)
          if (j < f.blurs)
            blur[j] =
                f.kept == nullptr ? at[j * blur_step] : f.kept[((plane * f.blurs + j) * f.high + unit.at + g) * w + x];
#pragma unroll 1
        for (int k = 0; k < f.bands; ++k) {
          float4 band = band_of(mix, k, blur);
          const float weight = c[s * (f.bands + 1) + k];
          band = {weight * band.x, weight * band.y, weight * band.z, weight * band.w};
#pragma unroll
          for (int j = 0; j < kStripBlurs; ++j) add_scaled(sum[j], mix[k * kStripBlurs + j], band);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kStripBlurs; ++j)
      if (j < f.blurs) at[j * blur_step] = sum[j];
  }
}

// c_j R_j of the lines to the workspace, for the rows that the plane has in whole groups.
__device__ __forceinline__ void strips_along_back(const Source& source, const StripsPlan& f, const StripsPlace& place,
                                                  const StripsUnit& unit, int64_t n, const float4* lines,
                                                  const float4* right) {
  if (!place.active || unit.at + place.group >= f.high) return;
#pragma unroll 1
  for (int round = 0; round * f.teams < f.blurs; ++round) {
    const int j = place.blur(f, round);
    if (j < 0) continue;
    float4 sum[4] = {};
    strips_along(lines + (j * f.groups + place.group) * f.line(), f.wide, place.column, f.reach_w[j],
                 right + right_offset(f, j), f.right_pitch(), sum);
    transpose(sum);
    const int64_t plane = (n * source.p + unit.plane) * f.blurs + j;
    float4* to = f.back + (plane * f.high + unit.at + place.group) * 4 * f.wide + place.column;
#pragma unroll
    for (int u = 0; u < 4; ++u) to[u * f.wide] = sum[u];
  }
}

// The rows around the strip of every c_j R_j, on their way to tiles until await_copies().
__device__ __forceinline__ void strips_fetch(const Source& source, const StripsPlan& f, const StripsUnit& unit,
                                             int64_t n, float4* tiles) {
#pragma unroll 1
  for (int j = 0; j < f.blurs; ++j) {
    const int first = max(0, unit.at - f.reach_h[j]), last = min(f.high, unit.at + f.groups + f.reach_h[j]);
    const int64_t plane = (n * source.p + unit.plane) * f.blurs + j;
    const float4* from = f.back + (plane * f.high + first) * 4 * f.wide;
#pragma unroll 4
    for (int t = threadIdx.x; t < 4 * (last - first) * f.wide; t += blockDim.x) copy_async(tiles + t, from + t);
    tiles += f.tile(f.reach_h[j]);
  }
}

// Each team's part of sum_j L_j^T (c_j R_j) to parts (teams, 4 groups, wide).
__device__ __forceinline__ void strips_down_back(const StripsPlan& f, const StripsPlace& place, int at,
                                                 const float4* tiles, const float4* left, float4* parts) {
  if (!place.active) return;
  float4 sum[4] = {};
#pragma unroll 1
  for (int round = 0; round * f.teams < f.blurs; ++round) {
    const int j = place.blur(f, round);
    if (j < 0) continue;
    const int reach = f.reach_h[j];
    const float4* tile = tiles;
    for (int i = 0; i < j; ++i) tile += f.tile(f.reach_h[i]);
    strips_down(tile, max(0, at - reach), f.wide, f.high, place.column, at + place.group, reach,
                left + left_offset(f, j) + place.group * 4 * (2 * reach + 1), sum);
  }
  float4* to = parts + (place.team * f.groups + place.group) * 4 * f.wide + place.column;
#pragma unroll
  for (int u = 0; u < 4; ++u) to[u * f.wide] = sum[u];
}

// dz of a strip: the teams' parts in order, and sum_s c[s][K] s.
template <class T, class O>
__device__ __forceinline__ void strips_write(const Source& source, const StripsPlan& f, const StripsUnit& unit,
                                             int64_t n, const float4* parts, const float* c, const View& dz,
                                             const Scale<float>& scale) {
  const Quotient by_wide(f.wide);
  const int rows = min(4 * f.groups, source.h - 4 * unit.at), w = source.w;
  const Plane<T> planes[2] = {Plane<T>(source, n, unit.plane),
                              Plane<T>(source, source.signals == 2 ? source.n + n : n, unit.plane)};
  O* const to = static_cast<O*>(dz.data) + dz.offset(n, unit.plane, 0, 0);
#pragma unroll 1
  for (int t = threadIdx.x; t < rows * f.wide; t += blockDim.x) {
    const int row = by_wide(t), x = 4 * (t - row * f.wide), y = 4 * unit.at + row;
    float4 sum = parts[t];
    for (int i = 1; i < f.teams; ++i) add_scaled(sum, 1.0f, parts[i * f.groups * 4 * f.wide + t]);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (s >= source.signals) continue;
      const float whole = c[s * (f.bands + 1) + f.bands];
      if (whole != 0) add_scaled(sum, whole, load_four(planes[s], y, x, w, f.vector_in));
    }
    store_four(to + y * dz.stride_h, dz.stride_w, x, w, f.vector_out,
               {scale(sum.x), scale(sum.y), scale(sum.z), scale(sum.w)});
  }
}

// grid N * clusters * size, clusters of `size` blocks; a plane's strips are all of one cluster. The adjoint of one
// signal, or of two from the blurs that strips_energies kept.
__global__ void __launch_bounds__(kStripThreads, 1)
    strips_gradient(const __grid_constant__ Source source, const __grid_constant__ StripsPlan f,
                    const __grid_constant__ StripsGradient to) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ float c[2 * (FERA_MAX_BANDS + 1)], mix[FERA_MAX_BANDS * kStripBlurs];
  __shared__ int exponent;
  const int which = blockIdx.x / f.size, rank = cluster_rank();
  const int64_t n = which / f.clusters;
  const int cluster = which - static_cast<int>(n) * f.clusters;
  const StripsPlace place(f);
  const int first_plane = cluster * f.planes_of, planes = min(f.planes_of, source.p - first_plane);
  int loaded = -1;
  {
    float4* const right_back = reinterpret_cast<float4*>(raw);
    float4* const lines = right_back + f.right_size();
    float4* const right = lines + f.lines();
    float4* const left = right + f.right_size();
    float4* const tile = left + f.left_size();
    strips_right<true>(f, source.w, right_back);
    if (f.kept == nullptr) strips_right<false>(f, source.w, right);
    strips_mix(f, mix);
    load_coefficients(to.from, n, f.bands, source.signals, c, &exponent);
    if (to.from.factor != nullptr && cluster == 0 && rank == 0 && threadIdx.x == 0)
      to.from.factor[n] = ldexp(1.0, exponent);
    if (to.means != nullptr && blockIdx.x == 0 && threadIdx.x < 32) mean_of_losses(source.n, to.means, to.loss);
#pragma unroll 1
    for (int i = rank; i < planes * f.strips; i += f.size) {
      const StripsUnit unit = strips_unit(f, i, first_plane, planes);
      __syncthreads();  // the last unit's lines have been read
      if (f.kept == nullptr) {
        if (unit.at != loaded) strips_left<false>(f, source.h, unit.at, left);
        loaded = unit.at;
        const int first = max(0, unit.at - f.widest()), last = min(f.high, unit.at + f.groups + f.widest());
        with_element(source.dtype, [&](auto tag) {
          strips_tile(Plane<decltype(tag)>(source, n, unit.plane), f, source.h, source.w, first, last, tile);
        });
        await_copies();
        __syncthreads();
        strips_blur(f, place, unit.at, tile, left, right, lines);
      }
      strips_bands(source, f, unit, n, mix, c, lines);
      await_copies();
      __syncthreads();
      strips_along_back(source, f, place, unit, n, lines, right_back);
    }
  }
  await_copies();  // where a block has no unit, nothing waited for its coefficients
  __syncwarp();
  cluster_arrive();  // what this block wrote to the workspace is to be seen by the cluster
  cluster_wait();
  float4* const left = reinterpret_cast<float4*>(raw);
  float4* const tiles = left + f.left_size();
  float4* parts = tiles;
  for (int j = 0; j < f.blurs; ++j) parts += f.tile(f.reach_h[j]);
  const Scale<float> scale(to.from.factor != nullptr ? 1.0 : ldexp(1.0, exponent));
  loaded = -1;
#pragma unroll 1
  for (int i = rank; i < planes * f.strips; i += f.size) {
    const StripsUnit unit = strips_unit(f, i, first_plane, planes);
    if (unit.at != loaded) strips_left<true>(f, source.h, unit.at, left);
    loaded = unit.at;
    strips_fetch(source, f, unit, n, tiles);
    await_copies();
    __syncthreads();
    strips_down_back(f, place, unit.at, tiles, left, parts);
    __syncthreads();
    with_element(source.dtype, [&](auto tag) {
      using T = decltype(tag);
      if (to.dz.wide)
        strips_write<T, float>(source, f, unit, n, parts, c, to.dz.view, scale);
      else
        strips_write<T, T>(source, f, unit, n, parts, c, to.dz.view, scale);
    });
  }
#else
  asm("trap;");  // an older image has no clusters: it is never chosen
#endif
}

}  // namespace fera::cuda
