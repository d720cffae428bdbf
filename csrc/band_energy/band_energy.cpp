#include "band_energy/band_energy.h"

#include "common/entry.h"

FERA_ENTRY(band_energy)
FERA_ENTRY(band_energy_backward)
