// The variant of the band kernels for separable filters on sm_90: host side. See strips.cuh.
#pragma once

#include "band_energy/energies.cuh"

namespace fera::cuda {

// Whether this device, size, dtype and these blurs have a kernel: energies, the adjoint and FECL alike.
bool strips_takes(const Source& source, const fera_filters& filters);

size_t strips_energies_workspace(const Source& source, const fera_filters& filters);
size_t strips_adjoint_workspace(const Source& source, const fera_filters& filters);

// loss: the mean of finish.losses, by a launch of its own; or NULL.
fera_status strips_energies_launch(const char* op, const Source& source, const fera_filters& filters,
                                   const Finish<float>& finish, float* loss, const fera_context* context);

// Of one signal.
fera_status strips_adjoint_launch(const char* op, const Source& source, const fera_filters& filters,
                                  const Coefficients& from, const Output& dz, const fera_context* context);

// FECL's loss, and its gradient divided by factor[n]: two launches, with the adjoint's workspace.
fera_status strips_fecl_launch(const char* op, const Source& source, const fera_filters& filters,
                               const Finish<float>& finish, float* loss, const View& gradient, double* factor,
                               const fera_context* context);

}  // namespace fera::cuda
