// finish.cuh by one warp, for the usual routers: nothing is shared and nothing is waited for.
#pragma once

#include "band_energy/finish.cuh"

namespace fera::cuda {

// Up to 4 bands: every lane has the whole indicator; the absent bands are 0.
struct Indicator {
  float value[4];

  __device__ __forceinline__ Indicator(const Finish<float>& f, int64_t n, const double* sums) {
    double sum = f.eps;
    for (int k = 0; k < f.bands; ++k) sum += sums[k];
    // 0/0 only when eps is 0 and the latent is 0: no energy, no share.
    const double inverse = sum == 0 ? 0 : 1 / sum;
#pragma unroll
    for (int k = 0; k < 4; ++k) value[k] = k < f.bands ? static_cast<float>(sums[k] * inverse) : 0;
    const int k = threadIdx.x % 32;
    if (k >= f.bands) return;
    if (f.energy != nullptr) f.energy[n * f.bands + k] = static_cast<float>(sums[k]);
    if (f.indicator != nullptr)
      f.indicator[n * f.bands + k] = k == 0 ? value[0] : k == 1 ? value[1] : k == 2 ? value[2] : value[3];
    if (k == 0 && f.total != nullptr) f.total[n] = sum;
  }
};

// Up to 64 hidden units, 4 bands and 4 experts: the weights a lane needs, in registers before the energies arrive.
struct WarpRouter {
  float w1[2][4], b1[2], w2[2][4], b2[4];

  __device__ __forceinline__ static bool takes(const Router<float>& r) {
    return r.hidden <= 64 && r.bands <= 4 && r.experts <= 4;
  }
  __device__ __forceinline__ void load(const Router<float>& r) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int i = lane + 32 * u;
      b1[u] = i < r.hidden ? r.b1[i] : 0;
#pragma unroll
      for (int k = 0; k < 4; ++k) w1[u][k] = i < r.hidden && k < r.bands ? r.w1[i * r.bands + k] : 0;
#pragma unroll
      for (int e = 0; e < 4; ++e) w2[u][e] = i < r.hidden && e < r.experts ? r.w2[e * r.hidden + i] : 0;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) b2[e] = e < r.experts ? r.b2[e] : 0;
  }
  // energy: the indicator, 4 values, the absent ones 0.
  __device__ __forceinline__ void route(const Router<float>& r, const float* energy, float* gate) const {
    double logit[4] = {0, 0, 0, 0};
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      double unit = b1[u];
#pragma unroll
      for (int k = 0; k < 4; ++k) unit += static_cast<double>(w1[u][k]) * energy[k];
      unit = relu(unit);
#pragma unroll
      for (int e = 0; e < 4; ++e) logit[e] += unit * w2[u][e];
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
      for (int e = 0; e < 4; ++e) logit[e] += __shfl_xor_sync(0xffffffffu, logit[e], offset);
    double largest = -INFINITY;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      logit[e] = e < r.experts ? (logit[e] + b2[e]) * r.inverse_tau : -INFINITY;
      largest = fmax(largest, logit[e]);
    }
    float power[4], sum = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      power[e] = e < r.experts ? expf(static_cast<float>(logit[e] - largest)) : 0;
      sum += power[e];
    }
    const int lane = threadIdx.x % 32;
    const float mine = lane == 0 ? power[0] : lane == 1 ? power[1] : lane == 2 ? power[2] : power[3];
    if (lane < r.experts) gate[lane] = mine / sum;
  }
};

}  // namespace fera::cuda
