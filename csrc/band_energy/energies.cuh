// The two halves every operator on bands shares: energies of a source with what becomes of them, and the filters'
// adjoint. energies.cu chooses the variant that runs.
#pragma once

#include "band_energy/finish.cuh"
#include "band_energy/source.cuh"

namespace fera::cuda {

// Block sums of the band energies, still to be added up: band k of virtual sample v is
// scale * sum_i data[(v * count + i) * (K + 1) + k]; entry K is the whole norm squared.
struct Partials {
  double* data;
  int64_t count;
  double scale;
};

// Adds up sample n's partials of every signal in a fixed order; each warp of the block takes entries in turn. `sums`
// is shared, (signals, K+1); the block is synchronised on return.
__device__ inline void add_partials(const Partials& partials, int64_t n, int64_t samples, int signals, int bands,
                                    double* sums) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, entries = bands + 1;
  for (int e = warp; e < signals * entries; e += warps) {
    const int s = e / entries, k = e - s * entries;
    const double* from = partials.data + (s * samples + n) * partials.count * entries + k;
    double sum = 0;
    for (int64_t i = lane; i < partials.count; i += 32) sum += from[i * entries];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) sums[e] = sum * partials.scale;
  }
  __syncthreads();
}

// The power of two by which a block's values are divided before they are squared, so that no square leaves Real's
// range: of the largest magnitude, but never below the smallest whose inverse is finite.
template <class Real>
__device__ inline int block_exponent(Real largest) {
  __shared__ Real scratch[32];
  largest = block_max(largest, scratch);
  if (!(largest > 0) || !isfinite(largest)) return 0;
  return max(ilogb(largest), sizeof(Real) == 4 ? -126 : -1022);
}

// Bands summed in one walk over a tile's values.
constexpr int kSums = 4;

// Adds up entries k0 ... k0 + 3 of K + 1 over the block, in float64 beyond a thread; `to` (K+1) is the tile's row of
// partials. Values were divided by 2^exponent before they were squared. Ends with a barrier.
template <class Real>
__device__ inline void write_partials(const Real (&sum)[kSums], int k0, int bands, int exponent, double* to) {
  __shared__ double scratch[kSums][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  // Four sums over 32 lanes: two halves of a warp take two each, their halves one each. Six additions, where float64
  // is slow, not twenty.
  const bool high = lane & 16, odd = lane & 8;
  const double given0 = high ? sum[0] : sum[2], given1 = high ? sum[1] : sum[3];
  const double two0 = (high ? sum[2] : sum[0]) + __shfl_xor_sync(0xffffffffu, given0, 16);
  const double two1 = (high ? sum[3] : sum[1]) + __shfl_xor_sync(0xffffffffu, given1, 16);
  const double given = odd ? two0 : two1;
  double one = (odd ? two1 : two0) + __shfl_xor_sync(0xffffffffu, given, 8);
  for (int offset = 4; offset > 0; offset /= 2) one += __shfl_xor_sync(0xffffffffu, one, offset);
  if (lane % 8 == 0) scratch[lane / 8][warp] = one;
  __syncthreads();
  const int i = threadIdx.x;
  if (i < kSums && k0 + i <= bands) {
    double total = 0;
    for (int j = 0; j < warps; ++j) total += scratch[i][j];
    to[k0 + i] = ldexp(total, 2 * exponent);
  }
  __syncthreads();
}

// A table of spectral filters for latents of at most 32 bits.
inline const float* masks_of(const fera_filters& f) { return static_cast<const float*>(f.table); }

size_t energies_workspace(const Source& source, const fera_filters& filters);
// loss: FECL's mean over the samples, where finish has losses; else NULL.
fera_status launch_energies(const char* op, const Source& source, const fera_filters& filters,
                            const Finish<float>& finish, float* loss, const fera_context* context);
fera_status launch_energies(const char* op, const Source& source, const fera_filters& filters,
                            const Finish<double>& finish, double* loss, const fera_context* context);

size_t adjoint_workspace(const Source& source, const fera_filters& filters);
// dz is of the source's dtype or, wide, of its compute dtype.
fera_status launch_adjoint(const char* op, const Source& source, const fera_filters& filters, const Coefficients& from,
                           const View& dz, fera_dtype dz_dtype, const fera_context* context);

// FECL's loss, the mean of finish.losses, and gradient in float32, divided by factor[n], in at most two launches;
// `done` says whether a variant does that. If not, nothing was launched: energies and adjoint do it.
fera_status launch_fecl(const char* op, const Source& source, const fera_filters& filters, const Finish<float>& finish,
                        float* loss, const View& gradient, double* factor, const fera_context* context, bool* done);

// The variant that energies of such a latent take now: "cluster", "strips" or "grid"; "" where FERA_BAND_VARIANT asks
// for what there is not.
const char* band_variant(const Source& source, const fera_filters& filters);

}  // namespace fera::cuda
