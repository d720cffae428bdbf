// router_softmax on CUDA: one block a sample; backward: a warp a hidden unit, and one block a sample for denergy.
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

constexpr int kUnits = 8;     // hidden units of a block, a warp each
constexpr int kSamples = 32;  // at a time, a lane each

__device__ inline double warp_sum(double v) {
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

template <class Real>
struct RouterGrad {
  Router<Real> router;
  int64_t n;
  const Real *energy, *gate, *grad;
  Real *denergy, *dw1, *db1, *dw2, *db2;  // denergy or the others may be NULL
};

// Up to kSamples samples and their dlogit, (E, kSamples), in shared memory: everything is read at once, because a block
// has little else to do than to wait for it.
template <class Real>
struct RouterSamples {
  Real energy[kSamples * FERA_MAX_BANDS], gate[kSamples * FERA_MAX_EXPERTS], grad[kSamples * FERA_MAX_EXPERTS];
  double dlogit[FERA_MAX_EXPERTS][kSamples];

  // Starts and ends with a barrier. Samples that are not there have no dlogit and no energy.
  __device__ void read(const RouterGrad<Real>& from, int64_t first, int count) {
    const int bands = from.router.bands, experts = from.router.experts;
    __syncthreads();
    for (int t = threadIdx.x; t < kSamples * max(bands, experts); t += blockDim.x) {
      const bool mine = t < count * experts;
      const Real g = mine ? from.gate[first * experts + t] : Real(0),
                 dg = mine ? from.grad[first * experts + t] : Real(0),
                 e = t < count * bands ? from.energy[first * bands + t] : Real(0);
      if (t < kSamples * experts) {
        gate[t] = g;
        grad[t] = dg;
      }
      if (t < kSamples * bands) energy[t] = e;
    }
    __syncthreads();
    for (int t = threadIdx.x; t < kSamples * experts; t += blockDim.x) {
      const int s = t % kSamples, e = t / kSamples;
      const Real* const g = gate + s * experts;
      dlogit[e][s] = g[e] * above_mean(g, grad + s * experts, experts, e) * from.router.inverse_tau;
    }
    __syncthreads();
  }
};

// The derivative before the relu of a hidden unit whose value there is `before`; NaN stays NaN. weight(e): of w2.
template <class Logit, class Weight>
__device__ inline double router_unit_backward(int experts, double before, const Logit& logit, const Weight& weight) {
  double sum = 0;
#pragma unroll 4
  for (int e = 0; e < experts; ++e) sum += logit(e) * weight(e);
  return before > 0 ? sum : before <= 0 ? 0 : before;
}

// The weights' gradients are sums over the samples: a warp has a hidden unit, its lanes the samples, 32 at a time.
template <class Real>
__device__ inline void router_weights_backward(const RouterGrad<Real>& to, RouterSamples<Real>& samples) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, unit = blockIdx.x * kUnits + warp;
  const int bands = to.router.bands, experts = to.router.experts, entries = experts + 1 + bands;
  const bool mine = unit < to.router.hidden;
  // Lane i has weight i of each kind.
  const Real w1 = mine && lane < bands ? to.router.w1[unit * bands + lane] : Real(0),
             w2 = mine && lane < experts ? to.router.w2[lane * to.router.hidden + unit] : Real(0),
             b1 = mine ? to.router.b1[unit] : Real(0);
  // Lane i: entries i and 32 + i of this unit's row of (dw2, db1, dw1); entry i of the biases of experts warp + i
  // kUnits.
  double low = 0, high = 0, bias = 0;
  for (int64_t first = 0; first < to.n; first += kSamples) {
    samples.read(to, first, static_cast<int>(to.n - first < kSamples ? to.n - first : kSamples));
    if (blockIdx.x == 0)
      for (int e = warp; e < experts; e += kUnits) {
        const double sum = warp_sum(samples.dlogit[e][lane]);
        if (lane == e / kUnits) bias += sum;
      }
    if (!mine) continue;
    const Real* const x = samples.energy + lane * bands;
    double before = b1;
    for (int k = 0; k < bands; ++k) before += static_cast<double>(__shfl_sync(0xffffffffu, w1, k)) * x[k];
    const double after = relu(before);
    const double dunit = router_unit_backward(
        experts, before, [&](int e) { return samples.dlogit[e][lane]; },
        [&](int e) { return __shfl_sync(0xffffffffu, w2, e); });
    const bool valid = first + lane < to.n;  // a bias of NaN is nothing that an absent sample adds
    for (int i = 0; i < entries; i += 4) {   // four at once: a shuffle waits as long for one as for four
      double four[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int k = i + j - experts - 1;
        four[j] = k >= bands || !valid ? 0
                  : k >= 0             ? dunit * x[k]
                  : k == -1            ? dunit
                                       : samples.dlogit[i + j][lane] * after;
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] += __shfl_xor_sync(0xffffffffu, four[j], offset);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (lane == (i + j) % 32) (i < 32 ? low : high) += four[j];
    }
  }
  if (blockIdx.x == 0 && warp + lane * kUnits < experts) to.db2[warp + lane * kUnits] = static_cast<Real>(bias);
  if (!mine) return;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int i = lane + 32 * j, k = i - experts - 1;
    const Real sum = static_cast<Real>(j == 0 ? low : high);
    if (i < experts)
      to.dw2[i * to.router.hidden + unit] = sum;
    else if (k == -1)
      to.db1[unit] = sum;
    else if (k < bands)
      to.dw1[unit * bands + k] = sum;
  }
}

// denergy of one sample; a thread has a hidden unit.
template <class Real>
__device__ inline void router_energy_backward(const RouterGrad<Real>& to, RouterSamples<Real>& samples, int64_t row) {
  __shared__ double scratch[32];
  const Router<Real>& router = to.router;
  const int i = threadIdx.x, bands = router.bands;
  samples.read(to, row, 1);
  double dunit = 0;
  if (i < router.hidden)
    dunit = router_unit_backward(
        router.experts, router.unit(samples.energy, i), [&](int e) { return samples.dlogit[e][0]; },
        [&](int e) { return router.w2[e * router.hidden + i]; });
  for (int k = 0; k < bands; ++k) {
    const double sum = block_sum(i < router.hidden ? dunit * router.w1[i * bands + k] : 0.0, scratch);
    if (i == 0) to.denergy[row * bands + k] = static_cast<Real>(sum);
  }
}

static_assert(32 * kUnits >= FERA_MAX_HIDDEN && FERA_MAX_EXPERTS + 1 + FERA_MAX_BANDS <= 64);

// weights: blocks of the weights' gradients; then a block a sample.
template <class Real>
__global__ void __launch_bounds__(32 * kUnits)
    router_softmax_backward(const __grid_constant__ RouterGrad<Real> to, int weights) {
  __shared__ RouterSamples<Real> samples;
  if (static_cast<int>(blockIdx.x) < weights)
    router_weights_backward(to, samples);
  else
    router_energy_backward(to, samples, blockIdx.x - weights);
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
    const int weights = a->dw1 == nullptr ? 0 : cuda::ceil_div(static_cast<int>(a->router.hidden), cuda::kUnits);
    const int64_t blocks = weights + (a->denergy == nullptr ? 0 : a->n);
    if (blocks == 0) return FERA_OK;
    const cuda::RouterGrad<Real> to{cuda::Router<Real>(a->router),       a->n,
                                    static_cast<const Real*>(a->energy), static_cast<const Real*>(a->gate),
                                    static_cast<const Real*>(a->grad),   static_cast<Real*>(a->denergy),
                                    static_cast<Real*>(a->dw1),          static_cast<Real*>(a->db1),
                                    static_cast<Real*>(a->dw2),          static_cast<Real*>(a->db2)};
    cuda::router_softmax_backward<Real>
        <<<static_cast<unsigned>(blocks), 32 * cuda::kUnits, 0, cuda::stream_of(context)>>>(to, weights);
    return FERA_OK;
  });
  return cuda::launch_status("router_softmax_backward");
}
