// One tiled product with a register tile a thread, for every skinny product of the gated multi-expert linear:
//   out(m, n) = sum_k a(m, k) b(k, n),  m < M, n < N, k in this block's slice of K.
// Operands and the epilogue are functors, so gates, casts and transposes cost no pass of their own.
#pragma once

#include "common/cuda_dropout.cuh"

namespace fera::cuda {

constexpr int kProductThreads = 256;
constexpr int kDepth = 16;

// x or dy: rows of contiguous elements; (row, column), optionally read transposed.
template <class T, bool Transposed = false>
struct RowsOperand {
  const T* data;
  int64_t stride;
  __device__ Compute<T> operator()(int64_t i, int64_t j) const {
    return Transposed ? widen(data[j * stride + i]) : widen(data[i * stride + j]);
  }
};

// x after dropout. Eight threads side by side make the same numbers: this variant is for what the others do not take.
template <class T, bool Transposed = false>
struct DroppedOperand {
  RowsOperand<T, Transposed> rows;
  Dropout dropout;
  __device__ Compute<T> operator()(int64_t i, int64_t j) const {
    const bool keeps = Transposed ? Mask(dropout).keeps(j, i) : Mask(dropout).keeps(i, j);
    return keeps ? rows(i, j) * static_cast<Compute<T>>(dropout.scale) : Compute<T>(0);
  }
};

// A or B of the adapter, rounded to x's dtype: element (i, j) at i * stride_i + j * stride_j.
template <class T>
struct WeightOperand {
  const void* data;
  fera_dtype dtype;
  int64_t stride_i, stride_j;
  __device__ Compute<T> operator()(int64_t i, int64_t j) const {
    return widen(narrow<T>(load_any<Compute<T>>(data, dtype, i * stride_i + j * stride_j)));
  }
};

// h or dh times gate and scale: (token, stacked rank), optionally read transposed.
template <class T, class Stored, bool Transposed = false>
struct GatedOperand {
  const Stored* data;
  const Compute<T>* gate;
  int64_t rows_per_gate;
  int experts, rank;
  Compute<T> scale;
  __device__ Compute<T> operator()(int64_t i, int64_t j) const {
    const int64_t t = Transposed ? j : i;
    const int q = static_cast<int>(Transposed ? i : j);
    return widen(data[t * experts * rank + q]) * (gate[t / rows_per_gate * experts + q / rank] * scale);
  }
};

// y = value (+ base)
template <class T>
struct AddRows {
  T* y;
  int64_t stride;
  const T* base;  // or NULL
  int64_t base_stride;
  __device__ void operator()(int64_t m, int64_t n, int, Compute<T> value) const {
    if (base != nullptr) value += widen(base[m * base_stride + n]);
    y[m * stride + n] = narrow<T>(value);
  }
};

// dx after dropout of the value
template <class T>
struct AddDroppedRows {
  AddRows<T> rows;
  Dropout dropout;
  __device__ void operator()(int64_t m, int64_t n, int slice, Compute<T> value) const {
    rows(m, n, slice, Mask(dropout).keeps(m, n) ? value * static_cast<Compute<T>>(dropout.scale) : Compute<T>(0));
  }
};

// partial (slices, M, N) in the compute dtype
template <class Real>
struct StorePartial {
  Real* data;
  int64_t m_size, n_size;
  __device__ void operator()(int64_t m, int64_t n, int slice, Real value) const {
    data[(slice * m_size + m) * n_size + n] = value;
  }
};

// grid (M tiles * N tiles, slices); slice y covers [y * slice, (y + 1) * slice) of K.
template <class Real, int TileM, int TileN, class A, class B, class Out>
__global__ void __launch_bounds__(kProductThreads)
    product(int64_t m_size, int64_t n_size, int64_t k_size, int64_t slice, A a, B b, Out out) {
  constexpr int kColumns = TileN >= 64 ? 16 : 8, kRows = kProductThreads / kColumns;
  constexpr int kM = TileM / kRows, kN = TileN / kColumns;
  __shared__ Real tile_a[kDepth][TileM + 1];
  __shared__ Real tile_b[kDepth][TileN + 1];
  const int64_t n_tiles = ceil_div(n_size, static_cast<int64_t>(TileN));
  const int64_t m0 = blockIdx.x / n_tiles * TileM, n0 = blockIdx.x % n_tiles * TileN;
  const int64_t k_first = blockIdx.y * slice, k_last = min(k_size, k_first + slice);
  const int row = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  Real sum[kM][kN] = {};
  for (int64_t k0 = k_first; k0 < k_last; k0 += kDepth) {
    for (int i = threadIdx.x; i < TileM * kDepth; i += kProductThreads) {
      const int64_t m = m0 + i / kDepth, k = k0 + i % kDepth;
      tile_a[i % kDepth][i / kDepth] = m < m_size && k < k_last ? a(m, k) : Real(0);
    }
    for (int i = threadIdx.x; i < TileN * kDepth; i += kProductThreads) {
      const int64_t n = n0 + i % TileN, k = k0 + i / TileN;
      tile_b[i / TileN][i % TileN] = n < n_size && k < k_last ? b(k, n) : Real(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      Real left[kM], right[kN];
#pragma unroll
      for (int i = 0; i < kM; ++i) left[i] = tile_a[k][row + i * kRows];
#pragma unroll
      for (int j = 0; j < kN; ++j) right[j] = tile_b[k][column + j * kColumns];
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int j = 0; j < kN; ++j) sum[i][j] += left[i] * right[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      const int64_t m = m0 + row + i * kRows, n = n0 + column + j * kColumns;
      if (m < m_size && n < n_size) out(m, n, static_cast<int>(blockIdx.y), sum[i][j]);
    }
}

template <class Real, int TileM, int TileN, class A, class B, class Out>
void launch_product(int64_t m, int64_t n, int64_t k, int64_t slices, A a, B b, Out out, cudaStream_t stream) {
  const int64_t slice = ceil_div(ceil_div(k, slices), static_cast<int64_t>(kDepth)) * kDepth;
  const int64_t tiles = ceil_div(m, static_cast<int64_t>(TileM)) * ceil_div(n, static_cast<int64_t>(TileN));
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(slices));
  product<Real, TileM, TileN><<<grid, kProductThreads, 0, stream>>>(m, n, k, slice, a, b, out);
}

// out[i * stride_i + j * stride_j] = sum of the slices of partial (slices, M, N), in order.
template <class Real>
__global__ void add_slices(const Real* partial, int64_t slices, int64_t m_size, int64_t n_size, void* out,
                           fera_dtype dtype, int64_t stride_m, int64_t stride_n) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= m_size * n_size) return;
  Real sum = 0;
  for (int64_t s = 0; s < slices; ++s) sum += partial[s * m_size * n_size + i];
  store_any(out, dtype, i / n_size * stride_m + i % n_size * stride_n, sum);
}

}  // namespace fera::cuda
