// The cluster variant's other kernels, by planes: a block a plane, or a few blocks. Host side; see plane.cuh.
#pragma once

#include "band_energy/energies.cuh"

namespace fera::cuda {

// fecl: energies, loss and gradient in one launch.
enum class ClusterTask { energies, adjoint, fecl };

// Numbers asked for; 0 leaves one to the rules.
struct PlaneWish {
  int split;     // blocks of a plane
  int threads;   // of a block
  int launches;  // of FECL's energies and gradient: 1 or 2
};

// Whether this device, size, dtype and layout have such kernels and, unless they are wished for, whether the task has
// planes enough for them. Of two signals energies are FECL's.
bool plane_takes(const Source& source, const fera_filters& filters, ClusterTask task, bool wished,
                 const PlaneWish& wish);

size_t plane_workspace(const Source& source, const fera_filters& filters, const PlaneWish& wish);

// Of two signals the losses, and in a second launch their mean to `loss`.
fera_status plane_energies_launch(const char* op, const Source& source, const fera_filters& filters,
                                  const Finish<float>& finish, float* loss, const PlaneWish& wish,
                                  const fera_context* context);
// Of one signal.
fera_status plane_adjoint_launch(const char* op, const Source& source, const fera_filters& filters,
                                 const Coefficients& from, const Output& dz, const PlaneWish& wish,
                                 const fera_context* context);

// Whether FECL's planes all run side by side, so that one launch can make loss and gradient.
bool plane_fecl_fits(const Source& source, const PlaneWish& wish);
// The loss, and its gradient divided by factor[n], in one launch (only where they fit) or two.
fera_status plane_fecl_launch(const char* op, const Source& source, const fera_filters& filters,
                              const Finish<float>& finish, float* loss, const View& gradient, double* factor,
                              const PlaneWish& wish, const fera_context* context);

}  // namespace fera::cuda
