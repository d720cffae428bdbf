"""CUDA C of the cuFFT rival's kernels, compiled by CuPy at run time; blocks have 256 threads.

Masks are (K, size) float32 with the half spectrum's count and 1/(H·W) folded in; size = H·(W//2+1).
"""

THREADS = 256

SOURCE = r"""
extern "C" {

__device__ float warp_sum(float v) {
  for (int step = 16; step; step >>= 1) v += __shfl_down_sync(0xffffffffu, v, step);
  return v;
}

// The sum over 256 threads, in thread 0.
__device__ float block_sum(float v, float* shared) {
  v = warp_sum(v);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) shared[threadIdx.x >> 5] = v;
  __syncthreads();
  v = threadIdx.x < 8 ? shared[threadIdx.x] : 0.f;
  return warp_sum(v);
}

__device__ float band_total(const float* partial, int n, int pieces, int bands, int k, float* shared) {
  float v = 0.f;
  for (int i = threadIdx.x; i < pieces; i += 256) v += partial[((size_t)n * pieces + i) * bands + k];
  return block_sum(v, shared);
}

// What an entry of the half spectrum does not count twice for: 2 on the outer columns, else 1.
__device__ float outer(int u, int columns, int width) {
  int x = u % columns;
  return x == 0 || 2 * x == width ? 2.f : 1.f;
}

// base, fera, target (M,) -> fera - base, fera - target (2, M)
__global__ void differences(const float* base, const float* fera, const float* target, float* out, int count) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= count) return;
  float prediction = fera[i];
  out[i] = prediction - base[i];
  out[(size_t)count + i] = prediction - target[i];
}

// spectrum (N, planes, size) -> partial (N, splits, chunks, K); grid (chunks, N, splits)
__global__ void band_sums(const float2* spectrum, const float* masks, float* partial, int planes, int size,
                          int bands) {
  __shared__ float shared[8];
  int u = blockIdx.x * 256 + threadIdx.x, n = blockIdx.y;
  float power = 0.f;
  if (u < size) {
    const float2* at = spectrum + (size_t)n * planes * size + u;
    #pragma unroll 4
    for (int p = blockIdx.z; p < planes; p += gridDim.z) {
      float2 v = at[(size_t)p * size];
      power += v.x * v.x + v.y * v.y;
    }
  }
  float* row = partial + (((size_t)n * gridDim.z + blockIdx.z) * gridDim.x + blockIdx.x) * bands;
  for (int k = 0; k < bands; ++k) {
    float v = block_sum(u < size ? power * masks[(size_t)k * size + u] : 0.f, shared);
    if (threadIdx.x == 0) row[k] = v;
  }
}

// grid (N,)
__global__ void energies(const float* partial, float* out, int pieces, int bands) {
  __shared__ float shared[8];
  for (int k = 0; k < bands; ++k) {
    float v = band_total(partial, blockIdx.x, pieces, bands, k, shared);
    if (threadIdx.x == 0) out[blockIdx.x * bands + k] = v;
  }
}

// Energies, indicator, router; hidden <= 256, K <= 16, E <= 32; grid (N,)
__global__ void gate(const float* partial, const float* w1, const float* b1, const float* w2, const float* b2,
                     float* out, int pieces, int bands, int hidden, int experts, float eps, float tau) {
  __shared__ float shared[8], energy[16], middle[256], logits[32];
  int t = threadIdx.x;
  for (int k = 0; k < bands; ++k) {
    float v = band_total(partial, blockIdx.x, pieces, bands, k, shared);
    if (t == 0) energy[k] = v;
  }
  __syncthreads();
  float total = eps;
  for (int k = 0; k < bands; ++k) total += energy[k];
  if (t < hidden) {
    float v = b1[t];
    for (int k = 0; k < bands; ++k) v += w1[t * bands + k] * (energy[k] / total);
    middle[t] = v > 0.f ? v : 0.f;
  }
  __syncthreads();
  for (int m0 = 0; m0 < experts; m0 += 8) {
    int m = m0 + (t >> 5);
    float v = 0.f;
    if (m < experts)
      for (int j = t & 31; j < hidden; j += 32) v += w2[m * hidden + j] * middle[j];
    v = warp_sum(v);
    if ((t & 31) == 0 && m < experts) logits[m] = (v + b2[m]) / tau;
  }
  __syncthreads();
  if (t < experts) {
    float most = logits[0], sum = 0.f;
    for (int m = 1; m < experts; ++m) most = logits[m] > most ? logits[m] : most;
    for (int m = 0; m < experts; ++m) sum += expf(logits[m] - most);
    out[blockIdx.x * experts + t] = expf(logits[t] - most) / sum;
  }
}

// d(sum_k factor_k E_k) as a half spectrum for an unnormalised inverse transform; grid (chunks, N, splits)
__global__ void weigh(const float2* spectrum, const float* masks, const float* factors, float2* out, int planes,
                      int size, int bands, int columns, int width) {
  int u = blockIdx.x * 256 + threadIdx.x, n = blockIdx.y;
  if (u >= size) return;
  float c = 0.f;
  for (int k = 0; k < bands; ++k) c += factors[n * bands + k] * masks[(size_t)k * size + u];
  c *= outer(u, columns, width);
  for (int p = blockIdx.z; p < planes; p += gridDim.z) {
    size_t at = ((size_t)n * planes + p) * size + u;
    float2 v = spectrum[at];
    v.x *= c;
    v.y *= c;
    out[at] = v;
  }
}

// partial (2N, pieces, K+1), the last "band" the whole; energy, factors (2N, K+1) with d first, then r; one block
__global__ void consistency(const float* partial, float* energy, float* factors, float* loss, int samples,
                            int pieces, int bands, float eps) {
  __shared__ float shared[8];
  int t = threadIdx.x, width = bands + 1, sums = 2 * samples * width;
  for (int s0 = 0; s0 < sums; s0 += 8) {
    int s = s0 + (t >> 5);
    float v = 0.f;
    if (s < sums)
      for (int i = t & 31; i < pieces; i += 32) v += partial[((size_t)(s / width) * pieces + i) * width + s % width];
    v = warp_sum(v);
    if ((t & 31) == 0 && s < sums) energy[s] = v;
  }
  __syncthreads();
  float mine = 0.f, share = 1.f / samples;
  for (int n = t; n < samples; n += 256) {
    const float *d = energy + n * width, *r = energy + (samples + n) * width;
    float *fd = factors + n * width, *fr = factors + (samples + n) * width;
    float whole_d = sqrtf(d[bands]), whole_r = sqrtf(r[bands]), below = eps, mean = 0.f, gd = 0.f, gr = 0.f;
    for (int k = 0; k < bands; ++k) below += r[k];
    for (int k = 0; k < bands; ++k) {
      float gap = sqrtf(d[k]) / (whole_d + eps) - sqrtf(r[k]) / (whole_r + eps);
      mean += r[k] / below * gap * gap;
    }
    for (int k = 0; k < bands; ++k) {
      float root_d = sqrtf(d[k]), root_r = sqrtf(r[k]);
      float gap = root_d / (whole_d + eps) - root_r / (whole_r + eps);
      float slope = r[k] / below * gap * share;
      fd[k] = root_d > 0.f ? slope / ((whole_d + eps) * root_d) : 0.f;
      fr[k] = (gap * gap - mean) / below * share;
      fr[k] -= root_r > 0.f ? slope / ((whole_r + eps) * root_r) : 0.f;
      gd -= slope * root_d / ((whole_d + eps) * (whole_d + eps));
      gr += slope * root_r / ((whole_r + eps) * (whole_r + eps));
    }
    fd[bands] = whole_d > 0.f ? gd / whole_d : 0.f;
    fr[bands] = whole_r > 0.f ? gr / whole_r : 0.f;
    mine += mean * share;
  }
  mine = block_sum(mine, shared);
  if (t == 0) loss[0] = mine;
}

// spectrum (2N, planes, size) -> the gradient's half spectrum (N, planes, size); grid (chunks, N, splits)
__global__ void weigh_both(const float2* spectrum, const float* masks, const float* factors, float2* out,
                           int samples, int planes, int size, int bands, int columns, int width) {
  int u = blockIdx.x * 256 + threadIdx.x, n = blockIdx.y;
  if (u >= size) return;
  float cd = 0.f, cr = 0.f;
  for (int k = 0; k < bands; ++k) {
    float mask = masks[(size_t)k * size + u];
    cd += factors[n * bands + k] * mask;
    cr += factors[(samples + n) * bands + k] * mask;
  }
  float edge = outer(u, columns, width);
  cd *= edge;
  cr *= edge;
  for (int p = blockIdx.z; p < planes; p += gridDim.z) {
    size_t at = ((size_t)n * planes + p) * size + u;
    float2 d = spectrum[at], r = spectrum[at + (size_t)samples * planes * size], v;
    v.x = cd * d.x + cr * r.x;
    v.y = cd * d.y + cr * r.y;
    out[at] = v;
  }
}

}
"""
