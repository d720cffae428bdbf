// g_k - sum_j p_j g_j for a point p of the simplex, as sum_j p_j (g_k - g_j): where one p_j is nearly 1 the plain
// difference cancels, and a p that was rounded to float32 would leave nothing of it.
#pragma once

#if defined(__CUDACC__)
#define FERA_HOST_DEVICE __host__ __device__
#else
#define FERA_HOST_DEVICE
#endif

namespace fera {

template <class Real>
FERA_HOST_DEVICE inline double above_mean(const Real* p, const Real* g, int count, int k) {
  double sum = 0;
  for (int j = 0; j < count; ++j)
    sum += static_cast<double>(p[j]) * (static_cast<double>(g[k]) - static_cast<double>(g[j]));
  return sum;
}

}  // namespace fera
