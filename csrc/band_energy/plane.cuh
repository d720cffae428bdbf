// Spectral filters of many planes: a block holds a whole complex plane in its shared memory and transforms it in place.
//
// As in cluster.cuh two real planes make a complex one, an axis is two butterflies, and the spectrum stays in
// digit-reversed order. Nothing crosses between blocks but sums, so a plane costs barriers of its block only; but it
// takes most of a multiprocessor, so there must be planes for many of them. The weights are read from global memory,
// where lanes read along rows and L1 holds them. FECL's two signals: plane_fecl.cuh.
#pragma once

#include <cooperative_groups.h>

#include "band_energy/cluster_back.cuh"

namespace fera::cuda {

constexpr int kPlaneThreads = 1024;  // at most

template <int Height, int Width>
struct PlaneSize {
  static constexpr int H = Height, W = Width;
  static constexpr int w1 = smaller_radix(W), w2 = W / w1, h1 = smaller_radix(H), h2 = H / h1;
  // Block b of a row (what its second butterfly takes) begins at b step, row y at y pitch. Lanes along the blocks and
  // then along a block meet all banks with eight blocks and a step of 2 modulo 4, lanes down the rows with an odd
  // pitch.
  static constexpr int step = w2 + (6 - w2 % 4) % 4, pitch = (w1 * step) | 1;
  static constexpr size_t bytes = sizeof(float2) * H * pitch;

  // Frequency x of a row.
  __host__ __device__ static constexpr unsigned at(unsigned x) { return x % w1 * step + x / w1; }
};

// The weights of frequencies (b + i h1, x), i < h2, in a half-spectrum table.
template <class F>
struct PlaneWeights {
  static constexpr int row = F::W / 2 + 1, plane = F::H * row;
  const float* from;
  int first, stride;
  bool zero;  // i = 0 is frequency (0, x)

  __device__ __forceinline__ PlaneWeights(const float* masks, unsigned x, unsigned b) {
    const bool mirrored = x > F::W / 2;
    from = masks + (mirrored ? F::W - x : x);
    first = static_cast<int>(mirrored ? F::H - b : b) * row;
    stride = mirrored ? -F::h1 * row : F::h1 * row;
    zero = b == 0;
  }
  __device__ __forceinline__ float operator()(int band, int i) const {
    return __ldg(from + band * plane + (i == 0 && zero ? 0 : first + i * stride));
  }
};

// A butterfly in place of every block of the rows: their second forward, their first on the way back.
template <class F>
__device__ __forceinline__ void plane_row_blocks(float2* plane) {
  constexpr int R = F::w2, B = F::w1;
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < F::H * B; t += blockDim.x) {
    float2* at = plane + t % F::H * F::pitch + t / F::H * F::step;
    float2 a[R];
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = at[i];
    dft<R>(a);
#pragma unroll
    for (int i = 0; i < R; ++i) at[i] = a[i];
  }
}

// Global memory -> the columns after their first butterfly, of the latent or, of two signals, of this one's difference.
// The block is synchronised on entry and on return.
template <class F, int Signals>
__device__ __forceinline__ void plane_forward(const Source& source, int64_t n, int pair, int signal, float2* plane) {
  {
    constexpr int R = F::w1, M = F::w2;
    const int p = 2 * pair;
    const bool two = p + 1 < source.p;
#pragma unroll 1
    for (unsigned t = threadIdx.x; t < F::H * M; t += blockDim.x) {
      const unsigned j = t % M, y = t / M;
      float2 a[R], root[R];
#pragma unroll
      for (int i = 0; i < R; ++i) a[i] = {0, 0};
      auto load = [&](auto tag) {
        using T = decltype(tag);
        const auto read = [&](const View& v, float2(&to)[R]) {
          const T* from = static_cast<const T*>(v.data) + n * v.stride_n + p * v.stride_p + y * v.stride_h + j;
#pragma unroll
          for (int i = 0; i < R; ++i) to[i].x = widen(load_once(from + i * M));
          if (two)
#pragma unroll
            for (int i = 0; i < R; ++i) to[i].y = widen(load_once(from + v.stride_p + i * M));
        };
        read(source.whole, a);
        if constexpr (Signals == 2) {
          float2 minus[R];
#pragma unroll
          for (int i = 0; i < R; ++i) minus[i] = {0, 0};
          read(source.minus[signal], minus);
#pragma unroll
          for (int i = 0; i < R; ++i) a[i] = {a[i].x - minus[i].x, a[i].y - minus[i].y};
        }
      };
      if (source.dtype == FERA_F32)
        load(float{});
      else if (source.dtype == FERA_BF16)
        load(Bfloat{});
      else
        load(Half{});
      powers_of<R>(kRoots<F::W>.root[j], root);
      dft<R>(a);
      float2* to = plane + y * F::pitch + j;
      to[0] = a[0];
#pragma unroll
      for (int i = 1; i < R; ++i) to[i * F::step] = times(a[i], root[i]);
    }
  }
  __syncthreads();
  plane_row_blocks<F>(plane);
  __syncthreads();
  {
    constexpr int R = F::h1, M = F::h2;
#pragma unroll 1
    for (unsigned t = threadIdx.x; t < F::W * M; t += blockDim.x) {
      const unsigned x = t % F::W, j = t / F::W;
      float2* at = plane + F::at(x) + j * F::pitch;
      float2 a[R], root[R];
#pragma unroll
      for (int i = 0; i < R; ++i) a[i] = at[i * M * F::pitch];
      powers_of<R>(kRoots<F::H>.root[j], root);
      dft<R>(a);
      at[0] = a[0];
#pragma unroll
      for (int i = 1; i < R; ++i) at[i * M * F::pitch] = times(a[i], root[i]);
    }
  }
  __syncthreads();
}

// The columns' second butterfly, powers and sums: `to` takes the plane's, one a band and, with Whole, the norm squared.
// Keep writes the spectrum back. arrived: (sums, warps). The block is synchronised on return, but for `to`.
template <class F, bool Keep, bool Whole>
__device__ __forceinline__ void plane_sums(float2* plane, const float* masks, int bands, double* arrived, double* to) {
  constexpr int R = F::h2, B = F::h1;
  constexpr unsigned items = F::W * B;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, sums = bands + (Whole ? 1 : 0);
  double mine = 0;  // lane k: sum k of this warp
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < (items + 31) / 32 * 32; t += blockDim.x) {
    const bool active = items % 32 == 0 || t < items;
    const unsigned x = t % F::W, b = active ? t / F::W : 0;
    float2* const column = plane + F::at(x) + b * R * F::pitch;
    float power[R];
    const double back = column_powers<R, Keep>([&](int i) -> float2& { return column[i * F::pitch]; }, active, power);
    const PlaneWeights<F> weights(masks, x, b);
#pragma unroll 1
    for (int k = 0; k < sums; ++k) {
      float sum = 0;
      if (Whole && k == bands) {
#pragma unroll
        for (int i = 0; i < R; ++i) sum += power[i];
      } else {
#pragma unroll
        for (int i = 0; i < R; ++i) sum = fmaf(power[i], weights(k, i), sum);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      if (lane == k) mine += sum * back;
    }
  }
  if (lane < sums) arrived[lane * warps + warp] = mine;
  __syncthreads();
  for (int k = warp; k < sums; k += warps) {
    double sum = lane < warps ? arrived[k * warps + lane] : 0;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) to[k] = sum;
  }
}

// The columns times sum_k c_k M_k + c_K, exchanged, and their second butterfly backwards. Done says that the second
// butterfly forward is done already. The block is synchronised on return.
template <class F, bool Done>
__device__ __forceinline__ void plane_filter(float2* plane, const float* masks, int bands, const float* coefficients) {
  constexpr int R = F::h2, B = F::h1;
  const float whole = coefficients[bands];
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < F::W * B; t += blockDim.x) {
    const unsigned x = t % F::W, b = t / F::W;
    float2* const column = plane + F::at(x) + b * R * F::pitch;
    const PlaneWeights<F> weights(masks, x, b);
    float transfer[R];
#pragma unroll
    for (int i = 0; i < R; ++i) transfer[i] = whole;
#pragma unroll 1
    for (int k = 0; k < bands; ++k) {
      const float c = coefficients[k];
#pragma unroll
      for (int i = 0; i < R; ++i) transfer[i] = fmaf(c, weights(k, i), transfer[i]);
    }
    float2 a[R];
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = column[i * F::pitch];
    if constexpr (!Done) dft<R>(a);
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = {transfer[i] * a[i].y, transfer[i] * a[i].x};
    dft<R>(a);
#pragma unroll
    for (int i = 0; i < R; ++i) column[i * F::pitch] = a[i];
  }
  __syncthreads();
}

// The columns' first butterfly backwards. The block is synchronised on return.
template <class F>
__device__ __forceinline__ void plane_columns_back(float2* plane) {
  constexpr int R = F::h1, M = F::h2;
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < F::W * M; t += blockDim.x) {
    const unsigned x = t % F::W, j = t / F::W;
    float2* at = plane + F::at(x) + j * F::pitch;
    float2 a[R], root[R];
    powers_of<R>(kRoots<F::H>.root[j], root);
#pragma unroll
    for (int i = 0; i < R; ++i) {
      a[i] = at[i * M * F::pitch];
      if (i > 0) a[i] = times(a[i], root[i]);
    }
    dft<R>(a);
#pragma unroll
    for (int i = 0; i < R; ++i) at[i * M * F::pitch] = a[i];
  }
  __syncthreads();
}

// The last butterfly of `count` rows from `first` on, of element(place in the plane), to global memory, scaled.
template <class F, class Element>
__device__ __forceinline__ void plane_rows_out(const Source& source, const Output& dz, int64_t n, int pair, int first,
                                               int count, const Scale<float>& scale, const Element& element) {
  constexpr int R = F::w1, M = F::w2;
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < unsigned(count) * M; t += blockDim.x) {
    const unsigned j = t % M, y = first + t / M;
    float2 a[R], root[R];
    powers_of<R>(kRoots<F::W>.root[j], root);
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = element(y * F::pitch + j + i * F::step);
#pragma unroll
    for (int i = 1; i < R; ++i) a[i] = times(a[i], root[i]);
    dft<R>(a);
    write_row<R, M>(source, dz, n, 2 * pair, y, j, a, scale);
  }
}

// A cooperative launch; blocks take planes in turn, then samples. partial (N, pairs, K): the planes' sums.
template <class F, int Threads>
__global__ void __launch_bounds__(Threads, 1)
    plane_energies(const __grid_constant__ Source source, const float* masks, int bands,
                   const __grid_constant__ Finish<float> finish, double* partial) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ double arrived[FERA_MAX_BANDS * (Threads / 32)], sums[FERA_MAX_BANDS];
  __shared__ float indicator[FERA_MAX_BANDS];
  __shared__ FinishShared finish_shared;
  float2* const plane = reinterpret_cast<float2*>(raw);
  const int pairs = source.pairs();
#pragma unroll 1
  for (int64_t i = blockIdx.x; i < source.n * pairs; i += gridDim.x) {
    const int64_t n = i / pairs;
    plane_forward<F, 1>(source, n, static_cast<int>(i - n * pairs), 0, plane);
    plane_sums<F, false, false>(plane, masks, bands, arrived, partial + i * bands);
  }
  const bool warp_routes = finish.gate != nullptr && WarpRouter::takes(finish.router);
  cooperative_groups::this_grid().sync();
  const double scale = 1.0 / (static_cast<double>(F::H) * F::W);
#pragma unroll 1
  for (int64_t n = blockIdx.x; n < source.n; n += gridDim.x) {
    if (static_cast<int>(threadIdx.x) < bands) {
      double sum = 0;
#pragma unroll 4
      for (int i = 0; i < pairs; ++i) sum += __ldcg(partial + (n * pairs + i) * bands + threadIdx.x);
      sums[threadIdx.x] = sum * scale;
    }
    if (warp_routes) {
      if (threadIdx.x >= 32) return;
      __syncwarp();
      WarpRouter router;
      router.load(finish.router);
      const Indicator share(finish, n, sums);
      router.route(finish.router, share.value, finish.gate + n * finish.router.experts);
      __syncwarp();
    } else {
      __syncthreads();
      finish_sample(finish, n, sums, indicator, finish_shared);
      __syncthreads();
    }
  }
#else
  asm("trap;");  // plane_takes never chooses an older image
#endif
}

// grid N * pairs. The filters' adjoint.
template <class F, int Threads>
__global__ void __launch_bounds__(Threads, 1)
    plane_gradient(const __grid_constant__ Source source, const float* masks, int bands,
                   const __grid_constant__ Coefficients from, const __grid_constant__ Output dz) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ float coefficients[FERA_MAX_BANDS + 1];
  __shared__ int exponent;
  float2* const plane = reinterpret_cast<float2*>(raw);
  const int pairs = source.pairs();
  const int64_t n = blockIdx.x / pairs;
  const int pair = static_cast<int>(blockIdx.x - n * pairs);
  load_coefficients(from, n, bands, 1, coefficients, &exponent);
  plane_forward<F, 1>(source, n, pair, 0, plane);
  plane_filter<F, false>(plane, masks, bands, coefficients);
  plane_columns_back<F>(plane);
  plane_row_blocks<F>(plane);
  __syncthreads();
  plane_rows_out<F>(source, dz, n, pair, 0, F::H,
                    Scale<float>(ldexp(1.0 / (static_cast<double>(F::H) * F::W), exponent)),
                    [&](unsigned at) { return plane[at]; });
#else
  asm("trap;");  // plane_takes never chooses an older image
#endif
}

}  // namespace fera::cuda
