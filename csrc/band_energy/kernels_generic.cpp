// The band kernels for the generic level; see common/cpu_isa.h.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "band_energy/energies_cpu.h"

#define FERA_ISA_LEVEL 0
// The order matters.
// clang-format off
#include "common/isa_push.h"
#include "band_energy/kernels_isa.h"
#include "common/isa_pop.h"
// clang-format on
