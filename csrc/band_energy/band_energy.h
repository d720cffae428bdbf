// Scratch each device's kernels of band_energy want, and their variant on CUDA; band_energy.cpp chooses between
// devices.
#pragma once

#include "common/checks.h"

namespace fera {

size_t band_energy_workspace_cpu(const fera_band_energy_args& a);
size_t band_energy_workspace_cuda(const fera_band_energy_args& a);
size_t band_energy_backward_workspace_cpu(const fera_band_energy_backward_args& a);
size_t band_energy_backward_workspace_cuda(const fera_band_energy_backward_args& a);

const char* band_variant_cuda(const fera_latent& z, const fera_filters& filters);

}  // namespace fera
