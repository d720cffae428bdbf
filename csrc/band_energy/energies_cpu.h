// The two halves every operator on bands shares, on the CPU: partial energies of a source, and the filters'
// adjoint. A source is a latent z, or FECL's two differences fera - base and fera - target ("signals").
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/checks.h"
#include "common/cpu_isa.h"
#include "common/cpu_types.h"
#include "fera/fera.h"

namespace fera::cpu {

constexpr int kMaxLanes = 16;

struct Source {
  fera_latent whole;     // z, or fera
  fera_latent minus[2];  // base and target (signals == 2)
  int signals;
};

inline Source source_of(const fera_latent& z) { return {z, {}, 1}; }
inline Source source_of(const fera_latent& base, const fera_latent& fera, const fera_latent& target) {
  return {fera, {base, target}, 2};
}

// n = product of radix; cosine[t] + i sine[t] = e^(-2 pi i t / n), t < n.
template <class T>
struct FftPlan {
  int n, passes, radix[10];
  const T *cosine, *sine;
};

// All that a unit of work reads. Padded widths are in elements.
template <class T>
struct Job {
  Source source;
  fera_filters filters;
  int planes, h, w;
  int padded_w, padded_h;  // multiples of the lanes
  // Spectral form.
  FftPlan<T> fft_w, fft_h;
  int half, strips;  // columns 0 .. half - 1 and their mirror images, in 2 * strips vectors
  // Separable form: right_diagonals[j] is (2 reach + 1, padded_w), entry (d, w) = right[j][w][w + d - reach];
  // right_adjoint likewise of the transposed matrices.
  int reach_h[FERA_MAX_BANDS], reach_w[FERA_MAX_BANDS];
  const T* right_diagonals[FERA_MAX_BANDS];
  const T* right_adjoint[FERA_MAX_BANDS];
  // Adjoint: dz = sum_s (sum_k c[n][s][k] H_k^T H_k s + c[n][s][K] s) / factor[n]
  const double* coefficients;  // (N, signals, K + 1)
  const double* factor;        // (N), or NULL: 1
  fera_latent dz;              // of the source's dtype or, with factor, of the compute dtype
};

// Energies of one unit (a packed pair of planes of one signal; separable: one plane), divided by 4^exponent:
// partial is (K + 1), its last entry the whole norm squared.
template <class T>
struct Kernels {
  int lanes;
  void (*energies)(const Job<T>&, int64_t unit, void* scratch, double* partial, int* exponent);
  void (*adjoint)(const Job<T>&, int64_t unit, void* scratch);
};

// Where the adjoint's coefficients come from: see fera.h.
struct Coefficients {
  const double* table;    // FECL: (N, 2, K+1)
  const void* grad;       // band energies: (N, K), compute dtype
  const void* indicator;  // with grad: (N, K), or NULL
  const double* total;    // with grad: (N), or NULL
  double eps;             // with indicator
  double* factor;         // (N) or NULL: takes the coefficients' power of two, by which dz's values stay divided
};

size_t energies_workspace(const Source& source, const fera_filters& filters);
// energies: (signals, N, K + 1) doubles, sample by sample divided by 4^exponents: (signals, N). Both lie in the
// workspace.
void run_energies(const Source& source, const fera_filters& filters, const fera_context* context,
                  const double** energies, const int** exponents);

size_t adjoint_workspace(const Source& source, const fera_filters& filters);
void run_adjoint(const Source& source, const fera_filters& filters, const Coefficients& from, const fera_latent& dz,
                 const fera_context* context);

namespace generic {
void kernels(Kernels<float>* f, Kernels<double>* d);
}
namespace avx2 {
void kernels(Kernels<float>* f, Kernels<double>* d);
}
namespace avx512 {
void kernels(Kernels<float>* f, Kernels<double>* d);
}

}  // namespace fera::cpu
