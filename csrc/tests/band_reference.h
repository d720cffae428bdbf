// Filters for the tests, and what the band operators compute, by direct sums in double.
#pragma once

#include <complex>

#include "tests/harness.h"

namespace test {

// An environment variable for as long as it lives.
class Forced {
 public:
  Forced(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  Forced(const Forced&) = delete;
  Forced& operator=(const Forced&) = delete;
  ~Forced() { unsetenv(name_); }

 private:
  const char* name_;
};

// Checks each case under a plan that FERA_BAND_CLUSTER asks for; in brief runs the first few.
template <class Case>
void check_plans(const std::vector<std::pair<const char*, Case>>& cases, size_t in_brief, void (*check)(const Case&)) {
  for (size_t i = 0; i < (brief() ? std::min(in_brief, cases.size()) : cases.size()); ++i) {
    const Forced forced("FERA_BAND_CLUSTER", cases[i].first);
    check(cases[i].second);
  }
}

// Whether latents of the usual sizes take the cluster variant; not on older GPUs, nor where another one is forced.
inline bool has_clusters(fera_device device) {
  if (device == FERA_CPU) return false;
  const fera_latent z{nullptr, FERA_F32, 4, 4, 64, 64, 4 * 64 * 64, 64 * 64, 64, 1};
  fera_filters filters{};
  filters.bands = 3;
  return std::string(fera_band_variant(&z, &filters, device)) == "cluster";
}

using Spectrum = std::vector<std::complex<double>>;

// Filters of random values at one size, on a device; the values are those of the dtype.
struct Filters {
  fera_filters view{};
  Values table, right, mix;
  int h, w;
  Array device_table, device_right, device_mix;

  // blurs == 0: K symmetric masks. Else J banded matrices an axis; a spread above 1 widens their reach, and keeps rows'
  // norms near 1: FECL subtracts norms of bands, and its error grows with them.
  Filters(fera_device device, fera_dtype compute, int bands, int blurs, int height, int width, int spread = 1)
      : h(height), w(width) {
    view.bands = bands;
    view.blurs = blurs;
    if (blurs == 0) {
      const int row = w / 2 + 1;
      table = normal(int64_t{bands} * h * row);
      for (double& m : table) m *= m;
      for (int k = 0; k < bands; ++k)
        for (int v = 1; v < h; ++v)
          for (const int u : {0, w / 2})
            if ((u == 0 || w % 2 == 0) && v > h - v)
              table[(int64_t{k} * h + v) * row + u] = table[(int64_t{k} * h + h - v) * row + u];
      device_table = Array(device, compute, table);
    } else {
      table = normal(int64_t{blurs} * h * h);
      right = normal(int64_t{blurs} * w * w);
      mix = normal(int64_t{bands} * blurs);
      for (int j = 0; j < blurs; ++j) {
        view.reach[j] = std::min(spread * (2 * j + 1), std::max(h, w) - 1);
        for (const auto& [matrices, size] : {std::pair<Values*, int>{&table, h}, {&right, w}})
          for (int a = 0; a < size; ++a)
            for (int b = 0; b < size; ++b)
              if (double& m = (*matrices)[(int64_t{j} * size + a) * size + b]; std::abs(a - b) > view.reach[j])
                m = 0;
              else if (spread > 1)
                m /= std::sqrt(2.0 * view.reach[j] + 1);
      }
      device_table = Array(device, compute, table);
      device_right = Array(device, compute, right);
      device_mix = Array(device, compute, mix);
      view.right = device_right.data();
      view.mix = device_mix.data();
    }
    view.table = device_table.data();
  }

  double mask(int k, int v, int u) const {
    if (u > w / 2) {
      u = w - u;
      v = (h - v) % h;
    }
    return table[(int64_t{k} * h + v) * (w / 2 + 1) + u];
  }
};

// Direct sums along each axis; sign -1 forward, +1 inverse without 1/(HW).
inline Spectrum transform(const Spectrum& z, int h, int w, int sign) {
  const double tau = sign * 6.28318530717958647692;
  Spectrum rows(z.size()), out(z.size());
  const auto root = [&](int64_t t, int n) { return std::polar(1.0, tau * static_cast<double>(t % n) / n); };
  Spectrum roots_w(w), roots_h(h);
  for (int t = 0; t < w; ++t) roots_w[t] = root(t, w);
  for (int t = 0; t < h; ++t) roots_h[t] = root(t, h);
  const auto times = [](std::complex<double> a, std::complex<double> b) {
    return std::complex<double>(a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real());
  };
  for (int i = 0; i < h; ++i)
    for (int u = 0; u < w; ++u) {
      std::complex<double> sum = 0;
      for (int j = 0, t = 0; j < w; ++j, t = (t + u) % w) sum += times(z[int64_t{i} * w + j], roots_w[t]);
      rows[int64_t{i} * w + u] = sum;
    }
  for (int v = 0; v < h; ++v)
    for (int u = 0; u < w; ++u) {
      std::complex<double> sum = 0;
      for (int i = 0, t = 0; i < h; ++i, t = (t + v) % h) sum += times(rows[int64_t{i} * w + u], roots_h[t]);
      out[int64_t{v} * w + u] = sum;
    }
  return out;
}

// (rows, inner) matrix times (inner, columns)
inline Values multiply(const double* a, bool a_transposed, const Values& b, int rows, int inner, int columns) {
  Values out(static_cast<size_t>(rows) * columns, 0.0);
  for (int i = 0; i < rows; ++i)
    for (int l = 0; l < inner; ++l) {
      const double c = a_transposed ? a[int64_t{l} * rows + i] : a[int64_t{i} * inner + l];
      if (c != 0)
        for (int j = 0; j < columns; ++j) out[int64_t{i} * columns + j] += c * b[int64_t{l} * columns + j];
    }
  return out;
}
inline Values transposed(const Values& a, int rows, int columns) {
  Values out(a.size());
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) out[int64_t{j} * rows + i] = a[int64_t{i} * columns + j];
  return out;
}

// L z R^T, or L^T z R
inline Values blur(const Filters& f, int j, const Values& z, bool adjoint) {
  const Values left = multiply(f.table.data() + int64_t{j} * f.h * f.h, adjoint, z, f.h, f.h, f.w);
  const Values flipped = transposed(left, f.h, f.w);
  return transposed(multiply(f.right.data() + int64_t{j} * f.w * f.w, adjoint, flipped, f.w, f.w, f.h), f.w, f.h);
}

// Adds the energies of one plane to e (K).
inline void add_energies(const Filters& f, const Values& z, double* e) {
  if (f.view.blurs == 0) {
    const Spectrum s = transform(Spectrum(z.begin(), z.end()), f.h, f.w, -1);
    for (int k = 0; k < f.view.bands; ++k)
      for (int v = 0; v < f.h; ++v)
        for (int u = 0; u < f.w; ++u)
          e[k] += f.mask(k, v, u) * std::norm(s[int64_t{v} * f.w + u]) / (static_cast<double>(f.h) * f.w);
    return;
  }
  std::vector<Values> blurs;
  for (int j = 0; j < f.view.blurs; ++j) blurs.push_back(blur(f, j, z, false));
  for (int k = 0; k < f.view.bands; ++k)
    for (size_t i = 0; i < z.size(); ++i) {
      double band = 0;
      for (int j = 0; j < f.view.blurs; ++j) band += f.mix[k * f.view.blurs + j] * blurs[j][i];
      e[k] += band * band;
    }
}

// sum_k c_k H_k^T H_k z of one plane
inline Values weighted(const Filters& f, const Values& z, const double* c) {
  Values out(z.size(), 0.0);
  if (f.view.blurs == 0) {
    Spectrum s = transform(Spectrum(z.begin(), z.end()), f.h, f.w, -1);
    for (int v = 0; v < f.h; ++v)
      for (int u = 0; u < f.w; ++u) {
        double m = 0;
        for (int k = 0; k < f.view.bands; ++k) m += c[k] * f.mask(k, v, u);
        s[int64_t{v} * f.w + u] *= m / (static_cast<double>(f.h) * f.w);
      }
    s = transform(s, f.h, f.w, 1);
    for (size_t i = 0; i < z.size(); ++i) out[i] = s[i].real();
    return out;
  }
  const int blurs = f.view.blurs;
  std::vector<Values> b;
  for (int j = 0; j < blurs; ++j) b.push_back(blur(f, j, z, false));
  for (int j = 0; j < blurs; ++j) {
    Values mixed(z.size(), 0.0);
    for (int i = 0; i < blurs; ++i)
      for (int k = 0; k < f.view.bands; ++k)
        for (size_t at = 0; at < z.size(); ++at)
          mixed[at] += f.mix[k * blurs + j] * c[k] * f.mix[k * blurs + i] * b[i][at];
    const Values back = blur(f, j, mixed, true);
    for (size_t at = 0; at < z.size(); ++at) out[at] += back[at];
  }
  return out;
}

inline Values plane_of(const Values& z, int64_t plane, int64_t pixels) {
  return Values(z.begin() + plane * pixels, z.begin() + (plane + 1) * pixels);
}

// (N, K) energies of (N, P, H, W)
inline Values energies(const Filters& f, const Values& z, int64_t n, int64_t p) {
  Values e(static_cast<size_t>(n) * f.view.bands, 0.0);
  for (int64_t i = 0; i < n * p; ++i)
    add_energies(f, plane_of(z, i, int64_t{f.h} * f.w), e.data() + i / p * f.view.bands);
  return e;
}

// sum_k c[n][k] H_k^T H_k z; c has `row` entries a sample
inline Values weighted_all(const Filters& f, const Values& z, int64_t n, int64_t p, const Values& c, int row) {
  Values out;
  for (int64_t i = 0; i < n * p; ++i) {
    const Values part = weighted(f, plane_of(z, i, int64_t{f.h} * f.w), c.data() + i / p * row);
    out.insert(out.end(), part.begin(), part.end());
  }
  return out;
}

struct Size {
  int h, w;
};
constexpr Size kSizes[] = {{1, 1},  {1, 2},   {2, 3},   {3, 1},   {5, 7},   {7, 8},   {8, 13},  {13, 5},  {31, 8},
                           {1, 37}, {33, 47}, {64, 64}, {19, 52}, {72, 24}, {16, 32}, {128, 8}, {509, 3}, {4, 512}};

}  // namespace test
