// fecl_loss and its backward against direct sums.
#include "tests/band_reference.h"

using namespace test;

namespace {

struct Case {
  fera_device device;
  fera_dtype dtype;
  int64_t n, p;
  Size size;
  int bands, blurs;
  Layout layout;
  double scale;
  bool same_base = false;  // d = 0
  int spread = 1;          // of the blurs' reach
  std::string what() const {
    char text[160];
    std::snprintf(text, sizeof text, "%s %s (%d, %d, %d, %d) K=%d J=%d spread %d scale %g", name_of(device),
                  name_of(dtype), static_cast<int>(n), static_cast<int>(p), size.h, size.w, bands, blurs, spread,
                  scale);
    return text;
  }
};

struct Results {
  Array loss, gradient, factor;
  Latent dfera;
};

struct Inputs {
  Values base, fera, target;
};

Results compute(const Case& c, Inputs& in, const Filters& filters, double upstream, Threads threads) {
  const auto latent = [&](Layout layout) { return Latent(c.device, c.dtype, c.n, c.p, c.size.h, c.size.w, layout); };
  Latent base = latent(Layout::contiguous), fera = latent(c.layout), target = latent(Layout::sliced);
  base.set(in.base);
  fera.set(in.fera);
  target.set(in.target);
  const fera_dtype compute = compute_of(c.dtype);
  const int64_t count = c.n * c.p * c.size.h * c.size.w;
  Results r{Array(c.device, compute, 1), Array(c.device, compute, count), Array(c.device, FERA_F64, c.n),
            latent(c.layout)};
  fera_fecl_loss_args a{base.view, fera.view,     target.view,       filters.view,
                        1e-8,      r.loss.data(), r.gradient.data(), static_cast<double*>(r.factor.data())};
  EXPECT_OK(FERA_RUN(fecl_loss, c.device, a, threads));
  const Array loss_alone(c.device, compute, 1);
  a.loss = loss_alone.data();
  a.gradient = nullptr;
  a.factor = nullptr;
  EXPECT_OK(FERA_RUN(fecl_loss, c.device, a, threads));
  expect_same_bits(r.loss.buffer, loss_alone.buffer, "loss without gradient " + c.what());
  for (const double f : r.factor.values())
    if (!(f > 0) || std::ldexp(1.0, std::ilogb(f)) != f) fail("factor %g is no power of two, %s", f, c.what().c_str());
  Values up{upstream};
  const Array grad(c.device, compute, up);
  const fera_fecl_loss_backward_args b{r.gradient.data(), static_cast<const double*>(r.factor.data()), grad.data(),
                                       r.dfera.view};
  EXPECT_OK(FERA_RUN(fecl_loss_backward, c.device, b, threads));
  return r;
}

// L of one sample as DESIGN.md writes it, and 2 dL/dE by the chain rule over its intermediate values.
double reference(const double* d2, const double* r2, double d2_whole, double r2_whole, int bands, double eps,
                 double* c_d, double* c_r) {
  const double d = std::sqrt(d2_whole), r = std::sqrt(r2_whole);
  double sum = eps, loss = 0;
  for (int k = 0; k < bands; ++k) sum += r2[k];
  double g_sum = 0, g_d = 0, g_r = 0;
  for (int k = 0; k < bands; ++k) {
    const double dk = std::sqrt(d2[k]), rk = std::sqrt(r2[k]);
    const double a = dk / (d + eps), b = rk / (r + eps), w = r2[k] / sum, gap = a - b;
    loss += w * gap * gap;
    const double g_a = 2 * w * gap, g_b = -g_a, g_w = gap * gap;
    c_d[k] = dk > 0 ? g_a / (d + eps) / dk : 0;  // 2 dL/dE = 2 dL/d|d_k| / (2 |d_k|)
    c_r[k] = (rk > 0 ? g_b / (r + eps) / rk : 0) + 2 * g_w / sum;
    g_sum -= g_w * r2[k] / sum / sum;
    g_d -= g_a * dk / (d + eps) / (d + eps);
    g_r -= g_b * rk / (r + eps) / (r + eps);
  }
  for (int k = 0; k < bands; ++k) c_r[k] += 2 * g_sum;
  c_d[bands] = d > 0 ? g_d / d : 0;
  c_r[bands] = r > 0 ? g_r / r : 0;
  return loss;
}

void check(const Case& c) {
  const bool exact = c.dtype == FERA_F64;
  const int64_t pixels = int64_t{c.size.h} * c.size.w, sample = c.p * pixels, count = c.n * sample;
  const Filters filters(c.device, compute_of(c.dtype), c.bands, c.blurs, c.size.h, c.size.w, c.spread);
  // A correction that varies slowly and a noisy residual: the two spectra differ, so the loss is not a cancellation.
  Inputs in{normal(count, c.scale), {}, normal(count, c.scale)};
  in.fera = in.base;
  for (int64_t i = 0; i < count && !c.same_base; ++i)
    in.fera[i] += c.scale * (2 + std::cos(static_cast<double>(i % c.size.w) / c.size.w));
  const double upstream = 0.75;
  const Results r = compute(c, in, filters, upstream, Threads::none);

  Values d(static_cast<size_t>(count)), residual(d.size()), want(d.size(), 0.0);
  for (int64_t i = 0; i < count; ++i) {
    d[i] = in.fera[i] - in.base[i];
    residual[i] = in.fera[i] - in.target[i];
  }
  const Values ed = energies(filters, d, c.n, c.p), er = energies(filters, residual, c.n, c.p);
  Values cd(static_cast<size_t>(c.n * (c.bands + 1))), cr(cd.size());
  double loss = c.n == 0 ? NAN : 0;
  for (int64_t n = 0; n < c.n; ++n) {
    double whole_d = 0, whole_r = 0;
    for (int64_t i = n * sample; i < (n + 1) * sample; ++i) {
      whole_d += d[i] * d[i];
      whole_r += residual[i] * residual[i];
    }
    loss += reference(&ed[n * c.bands], &er[n * c.bands], whole_d, whole_r, c.bands, 1e-8, &cd[n * (c.bands + 1)],
                      &cr[n * (c.bands + 1)]) /
            static_cast<double>(c.n);
  }
  for (const auto& [signal, coefficient] : {std::pair<Values*, Values*>{&d, &cd}, {&residual, &cr}}) {
    for (double& x : *coefficient) x *= upstream / static_cast<double>(c.n);
    const Values part = weighted_all(filters, *signal, c.n, c.p, *coefficient, c.bands + 1);
    for (int64_t i = 0; i < count; ++i)
      want[i] += part[i] + (*coefficient)[(i / sample) * (c.bands + 1) + c.bands] * (*signal)[i];
  }
  const std::string what = c.what();
  const double got = r.loss.values()[0];
  if (c.n == 0) {
    if (!std::isnan(got)) fail("the mean over no samples is %g, %s", got, what.c_str());
    return;
  }
  // L sums w_k gap_k^2: an error of 2e-7 in every norm's share moves it by up to 2 sqrt(L) 2e-7.
  expect_close({got}, {loss}, exact ? 1e-11 : 1e-5, "loss " + what, exact ? 1e-15 : 1e-12 + 4e-7 * std::sqrt(loss));
  const double floor = c.dtype == FERA_F16 ? 3e-8 * std::sqrt(static_cast<double>(count)) : 0;
  expect_close(r.dfera.values(), want,
               c.dtype == FERA_BF16  ? 6e-3
               : c.dtype == FERA_F16 ? 1e-3
               : exact               ? 1e-10
                                     : 1e-5,
               "dfera " + what, floor);
}

void sizes(fera_device device) {
  int turn = 0;
  for (const Size size : kSizes)
    for (const int blurs : {0, 2}) {
      if (brief() && size.h * size.w > 600) continue;
      if (size.h * size.w < 6 || (blurs && size.h * size.w > 3000)) continue;
      for (const fera_dtype dtype : {kDtypes[turn % 4], FERA_F32}) {
        check({device, dtype, 1 + turn % 3, 1 + turn % 3, size, 2 + turn % 3, blurs, static_cast<Layout>(turn % 4), 1});
        ++turn;
      }
    }
  done("fecl_loss sizes, dtypes, strides", device);
}

// Sizes that have kernels of their own, in one launch and in two; sanitizers get the smallest.
void usual_sizes(fera_device device) {
  check({device, FERA_F32, 3, 4, {64, 64}, 3, 0, Layout::contiguous, 1});
  check({device, FERA_BF16, 2, 5, {64, 64}, 5, 0, Layout::contiguous, 1});
  check({device, FERA_F32, 2, 4, {64, 64}, 3, 0, Layout::contiguous, 1, true});
  check({device, FERA_F32, 1, 40, {64, 64}, 3, 0, Layout::contiguous, 1});
  if (!brief()) {
    check({device, FERA_F32, 2, 3, {128, 128}, 3, 0, Layout::contiguous, 1});
    check({device, FERA_F32, 1, 16, {128, 128}, 3, 0, Layout::contiguous, 1});
    check({device, FERA_F32, 1, 16, {104, 156}, 2, 0, Layout::contiguous, 1});
    check({device, FERA_F16, 2, 4, {72, 128}, 3, 0, Layout::contiguous, 1});
    check({device, FERA_F32, 2, 2, {104, 152}, 3, 0, Layout::contiguous, 1e18});
  }
  done("fecl_loss usual sizes", device);
}

// Both ways to the gradient, and blocks, threads and clusters that are not what a latent of a size the reference can
// afford would take.
void forced_clusters(fera_device device) {
  if (!has_clusters(device)) return;
  const Layout plain = Layout::contiguous;
  check_plans<Case>(
      {
          {"clusters=3,launches=1", {device, FERA_F32, 3, 5, {64, 64}, 3, 0, plain, 1, false}},
          {"launches=2", {device, FERA_F32, 3, 5, {64, 64}, 3, 0, plain, 1, false}},
          {"threads=512,clusters=2,launches=2", {device, FERA_F16, 2, 3, {64, 64}, 5, 0, plain, 1, false}},
          {"clusters=2,launches=1", {device, FERA_F32, 2, 4, {64, 64}, 3, 0, plain, 1, true}},
          {"blocks=8,launches=1", {device, FERA_F32, 2, 3, {128, 128}, 3, 0, plain, 1, false}},
          {"blocks=8,launches=2", {device, FERA_F32, 2, 3, {128, 128}, 3, 0, plain, 1, false}},
          {"blocks=8,clusters=2,threads=512,launches=1", {device, FERA_BF16, 1, 7, {128, 128}, 3, 0, plain, 1, false}},
          {"blocks=8,clusters=3,launches=1", {device, FERA_F32, 1, 5, {128, 128}, 4, 0, plain, 1e18, false}},
          {"blocks=16,clusters=2,launches=1", {device, FERA_F32, 2, 3, {128, 128}, 3, 0, plain, 1, false}},
          {"blocks=16,pairs=1,launches=2", {device, FERA_F32, 1, 6, {128, 128}, 3, 0, plain, 1, false}},
      },
      3, check);
  // Spectra of 16 planes: several clusters a sample.
  if (!brief()) check({device, FERA_F32, 2, 16, {128, 128}, 3, 0, Layout::contiguous, 1});
  // By planes.
  check_plans<Case>(
      {
          {"blocks=1,launches=1", {device, FERA_F32, 2, 3, {128, 128}, 3, 0, plain, 1, false}},
          {"blocks=1,launches=2", {device, FERA_F32, 2, 3, {128, 128}, 3, 0, plain, 1, false}},
          {"blocks=1,threads=512,launches=1", {device, FERA_BF16, 1, 7, {128, 128}, 5, 0, plain, 1, false}},
          {"blocks=1,threads=512,launches=2", {device, FERA_F32, 2, 2, {128, 128}, 16, 0, plain, 1e18, false}},
          {"blocks=1", {device, FERA_F16, 3, 1, {128, 128}, 4, 0, plain, 1, false}},
          {"blocks=1", {device, FERA_F32, 2, 4, {128, 128}, 3, 0, plain, 1, true}},
          {"blocks=1,launches=1", {device, FERA_F32, 1, 5, {104, 156}, 3, 0, plain, 1e-15, false}},
          {"blocks=1,launches=2", {device, FERA_F32, 2, 2, {104, 156}, 4, 0, plain, 1, false}},
          {"split=1,launches=1", {device, FERA_F32, 3, 5, {64, 64}, 3, 0, plain, 1, false}},
          {"split=1,launches=2", {device, FERA_F32, 2, 3, {72, 128}, 3, 0, plain, 1, false}},
          {"split=1,launches=1", {device, FERA_F16, 2, 3, {72, 128}, 16, 0, plain, 1, false}},
          {"split=1,launches=1", {device, FERA_F32, 2, 4, {72, 128}, 3, 0, plain, 1, true}},
          {"split=1,launches=1", {device, FERA_F32, 2, 3, {64, 64}, 4, 0, plain, 1e18, false}},
          {"split=2,launches=1", {device, FERA_F32, 1, 4, {128, 128}, 3, 0, plain, 1, false}},
          {"split=2,launches=2", {device, FERA_BF16, 1, 2, {128, 128}, 5, 0, plain, 1, false}},
          {"split=4,launches=2", {device, FERA_F32, 1, 2, {104, 152}, 3, 0, plain, 1, false}},
          {"split=4,launches=1", {device, FERA_F32, 1, 3, {104, 152}, 3, 0, plain, 1, false}},
          {"split=1,launches=1", {device, FERA_F32, 1, 2, {104, 152}, 3, 0, plain, 1, false}},
          {"split=4,launches=1", {device, FERA_F32, 1, 2, {104, 156}, 3, 0, plain, 1, false}},
      },
      2, check);
  done("fecl_loss forced clusters", device);
}

// Separable filters of the usual sizes and of odd ones, with wide and narrow reaches.
void usual_blurs(fera_device device) {
  check({device, FERA_F32, 3, 4, {64, 64}, 3, 3, Layout::contiguous, 1, false, 2});
  check({device, FERA_BF16, 2, 5, {33, 58}, 5, 4, Layout::channels_last, 1, false, 3});
  check({device, FERA_F32, 2, 4, {40, 64}, 3, 3, Layout::contiguous, 1, true, 2});
  check({device, FERA_F32, 1, 20, {16, 12}, 3, 3, Layout::sliced, 1, false, 9});
  if (!brief()) {
    check({device, FERA_F32, 1, 4, {128, 128}, 3, 3, Layout::contiguous, 1, false, 3});
    check({device, FERA_F16, 2, 2, {104, 152}, 3, 3, Layout::contiguous, 1, false, 2});
    check({device, FERA_F32, 2, 2, {72, 128}, 3, 3, Layout::contiguous, 1e18, false, 3});
  }
  done("fecl_loss usual blurs", device);
}

void ranges(fera_device device) {
  for (const int blurs : {0, 2}) {
    for (const double scale : {1e18, 1e-6, 1e10})
      check({device, FERA_F32, 2, 3, {12, 10}, 3, blurs, Layout::contiguous, scale});
    check({device, FERA_F16, 2, 3, {12, 10}, 3, blurs, Layout::contiguous, 3000});
    for (const fera_dtype dtype : kDtypes)
      check({device, dtype, 2, 3, {12, 10}, 3, blurs, Layout::contiguous, 1, true});
    check({device, FERA_F32, 0, 3, {8, 8}, 3, blurs, Layout::contiguous, 1});
  }
  // All three equal: no norm, no loss, no gradient.
  const Case zero{device, FERA_F32, 2, 2, {6, 8}, 3, 0, Layout::contiguous, 1};
  const Filters filters(device, FERA_F32, 3, 0, 6, 8);
  Inputs in{normal(192), {}, {}};
  in.fera = in.target = in.base;
  const Results r = compute(zero, in, filters, 1, Threads::none);
  expect_close(r.loss.values(), {0.0}, 0, "loss of equal tensors");
  expect_close(r.dfera.values(), Values(192, 0.0), 0, "gradient of equal tensors");
  done("fecl_loss ranges, zero norms, empty", device);
}

void nan_and_bits(fera_device device) {
  for (const auto& [blurs, size] : {std::pair{0, Size{20, 26}}, {2, Size{20, 26}}, {0, Size{64, 64}}}) {
    const Case c{device, FERA_F32, 5, 3, size, 3, blurs, Layout::contiguous, 1};
    const Filters filters(device, FERA_F32, 3, blurs, size.h, size.w);
    const int64_t count = c.n * c.p * size.h * size.w;
    Inputs in{normal(count), normal(count), normal(count)};
    const Results first = compute(c, in, filters, 1, Threads::none);
    for (const Threads threads : {Threads::none, Threads::reversed, Threads::two, Threads::many}) {
      const Results again = compute(c, in, filters, 1, threads);
      expect_same_bits(first.loss.buffer, again.loss.buffer, "loss " + c.what());
      expect_same_bits(first.dfera.buffer, again.dfera.buffer, "dfera " + c.what());
    }
    in.target[3] = NAN;
    expect_all_nan(compute(c, in, filters, 1, Threads::none).loss.values(), "loss " + c.what());
  }
  done("fecl_loss NaN, same bits", device);
}

void errors(fera_device device) {
  const Filters filters(device, FERA_F32, 3, 0, 8, 8);
  const Latent z(device, FERA_F32, 1, 1, 8, 8, Layout::contiguous),
      half(device, FERA_F16, 1, 1, 8, 8, Layout::contiguous);
  const Array loss(device, FERA_F32, 1);
  fera_fecl_loss_args a{z.view, z.view, half.view, filters.view, 1e-8, loss.data(), nullptr, nullptr};
  expect_error(FERA_RUN(fecl_loss, device, a), FERA_INVALID,
               "fecl_loss: target must be (1, 1, 8, 8) of dtype 0, got (1, 1, 8, 8) of dtype 1");
  a.target = z.view;
  a.loss = nullptr;
  expect_error(FERA_RUN(fecl_loss, device, a), FERA_INVALID, "fecl_loss: loss must be a pointer, got NULL");
  a.loss = loss.data();
  a.gradient = z.view.data;
  expect_error(FERA_RUN(fecl_loss, device, a), FERA_INVALID,
               "fecl_loss: gradient and factor must be given together, got one");
  const fera_fecl_loss_backward_args b{z.view.data, nullptr, loss.data(), z.view};
  expect_error(FERA_RUN(fecl_loss_backward, device, b), FERA_INVALID,
               "fecl_loss_backward: gradient, factor and grad must be pointers, got NULL");
  done("fecl_loss errors", device);
}

}  // namespace

int main() {
  for (const fera_device device : devices()) {
    sizes(device);
    usual_sizes(device);
    usual_blurs(device);
    ranges(device);
    nan_and_bits(device);
    forced_clusters(device);
    errors(device);
  }
  return finish();
}
