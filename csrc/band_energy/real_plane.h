// The cluster variant's energies of one signal by real planes: a block a plane. Host side; see real_plane.cuh.
#pragma once

#include "band_energy/energies.cuh"

namespace fera::cuda {

// Numbers asked for; 0 leaves one to the rules.
struct RealWish {
  int blocks;    // of a multiprocessor
  int threads;   // of a block
  int launches;  // 2: not in a cluster
};

// Whether this device, size, dtype and layout have such kernels and, unless they are wished for, planes enough.
bool real_takes(const Source& source, const fera_filters& filters, bool wished, const RealWish& wish);

size_t real_workspace(const Source& source, const fera_filters& filters);

fera_status real_energies_launch(const char* op, const Source& source, const fera_filters& filters,
                                 const Finish<float>& finish, const RealWish& wish, const fera_context* context);

}  // namespace fera::cuda
