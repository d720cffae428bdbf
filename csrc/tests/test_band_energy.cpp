// band_energy and its backward against direct sums.
#include <tuple>

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
  double scale, eps;
  int spread = 1;  // of the blurs' reach
  std::string what() const {
    char text[160];
    std::snprintf(text, sizeof text, "%s %s (%d, %d, %d, %d) K=%d J=%d spread %d layout %d scale %g", name_of(device),
                  name_of(dtype), static_cast<int>(n), static_cast<int>(p), size.h, size.w, bands, blurs, spread,
                  static_cast<int>(layout), scale);
    return text;
  }
};

struct Results {
  Array energy, indicator;
  Array total;
  Latent dz, dz_of_indicator;
};

Results compute(const Case& c, Values& z, const Filters& filters, Values& grad, Threads threads) {
  const fera_dtype compute = compute_of(c.dtype);
  Latent latent(c.device, c.dtype, c.n, c.p, c.size.h, c.size.w, c.layout);
  latent.set(z);
  Results r{Array(c.device, compute, c.n * c.bands), Array(c.device, compute, c.n * c.bands),
            Array(c.device, FERA_F64, c.n), Latent(c.device, c.dtype, c.n, c.p, c.size.h, c.size.w, c.layout),
            Latent(c.device, c.dtype, c.n, c.p, c.size.h, c.size.w, Layout::contiguous)};
  fera_band_energy_args a{latent.view,     filters.view,       c.eps,
                          r.energy.data(), r.indicator.data(), static_cast<double*>(r.total.data())};
  EXPECT_OK(FERA_RUN(band_energy, c.device, a, threads));
  const Array g(c.device, compute, grad);
  fera_band_energy_backward_args b{latent.view, filters.view, g.data(), nullptr, nullptr, r.dz.view, 0.0};
  EXPECT_OK(FERA_RUN(band_energy_backward, c.device, b, threads));
  b = {latent.view,
       filters.view,
       g.data(),
       r.indicator.data(),
       static_cast<const double*>(r.total.data()),
       r.dz_of_indicator.view,
       c.eps};
  EXPECT_OK(FERA_RUN(band_energy_backward, c.device, b, threads));
  return r;
}

void check(const Case& c) {
  const fera_dtype compute_dtype = compute_of(c.dtype);
  const bool exact = c.dtype == FERA_F64;
  const Filters filters(c.device, compute_dtype, c.bands, c.blurs, c.size.h, c.size.w, c.spread);
  Values z = normal(c.n * c.p * c.size.h * c.size.w, c.scale), grad = normal(c.n * c.bands);
  const Results r = compute(c, z, filters, grad, Threads::none);
  const Values want = energies(filters, z, c.n, c.p);
  const double tolerance = exact ? 1e-12 : 2e-6;
  Values share(want.size()), twice(want.size()), of_indicator(want.size()), total(static_cast<size_t>(c.n));
  for (int64_t n = 0; n < c.n; ++n) {
    double sum = c.eps, mean = 0;
    for (int k = 0; k < c.bands; ++k) sum += want[n * c.bands + k];
    total[n] = sum;
    for (int k = 0; k < c.bands; ++k) share[n * c.bands + k] = sum == 0 ? 0 : want[n * c.bands + k] / sum;
    for (int k = 0; k < c.bands; ++k) mean += share[n * c.bands + k] * grad[n * c.bands + k];
    for (int k = 0; k < c.bands; ++k) {
      twice[n * c.bands + k] = 2 * grad[n * c.bands + k];
      of_indicator[n * c.bands + k] = sum == 0 ? 0 : 2 * (grad[n * c.bands + k] - mean) / sum;
    }
  }
  const std::string what = c.what();
  const double smallest = exact ? 0 : 1e-43;  // a few of float32's subnormal steps
  if (!want.empty() && total[0] < 1e37) expect_close(r.energy.values(), want, tolerance, "energy " + what, smallest);
  expect_close(r.total.values(), total, tolerance, "total " + what);
  expect_close(r.indicator.values(), share, tolerance, "indicator " + what, smallest);
  // 16-bit results: half a unit in the last place, 2^-9 and 2^-12, plus half's subnormals.
  const double store = c.dtype == FERA_BF16 ? 6e-3 : c.dtype == FERA_F16 ? 1e-3 : exact ? 1e-11 : 5e-6;
  // Half a step of the smallest numbers: 2^-24 in float16, 2^-149 in float32.
  const double step = c.dtype == FERA_F16 ? 3e-8 : exact ? 0 : 0.8e-45;
  const double floor = step * std::sqrt(static_cast<double>(z.size()));
  // Below 2^-126 float32 is fixed point: what the latent is multiplied by on the way, roots of unity or taps, leaves
  // products rounded to multiples of 2^-149 too. A rounding is as if the latent were off by half a step an element, a
  // sum of t taps has t of them, along each axis; the gradient, linear in the latent, has that error relative to the
  // latent's norm, whatever its own magnitude.
  double norm = 0;
  for (const double x : z) norm += x * x;
  int taps = 1;
  for (int j = 0; j < c.blurs; ++j) taps = std::max(taps, 2 * (2 * filters.view.reach[j] + 1));
  const double inner = exact || norm == 0 ? 0 : std::ldexp(std::sqrt(taps * (z.size() / norm)), -150);
  const double near = store + inner;
  expect_close(r.dz.values(), weighted_all(filters, z, c.n, c.p, twice, c.bands), near, "dz " + what, floor);
  // The gradient of a share cancels where one band has nearly everything: the tolerance is of its terms.
  const Values through = weighted_all(filters, z, c.n, c.p, of_indicator, c.bands);
  double terms = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(z.size()); ++i) {
    const double t = total[i / (c.p * c.size.h * c.size.w)];
    terms += t == 0 ? 0 : 1e2 * z[i] * z[i] / t / t;
  }
  expect_close(r.dz_of_indicator.values(), through, near, "dz through the indicator " + what,
               floor + (exact ? 1e-12 : 4e-6) * std::sqrt(terms));
}

void sizes(fera_device device) {
  int turn = 0;
  for (const Size size : kSizes)
    for (const int blurs : {0, 2}) {
      if (brief() && size.h * size.w > 600) continue;
      for (const fera_dtype dtype : kDtypes) {
        if (dtype != FERA_F32 && (size.h > 100 || size.w > 100) && blurs) continue;
        const int64_t n = 1 + turn % 3, p = 1 + turn % 4;
        check({device, dtype, n, p, size, 1 + turn % 5, blurs, static_cast<Layout>(turn % 4), 1.0, 1e-8});
        ++turn;
      }
    }
  done("band_energy sizes, dtypes, strides", device);
}

// Sizes that have kernels of their own; sanitizers get the smallest of them.
void usual_sizes(fera_device device) {
  int turn = 0;
  for (const Size size :
       {Size{64, 64}, {96, 64}, {64, 96}, {96, 96}, {72, 128}, {128, 128}, {104, 152}, {152, 104}, {104, 156}}) {
    if (brief() && turn > 0) break;
    for (const auto& [n, p, bands] : {std::tuple{1, 1, 3}, {1, 4, 1}, {2, 5, 4}, {1, 23, 3}, {2, 3, 16}}) {
      if (size.h > 64 && p * n > 6) continue;  // the reference sums directly
      const fera_dtype dtype = turn % 2 ? kDtypes[turn % 3] : FERA_F32;
      check({device, dtype, n, p, size, bands, 0, turn % 4 == 3 ? Layout::sliced : Layout::contiguous, 1.0, 1e-8});
      ++turn;
    }
  }
  // More samples than clusters fit side by side: several chunks of planes a cluster, the last one partial.
  if (!brief()) check({device, FERA_F32, 34, 9, {64, 64}, 3, 0, Layout::contiguous, 1, 1e-8});
  for (const double scale : {0.0, 1e18, 1e-20, 1e-30, 1e-41, 1e15})
    check({device, FERA_F32, 2, 3, {64, 64}, 3, 0, Layout::contiguous, scale, 1e-8});
  for (const double scale : {1e18, 1e-20})
    if (!brief()) check({device, FERA_F32, 1, 3, {104, 152}, 3, 0, Layout::contiguous, scale, 1e-8});
  done("band_energy usual sizes", device);
}

// Blocks, threads and clusters that are not what a latent of a size the reference can afford would take.
void forced_clusters(fera_device device) {
  if (!has_clusters(device)) return;
  const Layout plain = Layout::contiguous;
  check_plans<Case>(
      {
          {"threads=512,clusters=3", {device, FERA_F32, 2, 5, {64, 64}, 4, 0, plain, 1.0, 1e-8}},
          {"threads=128,pairs=1", {device, FERA_F32, 1, 4, {64, 64}, 3, 0, plain, 1.0, 1e-8}},
          {"blocks=8", {device, FERA_F32, 2, 3, {128, 128}, 3, 0, plain, 1.0, 1e-8}},
          {"blocks=8,threads=512,pairs=2", {device, FERA_BF16, 1, 5, {128, 128}, 4, 0, plain, 1.0, 1e-8}},
          {"blocks=8,clusters=2,pairs=1", {device, FERA_F32, 1, 6, {128, 128}, 3, 0, plain, 1.0, 1e-8}},
          {"blocks=16,clusters=2,threads=512", {device, FERA_F16, 1, 5, {128, 128}, 3, 0, plain, 1.0, 1e-8}},
          {"blocks=1", {device, FERA_F32, 2, 3, {128, 128}, 3, 0, plain, 1.0, 1e-8}},
          {"blocks=1,threads=512", {device, FERA_F16, 1, 1, {128, 128}, 16, 0, plain, 1.0, 1e-8}},
          {"blocks=1", {device, FERA_BF16, 3, 2, {128, 128}, 5, 0, plain, 1.0, 1e-8}},
      },
      2, check);
  if (!brief())
    for (const char* wish : {"blocks=8", "blocks=1"})
      for (const double scale : {0.0, 1e18, 1e-30}) {
        const Forced forced("FERA_BAND_CLUSTER", wish);
        check({device, FERA_F32, 1, 3, {128, 128}, 3, 0, Layout::sliced, scale, 1e-8});
      }
  const Filters filters(device, FERA_F32, 3, 0, 64, 64);
  const Latent z(device, FERA_F32, 1, 1, 64, 64, Layout::contiguous);
  const Array e(device, FERA_F32, 3);
  const fera_band_energy_args a{z.view, filters.view, 1e-8, e.data(), nullptr, nullptr};
  for (const char* wish :
       {"blocks", "blocks=x", "block=8", "threads=100", "launches=3", "real=3", "blocks=8;threads=256"}) {
    const Forced forced("FERA_BAND_CLUSTER", wish);
    expect_error(FERA_RUN(band_energy, device, a), FERA_INVALID,
                 ("band_energy: FERA_BAND_CLUSTER must be like "
                  "blocks=8,threads=256,clusters=2,pairs=1,launches=2,split=2, got " +
                  std::string(wish))
                     .c_str());
  }
  const Forced forced("FERA_BAND_CLUSTER", "blocks=16");
  expect_error(FERA_RUN(band_energy, device, a), FERA_INVALID,
               "band_energy: FERA_BAND_CLUSTER must be one that this device, size, dtype, layout and these bands have, "
               "got blocks=16");
  done("band_energy forced clusters", device);
}

// A plane in a block or a few, their energies met in a cluster or (launches=2) at the grid's barrier.
void forced_planes(fera_device device) {
  if (!has_clusters(device)) return;
  const Layout plain = Layout::contiguous, sliced = Layout::sliced;
  check_plans<Case>(
      {
          {"split=1", {device, FERA_F32, 2, 3, {64, 64}, 3, 0, plain, 1.0, 1e-8}},
          {"split=1", {device, FERA_BF16, 1, 5, {64, 64}, 16, 0, plain, 1.0, 1e-8}},
          {"split=1,launches=2", {device, FERA_F16, 3, 4, {64, 64}, 5, 0, sliced, 1.0, 1e-8}},
          {"split=1", {device, FERA_F32, 1, 4, {72, 128}, 4, 0, plain, 1.0, 1e-8}},
          {"split=1,launches=2", {device, FERA_F16, 34, 1, {72, 128}, 3, 0, plain, 1.0, 1e-8}},
          {"split=1,launches=2", {device, FERA_F32, 1, 3, {128, 128}, 3, 0, plain, 1.0, 1e-8}},
          {"split=2", {device, FERA_F32, 1, 3, {128, 128}, 16, 0, plain, 1.0, 1e-8}},
          {"split=2,launches=2", {device, FERA_BF16, 2, 2, {128, 128}, 1, 0, sliced, 1.0, 1e-8}},
          {"split=1", {device, FERA_F32, 1, 1, {104, 152}, 3, 0, plain, 1.0, 1e-8}},
          {"split=4", {device, FERA_F32, 1, 4, {104, 152}, 4, 0, plain, 1.0, 1e-8}},
          {"split=4,launches=2", {device, FERA_F16, 2, 1, {104, 152}, 2, 0, plain, 1.0, 1e-8}},
          {"split=1", {device, FERA_F32, 2, 1, {104, 156}, 3, 0, plain, 1.0, 1e-8}},
          {"split=2", {device, FERA_F32, 1, 3, {104, 156}, 4, 0, plain, 1.0, 1e-8}},
          {"split=4", {device, FERA_BF16, 1, 2, {104, 156}, 5, 0, plain, 1.0, 1e-8}},
      },
      3, check);
  for (const char* wish : {"split=1", "split=1,launches=2"})
    for (const double scale : {0.0, 1e18, 1e-20, 1e-30, 1e-41, 1e15}) {
      const Forced forced("FERA_BAND_CLUSTER", wish);
      check({device, FERA_F32, 2, 3, {64, 64}, 3, 0, Layout::contiguous, scale, 1e-8});
    }
  done("band_energy forced planes", device);
}

// A real plane in a block; test_band_variants.py has several planes of a block.
void forced_real_planes(fera_device device) {
  if (!has_clusters(device)) return;
  const Layout plain = Layout::contiguous, sliced = Layout::sliced;
  check_plans<Case>(
      {
          {"real=1", {device, FERA_F32, 2, 3, {128, 128}, 3, 0, plain, 1.0, 1e-8}},
          {"real=2,launches=2", {device, FERA_BF16, 1, 5, {128, 128}, 16, 0, sliced, 1.0, 1e-8}},
          {"real=1", {device, FERA_F16, 1, 16, {128, 128}, 4, 0, plain, 1.0, 1e-8}},
          {"real=2", {device, FERA_F32, 3, 1, {128, 128}, 5, 0, sliced, 1.0, 1e-8}},
          {"real=1,launches=2", {device, FERA_F32, 2, 17, {128, 128}, 1, 0, plain, 1.0, 1e-8}},
      },
      2, check);
  if (!brief())
    for (const char* wish : {"real=1", "real=2,launches=2"})
      for (const double scale : {0.0, 1e18, 1e-20, 1e-30, 1e-41, 1e15}) {
        const Forced forced("FERA_BAND_CLUSTER", wish);
        check({device, FERA_F32, 2, 3, {128, 128}, 3, 0, Layout::contiguous, scale, 1e-8});
      }
  const Filters filters(device, FERA_F32, 3, 0, 64, 64);
  const Latent z(device, FERA_F32, 1, 1, 64, 64, Layout::contiguous);
  const Array e(device, FERA_F32, 3);
  const fera_band_energy_args a{z.view, filters.view, 1e-8, e.data(), nullptr, nullptr};
  const Forced forced("FERA_BAND_CLUSTER", "real=1");
  expect_error(FERA_RUN(band_energy, device, a), FERA_INVALID,
               "band_energy: FERA_BAND_CLUSTER must be one that this device, size, dtype, layout and these bands have, "
               "got real=1");
  done("band_energy forced real planes", device);
}

// Separable filters of the usual sizes and of odd ones, with wide and narrow reaches.
void usual_blurs(fera_device device) {
  const struct {
    fera_dtype dtype;
    int64_t n, p;
    Size size;
    int bands, blurs;
    Layout layout;
    int spread;
  } cases[] = {
      {FERA_F32, 2, 4, {64, 64}, 3, 3, Layout::contiguous, 2},
      {FERA_F32, 1, 3, {37, 130}, 2, 1, Layout::sliced, 9},
      {FERA_F16, 3, 5, {64, 64}, 5, 4, Layout::contiguous, 1},
      {FERA_BF16, 1, 2, {9, 66}, 3, 3, Layout::channels_last, 3},
      {FERA_F32, 34, 2, {12, 20}, 3, 3, Layout::contiguous, 30},
      {FERA_F32, 1, 23, {36, 44}, 16, 4, Layout::transposed, 2},
      {FERA_F32, 1, 4, {128, 128}, 3, 3, Layout::contiguous, 3},
      {FERA_BF16, 2, 2, {104, 152}, 3, 3, Layout::contiguous, 3},
      {FERA_F32, 1, 3, {152, 104}, 4, 4, Layout::contiguous, 2},
      {FERA_F32, 1, 1, {200, 180}, 3, 3, Layout::contiguous, 5},
      {FERA_F32, 5, 9, {72, 128}, 3, 3, Layout::contiguous, 3},
  };
  int turn = 0;
  for (const auto& c : cases)
    if (!brief() || turn++ < 5)
      check({device, c.dtype, c.n, c.p, c.size, c.bands, c.blurs, c.layout, 1.0, 1e-8, c.spread});
  for (const double scale : {0.0, 1e18, 1e-20, 1e-30, 1e-41, 1e15})
    check({device, FERA_F32, 2, 3, {32, 40}, 3, 3, Layout::contiguous, scale, 1e-8, 2});
  done("band_energy usual blurs", device);
}

// Which variant runs, without a pointer: the CPU's instruction set, or what FERA_BAND_VARIANT and the device leave.
void variant(fera_device device) {
  fera_latent z{nullptr, FERA_F32, 4, 4, 64, 64, 4 * 64 * 64, 64 * 64, 64, 1};
  fera_filters filters{};
  filters.bands = 3;
  const auto found = [&] { return std::string(fera_band_variant(&z, &filters, device)); };
  if (device == FERA_CPU) {
    if (found() != fera_cpu_isa()) fail("the CPU's variant is %s", found().c_str());
    if (!fera_has_cuda() && *fera_band_variant(&z, &filters, FERA_CUDA) != 0) fail("a variant in a build without CUDA");
    return done("fera_band_variant", device);
  }
  const char* value = std::getenv("FERA_BAND_VARIANT");
  const std::string wish = value == nullptr || *value == 0 ? "auto" : value;
  // What a latent has beside the grid; a variant it does not have is refused when it is asked for.
  const auto expect = [&](const std::string& other, const char* what) {
    const std::string got = found();
    const bool right = wish == "auto"   ? got == other || got == "grid"
                       : wish == "grid" ? got == "grid"
                       : wish == other  ? got == other || got.empty()  // the device may be too old
                                        : got.empty();
    if (!right) fail("%s takes \"%s\" where %s is asked for", what, got.c_str(), wish.c_str());
  };
  expect("cluster", "64 x 64");
  z.dtype = FERA_F64;
  expect("grid", "float64");
  filters.blurs = 2;
  expect("grid", "float64 blurs");
  z.dtype = FERA_F32;
  expect("strips", "separable filters");
  z.stride_w = 4;
  expect("strips", "separable filters and a stride along W");
  filters.blurs = 5;
  expect("grid", "five blurs");
  filters.blurs = 0;
  expect("grid", "a stride along W");
  done("fera_band_variant", device);
}

void ranges(fera_device device) {
  for (const int blurs : {0, 3})
    for (const double scale : {0.0, 1e18, 1e-20, 1e-30, 1e15, 100.0})
      for (const double eps : {1e-8, 0.0})
        check({device, FERA_F32, 2, 3, {12, 10}, 3, blurs, Layout::contiguous, scale, eps});
  for (const fera_dtype dtype : {FERA_F16, FERA_BF16, FERA_F64})
    for (const double scale : {0.0, 300.0, 1e-3})
      check({device, dtype, 2, 2, {12, 10}, 16, 0, Layout::contiguous, scale, 1e-8});
  check({device, FERA_F32, 0, 3, {8, 8}, 3, 0, Layout::contiguous, 1, 1e-8});
  check({device, FERA_F32, 2, 0, {8, 8}, 3, 0, Layout::contiguous, 1, 1e-8});
  check({device, FERA_F32, 2, 0, {8, 8}, 3, 2, Layout::contiguous, 1, 1e-8});
  check({device, FERA_F32, 70, 3, {4, 6}, 2, 0, Layout::contiguous, 1, 1e-8});
  done("band_energy ranges and empty sizes", device);
}

void nan_stays(fera_device device) {
  for (const int blurs : {0, 2})
    for (const fera_dtype dtype : kDtypes) {
      for (const Size size : {Size{9, 8}, Size{64, 64}}) {
        if (blurs && size.h == 64) continue;
        const Case c{device, dtype, 3, 2, size, 3, blurs, Layout::contiguous, 1, 1e-8};
        const Filters filters(device, compute_of(dtype), c.bands, blurs, c.size.h, c.size.w);
        const int64_t sample = c.p * size.h * size.w, spoiled = sample + sample / 3;
        Values z = normal(c.n * sample), grad(static_cast<size_t>(c.n * c.bands), 1.0);
        z[spoiled] = NAN;
        const Results r = compute(c, z, filters, grad, Threads::none);
        for (const Values& v : {r.energy.values(), r.indicator.values()})
          for (int64_t n = 0; n < c.n; ++n)
            if (n == 1)
              expect_all_nan(Values(v.begin() + n * 3, v.begin() + n * 3 + 3), "NaN " + c.what());
            else
              for (int k = 0; k < 3; ++k)
                if (!std::isfinite(v[n * 3 + k])) fail("a NaN spread to another sample, %s", c.what().c_str());
        const Values dz = r.dz.values();
        if (!std::isnan(dz[spoiled])) fail("a NaN was lost backward, %s", c.what().c_str());
        if (!std::isfinite(dz[0])) fail("a NaN spread backward, %s", c.what().c_str());
      }
    }
  done("band_energy NaN", device);
}

void deterministic(fera_device device) {
  for (const int blurs : {0, 3})
    for (const Size size : {Size{24, 20}, Size{104, 19}, Size{64, 64}}) {
      if (blurs && size.h == 64) continue;
      const Case c{device, FERA_F32, 5, size.h == 64 ? 9 : 3, size, 3, blurs, Layout::contiguous, 1, 1e-8};
      const Filters filters(device, FERA_F32, 3, blurs, size.h, size.w);
      Values z = normal(c.n * c.p * size.h * size.w), grad = normal(c.n * 3);
      const Results first = compute(c, z, filters, grad, Threads::none);
      for (const Threads threads : {Threads::none, Threads::reversed, Threads::two, Threads::many}) {
        const Results again = compute(c, z, filters, grad, threads);
        expect_same_bits(first.energy.buffer, again.energy.buffer, "energy " + c.what());
        expect_same_bits(first.dz.buffer, again.dz.buffer, "dz " + c.what());
        expect_same_bits(first.dz_of_indicator.buffer, again.dz_of_indicator.buffer, "dz " + c.what());
      }
    }
  done("band_energy same bits", device);
}

void errors(fera_device device) {
  const Filters filters(device, FERA_F32, 3, 0, 8, 8);
  const Latent z(device, FERA_F32, 1, 1, 8, 8, Layout::contiguous);
  const Array e(device, FERA_F32, 3);
  const fera_band_energy_args good{z.view, filters.view, 1e-8, e.data(), nullptr, nullptr};
  fera_band_energy_args a = good;
  a.z.h = 513;
  expect_error(FERA_RUN(band_energy, device, a), FERA_INVALID, "band_energy: z height must be from 1 to 512, got 513");
  a = good;
  a.z.w = 0;
  expect_error(FERA_RUN(band_energy, device, a), FERA_INVALID, "band_energy: z width must be from 1 to 512, got 0");
  a = good;
  a.filters.bands = 17;
  expect_error(FERA_RUN(band_energy, device, a), FERA_INVALID, "band_energy: bands must be from 1 to 16, got 17");
  a = good;
  a.z.data = nullptr;
  expect_error(FERA_RUN(band_energy, device, a), FERA_INVALID, "band_energy: z must be a pointer, got NULL");
  a = good;
  a.eps = -1;
  expect_error(FERA_RUN(band_energy, device, a), FERA_INVALID,
               "band_energy: eps must be finite and not negative, got -1");
  const size_t bytes = fera_band_energy_workspace(&good, device);
  if (bytes > 0) {
    fera_context context{};
    const fera_status status =
        device == FERA_CPU ? fera_band_energy_cpu(&good, &context) : fera_band_energy_cuda(&good, &context);
    char sentence[160];
    std::snprintf(sentence, sizeof sentence, "band_energy: workspace must be at least %zu bytes, got 0", bytes);
    expect_error(status, FERA_INVALID, sentence);
  }
  Latent dz(device, FERA_F32, 1, 1, 8, 9, Layout::contiguous);
  const fera_band_energy_backward_args b{z.view, filters.view, e.data(), nullptr, nullptr, dz.view, 0.0};
  expect_error(FERA_RUN(band_energy_backward, device, b), FERA_INVALID,
               "band_energy_backward: dz must be (1, 1, 8, 8) of dtype 0, got (1, 1, 8, 9) of dtype 0");
  done("band_energy errors", device);
}

}  // namespace

int main() {
  for (const fera_device device : devices()) {
    sizes(device);
    usual_sizes(device);
    forced_clusters(device);
    forced_planes(device);
    forced_real_planes(device);
    usual_blurs(device);
    variant(device);
    ranges(device);
    nan_stays(device);
    deterministic(device);
    errors(device);
  }
  return finish();
}
