// Scratch each device's kernels of band_energy want; fera_<op>_workspace in band_energy.cpp chooses between them.
#pragma once

#include "common/checks.h"

namespace fera {

size_t band_energy_workspace_cpu(const fera_band_energy_args& a);
size_t band_energy_workspace_cuda(const fera_band_energy_args& a);
size_t band_energy_backward_workspace_cpu(const fera_band_energy_backward_args& a);
size_t band_energy_backward_workspace_cuda(const fera_band_energy_backward_args& a);

}  // namespace fera
