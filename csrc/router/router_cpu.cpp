// CPU entry points of router_softmax and latent_gate. The sums are small: plain loops, accumulated in double.
#include <algorithm>
#include <cmath>

#include "band_energy/energies_cpu.h"
#include "common/cpu_parallel.h"
#include "common/dispatch.h"
#include "common/simplex.h"
#include "router/router.h"

namespace fera {
namespace {

// relu(W1 e + b1); a NaN stays one.
template <class T>
void hidden_layer(const fera_router& r, const T* energy, double* hidden) {
  const T *w1 = static_cast<const T*>(r.w1), *b1 = static_cast<const T*>(r.b1);
  for (int i = 0; i < r.hidden; ++i) {
    double sum = static_cast<double>(b1[i]);
    for (int k = 0; k < r.bands; ++k) sum += static_cast<double>(w1[i * r.bands + k]) * static_cast<double>(energy[k]);
    hidden[i] = sum < 0 ? 0 : sum;
  }
}

template <class T>
void route(const fera_router& r, const T* energy, T* gate) {
  const T *w2 = static_cast<const T*>(r.w2), *b2 = static_cast<const T*>(r.b2);
  double hidden[FERA_MAX_HIDDEN], power[FERA_MAX_EXPERTS];
  hidden_layer(r, energy, hidden);
  double largest = -HUGE_VAL, sum = 0;
  for (int e = 0; e < r.experts; ++e) {
    double logit = static_cast<double>(b2[e]);
    for (int i = 0; i < r.hidden; ++i) logit += static_cast<double>(w2[e * r.hidden + i]) * hidden[i];
    power[e] = logit / r.tau;
    largest = std::max(largest, power[e]);
  }
  for (int e = 0; e < r.experts; ++e) sum += power[e] = std::exp(power[e] - largest);
  for (int e = 0; e < r.experts; ++e) gate[e] = static_cast<T>(power[e] / sum);
}

template <class T>
void route_all(const fera_router& r, int64_t n, const void* energy, void* gate, const fera_context* context) {
  cpu::parallel_for(context, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      route(r, static_cast<const T*>(energy) + i * r.bands, static_cast<T*>(gate) + i * r.experts);
  });
}

int64_t weights_count(const fera_router& r) {
  return int64_t{r.hidden} * (r.bands + 1) + int64_t{r.experts} * (r.hidden + 1);
}

// With p = softmax(l / tau): dl_e = p_e (g_e - sum_j g_j p_j) / tau; dh = W2^T dl where h > 0; de = W1^T dh.
template <class T>
void backward(const fera_router_softmax_backward_args& a, double* sums) {
  const fera_router& r = a.router;
  const int bands = r.bands, hidden = r.hidden, experts = r.experts;
  const T *w1 = static_cast<const T*>(r.w1), *w2 = static_cast<const T*>(r.w2);
  double *dw1 = sums, *db1 = dw1 + int64_t{hidden} * bands, *dw2 = db1 + hidden, *db2 = dw2 + int64_t{experts} * hidden;
  const bool weights = a.dw1 != nullptr;
  if (weights) std::fill(sums, sums + weights_count(r), 0.0);
  for (int64_t n = 0; n < a.n; ++n) {
    const T* energy = static_cast<const T*>(a.energy) + n * bands;
    const T* gate = static_cast<const T*>(a.gate) + n * experts;
    const T* grad = static_cast<const T*>(a.grad) + n * experts;
    double h[FERA_MAX_HIDDEN], dlogit[FERA_MAX_EXPERTS], denergy[FERA_MAX_BANDS] = {};
    hidden_layer(r, energy, h);
    for (int e = 0; e < experts; ++e)
      dlogit[e] = static_cast<double>(gate[e]) * above_mean(gate, grad, experts, e) / r.tau;
    for (int i = 0; i < hidden; ++i) {
      double dh = 0;
      for (int e = 0; e < experts; ++e) {
        dh += static_cast<double>(w2[e * hidden + i]) * dlogit[e];
        if (weights) dw2[e * hidden + i] += dlogit[e] * h[i];
      }
      if (h[i] <= 0) continue;
      for (int k = 0; k < bands; ++k) {
        denergy[k] += static_cast<double>(w1[i * bands + k]) * dh;
        if (weights) dw1[i * bands + k] += dh * static_cast<double>(energy[k]);
      }
      if (weights) db1[i] += dh;
    }
    if (weights)
      for (int e = 0; e < experts; ++e) db2[e] += dlogit[e];
    if (a.denergy != nullptr)
      for (int k = 0; k < bands; ++k) static_cast<T*>(a.denergy)[n * bands + k] = static_cast<T>(denergy[k]);
  }
  if (!weights) return;
  const auto write = [](const double* from, int64_t count, void* to) {
    for (int64_t i = 0; i < count; ++i) static_cast<T*>(to)[i] = static_cast<T>(from[i]);
  };
  write(dw1, int64_t{hidden} * bands, a.dw1);
  write(db1, hidden, a.db1);
  write(dw2, int64_t{experts} * hidden, a.dw2);
  write(db2, experts, a.db2);
}

}  // namespace

size_t router_softmax_workspace_cpu(const fera_router_softmax_args&) { return 0; }

size_t router_softmax_backward_workspace_cpu(const fera_router_softmax_backward_args& a) {
  return a.dw1 == nullptr ? 0 : align256(sizeof(double) * static_cast<size_t>(weights_count(a.router)));
}

size_t latent_gate_workspace_cpu(const fera_latent_gate_args& a) {
  return cpu::energies_workspace(cpu::source_of(a.energy.z), a.energy.filters);
}

}  // namespace fera

extern "C" fera_status fera_router_softmax_cpu(const fera_router_softmax_args* args, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("router_softmax", context, 0));
  return dispatch_compute(args->router.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    route_all<T>(args->router, args->n, args->energy, args->gate, context);
    return FERA_OK;
  });
}

extern "C" fera_status fera_router_softmax_backward_cpu(const fera_router_softmax_backward_args* args,
                                                        const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(
      check_workspace("router_softmax_backward", context, router_softmax_backward_workspace_cpu(*args)));
  return dispatch_compute(args->router.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    backward<T>(*args, static_cast<double*>(context->workspace));
    return FERA_OK;
  });
}

extern "C" fera_status fera_latent_gate_cpu(const fera_latent_gate_args* args, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*args));
  FERA_RETURN_IF_ERROR(check_workspace("latent_gate", context, latent_gate_workspace_cpu(*args)));
  FERA_RETURN_IF_ERROR(fera_band_energy_cpu(&args->energy, context));
  return dispatch_compute(args->router.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    route_all<T>(args->router, args->energy.z.n, args->energy.indicator, args->gate, context);
    return FERA_OK;
  });
}
