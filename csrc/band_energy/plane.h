// The cluster variant's other kernels, for many planes: a block a plane. Host side; see plane.cuh.
#pragma once

#include "band_energy/energies.cuh"

namespace fera::cuda {

// Whether this device, size, dtype and layout have kernels of a block a plane, with so many threads if any are asked
// for, and, unless they are wished for, whether there are planes for a third of the multiprocessors: a plane's time is
// a plane's, however few there are, and a cluster has shared one of so many sooner.
bool plane_takes(const Source& source, const fera_filters& filters, bool wished, int threads);

size_t plane_workspace(const Source& source, const fera_filters& filters);

fera_status plane_energies_launch(const char* op, const Source& source, const fera_filters& filters,
                                  const Finish<float>& finish, int threads, const fera_context* context);
fera_status plane_adjoint_launch(const char* op, const Source& source, const fera_filters& filters,
                                 const Coefficients& from, const Output& dz, int threads, const fera_context* context);

}  // namespace fera::cuda
