// CPU entry points of fecl_loss.
#include <cmath>
#include <limits>

#include "band_energy/energies_cpu.h"
#include "fecl/fecl.h"
#include "fecl/fecl_sample.h"

namespace fera {

size_t fecl_loss_workspace_cpu(const fera_fecl_loss_args& a) {
  return cpu::energies_workspace(cpu::source_of(a.base, a.fera, a.target), a.filters);
}

size_t fecl_loss_backward_workspace_cpu(const fera_fecl_loss_backward_args& a) {
  return cpu::adjoint_workspace(cpu::source_of(a.base, a.fera, a.target), a.filters);
}

}  // namespace fera

extern "C" fera_status fera_fecl_loss_cpu(const fera_fecl_loss_args* args, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("fecl_loss", context, fecl_loss_workspace_cpu(*args)));
  const double* energies;
  const int* exponents;
  cpu::run_energies(cpu::source_of(args->base, args->fera, args->target), args->filters, context, &energies,
                    &exponents);
  const int64_t samples = args->fera.n;
  const int bands = args->filters.bands, count = bands + 1;
  double loss = 0;
  for (int64_t n = 0; n < samples; ++n) {
    double e[2][FERA_MAX_BANDS + 1];
    for (int s = 0; s < 2; ++s)
      for (int k = 0; k < count; ++k)
        e[s][k] = std::ldexp(energies[(s * samples + n) * count + k], 2 * exponents[s * samples + n]);
    double* c = args->coefficients == nullptr ? nullptr : args->coefficients + n * 2 * count;
    loss += fecl_sample(e[0], e[1], bands, args->eps, 1.0 / static_cast<double>(samples), c);
  }
  // The mean over no samples is NaN, as in torch.
  loss = samples == 0 ? std::numeric_limits<double>::quiet_NaN() : loss / static_cast<double>(samples);
  if (args->fera.dtype == FERA_F64)
    *static_cast<double*>(args->loss) = loss;
  else
    *static_cast<float*>(args->loss) = static_cast<float>(loss);
  return FERA_OK;
}

extern "C" fera_status fera_fecl_loss_backward_cpu(const fera_fecl_loss_backward_args* args,
                                                   const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("fecl_loss_backward", context, fecl_loss_backward_workspace_cpu(*args)));
  const cpu::Coefficients from{args->coefficients, args->grad, nullptr, nullptr, nullptr, 0};
  cpu::run_adjoint(cpu::source_of(args->base, args->fera, args->target), args->filters, from, args->dfera, context);
  return FERA_OK;
}
