// The variant of the band kernels for the usual latent sizes on sm_90: host side. See cluster.cuh.
#pragma once

#include "band_energy/plane.h"

namespace fera::cuda {

// The environment's variable with numbers for the launches of this variant.
constexpr const char* kClusterWish = "FERA_BAND_CLUSTER";
bool cluster_wish_given();
bool cluster_wish_known();

// Whether this device, size, dtype and layout have a kernel.
bool cluster_takes(const Source& source, const fera_filters& filters, ClusterTask task);

size_t cluster_workspace(const Source& source, const fera_filters& filters);
size_t cluster_fecl_workspace(const Source& source, const fera_filters& filters);

// loss: the mean of finish.losses, by a launch of its own; or NULL.
fera_status cluster_energies_launch(const char* op, const Source& source, const fera_filters& filters,
                                    const Finish<float>& finish, float* loss, const fera_context* context);

// Of one signal.
fera_status cluster_adjoint_launch(const char* op, const Source& source, const fera_filters& filters,
                                   const Coefficients& from, const Output& dz, const fera_context* context);

// FECL's loss, and its gradient divided by factor[n]: at most two launches.
fera_status cluster_fecl_launch(const char* op, const Source& source, const fera_filters& filters,
                                const Finish<float>& finish, float* loss, const View& gradient, double* factor,
                                const fera_context* context);

}  // namespace fera::cuda
