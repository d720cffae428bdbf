// latent_gate on CUDA: the band energies' passes, then one block a sample normalises and routes.
#include "band_energy/energies.cuh"
#include "router/router.cuh"
#include "router/router.h"

namespace fera {
namespace cuda {
namespace {

template <class Real>
__global__ void __launch_bounds__(128) latent_gate_finish(Partials partials, double eps, Router<Real> router,
                                                          Real* energy, Real* indicator, double* total, Real* gate) {
  __shared__ double sums[FERA_MAX_BANDS + 1];
  __shared__ RouterShared shared;
  const int64_t n = blockIdx.x;
  add_partials(partials, n, router.bands, sums);
  if (threadIdx.x == 0) write_indicator(sums, router.bands, eps, n, energy, indicator, total);
  __syncthreads();
  route(router, indicator + n * router.bands, shared, gate + n * router.experts);
}

}  // namespace
}  // namespace cuda

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
  cuda::Partials partials;
  FERA_RETURN_IF_ERROR(cuda::launch_energies("latent_gate", cuda::source_of(e.z), e.filters, context, &partials));
  dispatch_compute(e.z.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    cuda::latent_gate_finish<Real><<<static_cast<unsigned>(e.z.n), 128, 0, cuda::stream_of(context)>>>(
        partials, e.eps, cuda::Router<Real>(a->router), static_cast<Real*>(e.energy), static_cast<Real*>(e.indicator),
        e.total, static_cast<Real*>(a->gate));
    return FERA_OK;
  });
  return cuda::launch_status("latent_gate");
}
