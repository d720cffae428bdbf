#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>

#include "band_energy/grid.cuh"
#include "band_energy/separable.cuh"
#include "band_energy/spectral.cuh"

namespace fera::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kThreads == kSeparableThreads, "the tiles of separable.cuh");

// Dynamic shared memory, in classes by which the occupancy is remembered; the kernels' static part comes on top.
constexpr size_t kSharedStep = 11008, kSharedClasses = 4, kSharedBudget = kSharedStep * kSharedClasses;
constexpr int kMaxDevices = 64;

// Two blocks of float64 fill the registers of a multiprocessor; float32 leaves room for three without spills.
template <class T>
constexpr int kResident = sizeof(Compute<T>) == 8 ? 2 : 3;

template <class F>
constexpr bool kSpectral = false;
template <class Real>
constexpr bool kSpectral<Spectral<Real>> = true;

template <class Real>
__device__ inline Partials partials_of(const Source& source, const Spectral<Real>& f) {
  return {f.partial, static_cast<int64_t>(source.pairs()) * f.column_tiles,
          1.0 / (static_cast<double>(source.h) * source.w)};
}
template <class Real>
__device__ inline Partials partials_of(const Source& source, const Separable<Real>& f) {
  return {f.partial, static_cast<int64_t>(source.p) * f.tiles(), 1.0};
}

// rows | columns and partial sums | a block a sample: what becomes of them | FECL: the mean
template <class T, class F>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    energies_grid(Source source, F f, Finish<Compute<T>> finish, Compute<T>* loss) {
  using Real = Compute<T>;
  extern __shared__ __align__(16) unsigned char raw[];
  __shared__ double sums[2 * (FERA_MAX_BANDS + 1)];
  __shared__ Real indicator[FERA_MAX_BANDS];
  __shared__ FinishShared shared;
  const auto grid = cooperative_groups::this_grid();
  if constexpr (kSpectral<F>) {
    spectral_rows<T>(source, f, raw);
    grid.sync();
    spectral_energy(source, f, raw);
  } else {
    separable_rows<T>(source, f, raw);
    grid.sync();
    separable_energy<T>(source, f, raw);
  }
  grid.sync();
  const Partials partials = partials_of(source, f);
  for (int64_t n = blockIdx.x; n < source.n; n += gridDim.x) {
    add_partials(partials, n, source.n, source.signals, f.bands, sums);
    finish_sample(finish, n, sums, indicator, shared);
    __syncthreads();
  }
  if (loss == nullptr) return;
  grid.sync();
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  double sum = 0;
  for (int64_t n = 0; n < source.n; ++n) sum += finish.losses[n];
  // The mean over no samples is NaN, as in torch.
  *loss = static_cast<Real>(sum / static_cast<double>(source.n));
}

template <class T, class F>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    adjoint_grid(Source source, F f, Coefficients from, Output dz) {
  using Real = Compute<T>;
  extern __shared__ __align__(16) unsigned char raw[];
  const auto grid = cooperative_groups::this_grid();
  if (from.factor != nullptr) {
    __shared__ Real c[2 * (FERA_MAX_BANDS + 1)];
    __shared__ int exponent;
    for (int64_t n = blockIdx.x; n < source.n; n += gridDim.x) {
      load_coefficients(from, n, f.bands, source.signals, c, &exponent);
      if (threadIdx.x == 0) from.factor[n] = ldexp(1.0, exponent);
    }
  }
  if constexpr (kSpectral<F>) {
    spectral_rows<T>(source, f, raw);
    grid.sync();
    spectral_filter(source, f, from, raw);
    grid.sync();
    spectral_rows_back<T>(source, f, from, dz, raw);
  } else {
    separable_rows<T>(source, f, raw);
    grid.sync();
    separable_bands(source, f, from, raw);
    grid.sync();
    separable_columns_back(source, f, raw);
    grid.sync();
    separable_rows_back<T>(source, f, from, dz, raw);
  }
}

// Filters with their pieces of the workspace, and what a launch needs to know. With a null base it only counts.
template <class F>
struct Layout {
  F filters{};
  int64_t tiles = 0;  // of the largest pass
  int64_t most_blocks = int64_t{1} << 30;
  size_t shared = 0, bytes = 0;
};

template <class Real>
void lay_out(const Source& s, const fera_filters& f, void* base, bool gradient, Layout<Spectral<Real>>* layout) {
  Workspace workspace(base);
  const int64_t planes = s.virtual_samples() * s.pairs();
  const int buffers = gradient && s.signals == 2 ? 3 : 2;
  Spectral<Real>& to = layout->filters;
  to.row = make_fft_plan(s.w);
  to.column = make_fft_plan(s.h);
  to.row_lanes = spectral_lanes<Real>(s.w, s.h, 2, planes, kSharedBudget);
  to.column_lanes = spectral_lanes<Real>(s.h, s.w, buffers, planes, kSharedBudget);
  to.row_tiles = ceil_div(s.h, 1 << to.row_lanes);
  to.column_tiles = ceil_div(s.w, 1 << to.column_lanes);
  to.spectrum = workspace.take<Complex<Real>>(planes * s.h * s.w);
  to.partial = workspace.take<double>(gradient ? 0 : planes * to.column_tiles * (f.bands + 1));
  to.masks = static_cast<const Real*>(f.table);
  to.bands = f.bands;
  layout->tiles = planes * std::max(to.row_tiles, to.column_tiles);
  layout->shared = std::max(spectral_shared_bytes<Real>(s.w, to.row_lanes, 2),
                            spectral_shared_bytes<Real>(s.h, to.column_lanes, buffers));
  layout->bytes = workspace.used();
}

template <class Real>
void lay_out(const Source& s, const fera_filters& f, void* base, bool gradient, Layout<Separable<Real>>* layout) {
  Workspace workspace(base);
  const int64_t planes = s.virtual_samples() * s.p, pixels = static_cast<int64_t>(s.h) * s.w;
  Separable<Real>& to = layout->filters;
  to.left = static_cast<const Real*>(f.table);
  to.right = static_cast<const Real*>(f.right);
  to.mix = static_cast<const Real*>(f.mix);
  to.bands = f.bands;
  to.blurs = f.blurs;
  for (int j = 0; j < f.blurs; ++j) to.reach[j] = f.reach[j];
  to.tiles_h = ceil_div(s.h, kSide);
  to.tiles_w = ceil_div(s.w, kSide);
  to.rows = workspace.take<Real>(planes * f.blurs * pixels);
  to.adjoint = workspace.take<Real>(gradient ? s.n * s.p * f.blurs * pixels : 0);
  to.partial = workspace.take<double>(gradient ? 0 : planes * to.tiles() * (f.bands + 1));
  layout->tiles = planes * f.blurs * to.tiles();
  layout->shared = sizeof(SeparableShared<Real>);
  const int slots = gradient ? f.blurs + f.bands : f.blurs;
  const size_t slot_bytes = sizeof(Real) * slots * kSide * kSide;
  if (layout->shared + slot_bytes <= kSharedBudget) {
    layout->shared += slot_bytes;
  } else {
    layout->most_blocks = kSlotBlocks;
    to.slots = workspace.take<Real>(std::min<int64_t>(kSlotBlocks, layout->tiles) * slots * kSide * kSide);
  }
  layout->bytes = workspace.used();
}

// Blocks of `kernel` that the current device holds at once; 0 where it cannot launch cooperatively. Asked once a
// device, kernel and class of shared memory.
template <auto kernel>
fera_status resident_blocks(const char* op, size_t shared, int64_t* blocks) {
  static std::atomic<int> known[kMaxDevices][kSharedClasses];  // blocks + 1; 0 is unknown
  const size_t step = shared == 0 ? 0 : (shared - 1) / kSharedStep;
  int device = 0, cooperative = 0, processors = 0, each = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return launch_status(op);
  std::atomic<int>* slot = device < kMaxDevices ? &known[device][step] : nullptr;
  int value = slot != nullptr ? slot->load(std::memory_order_relaxed) : 0;
  if (value == 0) {
    if (cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, (step + 1) * kSharedStep) != cudaSuccess)
      return launch_status(op);
    value = (cooperative != 0 ? processors * each : 0) + 1;
    if (slot != nullptr) slot->store(value, std::memory_order_relaxed);
  }
  *blocks = value - 1;
  if (*blocks > 0) return FERA_OK;
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  set_last_error(std::string(op) + ": device must be able to launch cooperatively, got device " + text(device) +
                 " of compute capability " + text(major) + "." + text(minor));
  return FERA_UNSUPPORTED;
}

template <auto kernel, class F, class... Arguments>
fera_status launch(const char* op, const Layout<F>& layout, int64_t samples, const fera_context* context,
                   Arguments... arguments) {
  int64_t blocks = 0;
  FERA_RETURN_IF_ERROR(resident_blocks<kernel>(op, layout.shared, &blocks));
  const int64_t wanted = std::max<int64_t>({1, layout.tiles, samples});
  blocks = std::min({blocks, wanted, layout.most_blocks});
  void* pointers[] = {&arguments...};
  cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                              dim3(kThreads), pointers, layout.shared, stream_of(context));
  return launch_status(op);
}

template <class T, class F>
fera_status run_energies(const char* op, const Source& source, const fera_filters& filters,
                         const Finish<Compute<T>>& finish, Compute<T>* loss, const fera_context* context) {
  Layout<F> layout;
  lay_out(source, filters, context->workspace, false, &layout);
  return launch<energies_grid<T, F>>(op, layout, source.n, context, source, layout.filters, finish, loss);
}

template <class T, class F>
fera_status run_adjoint(const char* op, const Source& source, const fera_filters& filters, const Coefficients& from,
                        const Output& dz, const fera_context* context) {
  Layout<F> layout;
  lay_out(source, filters, context->workspace, true, &layout);
  return launch<adjoint_grid<T, F>>(op, layout, source.n, context, source, layout.filters, from, dz);
}

template <class Real>
fera_status energies_of(const char* op, const Source& source, const fera_filters& filters, const Finish<Real>& finish,
                        Real* loss, const fera_context* context) {
  return dispatch(source.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<Compute<T>, Real>)
      return filters.blurs ? run_energies<T, Separable<Real>>(op, source, filters, finish, loss, context)
                           : run_energies<T, Spectral<Real>>(op, source, filters, finish, loss, context);
    return FERA_OK;
  });
}

// Sizes that the entry point will refuse need no workspace.
bool possible(const Source& s, const fera_filters& f) {
  return s.n >= 0 && s.p >= 0 && s.h >= 1 && s.h <= FERA_MAX_SIDE && s.w >= 1 && s.w <= FERA_MAX_SIDE && f.bands >= 1 &&
         f.bands <= FERA_MAX_BANDS && f.blurs >= 0 && f.blurs <= FERA_MAX_BANDS;
}

size_t workspace_bytes(const Source& source, const fera_filters& filters, bool gradient) {
  size_t bytes = 0;
  if (!possible(source, filters)) return bytes;
  dispatch_compute(source.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    Layout<Spectral<Real>> spectral;
    Layout<Separable<Real>> separable;
    if (filters.blurs)
      lay_out(source, filters, nullptr, gradient, &separable);
    else
      lay_out(source, filters, nullptr, gradient, &spectral);
    bytes = filters.blurs ? separable.bytes : spectral.bytes;
    return FERA_OK;
  });
  return bytes;
}

}  // namespace

size_t grid_energies_workspace(const Source& source, const fera_filters& filters) {
  return workspace_bytes(source, filters, false);
}
size_t grid_adjoint_workspace(const Source& source, const fera_filters& filters) {
  return workspace_bytes(source, filters, true);
}

fera_status grid_energies(const char* op, const Source& source, const fera_filters& filters,
                          const Finish<float>& finish, float* loss, const fera_context* context) {
  return energies_of(op, source, filters, finish, loss, context);
}
fera_status grid_energies(const char* op, const Source& source, const fera_filters& filters,
                          const Finish<double>& finish, double* loss, const fera_context* context) {
  return energies_of(op, source, filters, finish, loss, context);
}

fera_status grid_adjoint(const char* op, const Source& source, const fera_filters& filters, const Coefficients& from,
                         const View& dz, fera_dtype dz_dtype, const fera_context* context) {
  const Output out{dz, dz_dtype != source.dtype};
  return dispatch(source.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Real = Compute<T>;
    return filters.blurs ? run_adjoint<T, Separable<Real>>(op, source, filters, from, out, context)
                         : run_adjoint<T, Spectral<Real>>(op, source, filters, from, out, context);
  });
}

}  // namespace fera::cuda
