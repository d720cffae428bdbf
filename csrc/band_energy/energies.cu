#include "band_energy/energies.cuh"
#include "band_energy/separable.cuh"
#include "band_energy/spectral.cuh"

namespace fera::cuda {
namespace {

Separable separable_of(const fera_filters& f) {
  Separable s{f.table, f.right, f.mix, f.bands, f.blurs, {}};
  for (int j = 0; j < f.blurs; ++j) s.reach[j] = f.reach[j];
  return s;
}

// Grid axes y and z hold at most 65535 blocks.
fera_status check_grid(const char* op, const Source& s) {
  FERA_CHECK(op, s.p <= 65535, "planes", "at most 65535 a sample", s.p);
  FERA_CHECK(op, s.virtual_samples() <= 65535, "samples", "at most 65535 (half as many for fecl_loss)", s.n);
  return FERA_OK;
}

template <class Real>
struct SpectralLayout {
  Complex<Real>* spectrum;
  double* partial;
  int row_lanes, column_lanes, column_tiles;
  size_t bytes;

  SpectralLayout(const Source& s, const fera_filters& f, void* base, bool gradient) {
    Workspace workspace(base);
    row_lanes = lanes_for<Real>(s.w, 2);
    column_lanes = lanes_for<Real>(s.h, gradient ? 3 : 2);
    column_tiles = ceil_div(s.w, column_lanes);
    const int64_t planes = s.virtual_samples() * s.pairs();
    spectrum = workspace.take<Complex<Real>>(planes * s.h * s.w);
    partial = workspace.take<double>(gradient ? 0 : planes * column_tiles * (f.bands + 1));
    bytes = workspace.used();
  }
};

template <class Real>
struct SeparableLayout {
  Real *rows, *adjoint;
  double* partial;
  int tiles;
  size_t bytes;

  SeparableLayout(const Source& s, const fera_filters& f, void* base, bool gradient) {
    Workspace workspace(base);
    tiles = ceil_div(s.h * s.w, kTile);
    const int64_t planes = s.virtual_samples() * s.p, pixels = static_cast<int64_t>(s.h) * s.w;
    rows = workspace.take<Real>(planes * f.blurs * pixels);
    adjoint = workspace.take<Real>(gradient ? s.n * s.p * f.blurs * pixels : 0);
    partial = workspace.take<double>(gradient ? 0 : planes * tiles * (f.bands + 1));
    bytes = workspace.used();
  }
};

size_t layout_bytes(const Source& s, const fera_filters& f, bool gradient) {
  size_t bytes = 0;
  dispatch_compute(compute_dtype(s.dtype), [&](auto tag) {
    using Real = typename decltype(tag)::type;
    bytes = f.blurs ? SeparableLayout<Real>(s, f, nullptr, gradient).bytes
                    : SpectralLayout<Real>(s, f, nullptr, gradient).bytes;
    return FERA_OK;
  });
  return bytes;
}

template <class Real>
void launch_rows(const Source& s, const SpectralLayout<Real>& l, cudaStream_t stream) {
  const dim3 grid(ceil_div(s.h, l.row_lanes), s.pairs(), static_cast<unsigned>(s.virtual_samples()));
  const size_t bytes = spectral_shared_bytes<Real>(s.w, l.row_lanes, 2);
  dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<Compute<T>, Real>)
      spectral_rows<T><<<grid, kThreads, bytes, stream>>>(s, make_fft_plan(s.w), l.row_lanes, l.spectrum);
    return FERA_OK;
  });
}

template <class Real>
void spectral_energies(const Source& s, const fera_filters& f, const fera_context* context, Partials* partials) {
  const cudaStream_t stream = stream_of(context);
  const SpectralLayout<Real> l(s, f, context->workspace, false);
  launch_rows<Real>(s, l, stream);
  const dim3 grid(l.column_tiles, s.pairs(), static_cast<unsigned>(s.virtual_samples()));
  spectral_energy<Real><<<grid, kThreads, spectral_shared_bytes<Real>(s.h, l.column_lanes, 2), stream>>>(
      s.h, s.w, make_fft_plan(s.h), l.column_lanes, l.spectrum, static_cast<const Real*>(f.table), f.bands, l.partial);
  *partials = {l.partial, s.pairs() * l.column_tiles, 1.0 / (static_cast<double>(s.h) * s.w)};
}

template <class Real>
void spectral_adjoint(const Source& s, const fera_filters& f, const Coefficients& from, const View& dz,
                      const fera_context* context) {
  const cudaStream_t stream = stream_of(context);
  const SpectralLayout<Real> l(s, f, context->workspace, true);
  launch_rows<Real>(s, l, stream);
  const dim3 columns(l.column_tiles, s.pairs(), static_cast<unsigned>(s.n));
  spectral_filter<Real><<<columns, kThreads, spectral_shared_bytes<Real>(s.h, l.column_lanes, 3), stream>>>(
      s.h, s.w, make_fft_plan(s.h), l.column_lanes, l.spectrum, static_cast<const Real*>(f.table), f.bands, s.signals,
      from);
  const dim3 rows(ceil_div(s.h, l.row_lanes), s.pairs(), static_cast<unsigned>(s.n));
  const size_t bytes = spectral_shared_bytes<Real>(s.w, l.row_lanes, 2);
  dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (std::is_same_v<Compute<T>, Real>)
      spectral_rows_back<T>
          <<<rows, kThreads, bytes, stream>>>(s, make_fft_plan(s.w), l.row_lanes, l.spectrum, f.bands, from, dz);
    return FERA_OK;
  });
}

template <class T>
void separable_energies(const Source& s, const fera_filters& f, const fera_context* context, Partials* partials) {
  const cudaStream_t stream = stream_of(context);
  const SeparableLayout<Compute<T>> l(s, f, context->workspace, false);
  const dim3 grid(l.tiles, s.p, static_cast<unsigned>(s.virtual_samples()));
  separable_rows<T><<<grid, kTile, 0, stream>>>(s, separable_of(f), l.rows);
  separable_energy<T><<<grid, kTile, 0, stream>>>(s, separable_of(f), l.rows, l.partial);
  *partials = {l.partial, s.p * l.tiles, 1.0};
}

template <class T>
void separable_adjoint(const Source& s, const fera_filters& f, const Coefficients& from, const View& dz,
                       const fera_context* context) {
  using Real = Compute<T>;
  const cudaStream_t stream = stream_of(context);
  const SeparableLayout<Real> l(s, f, context->workspace, true);
  const Separable filters = separable_of(f);
  const dim3 all(l.tiles, s.p, static_cast<unsigned>(s.virtual_samples()));
  const dim3 grid(l.tiles, s.p, static_cast<unsigned>(s.n));
  separable_rows<T><<<all, kTile, 0, stream>>>(s, filters, l.rows);
  separable_bands<Real><<<grid, kTile, 0, stream>>>(s, filters, l.rows, from, l.adjoint);
  separable_columns_back<Real><<<grid, kTile, 0, stream>>>(s, filters, l.adjoint, l.rows);
  separable_rows_back<T><<<grid, kTile, 0, stream>>>(s, filters, l.rows, from, dz);
}

}  // namespace

size_t energies_workspace(const Source& s, const fera_filters& f) { return layout_bytes(s, f, false); }
size_t adjoint_workspace(const Source& s, const fera_filters& f) { return layout_bytes(s, f, true); }

fera_status launch_energies(const char* op, const Source& s, const fera_filters& f, const fera_context* context,
                            Partials* partials) {
  FERA_RETURN_IF_ERROR(check_grid(op, s));
  if (s.p == 0) {
    *partials = {nullptr, 0, 1.0};
    return FERA_OK;
  }
  FERA_RETURN_IF_ERROR(dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (f.blurs)
      separable_energies<T>(s, f, context, partials);
    else
      spectral_energies<Compute<T>>(s, f, context, partials);
    return FERA_OK;
  }));
  return launch_status(op);
}

fera_status launch_adjoint(const char* op, const Source& s, const fera_filters& f, const Coefficients& from,
                           const View& dz, const fera_context* context) {
  FERA_RETURN_IF_ERROR(check_grid(op, s));
  if (s.p == 0) return FERA_OK;
  FERA_RETURN_IF_ERROR(dispatch(s.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (f.blurs)
      separable_adjoint<T>(s, f, from, dz, context);
    else
      spectral_adjoint<Compute<T>>(s, f, from, dz, context);
    return FERA_OK;
  }));
  return launch_status(op);
}

}  // namespace fera::cuda
