// Skinny products of expert_linear, one table an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "common/cpu_types.h"
#include "common/dropout.h"

#if FERA_CPU_X86
#include <immintrin.h>
#endif

namespace fera::cpu {

// out (m, n) = init + a (m, k) panel (k, n) with n <= panel_width; panel rows `panel_step` apart, readable to the
// end of their vectors. init NULL is 0. Element (i, l) of a: a[i * a_step + l], or, transposed, in tiles of
// tile_height rows, a[i / tile_height * a_step + l * tile_height + i % tile_height].
template <class T>
struct Product {
  const T* a;
  int64_t a_step;
  int64_t m, n, k;
  const T* panel;
  int64_t panel_step;
  const T* init;
  int64_t init_stride;
  T* out;
  int64_t out_stride;
};

// Rows [row, row + rows) and columns [column, column + columns) of the experts' input, or of its gradient.
template <class T>
struct Masked {
  T* data;
  int64_t stride;
  int64_t row, rows, column, columns;
};

template <class T>
struct ProductKernels {
  int panel_width, tile_height;
  void (*product)(const Product<T>&);
  void (*transposed_product)(const Product<T>&);
  // to[i] = from[i] in the compute dtype, rounded to `through` on the way.
  void (*widen_row)(const void* from, fera_dtype dtype, fera_dtype through, int64_t offset, int64_t count, T* to);
  // to[i] = from[i] + (add ? add[i] : 0), both in `dtype`.
  void (*narrow_row)(const T* from, const void* add, int64_t add_offset, void* to, int64_t offset, fera_dtype dtype,
                     int64_t count);
  // Columns [offset, offset + columns) of `rows` rows as panels `panel_step` apart, in the compute dtype.
  void (*pack_rows)(const void* from, fera_dtype dtype, int64_t offset, int64_t stride, int64_t rows, int64_t columns,
                    T* to, int64_t panel_step);
  // to[i] = a[i] b[i]
  void (*multiply_row)(const T* a, const T* b, int64_t count, T* to);
  // to[m] = sum_i a[m rank + i] b[m rank + i]
  void (*grouped_dots)(const T* a, const T* b, int groups, int rank, T* to);
  // Zeros where dropout drops an element.
  void (*mask)(const Dropout& d, const Masked<T>& m);
};

namespace generic {
void products(ProductKernels<float>* f, ProductKernels<double>* d);
}
namespace avx2 {
void products(ProductKernels<float>* f, ProductKernels<double>* d);
}
namespace avx512 {
void products(ProductKernels<float>* f, ProductKernels<double>* d);
}

}  // namespace fera::cpu
