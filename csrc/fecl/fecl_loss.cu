// fecl_loss on CUDA: the energies of d = fera - base and r = fera - target, then the loss and what backward
// needs; backward is the filters' adjoint of both, summed before the inverse transform.
#include "band_energy/energies.cuh"
#include "fecl/fecl.h"
#include "fecl/fecl_sample.h"

namespace fera {
namespace cuda {
namespace {

constexpr int kSums = FERA_MAX_BANDS + 1;

// One block walks the samples in order: warps add up a sample's partials, thread 0 its loss.
template <class Real>
__global__ void __launch_bounds__(256)
    fecl_loss_finish(Partials partials, int64_t n, int bands, double eps, Real* loss, double* coefficients) {
  __shared__ double sums[2][kSums];
  double total = 0;
  for (int64_t row = 0; row < n; ++row) {
    add_partials(partials, row, bands, sums[0]);
    add_partials(partials, n + row, bands, sums[1]);
    if (threadIdx.x == 0)
      total += fecl_sample(sums[0], sums[1], bands, eps, 1.0 / static_cast<double>(n),
                           coefficients == nullptr ? nullptr : coefficients + row * 2 * (bands + 1));
    __syncthreads();
  }
  if (threadIdx.x == 0) *loss = static_cast<Real>(total / static_cast<double>(n));
}

}  // namespace
}  // namespace cuda

size_t fecl_loss_workspace_cuda(const fera_fecl_loss_args& a) {
  return cuda::energies_workspace(cuda::source_of(a.base, a.fera, a.target), a.filters);
}

size_t fecl_loss_backward_workspace_cuda(const fera_fecl_loss_backward_args& a) {
  return cuda::adjoint_workspace(cuda::source_of(a.base, a.fera, a.target), a.filters);
}

}  // namespace fera

extern "C" fera_status fera_fecl_loss_cuda(const fera_fecl_loss_args* a, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("fecl_loss", context, fera_fecl_loss_workspace(a, FERA_CUDA)));
  cuda::Partials partials{nullptr, 0, 1.0};
  if (a->fera.n > 0)
    FERA_RETURN_IF_ERROR(cuda::launch_energies("fecl_loss", cuda::source_of(a->base, a->fera, a->target), a->filters,
                                               context, &partials));
  dispatch_compute(a->fera.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    cuda::fecl_loss_finish<Real><<<1, 256, 0, cuda::stream_of(context)>>>(partials, a->fera.n, a->filters.bands, a->eps,
                                                                          static_cast<Real*>(a->loss), a->coefficients);
    return FERA_OK;
  });
  return cuda::launch_status("fecl_loss");
}

extern "C" fera_status fera_fecl_loss_backward_cuda(const fera_fecl_loss_backward_args* a,
                                                    const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("fecl_loss_backward", context, fera_fecl_loss_backward_workspace(a, FERA_CUDA)));
  if (a->fera.n == 0) return FERA_OK;
  const cuda::Coefficients from{a->coefficients, a->grad, nullptr, nullptr, nullptr, 0};
  return cuda::launch_adjoint("fecl_loss_backward", cuda::source_of(a->base, a->fera, a->target), a->filters, from,
                              cuda::view_of(a->dfera), context);
}
