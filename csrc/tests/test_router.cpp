// router_softmax, its backward and latent_gate against plain loops in double.
#include <tuple>

#include "tests/band_reference.h"

using namespace test;

namespace {

struct Weights {
  int bands, hidden, experts;
  double tau;
  Values w1, b1, w2, b2;
  Array device_w1, device_b1, device_w2, device_b2;
  fera_router view{};
  Weights(fera_device device, fera_dtype t, int k, int h, int e, double temperature)
      : bands(k),
        hidden(h),
        experts(e),
        tau(temperature),
        w1(normal(int64_t{h} * k)),
        b1(normal(h)),
        w2(normal(int64_t{e} * h)),
        b2(normal(e)) {
    device_w1 = Array(device, t, w1);
    device_b1 = Array(device, t, b1);
    device_w2 = Array(device, t, w2);
    device_b2 = Array(device, t, b2);
    view = {t, k, h, e, device_w1.data(), device_b1.data(), device_w2.data(), device_b2.data(), temperature};
  }
};

Values hidden_of(const Weights& r, const double* energy) {
  Values h = r.b1;
  for (int i = 0; i < r.hidden; ++i) {
    for (int k = 0; k < r.bands; ++k) h[i] += r.w1[i * r.bands + k] * energy[k];
    h[i] = std::max(h[i], 0.0);
  }
  return h;
}

Values gate_of(const Weights& r, const double* energy) {
  const Values h = hidden_of(r, energy);
  Values g = r.b2;
  double largest = -INFINITY, sum = 0;
  for (int e = 0; e < r.experts; ++e) {
    for (int i = 0; i < r.hidden; ++i) g[e] += r.w2[e * r.hidden + i] * h[i];
    g[e] /= r.tau;
    largest = std::max(largest, g[e]);
  }
  for (double& x : g) sum += x = std::exp(x - largest);
  for (double& x : g) x /= sum;
  return g;
}

void check(fera_device device, fera_dtype t, int64_t n, int k, int h, int e, double tau, bool weights) {
  const Weights r(device, t, k, h, e, tau);
  Values energy = normal(n * k), grad = normal(n * e);
  for (double& x : energy) x = std::fabs(x);
  const Array device_energy(device, t, energy), device_grad(device, t, grad), gate(device, t, n * e);
  char what[120];
  std::snprintf(what, sizeof what, "%s %s N=%d K=%d hidden=%d E=%d", name_of(device), name_of(t), static_cast<int>(n),
                k, h, e);
  const fera_router_softmax_args a{r.view, n, device_energy.data(), gate.data()};
  EXPECT_OK(FERA_RUN(router_softmax, device, a, Threads::two));

  const Array de(device, t, n * k), dw1(device, t, int64_t{h} * k), db1(device, t, h), dw2(device, t, int64_t{e} * h),
      db2(device, t, e);
  fera_router_softmax_backward_args b{r.view,    n,          device_energy.data(), gate.data(), device_grad.data(),
                                      de.data(), dw1.data(), db1.data(),           dw2.data(),  db2.data()};
  if (!weights) b.dw1 = b.db1 = b.dw2 = b.db2 = nullptr;
  EXPECT_OK(FERA_RUN(router_softmax_backward, device, b, Threads::two));

  Values want, want_de(energy.size(), 0.0), want_w1(r.w1.size(), 0.0), want_b1(r.b1.size(), 0.0),
      want_w2(r.w2.size(), 0.0), want_b2(r.b2.size(), 0.0);
  for (int64_t s = 0; s < n; ++s) {
    const Values g = gate_of(r, &energy[s * k]), hid = hidden_of(r, &energy[s * k]);
    want.insert(want.end(), g.begin(), g.end());
    double mean = 0;
    for (int m = 0; m < e; ++m) mean += g[m] * grad[s * e + m];
    for (int i = 0; i < h; ++i) {
      double dh = 0;
      for (int m = 0; m < e; ++m) {
        const double dl = g[m] * (grad[s * e + m] - mean) / tau;
        dh += r.w2[m * h + i] * dl;
        want_w2[m * h + i] += dl * hid[i];
        if (i == 0) want_b2[m] += dl;
      }
      if (hid[i] == 0) continue;
      want_b1[i] += dh;
      for (int c = 0; c < k; ++c) {
        want_de[s * k + c] += r.w1[i * k + c] * dh;
        want_w1[i * k + c] += energy[s * k + c] * dh;
      }
    }
  }
  // The saved gate is rounded: the gradients carry its error times the cancelling terms of the softmax.
  const double tolerance = t == FERA_F64 ? 1e-12 : 2e-6, backward = t == FERA_F64 ? 1e-11 : 2e-5;
  expect_close(gate.values(), want, tolerance, std::string("gate ") + what);
  expect_close(de.values(), want_de, backward, std::string("denergy ") + what, 1e-6);
  if (!weights) return;
  expect_close(dw1.values(), want_w1, backward, std::string("dw1 ") + what, 1e-6);
  expect_close(db1.values(), want_b1, backward, std::string("db1 ") + what, 1e-6);
  expect_close(dw2.values(), want_w2, backward, std::string("dw2 ") + what, 1e-6);
  expect_close(db2.values(), want_b2, backward, std::string("db2 ") + what, 1e-6);
}

void shapes(fera_device device) {
  for (const fera_dtype t : {FERA_F32, FERA_F64}) {
    check(device, t, 4, 3, 64, 3, 0.7, true);
    check(device, t, 1, 1, 1, 1, 1.0, true);
    check(device, t, 33, 16, 256, 32, 0.7, true);
    check(device, t, 100, 4, 31, 5, 2.0, false);
    check(device, t, 2, 3, 64, 8, 0.1, true);
    check(device, t, 0, 3, 64, 3, 0.7, true);
  }
  done("router_softmax shapes", device);
}

// (12, 13) in a layout that few kernels take, and (64, 64), contiguous, which has a kernel of its own.
void latent(fera_device device) {
  for (const fera_dtype t : kDtypes)
    for (const auto& [blurs, h, w, experts, hidden] : {std::tuple{0, 12, 13, 5, 64},
                                                       {2, 12, 13, 5, 64},
                                                       {0, 64, 64, 3, 64},
                                                       {0, 64, 64, 4, 33},
                                                       {0, 64, 64, 7, 100}})
      for (const int64_t n : {4, 0, 1}) {
        const int64_t p = h == 64 ? 9 : 3;
        const Filters filters(device, compute_of(t), 3, blurs, h, w);
        const Weights r(device, compute_of(t), 3, hidden, experts, 0.7);
        Latent z(device, t, n, p, h, w, h == 64 ? Layout::contiguous : Layout::channels_last);
        Values values = normal(n * p * h * w);
        if (n == 4) values[5] = NAN;
        z.set(values);
        const Array indicator(device, compute_of(t), n * 3), gate(device, compute_of(t), n * experts);
        const fera_latent_gate_args a{
            {z.view, filters.view, 1e-8, nullptr, indicator.data(), nullptr}, r.view, gate.data()};
        EXPECT_OK(FERA_RUN(latent_gate, device, a, Threads::two));
        const Values e = energies(filters, values, n, p), got = gate.values();
        for (int64_t s = 0; s < n; ++s) {
          const Values mine(got.begin() + s * experts, got.begin() + (s + 1) * experts);
          if (n == 4 && s == 0) {
            expect_all_nan(mine, "gate of a NaN latent");
            continue;
          }
          double share[3];
          for (int k = 0; k < 3; ++k) share[k] = e[s * 3 + k] / (e[s * 3] + e[s * 3 + 1] + e[s * 3 + 2] + 1e-8);
          expect_close(mine, gate_of(r, share), t == FERA_F64 ? 1e-11 : 5e-6, std::string("latent_gate ") + name_of(t));
        }
      }
  done("latent_gate", device);
}

void errors(fera_device device) {
  const Weights r(device, FERA_F32, 3, 64, 3, 0.7);
  const Array e(device, FERA_F32, 3), g(device, FERA_F32, 3);
  const fera_router_softmax_args good{r.view, 1, e.data(), g.data()};
  fera_router_softmax_args a = good;
  a.router.tau = 0;
  expect_error(FERA_RUN(router_softmax, device, a), FERA_INVALID,
               "router_softmax: tau must be positive and finite, got 0");
  a = good;
  a.router.hidden = 257;
  expect_error(FERA_RUN(router_softmax, device, a), FERA_INVALID,
               "router_softmax: hidden must be from 1 to 256, got 257");
  a = good;
  a.router.experts = 33;
  expect_error(FERA_RUN(router_softmax, device, a), FERA_INVALID,
               "router_softmax: experts must be from 1 to 32, got 33");
  a = good;
  a.router.dtype = FERA_F16;
  expect_error(FERA_RUN(router_softmax, device, a), FERA_INVALID,
               "router_softmax: router.dtype must be float32 or float64, got 1");
  const Filters filters(device, FERA_F32, 2, 0, 8, 8);
  const Latent z(device, FERA_F32, 1, 1, 8, 8, Layout::contiguous);
  const fera_latent_gate_args l{{z.view, filters.view, 1e-8, nullptr, e.data(), nullptr}, r.view, g.data()};
  expect_error(FERA_RUN(latent_gate, device, l), FERA_INVALID,
               "latent_gate: w1 columns must be the number of bands 2, got 3");
  done("router errors", device);
}

}  // namespace

int main() {
  for (const fera_device device : devices()) {
    shapes(device);
    latent(device);
    errors(device);
  }
  return finish();
}
