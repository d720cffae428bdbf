// band_energy on CUDA: rows, columns, finish; backward: rows, filter, rows back.
#include "band_energy/band_energy.h"
#include "band_energy/energies.cuh"

namespace fera {
namespace cuda {
namespace {

// One block a sample.
template <class Real>
__global__ void __launch_bounds__(128)
    band_energy_finish(Partials partials, int bands, double eps, Real* energy, Real* indicator, double* total) {
  __shared__ double sums[FERA_MAX_BANDS + 1];
  add_partials(partials, blockIdx.x, bands, sums);
  if (threadIdx.x == 0) write_indicator(sums, bands, eps, blockIdx.x, energy, indicator, total);
}

}  // namespace
}  // namespace cuda

size_t band_energy_workspace_cuda(const fera_band_energy_args& a) {
  return cuda::energies_workspace(cuda::source_of(a.z), a.filters);
}

size_t band_energy_backward_workspace_cuda(const fera_band_energy_backward_args& a) {
  return cuda::adjoint_workspace(cuda::source_of(a.z), a.filters);
}

}  // namespace fera

extern "C" fera_status fera_band_energy_cuda(const fera_band_energy_args* a, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("band_energy", context, fera_band_energy_workspace(a, FERA_CUDA)));
  if (a->z.n == 0) return FERA_OK;
  cuda::Partials partials;
  FERA_RETURN_IF_ERROR(cuda::launch_energies("band_energy", cuda::source_of(a->z), a->filters, context, &partials));
  dispatch_compute(a->z.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    cuda::band_energy_finish<Real><<<static_cast<unsigned>(a->z.n), 128, 0, cuda::stream_of(context)>>>(
        partials, a->filters.bands, a->eps, static_cast<Real*>(a->energy), static_cast<Real*>(a->indicator), a->total);
    return FERA_OK;
  });
  return cuda::launch_status("band_energy");
}

extern "C" fera_status fera_band_energy_backward_cuda(const fera_band_energy_backward_args* a,
                                                      const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(
      check_workspace("band_energy_backward", context, fera_band_energy_backward_workspace(a, FERA_CUDA)));
  if (a->z.n == 0) return FERA_OK;
  const cuda::Coefficients from{nullptr, nullptr, a->grad, a->indicator, a->total, a->eps};
  return cuda::launch_adjoint("band_energy_backward", cuda::source_of(a->z), a->filters, from, cuda::view_of(a->dz),
                              context);
}
