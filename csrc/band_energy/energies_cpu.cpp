// Drivers of the band kernels: the plan in the workspace, units on threads, sums in a fixed order.
#include "band_energy/energies_cpu.h"

#include <cmath>

#include "common/carver.h"
#include "common/cpu_parallel.h"
#include "common/simplex.h"

namespace fera::cpu {
namespace {

constexpr double kPi = 3.14159265358979323846;

int round_up(int64_t value, int multiple) { return static_cast<int>((value + multiple - 1) / multiple * multiple); }

bool spectral(const fera_filters& filters) { return filters.blurs == 0; }

// Sizes that the entry point will refuse need no workspace.
bool possible(const Source& source, const fera_filters& f) {
  const fera_latent& z = source.whole;
  bool reaches = true;
  for (int j = 0; j < f.blurs && j < FERA_MAX_BANDS; ++j) reaches = reaches && f.reach[j] >= 0;
  return z.n >= 0 && z.p >= 0 && z.h >= 1 && z.h <= FERA_MAX_SIDE && z.w >= 1 && z.w <= FERA_MAX_SIDE &&
         z.n * z.p < (int64_t{1} << 30) && f.bands >= 1 && f.bands <= FERA_MAX_BANDS && f.blurs >= 0 &&
         f.blurs <= FERA_MAX_BANDS && reaches;
}

int64_t units_per_sample(const Source& source, const fera_filters& filters) {
  return spectral(filters) ? (source.whole.p + 1) / 2 : source.whole.p;
}

// A fixed number of pieces of scratch, by shape alone: 64, fewer where a piece is large.
int64_t slots_for(int64_t units, size_t scratch) {
  const int64_t most =
      std::max<int64_t>(8, std::min<int64_t>(64, (int64_t{64} << 20) / (static_cast<int64_t>(scratch) + 1)));
  return std::max<int64_t>(1, std::min(units, most));
}

// 8 first, but 16 = 4 4 and 32 = 8 4 rather than a pass of 2; other primes as they are.
template <class T>
void factorise(int n, FftPlan<T>* plan) {
  plan->n = n;
  plan->passes = 0;
  int twos = 0;
  while (n % 2 == 0) {
    n /= 2;
    ++twos;
  }
  const auto add = [&](int radix) { plan->radix[plan->passes++] = radix; };
  if (twos == 1) add(2);
  if (twos % 3 == 2) add(4);
  if (twos > 1 && twos % 3 == 1) {
    add(4);
    add(4);
    twos -= 4;
  }
  for (int i = 0; i < twos / 3; ++i) add(8);
  for (int prime = 3; n > 1; prime += 2)
    while (n % prime == 0) {
      add(prime);
      n /= prime;
    }
}

// e^(-2 pi i t / n) in double, half of them by symmetry.
template <class T>
void fill_roots(int n, T* cosine, T* sine) {
  for (int t = 0; 2 * t <= n; ++t) {
    double c = std::cos(2 * kPi * t / n), s = std::sin(2 * kPi * t / n);
    if (2 * t == n) s = 0;
    if (4 * t == n) c = 0;
    cosine[t] = static_cast<T>(c);
    sine[t] = static_cast<T>(-s);
    if (t > 0) {
      cosine[n - t] = static_cast<T>(c);
      sine[n - t] = static_cast<T>(t == n - t ? -s : s);
    }
  }
}

template <class T>
FftPlan<T> plan_fft(int n, Carver* carver) {
  FftPlan<T> plan;
  factorise(n, &plan);
  T* cosine = carver->take<T>(n);
  T* sine = carver->take<T>(n);
  plan.cosine = cosine;
  plan.sine = sine;
  if (carver->base != nullptr) fill_roots(n, cosine, sine);
  return plan;
}

// (2 reach + 1, padded): entry (d, w) = m[w][w + d - reach], or of the transposed matrix.
template <class T>
void fill_diagonals(const T* m, int size, int reach, int padded, bool transposed, T* out) {
  for (int d = -reach; d <= reach; ++d, out += padded) {
    const int begin = std::max(0, -d), end = std::min(size, size - d);
    for (int w = 0; w < begin; ++w) out[w] = 0;
    const int64_t first = transposed ? int64_t{d} * size : d;
    for (int w = begin; w < end; ++w) out[w] = m[int64_t{w} * (size + 1) + first];
    for (int w = std::max(begin, end); w < padded; ++w) out[w] = 0;
  }
}

// Everything but the coefficients and dz; with a null base only the pieces' sizes matter.
template <class T>
Job<T> make_job(const Source& source, const fera_filters& filters, int lanes, bool adjoint, Carver* carver,
                const fera_context* context) {
  Job<T> job{};
  job.source = source;
  job.filters = filters;
  job.planes = static_cast<int>(source.whole.p);
  job.h = static_cast<int>(source.whole.h);
  job.w = static_cast<int>(source.whole.w);
  job.padded_h = round_up(job.h, lanes);
  job.padded_w = round_up(job.w, lanes);
  if (spectral(filters)) {
    job.half = (job.w + 1) / 2;
    job.strips = (job.half + lanes - 1) / lanes;
    job.fft_w = plan_fft<T>(job.w, carver);
    job.fft_h = job.h == job.w ? job.fft_w : plan_fft<T>(job.h, carver);
    return job;
  }
  const int64_t widest = round_up(job.w, kMaxLanes);
  T* to[2][FERA_MAX_BANDS] = {};
  for (int j = 0; j < filters.blurs; ++j) {
    job.reach_h[j] = std::min(filters.reach[j], job.h - 1);
    job.reach_w[j] = std::min(filters.reach[j], job.w - 1);
    for (int t = 0; t <= adjoint; ++t) to[t][j] = carver->take<T>((2 * job.reach_w[j] + 1) * widest);
    job.right_diagonals[j] = to[0][j];
    job.right_adjoint[j] = to[1][j];
  }
  if (carver->base == nullptr) return job;
  const int kinds = adjoint ? 2 : 1;
  parallel_for(context, int64_t{kinds} * filters.blurs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int j = static_cast<int>(i / kinds), t = static_cast<int>(i % kinds);
      fill_diagonals(static_cast<const T*>(filters.right) + int64_t{j} * job.w * job.w, job.w, job.reach_w[j],
                     job.padded_w, t == 1, to[t][j]);
    }
  });
  return job;
}

// Elements of scratch for the widest lanes.
size_t scratch_bytes(const Source& source, const fera_filters& filters, bool adjoint) {
  const int64_t h = source.whole.h, w = source.whole.w;
  const int64_t padded_h = round_up(h, kMaxLanes), padded_w = round_up(w, kMaxLanes);
  int64_t elements;
  if (spectral(filters)) {
    const int64_t strips = ((w + 1) / 2 + kMaxLanes - 1) / kMaxLanes;
    const int64_t copies = adjoint ? source.signals : 1;
    elements = 2 * padded_h * padded_w + 2 * kMaxLanes * (3 * std::max(padded_w, h) + copies * 2 * strips * h);
  } else {
    const int64_t plane = h * padded_w;
    elements = 4 * 3 * padded_w + filters.blurs * 4 * padded_w + plane;
    if (adjoint) elements += plane * (1 + filters.blurs);
  }
  return align256(static_cast<size_t>(elements) * dtype_size(compute_dtype(source.whole.dtype))) + 256;
}

template <class T>
Kernels<T> kernels_of() {
  Kernels<float> f{};
  Kernels<double> d{};
#if FERA_CPU_X86
  if (cpu_isa() == Isa::avx512)
    avx512::kernels(&f, &d);
  else if (cpu_isa() == Isa::avx2)
    avx2::kernels(&f, &d);
  else
#endif
    generic::kernels(&f, &d);
  if constexpr (sizeof(T) == 8)
    return d;
  else
    return f;
}

int64_t grain_for(const Source& source, int64_t units, int64_t slots) {
  const int64_t work = source.whole.h * source.whole.w * source.signals * ((units + slots - 1) / slots);
  return std::max<int64_t>(1, 2048 / std::max<int64_t>(1, work));
}

struct EnergySums {
  double* partials;     // (units, K + 1)
  int* unit_exponents;  // (units)
  double* energies;     // (signals, N, K + 1)
  int* exponents;       // (signals, N)
  char* scratch;        // (slots, scratch bytes)
};

template <class T>
size_t energies_driver(const Source& source, const fera_filters& filters, const fera_context* context,
                       EnergySums* sums) {
  Carver carver{context == nullptr ? nullptr : static_cast<char*>(context->workspace)};
  const int64_t samples = source.signals * source.whole.n, per_sample = units_per_sample(source, filters);
  const int64_t units = samples * per_sample;
  const int count = filters.bands + 1;
  const size_t bytes = scratch_bytes(source, filters, false);
  const int64_t slots = slots_for(units, bytes);
  const Kernels<T> kernels = kernels_of<T>();
  const Job<T> job = make_job<T>(source, filters, kernels.lanes, false, &carver, context);
  *sums = {carver.take<double>(units * count), carver.take<int>(units), carver.take<double>(samples * count),
           carver.take<int>(samples), carver.take<char>(slots * static_cast<int64_t>(bytes))};
  if (context == nullptr) return carver.used;
  const EnergySums at = *sums;
  for_units(context, units, slots, grain_for(source, units, slots), [&](int64_t unit, int64_t slot) {
    kernels.energies(job, unit, at.scratch + slot * bytes, at.partials + unit * count, at.unit_exponents + unit);
  });
  for (int64_t sample = 0; sample < samples; ++sample) {
    const int64_t first = sample * per_sample;
    int most = per_sample > 0 ? at.unit_exponents[first] : 0;
    for (int64_t u = 1; u < per_sample; ++u) most = std::max(most, at.unit_exponents[first + u]);
    double* energy = at.energies + sample * count;
    for (int k = 0; k < count; ++k) energy[k] = 0;
    for (int64_t u = 0; u < per_sample; ++u)
      for (int k = 0; k < count; ++k)
        energy[k] += std::ldexp(at.partials[(first + u) * count + k], 2 * (at.unit_exponents[first + u] - most));
    at.exponents[sample] = most;
  }
  return carver.used;
}

template <class T>
void read_coefficients(const Coefficients& from, int64_t n, int bands, int count, double* c) {
  if (from.table != nullptr) {
    for (int i = 0; i < count; ++i) c[i] = from.table[n * count + i];
    return;
  }
  const T* grad = static_cast<const T*>(from.grad) + n * bands;
  const T* indicator = static_cast<const T*>(from.indicator);
  for (int k = 0; k < bands; ++k) {
    const double g = static_cast<double>(grad[k]);
    if (indicator == nullptr)
      c[k] = 2 * g;
    else if (from.total[n] == 0)  // a latent of 0 and an eps of 0: no gradient
      c[k] = 0;
    else
      c[k] = 2 * (above_mean(indicator + n * bands, grad, bands, k) + g * (from.eps / from.total[n])) / from.total[n];
  }
  c[bands] = 0;
}

// The power of two above every coefficient.
double power_above(const double* c, int count) {
  double largest = 0;
  for (int i = 0; i < count; ++i)
    if (std::isfinite(c[i])) largest = std::max(largest, std::fabs(c[i]));
  return largest > 0 ? std::ldexp(1.0, std::ilogb(largest) + 1) : 1.0;
}

template <class T>
size_t adjoint_driver(const Source& source, const fera_filters& filters, const Coefficients* from,
                      const fera_latent* dz, const fera_context* context) {
  Carver carver{context == nullptr ? nullptr : static_cast<char*>(context->workspace)};
  const int64_t samples = source.whole.n, units = samples * units_per_sample(source, filters);
  const int count = source.signals * (filters.bands + 1);
  const size_t bytes = scratch_bytes(source, filters, true);
  const int64_t slots = slots_for(units, bytes);
  const Kernels<T> kernels = kernels_of<T>();
  Job<T> job = make_job<T>(source, filters, kernels.lanes, true, &carver, context);
  double* coefficients = carver.take<double>(samples * count);
  char* scratch = carver.take<char>(slots * static_cast<int64_t>(bytes));
  if (context == nullptr) return carver.used;
  for (int64_t n = 0; n < samples; ++n) {
    read_coefficients<T>(*from, n, filters.bands, count, coefficients + n * count);
    if (from->factor != nullptr) from->factor[n] = power_above(coefficients + n * count, count);
  }
  job.coefficients = coefficients;
  job.factor = from->factor;
  job.dz = *dz;
  for_units(context, units, slots, grain_for(source, units, slots),
            [&](int64_t unit, int64_t slot) { kernels.adjoint(job, unit, scratch + slot * bytes); });
  return carver.used;
}

}  // namespace

size_t energies_workspace(const Source& source, const fera_filters& filters) {
  if (!possible(source, filters)) return 0;
  EnergySums sums;
  return source.whole.dtype == FERA_F64 ? energies_driver<double>(source, filters, nullptr, &sums)
                                        : energies_driver<float>(source, filters, nullptr, &sums);
}

void run_energies(const Source& source, const fera_filters& filters, const fera_context* context,
                  const double** energies, const int** exponents) {
  EnergySums sums;
  if (source.whole.dtype == FERA_F64)
    energies_driver<double>(source, filters, context, &sums);
  else
    energies_driver<float>(source, filters, context, &sums);
  *energies = sums.energies;
  *exponents = sums.exponents;
}

size_t adjoint_workspace(const Source& source, const fera_filters& filters) {
  if (!possible(source, filters)) return 0;
  return source.whole.dtype == FERA_F64 ? adjoint_driver<double>(source, filters, nullptr, nullptr, nullptr)
                                        : adjoint_driver<float>(source, filters, nullptr, nullptr, nullptr);
}

void run_adjoint(const Source& source, const fera_filters& filters, const Coefficients& from, const fera_latent& dz,
                 const fera_context* context) {
  if (source.whole.dtype == FERA_F64)
    adjoint_driver<double>(source, filters, &from, &dz, context);
  else
    adjoint_driver<float>(source, filters, &from, &dz, context);
}

}  // namespace fera::cpu
