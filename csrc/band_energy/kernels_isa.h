// The table of kernels of one instruction set. Included after common/isa_push.h.
#pragma once

#include "band_energy/separable_isa.h"
#include "band_energy/spectral_isa.h"

namespace fera::cpu::FERA_ISA {

template <class T>
void energies_unit(const Job<T>& job, int64_t unit, void* scratch, double* partial, int* exponent) {
  if (job.filters.blurs > 0)
    separable_energies<T>(job, unit, scratch, partial, exponent);
  else
    spectral_energies<T>(job, unit, scratch, partial, exponent);
}

template <class T>
void adjoint_unit(const Job<T>& job, int64_t unit, void* scratch) {
  if (job.filters.blurs > 0)
    separable_adjoint<T>(job, unit, scratch);
  else
    spectral_adjoint<T>(job, unit, scratch);
}

void kernels(Kernels<float>* f, Kernels<double>* d) {
  *f = {lanes_of<float>, energies_unit<float>, adjoint_unit<float>};
  *d = {lanes_of<double>, energies_unit<double>, adjoint_unit<double>};
}

}  // namespace fera::cpu::FERA_ISA
