// The two halves every operator on bands shares: partial energies of a source, and the filters' adjoint.
#pragma once

#include "band_energy/source.cuh"

namespace fera::cuda {

// Block sums of the band energies, still to be added up: band k of virtual sample v is
// scale * sum_i data[(v * count + i) * (K + 1) + k]; entry K is the whole norm squared.
struct Partials {
  double* data;
  int count;
  double scale;
};

// Adds up one virtual sample's partials in a fixed order; each warp of the block takes bands in turn.
// `sums` is shared, (K + 1); the block is synchronised on return.
__device__ inline void add_partials(const Partials& partials, int64_t v, int bands, double* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const double* from = partials.data + v * partials.count * (bands + 1);
  for (int k = warp; k <= bands; k += warps) {
    double sum = 0;
    for (int i = lane; i < partials.count; i += 32) sum += from[static_cast<int64_t>(i) * (bands + 1) + k];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) sums[k] = sum * partials.scale;
  }
  __syncthreads();
}

size_t energies_workspace(const Source& source, const fera_filters& filters);
fera_status launch_energies(const char* op, const Source& source, const fera_filters& filters,
                            const fera_context* context, Partials* partials);

size_t adjoint_workspace(const Source& source, const fera_filters& filters);
fera_status launch_adjoint(const char* op, const Source& source, const fera_filters& filters, const Coefficients& from,
                           const View& dz, const fera_context* context);

// Writes energy, indicator and total of sample n from its summed energies; thread 0 alone calls it.
template <class Real>
__device__ inline void write_indicator(const double* sums, int bands, double eps, int64_t n, Real* energy,
                                       Real* indicator, double* total) {
  double sum = eps;
  for (int k = 0; k < bands; ++k) sum += sums[k];
  for (int k = 0; k < bands; ++k) {
    if (energy != nullptr) energy[n * bands + k] = static_cast<Real>(sums[k]);
    // 0/0 only when eps is 0 and the latent is 0: no energy, no share.
    if (indicator != nullptr) indicator[n * bands + k] = static_cast<Real>(sum == 0 ? 0 : sums[k] / sum);
  }
  if (total != nullptr) total[n] = sum;
}

}  // namespace fera::cuda
