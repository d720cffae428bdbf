// The variant of the band kernels that runs everywhere: one cooperative launch a call, whose blocks walk tiles of the
// planes and meet at the grid's barrier between passes. Any GPU from sm_80, any size, any dtype, at most 48 KiB of
// shared memory a block.
#pragma once

#include "band_energy/energies.cuh"

namespace fera::cuda {

size_t grid_energies_workspace(const Source& source, const fera_filters& filters);
fera_status grid_energies(const char* op, const Source& source, const fera_filters& filters,
                          const Finish<float>& finish, float* loss, const fera_context* context);
fera_status grid_energies(const char* op, const Source& source, const fera_filters& filters,
                          const Finish<double>& finish, double* loss, const fera_context* context);

size_t grid_adjoint_workspace(const Source& source, const fera_filters& filters);
fera_status grid_adjoint(const char* op, const Source& source, const fera_filters& filters, const Coefficients& from,
                         const View& dz, fera_dtype dz_dtype, const fera_context* context);

}  // namespace fera::cuda
