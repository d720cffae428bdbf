#include "band_energy/band_energy.h"

#include "common/entry.h"

FERA_ENTRY(band_energy)
FERA_ENTRY(band_energy_backward)

extern "C" const char* fera_band_variant([[maybe_unused]] const fera_latent* z,
                                         [[maybe_unused]] const fera_filters* filters, fera_device device) {
  if (device == FERA_CPU) return fera_cpu_isa();
#if defined(FERA_WITH_CUDA)
  return fera::band_variant_cuda(*z, *filters);
#else
  return "";
#endif
}
