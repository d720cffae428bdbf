// router_softmax on CUDA: one block a sample; backward: one block, a thread a hidden unit.
#include "common/simplex.h"
#include "router/router.cuh"
#include "router/router.h"

namespace fera {
namespace cuda {
namespace {

template <class Real>
__global__ void __launch_bounds__(128) router_softmax(Router<Real> router, const Real* energy, Real* gate) {
  __shared__ RouterShared shared;
  const int64_t n = blockIdx.x;
  route(router, energy + n * router.bands, shared, gate + n * router.experts);
}

// The samples are few and the weights small: every thread owns a hidden unit and walks the samples in
// order, so each weight's gradient is one running sum and nothing needs a second stage.
template <class Real>
__global__ void __launch_bounds__(FERA_MAX_HIDDEN)
    router_softmax_backward(Router<Real> router, int64_t n, const Real* energy, const Real* gate, const Real* grad,
                            Real* denergy, Real* dw1, Real* db1, Real* dw2, Real* db2) {
  __shared__ double dlogit[FERA_MAX_EXPERTS];
  __shared__ double scratch[32];
  const int i = threadIdx.x, bands = router.bands, experts = router.experts;
  const bool unit = i < router.hidden;
  double dw1_sum[FERA_MAX_BANDS], dw2_sum[FERA_MAX_EXPERTS], db1_sum = 0, db2_sum = 0;
#pragma unroll
  for (int k = 0; k < FERA_MAX_BANDS; ++k) dw1_sum[k] = 0;
#pragma unroll
  for (int e = 0; e < FERA_MAX_EXPERTS; ++e) dw2_sum[e] = 0;

  for (int64_t row = 0; row < n; ++row) {
    const Real *g = gate + row * experts, *dg = grad + row * experts, *x = energy + row * bands;
    __syncthreads();
    if (i < experts) {
      dlogit[i] = g[i] * above_mean(g, dg, experts, i) * router.inverse_tau;
      db2_sum += dlogit[i];
    }
    __syncthreads();
    double dunit = 0;
    if (unit) {
      const double before = router.unit(x, i), after = relu(before);
      double sum = 0;
#pragma unroll
      for (int e = 0; e < FERA_MAX_EXPERTS; ++e)
        if (e < experts) {
          sum += dlogit[e] * router.w2[e * router.hidden + i];
          dw2_sum[e] += dlogit[e] * after;
        }
      dunit = before > 0 ? sum : before <= 0 ? 0 : before;  // NaN stays NaN
      db1_sum += dunit;
#pragma unroll
      for (int k = 0; k < FERA_MAX_BANDS; ++k)
        if (k < bands) dw1_sum[k] += dunit * x[k];
    }
    if (denergy != nullptr)
      for (int k = 0; k < bands; ++k) {
        const double sum = block_sum(unit ? dunit * router.w1[i * bands + k] : 0.0, scratch);
        if (i == 0) denergy[row * bands + k] = static_cast<Real>(sum);
      }
  }
  if (dw1 == nullptr) return;
  if (unit) {
    db1[i] = static_cast<Real>(db1_sum);
#pragma unroll
    for (int k = 0; k < FERA_MAX_BANDS; ++k)
      if (k < bands) dw1[i * bands + k] = static_cast<Real>(dw1_sum[k]);
#pragma unroll
    for (int e = 0; e < FERA_MAX_EXPERTS; ++e)
      if (e < experts) dw2[e * router.hidden + i] = static_cast<Real>(dw2_sum[e]);
  }
  if (i < experts) db2[i] = static_cast<Real>(db2_sum);
}

}  // namespace
}  // namespace cuda

size_t router_softmax_workspace_cuda(const fera_router_softmax_args&) { return 0; }
size_t router_softmax_backward_workspace_cuda(const fera_router_softmax_backward_args&) { return 0; }

}  // namespace fera

extern "C" fera_status fera_router_softmax_cuda(const fera_router_softmax_args* a, const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("router_softmax", context, 0));
  if (a->n == 0) return FERA_OK;
  dispatch_compute(a->router.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    cuda::router_softmax<Real><<<static_cast<unsigned>(a->n), 128, 0, cuda::stream_of(context)>>>(
        cuda::Router<Real>(a->router), static_cast<const Real*>(a->energy), static_cast<Real*>(a->gate));
    return FERA_OK;
  });
  return cuda::launch_status("router_softmax");
}

extern "C" fera_status fera_router_softmax_backward_cuda(const fera_router_softmax_backward_args* a,
                                                         const fera_context* context) {
  using namespace fera;
  FERA_RETURN_IF_ERROR(check(*a));
  FERA_RETURN_IF_ERROR(check_workspace("router_softmax_backward", context, 0));
  dispatch_compute(a->router.dtype, [&](auto tag) {
    using Real = typename decltype(tag)::type;
    const int units = std::max(a->router.hidden, a->router.experts);
    cuda::router_softmax_backward<Real><<<1, cuda::ceil_div(units, 32) * 32, 0, cuda::stream_of(context)>>>(
        cuda::Router<Real>(a->router), a->n, static_cast<const Real*>(a->energy), static_cast<const Real*>(a->gate),
        static_cast<const Real*>(a->grad), static_cast<Real*>(a->denergy), static_cast<Real*>(a->dw1),
        static_cast<Real*>(a->db1), static_cast<Real*>(a->dw2), static_cast<Real*>(a->db2));
    return FERA_OK;
  });
  return cuda::launch_status("router_softmax_backward");
}
