// band_energy on CUDA.
#include "band_energy/band_energy.h"
#include "band_energy/energies.cuh"

namespace fera {

size_t band_energy_workspace_cuda(const fera_band_energy_args& a) {
  return cuda::energies_workspace(cuda::source_of(a.z), a.filters);
}

size_t band_energy_backward_workspace_cuda(const fera_band_energy_backward_args& a) {
  return cuda::adjoint_workspace(cuda::source_of(a.z), a.filters);
}

const char* band_variant_cuda(const fera_latent& z, const fera_filters& filters) {
  return cuda::band_variant(cuda::source_of(z), filters);
}

}  // namespace fera

extern "C" fera_status fera_band_energy_cuda(const fera_band_energy_args* a, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("band_energy", context, fera_band_energy_workspace(a, FERA_CUDA)));
  if (a->z.n == 0) return FERA_OK;
  return dispatch_compute(a->z.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    cuda::Finish<Real> finish{};
    finish.bands = a->filters.bands;
    finish.eps = a->eps;
    finish.energy = static_cast<Real*>(a->energy);
    finish.indicator = static_cast<Real*>(a->indicator);
    finish.total = a->total;
    return cuda::launch_energies("band_energy", cuda::source_of(a->z), a->filters, finish, static_cast<Real*>(nullptr),
                                 context);
  });
}

extern "C" fera_status fera_band_energy_backward_cuda(const fera_band_energy_backward_args* a,
                                                      const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(
      check_workspace("band_energy_backward", context, fera_band_energy_backward_workspace(a, FERA_CUDA)));
  if (a->z.n == 0) return FERA_OK;
  const cuda::Coefficients from{nullptr, a->grad, a->indicator, a->total, a->eps, nullptr};
  return cuda::launch_adjoint("band_energy_backward", cuda::source_of(a->z), a->filters, from, cuda::view_of(a->dz),
                              a->dz.dtype, context);
}
