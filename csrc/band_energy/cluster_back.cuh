// The way back of cluster.cuh, and the kernel of the gradients: filter, columns and rows backwards.
//
// The inverse transform is the forward one on values with real and imaginary part exchanged, run from the last
// butterfly to the first (decimation in time): roots are multiplied before a butterfly, and natural order comes out.
#pragma once

#include "band_energy/cluster.cuh"
#include "fecl/fecl_sample.cuh"

namespace fera::cuda {

// Where the gradient goes, and what it is of.
struct ClusterGradient {
  Output dz;
  Coefficients from;  // without losses
  // With losses, FECL in one: energies, losses and coefficients come first; the gradient stays divided by factor[n].
  double eps, weight;
  double* factor;  // (N)
  double* losses;  // (N)
  // With several clusters a sample also what cluster_energies calls partial; loss takes the mean then.
  double* partial;
  // Without, of two signals: what cluster_energies kept of them, and the mean of these (N) goes to loss.
  float2* kept;
  const double* means;
  float* loss;
};

// 2^e for e from -1022 to 1023.
__device__ __forceinline__ double power_of_two(int e) { return __hiloint2double((1023 + e) << 20, 0); }

// The power of two above a magnitude whose exponent's bits these are, plus 1 (0: none is known), as far as its inverse
// is a number too.
__device__ __forceinline__ unsigned exponent_bits(double value) {
  const unsigned bits = __double2hiint(value) >> 20 & 0x7ff;
  return value != 0 && bits != 0x7ff ? bits + 1 : 0;
}
// Over a warp.
__device__ __forceinline__ int common_exponent(unsigned bits) {
  const int largest = static_cast<int>(__reduce_max_sync(0xffffffffu, bits));
  return largest == 0 ? 0 : max(-1021, min(largest - 1023, 1022));
}

// Coefficients (signals, K+1) to shared float32, each signal's padded to quadruples, at most 1 in magnitude once the
// power of two 2^exponent is taken out. Warp 0 calls it.
__device__ __forceinline__ void scale_coefficients(const double* raw, int signals, int bands, float* c, int* exponent) {
  const int lane = threadIdx.x, entries = bands + 1, padded = 4 * (bands / 4 + 1);
  unsigned bits = 0;
  for (int i = lane; i < signals * entries; i += 32) bits = max(bits, exponent_bits(raw[i]));
  const int e = common_exponent(bits);
  for (int i = lane; i < signals * padded; i += 32) {
    const int s = i >= padded, k = i - s * padded;
    c[i] = k < entries ? static_cast<float>(raw[s * entries + k] * power_of_two(-e)) : 0.0f;
  }
  if (lane == 0) *exponent = e;
}

// load_coefficients by one warp, of one signal, in two halves: what it reads is on its way while other things happen.
class EarlyCoefficients {
 public:
  __device__ __forceinline__ void read(const Coefficients& from, int64_t n, int bands) {
    const int k = threadIdx.x % 32;
    if (k >= bands) return;
    grad_ = static_cast<const float*>(from.grad)[n * bands + k];
    if (from.indicator == nullptr) return;
    share_ = static_cast<const float*>(from.indicator)[n * bands + k];
    total_ = from.total[n];
  }
  // To c, `count` of them, the absent ones 0. The warp is synchronised on return.
  __device__ __forceinline__ void write(const Coefficients& from, int bands, int count, float* c, int* exponent) const {
    const int k = threadIdx.x % 32;
    double value = 2 * static_cast<double>(grad_);
    if (from.indicator != nullptr) {
      double above = 0;  // above_mean
#pragma unroll 1
      for (int j = 0; j < bands; ++j)
        above += static_cast<double>(__shfl_sync(0xffffffffu, share_, j)) *
                 (static_cast<double>(grad_) - static_cast<double>(__shfl_sync(0xffffffffu, grad_, j)));
      // A latent of 0 and an eps of 0 has no gradient.
      value = k < bands && total_ != 0 ? 2 * (above + grad_ * (from.eps / total_)) / total_ : 0;
    }
    const int e = common_exponent(exponent_bits(value));
    if (k < count) c[k] = static_cast<float>(value * power_of_two(-e));
    if (k == 0) *exponent = e;
    __syncwarp();
  }

 private:
  float grad_ = 0, share_ = 0;
  double total_ = 0;
};

// cluster_weights through registers, by `threads` threads, in less time where the index arithmetic is cheap
// (F::shifts).
template <class F>
__device__ __forceinline__ void cluster_weights_beside(const ClusterScene<F>& c, unsigned thread, unsigned threads) {
  constexpr unsigned H = F::H, W = F::W, plane = H * (W / 2 + 1), count = H * F::cols;
  constexpr int at_once = 4;
#pragma unroll 1
  for (int g = 0; g < c.groups; ++g)
#pragma unroll 1
    for (unsigned first = thread; first < count; first += at_once * threads) {
      float4 w[at_once];
#pragma unroll
      for (int k = 0; k < at_once; ++k) {
        const unsigned t = first + k * threads, u = t / F::cols, x = min(c.rank * F::cols + t % F::cols, W - 1);
        const bool mirrored = x > W / 2;
        const float* from =
            c.masks + 4 * g * plane + (mirrored && u > 0 ? H - u : u) * (W / 2 + 1) + (mirrored ? W - x : x);
        const auto weight = [&](int i) {
          return 4 * g + i < c.bands ? __ldg(from + i * plane) : 4 * g + i == c.bands ? 1.0f : 0.0f;
        };
        if (t < count) w[k] = {weight(0), weight(1), weight(2), weight(3)};
      }
#pragma unroll
      for (int k = 0; k < at_once; ++k)
        if (first + k * threads < count) c.shared.slab[g * count + first + k * threads] = w[k];
    }
}

// sum_s T_s S_s of the columns, exchanged, and the second butterfly backwards, into signal 0's columns. Done says that
// the columns' second butterfly forward is done already.
template <class F, int Signals, bool Done>
__device__ __forceinline__ void cluster_filter(const ClusterScene<F>& c, int pairs, const float* coefficients) {
  constexpr int R = F::h2, B = F::h1;
  const int padded = 4 * c.groups, second = pairs * F::column_plane;
  const int valid = F::even_cols ? F::cols : max(0, min(F::cols, F::W - c.rank * F::cols));
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < unsigned(pairs * F::cols * B); t += blockDim.x) {
    const unsigned col = t % F::cols, rest = t / F::cols, b = rest % B, pair = rest / B;
    if (!F::even_cols && col >= unsigned(valid)) continue;
    float2* at = c.shared.columns + pair * F::column_plane;
    float2 a[R];
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = at[F::column_at(col, b, i)];
    if constexpr (!Done) dft<R>(a);
    float transfer[Signals][R] = {};
#pragma unroll 1
    for (int g = 0; g < c.groups; ++g) {
      const float4* weights = c.shared.slab + (g * F::H + b) * F::cols + col;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const float4 w = weights[i * B * F::cols];
#pragma unroll
        for (int s = 0; s < Signals; ++s) {
          const float* k = coefficients + s * padded + 4 * g;
          transfer[s][i] = fmaf(k[0], w.x, fmaf(k[1], w.y, fmaf(k[2], w.z, fmaf(k[3], w.w, transfer[s][i]))));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = {transfer[0][i] * a[i].y, transfer[0][i] * a[i].x};
    if constexpr (Signals == 2) {
      float2 r[R];
#pragma unroll
      for (int i = 0; i < R; ++i) r[i] = at[second + F::column_at(col, b, i)];
      if constexpr (!Done) dft<R>(r);
#pragma unroll
      for (int i = 0; i < R; ++i) a[i] = {fmaf(transfer[1][i], r[i].y, a[i].x), fmaf(transfer[1][i], r[i].x, a[i].y)};
    }
    dft<R>(a);
#pragma unroll
    for (int i = 0; i < R; ++i) at[F::column_at(col, b, i)] = a[i];
  }
}

// The first butterfly of signal 0's columns backwards -> parcels, in the columns' place, by the block that owns the
// row.
template <class F>
__device__ __forceinline__ void cluster_columns_back(const ClusterScene<F>& c, int pairs) {
  constexpr int R = F::h1, M = F::h2;
  const unsigned at_once = blockDim.x / (F::cols * M);
#pragma unroll 1
  for (int done = 0; done < pairs; done += at_once) {
    const unsigned j = threadIdx.x % M, line = threadIdx.x / M, col = line % F::cols, pair = done + line / F::cols;
    const bool mine = line / F::cols < at_once && pair < unsigned(pairs);
    float2* to = c.shared.columns + pair * F::column_plane;
    float2 a[R];
    if (mine) {
      float2 root[R];
      powers_of<R>(kRoots<F::H>.root[j], root);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        a[i] = to[F::column_at(col, i, j)];
        if (i > 0) a[i] = times(a[i], root[i]);
      }
      dft<R>(a);
    }
    __syncthreads();
    if (mine)
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const unsigned y = j + i * M;
        to[y / F::rows * F::back_parcel + y % F::rows * (F::cols | 1) + col] = a[i];
      }
  }
}

// Pixels j + i M of row y of planes p and p + 1, whose values come exchanged, scaled.
template <int R, int M>
__device__ __forceinline__ void write_row(const Source& source, const Output& dz, int64_t n, int p, int y, int j,
                                          const float2 (&a)[R], const Scale<float>& scale) {
  const int64_t at = dz.view.offset(n, p, y, j), step = dz.view.stride_w * M;
  auto write = [&](auto tag) {
    using T = decltype(tag);
    T* to = static_cast<T*>(dz.view.data) + at;
#pragma unroll
    for (int i = 0; i < R; ++i) to[i * step] = narrow<T>(scale(a[i].y));
    if (p + 1 < source.p)
#pragma unroll
      for (int i = 0; i < R; ++i) to[dz.view.stride_p + i * step] = narrow<T>(scale(a[i].x));
  };
  with_element(dz.wide ? FERA_F32 : source.dtype, write);
}

// Both butterflies of the rows backwards -> global memory, scaled.
template <class F>
__device__ __forceinline__ void cluster_rows_back(const ClusterScene<F>& c, const Output& dz, int first, int pairs,
                                                  const Scale<float>& scale) {
  {
    constexpr int R = F::w2, B = F::w1;
#pragma unroll 1
    for (unsigned t = threadIdx.x; t < unsigned(pairs * F::rows * B); t += blockDim.x) {
      const unsigned row = t % F::rows, rest = t / F::rows, b = rest % B;
      float2* at = c.shared.rows + rest / B * F::row_plane;
      float2 a[R];
#pragma unroll
      for (int i = 0; i < R; ++i) a[i] = at[F::row_at(row, b + i * B)];
      dft<R>(a);
#pragma unroll
      for (int i = 0; i < R; ++i) at[F::row_at(row, b + i * B)] = a[i];
    }
  }
  __syncthreads();
  constexpr int R = F::w1, M = F::w2;
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < unsigned(pairs * F::rows * M); t += blockDim.x) {
    const unsigned item = F::back_item(t), j = item % M, line = item / M, row = line % F::rows;
    const int y = c.rank * F::rows + row, p = 2 * (first + line / F::rows);
    if (!F::even_rows && y >= F::H) continue;
    const float2* from = c.shared.rows + line / F::rows * F::row_plane;
    float2 a[R], root[R];
    powers_of<R>(kRoots<F::W>.root[j], root);
    // Digit r of this butterfly is frequency r, which the first butterfly left, its digit j apart, at r + j w1.
#pragma unroll
    for (int i = 0; i < R; ++i) {
      a[i] = from[F::row_at(row, i + j * R)];
      if (i > 0) a[i] = times(a[i], root[i]);
    }
    dft<R>(a);
    write_row<R, M>(c.source, dz, c.n, p, y, j, a, scale);
  }
}

// The losses of all samples, by block 0 after the grid's barrier, a warp a sample: their mean needs no launch.
template <class F>
__device__ __forceinline__ void cluster_losses(const ClusterScene<F>& c, const ClusterGradient& to) {
  const int warp = threadIdx.x / 32, entries = 2 * (c.bands + 1);
  double* const sums = c.shared.arrived + warp * entries;  // the warps' sums have been added up
#pragma unroll 1
  for (int64_t n = warp; n < c.source.n; n += blockDim.x / 32) {
    cluster_gather<F>(c, n, to.partial, sums);
    const double loss = fecl_sample_warp(sums, sums + c.bands + 1, c.bands, to.eps, to.weight, nullptr);
    if (threadIdx.x % 32 == 0) to.losses[n] = loss;
    __syncwarp();
  }
}

// grid N * clusters * S, clusters of S blocks. The filters' adjoint of one signal, or of two from the spectra that
// cluster_energies kept; or FECL's loss and gradient, every pair at once, because the filter needs the sums over all
// planes: of one cluster, or of several in a cooperative launch.
template <class F>
__global__ void __launch_bounds__(kClusterThreads, 1)
    cluster_gradient(const __grid_constant__ Source source, const __grid_constant__ ClusterPlan plan,
                     const float* masks, int bands, const __grid_constant__ ClusterGradient to) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ double sums[2 * (FERA_MAX_BANDS + 4)], raw_coefficients[2 * (FERA_MAX_BANDS + 1)];
  __shared__ float coefficients[2 * 4 * kQuadruples];
  __shared__ int exponent;
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
  const bool fecl = to.losses != nullptr;
  cluster_arrive_relaxed();  // it has started, and may be written to
  // Of one signal, where weights come beside the rows: so do the coefficients, by the last warp.
  const bool beside = F::shifts && !fecl && to.from.table == nullptr;
  if (!beside) cluster_weights<F>(c);
  const bool single = beside && threadIdx.x / 32 == blockDim.x / 32 - 1;
  EarlyCoefficients early;
  if (single) early.read(to.from, n, bands);
  if (!fecl && !beside) {
    __shared__ float dense[2 * (FERA_MAX_BANDS + 1)];
    load_coefficients(to.from, n, bands, source.signals, dense, &exponent);
    const int padded = 4 * c.groups, i = threadIdx.x;
    if (i < source.signals * padded) {
      const int s = i >= padded, k = i - s * padded;
      coefficients[i] = k <= bands ? dense[s * (bands + 1) + k] : 0.0f;
    }
    if (to.from.factor != nullptr && which % plan.clusters == 0 && c.rank == 0 && i == 0)
      to.from.factor[n] = ldexp(1.0, exponent);
  }
  if (to.means != nullptr && blockIdx.x == 0 && threadIdx.x < 32) mean_of_losses(source.n, to.means, to.loss);
  const int end = min(plan.pairs, (c.cluster + 1) * plan.pairs_of);
#pragma unroll 1
  for (int first = c.cluster * plan.pairs_of; first < end; first += plan.pairs_at_once) {
    // Between chunks: every block has sent its parcels of the columns, so that these may be written to.
    if (first > c.cluster * plan.pairs_of) cluster_arrive();
    const int here = min(plan.pairs_at_once, end - first);
    if (to.kept == nullptr) {
      cluster_forward<F>(c, first, here, [&](unsigned thread, unsigned threads) {
        if (!beside || first != c.cluster * plan.pairs_of) return;
        cluster_weights_beside<F>(c, thread, threads);
        if (single) early.write(to.from, bands, 4 * c.groups, coefficients, &exponent);
      });
    } else {
      cluster_keep<F, true>(c, first, here, to.kept);
      await_copies();  // the weights too, the first time
      __syncthreads();
    }
    if (source.signals == 1) {
      cluster_filter<F, 1, false>(c, here, coefficients);
    } else {
      if (fecl) {
        double carried[2][kQuadruples] = {};
        cluster_columns_last<F, true>(c, here, carried);
        const bool alone = plan.clusters == 1;
        cluster_send<F>(c, carried, alone ? F::S : 1);
        cluster_arrive();
        cluster_wait();
        if (!alone) {
          if (c.rank == 0 && threadIdx.x < 32) {
            cluster_add<F>(c, sums);
            cluster_publish<F>(c, sums, to.partial);
          }
          cooperative_groups::this_grid().sync();
        }
        if (threadIdx.x < 32) {
          if (alone)
            cluster_add<F>(c, sums);
          else
            cluster_gather<F>(c, n, to.partial, sums);
          const double loss = fecl_sample_warp(sums, sums + bands + 1, bands, to.eps, to.weight, raw_coefficients);
          scale_coefficients(raw_coefficients, 2, bands, coefficients, &exponent);
          if (c.rank == 0 && c.cluster == 0 && threadIdx.x == 0) {
            if (alone) to.losses[n] = loss;
            to.factor[n] = power_of_two(exponent);
          }
        }
        if (!alone && blockIdx.x == 0) cluster_losses<F>(c, to);
        __syncthreads();
        if (!alone && blockIdx.x == 0 && threadIdx.x < 32) mean_of_losses(source.n, to.losses, to.loss);
      }
      cluster_filter<F, 2, true>(c, here, coefficients);
    }
    __syncthreads();
    cluster_columns_back<F>(c, here);
    __syncthreads();
    // The rows of every block are free: it sent them before it received its columns; or, where these were kept, it has
    // started, or read the last chunk's.
    if (to.kept != nullptr) cluster_wait();
    if (first + plan.pairs_at_once >= end) let_next_start();
    cluster_send_parcels<F, F::back_parcel>(c, c.shared.columns, F::column_plane, c.shared.rows, F::row_plane, here);
    cluster_arrive();
    cluster_wait();
    const int e = fecl || to.from.factor != nullptr ? 0 : exponent;
    const Scale<float> scale(1.0 / (static_cast<double>(F::H) * F::W) * power_of_two(e));
    cluster_rows_back<F>(c, to.dz, first, here, scale);
    __syncthreads();
  }
#else
  asm("trap;");  // an older image has no clusters: limits_of never chooses it
#endif
}

}  // namespace fera::cuda
