// latent_gate on CUDA: the band energies, whose finish also routes.
#include "band_energy/energies.cuh"
#include "router/router.h"

namespace fera {

size_t latent_gate_workspace_cuda(const fera_latent_gate_args& a) {
  return cuda::energies_workspace(cuda::source_of(a.energy.z), a.energy.filters);
}

}  // namespace fera

extern "C" fera_status fera_latent_gate_cuda(const fera_latent_gate_args* a, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("latent_gate", context, fera_latent_gate_workspace(a, FERA_CUDA)));
  const fera_band_energy_args& e = a->energy;
  if (e.z.n == 0) return FERA_OK;
  return dispatch_compute(e.z.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    cuda::Finish<Real> finish{};
    finish.bands = e.filters.bands;
    finish.eps = e.eps;
    finish.energy = static_cast<Real*>(e.energy);
    finish.indicator = static_cast<Real*>(e.indicator);
    finish.total = e.total;
    finish.router = cuda::Router<Real>(a->router);
    finish.gate = static_cast<Real*>(a->gate);
    return cuda::launch_energies("latent_gate", cuda::source_of(e.z), e.filters, finish, static_cast<Real*>(nullptr),
                                 context);
  });
}
