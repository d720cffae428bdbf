// expert_dropout on CUDA: the mask as a pass of its own, for where a vendor's library makes the products.
#include "common/cuda_dropout.cuh"
#include "expert_linear/expert_linear.h"

namespace fera {
namespace cuda {
namespace {

// A thread has 8 columns of a row.
template <class T>
__global__ void __launch_bounds__(256) drop_rows(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t tokens,
                                                 int in, bool add, bool drops, Dropout dropout) {
  const int groups = ceil_div(in, kDropoutColumns);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= tokens * groups) return;
  const int64_t t = at / groups;
  const int column = static_cast<int>(at % groups) * kDropoutColumns;
  uint4 kept = make_uint4(~0u, ~0u, ~0u, ~0u);
  if (drops) kept = Mask(dropout).words(static_cast<int>(t), column);
  const uint32_t words[4] = {kept.x, kept.y, kept.z, kept.w};
#pragma unroll
  for (int j = 0; j < kDropoutColumns; ++j) {
    const int i = column + j;
    if (i >= in) break;
    const bool keeps = (words[j / 2] >> j % 2 * 16 & 1u) != 0;
    Compute<T> v = keeps ? widen(x[t * x_stride + i]) * static_cast<Compute<T>>(dropout.scale) : Compute<T>(0);
    if (add) v += widen(y[t * y_stride + i]);
    y[t * y_stride + i] = narrow<T>(v);
  }
}

}  // namespace
}  // namespace cuda

size_t expert_dropout_workspace_cuda(const fera_expert_dropout_args&) { return 0; }

}  // namespace fera

extern "C" fera_status fera_expert_dropout_cuda(const fera_expert_dropout_args* a, const fera_context* context) {
  using namespace fera;
  using namespace fera::cuda;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("expert_dropout", context, 0));
  if (a->tokens == 0) return FERA_OK;
  FERA_RETURN_IF_ERROR(dispatch(a->x.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int64_t items = a->tokens * ceil_div(a->in, int64_t{kDropoutColumns});
    drop_rows<T><<<static_cast<unsigned>(ceil_div(items, int64_t{256})), 256, 0, stream_of(context)>>>(
        static_cast<const T*>(a->x.data), a->x.stride, static_cast<T*>(a->y.data), a->y.stride, a->tokens,
        static_cast<int>(a->in), a->add_to_y != 0, a->dropout > 0, dropout_of(a->dropout, a->seed, a->stream));
    return FERA_OK;
  }));
  return launch_status("expert_dropout");
}
