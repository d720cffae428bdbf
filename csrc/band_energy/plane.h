// The cluster variant's other kernels, for many planes: a block a plane. Host side; see plane.cuh.
#pragma once

#include "band_energy/energies.cuh"

namespace fera::cuda {

// Whether this device, size, dtype and layout have kernels of a block a plane, with so many threads if any are asked
// for, and, unless they are wished for, whether there are planes for a third of the multiprocessors: a plane's time is
// a plane's, however few there are, and a cluster has shared one of so many sooner.
bool plane_takes(const Source& source, const fera_filters& filters, bool wished, int threads);

size_t plane_workspace(const Source& source, const fera_filters& filters);

// Of two signals the losses, and in a second launch their mean to `loss`.
fera_status plane_energies_launch(const char* op, const Source& source, const fera_filters& filters,
                                  const Finish<float>& finish, float* loss, int threads, const fera_context* context);
// Of one signal.
fera_status plane_adjoint_launch(const char* op, const Source& source, const fera_filters& filters,
                                 const Coefficients& from, const Output& dz, int threads, const fera_context* context);

// Whether FECL's planes all run side by side, so that one launch can make loss and gradient.
bool plane_fecl_fits(const Source& source, int threads);
// The loss, and its gradient divided by factor[n], in one launch (only where they fit) or two.
fera_status plane_fecl_launch(const char* op, const Source& source, const fera_filters& filters,
                              const Finish<float>& finish, float* loss, const View& gradient, double* factor,
                              int threads, int launches, const fera_context* context);

}  // namespace fera::cuda
