// CPU entry points of band_energy.
#include <cmath>

#include "band_energy/band_energy.h"
#include "band_energy/energies_cpu.h"

namespace fera {
namespace {

// Everything is divided by 4^exponent until the end, so that shares are right where energies are out of range.
template <class T>
void write_energies(const fera_band_energy_args& a, const double* energies, const int* exponents) {
  const int bands = a.filters.bands;
  T* energy = static_cast<T*>(a.energy);
  T* indicator = static_cast<T*>(a.indicator);
  for (int64_t n = 0; n < a.z.n; ++n) {
    const double* e = energies + n * (bands + 1);
    const int exponent = 2 * exponents[n];
    double sum = std::ldexp(a.eps, -exponent);
    for (int k = 0; k < bands; ++k) sum += e[k];
    for (int k = 0; k < bands; ++k) {
      if (energy != nullptr) energy[n * bands + k] = static_cast<T>(std::ldexp(e[k], exponent));
      // 0/0 only when eps is 0 and the latent is 0: no energy, no share.
      if (indicator != nullptr) indicator[n * bands + k] = static_cast<T>(sum == 0 ? 0 : e[k] / sum);
    }
    if (a.total == nullptr) continue;
    // eps is added unscaled here: scaled by a tiny latent's exponent it may leave even float64.
    double total = 0;
    for (int k = 0; k < bands; ++k) total += e[k];
    a.total[n] = std::ldexp(total, exponent) + a.eps;
  }
}

}  // namespace

size_t band_energy_workspace_cpu(const fera_band_energy_args& a) {
  return cpu::energies_workspace(cpu::source_of(a.z), a.filters);
}

size_t band_energy_backward_workspace_cpu(const fera_band_energy_backward_args& a) {
  return cpu::adjoint_workspace(cpu::source_of(a.z), a.filters);
}

}  // namespace fera

extern "C" fera_status fera_band_energy_cpu(const fera_band_energy_args* args, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("band_energy", context, band_energy_workspace_cpu(*args)));
  const double* energies;
  const int* exponents;
  cpu::run_energies(cpu::source_of(args->z), args->filters, context, &energies, &exponents);
  if (args->z.dtype == FERA_F64)
    write_energies<double>(*args, energies, exponents);
  else
    write_energies<float>(*args, energies, exponents);
  return FERA_OK;
}

extern "C" fera_status fera_band_energy_backward_cpu(const fera_band_energy_backward_args* args,
                                                     const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("band_energy_backward", context, band_energy_backward_workspace_cpu(*args)));
  const cpu::Coefficients from{nullptr, args->grad, args->indicator, args->total, args->eps, nullptr};
  cpu::run_adjoint(cpu::source_of(args->z), args->filters, from, args->dz, context);
  return FERA_OK;
}
