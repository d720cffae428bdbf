// Energies by real planes: one real plane lies in the shared memory of a block, half of a complex one's. So few planes
// take twice as many multiprocessors, and of many a multiprocessor has two, one's loads beside another's butterflies.
//
// Pixels 2 m and 2 m + 1 of a row make one complex number (one load): a plane of H x 2 W pixels is a complex plane C of
// H x W, transformed in place by the three butterflies of plane.cuh. With D = conj C(-v, -u) and w = w_2W^u,
//   2 Z(v, u) = C + D - i w (C - D),   2 Z(v, u + W) = C + D + i w (C - D),
// and Z(v, u + W) is conjugate to Z(-v, W - u): a pair of opposite frequencies of C gives two of the half spectrum,
// which both count twice. A thread has a pair of opposite columns, and every weight is read once, lanes along its row.
// The columns that are their own opposites (ky = 0 or hb / 2, u = 0 or W / 2) go to a warp, in pairs.
#pragma once

#include "band_energy/plane_kernels.cuh"

namespace fera::cuda {

// Latents of Height x Width; W counts complex columns. The rest as in PlaneSize, the digits ky in their order.
template <int Height, int Width, int PatchRows, int PatchColumns>
struct RealSize {
  static constexpr int H = Height, W = Width / 2, hb = PatchRows, wb = PatchColumns, J = H / hb, M = W / wb;
  static_assert(Width % 4 == 0 && H % hb == 0 && W % wb == 0 && hb % 4 == 0 && 16 % wb == 0);
  static constexpr int lines = hb * wb, pairs = W / 2 * hb;  // lines of a j; pairs of columns of a plane
  static_assert(2 * J <= 32 && pairs / 2 >= 32, "a warp has at most one pair of columns opposite to themselves");
  static_assert(M == 16, "a warp does patches and then lines of the same two j, and lines change places as below");

  // Point (j, ky, kx, m) lies at ((j hb + ky) wb + kx) M + (m ^ turn): sixteen lanes along m, along kx and ky, and
  // along u = kx + wb ku meet sixteen pairs of banks, without a gap, so that two blocks of 128 x 128 leave L1 room for
  // the weights of three bands.
  static constexpr int spread = M / wb, block = wb * M, pitch = hb * block;
  __device__ static constexpr unsigned turn(unsigned ky, unsigned kx) { return kx * spread + ky % spread; }
  __device__ static constexpr unsigned at(unsigned j, unsigned ky, unsigned kx, unsigned m) {
    return (j * pitch + m ^ turn(ky, kx)) + ky * block + kx * M;
  }
  static constexpr size_t bytes = sizeof(float2) * J * pitch;
};

// Two elements side by side, at a multiple of two, read once.
__device__ __forceinline__ float2 load_pair_once(const float* from) {
  float2 v;
  asm volatile("ld.global.L1::no_allocate.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from));
  return v;
}
template <class T>
__device__ __forceinline__ float2 load_pair_once(const T* from) {
  const uint32_t two = load_once(reinterpret_cast<const uint32_t*>(from));
  const uint16_t low = two & 0xffff, high = two >> 16;
  return {widen(reinterpret_cast<const T&>(low)), widen(reinterpret_cast<const T&>(high))};
}

// Points of the patch (j, m) of plane p.
template <class F>
__device__ __forceinline__ void read_real_patch(const Source& source, int64_t n, int p, int j, int m,
                                                float2 (&a)[F::wb][F::hb]) {
  auto load = [&](auto tag) {
    using T = decltype(tag);
    const View& v = source.whole;
    const T* from = static_cast<const T*>(v.data) + n * v.stride_n + p * v.stride_p + j * v.stride_h + 2 * m;
    const int64_t row = F::J * v.stride_h;
    // Both pixels by one load where every row begins at a multiple of two.
    if (reinterpret_cast<uintptr_t>(v.data) % (2 * sizeof(T)) == 0 && (v.stride_n | v.stride_p | v.stride_h) % 2 == 0) {
#pragma unroll
      for (int y = 0; y < F::hb; ++y, from += row)
#pragma unroll
        for (int x = 0; x < F::wb; ++x) {
          a[x][y] = load_pair_once(from + 2 * x * F::M);
        }
    } else {
#pragma unroll
      for (int y = 0; y < F::hb; ++y, from += row)
#pragma unroll
        for (int x = 0; x < F::wb; ++x)
          a[x][y] = {widen(load_once(from + 2 * x * F::M)), widen(load_once(from + 2 * x * F::M + 1))};
    }
  };
  with_element(source.dtype, load);
}

// A line's butterfly, in place.
template <class F>
__device__ __forceinline__ void real_line(float2* plane, unsigned j, unsigned line) {
  const unsigned kx = line % F::wb, ky = line / F::wb, at = F::at(j, ky, kx, 0);
  float2 a[F::M];
#pragma unroll
  for (int i = 0; i < F::M; ++i) a[i] = plane[at ^ i];
  dft<F::M>(a);
#pragma unroll
  for (int i = 0; i < F::M; ++i) plane[at ^ i] = a[i];
}

// Global memory -> lines; nothing is synchronised on return.
template <class F, int Threads>
__device__ __forceinline__ void real_forward(float2* plane, const Source& source, int64_t n, int p) {
  const auto patch = [&](int j, int m) {
    float2 a[F::wb][F::hb];
    read_real_patch<F>(source, n, p, j, m, a);
    patch_forward<F>(a, PatchTurn<F>(j, m), [&](int y, int x, float2 v) { plane[F::at(j, y, x, m)] = v; });
  };
  constexpr int at_once = 32 / F::M;
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (int j = threadIdx.x / 32 * at_once; j < F::J; j += Threads / 32 * at_once) {
    if (F::J % at_once == 0 || j + lane / F::M < F::J) patch(j + lane / F::M, lane % F::M);
    __syncwarp();
#pragma unroll 1
    for (int t = lane; t < at_once * F::lines; t += 32)
      if (F::J % at_once == 0 || j + t / F::lines < F::J) real_line<F>(plane, j + t / F::lines, t % F::lines);
  }
}

// Item t: a pair of columns (ky, u) and (other_ky, other_u), opposite to each other or (self) each to itself.
template <class F>
struct RealColumns {
  unsigned ky, u, other_ky, other_u;
  bool self;

  __device__ __forceinline__ explicit RealColumns(unsigned t) : ky(t / (F::W / 2)), u(t % (F::W / 2)) {
    const unsigned digit = ky;
    self = u == 0 && digit % (F::hb / 2) == 0;
    if (u == 0 && digit >= F::hb / 2) u = F::W / 2;  // what is left of column 0 are opposites of those before
    if (self) ky = 0;
    other_ky = self ? F::hb / 2 : (F::hb - digit) % F::hb;
    other_u = (F::W - u) % F::W;
  }
  __device__ __forceinline__ static unsigned at(unsigned ky, unsigned u) { return F::at(0, ky, u % F::wb, u / F::wb); }
};

// The two frequencies of the half spectrum from C, C(-v, -u) and -i w_2W^u: their powers times 4.
struct RealPowers {
  float low, high;

  RealPowers() = default;
  __device__ __forceinline__ RealPowers(float2 c, float2 opposite, float2 root) {
    const float2 even = {c.x + opposite.x, c.y - opposite.y};
    const float2 odd = times({c.x - opposite.x, c.y + opposite.y}, root), sum = even + odd, difference = even - odd;
    low = fmaf(sum.x, sum.x, sum.y * sum.y);
    high = fmaf(difference.x, difference.x, difference.y * difference.y);
  }
};

// -i w_2W^u
template <class F>
__device__ __forceinline__ float2 real_root(unsigned u) {
  const float2 w = kRoots<2 * F::W>.root[u];
  return {w.y, -w.x};
}

// The frequencies of columns opposite to themselves, where a lane of the warp has a pair of those: lanes take one each,
// and meet every pair of opposites twice, so that their powers are halved.
template <class F>
struct RealSelves {
  bool any;
  unsigned u, v, at, opposite;  // of this lane's frequency; without one, of another

  __device__ __forceinline__ explicit RealSelves(const RealColumns<F>& item) {
    const unsigned lane = threadIdx.x % 32, lanes = __ballot_sync(0xffffffffu, item.self);
    any = lanes != 0;
    u = __shfl_sync(0xffffffffu, item.u, any ? __ffs(lanes) - 1 : 0);
    const unsigned second = lane >= F::J, kv = lane % F::J, ky = second * F::hb / 2;
    v = ky + kv * F::hb;
    const unsigned column = RealColumns<F>::at(ky, u);
    at = column + kv * F::pitch;
    opposite = column + (second ? F::J - 1 - kv : (F::J - kv) % F::J) * F::pitch;
  }
  __device__ __forceinline__ RealPowers powers(const float2* plane, float scale) const {
    RealPowers p{};
    if (any && threadIdx.x % 32 < 2 * F::J) {
      const float2 c = plane[at], d = plane[opposite];
      p = RealPowers({c.x * scale, c.y * scale}, {d.x * scale, d.y * scale}, real_root<F>(u));
      p.low *= 0.5f;
      p.high *= 0.5f;
    }
    return p;
  }
  // sum + self's with a band's weights.
  __device__ __forceinline__ float weighted(const RealPowers& self, const float* mask, float sum) const {
    constexpr int row = F::W + 1;
    sum = fmaf(self.low, __ldg(mask + v * row + u), sum);
    return fmaf(self.high, __ldg(mask + (F::H - v) % F::H * row + F::W - u), sum);
  }
};

// The weights of a pair's frequencies: (ky + hb i, u), i < J, and then the opposites of (ky + hb i, u + W).
template <class F>
struct RealWeights {
  static constexpr int row = F::W + 1, digit = F::hb * row, table = F::H * row, count = 2 * F::J;
  const float *from, *first, *mirrored;

  __device__ __forceinline__ RealWeights(const float* masks, const RealColumns<F>& item)
      : from(masks + item.ky * row + item.u),
        first(masks + F::W - item.u + (item.ky == 0 ? 0 : (F::H - item.ky) * row)),
        mirrored(masks + F::W - item.u + (F::hb - item.ky) * row) {}
  __device__ __forceinline__ float operator()(int band, int i) const {
    const int of = band * table;
    return __ldg(i < F::J    ? from + of + i * digit
                 : i == F::J ? first + of
                             : mirrored + of + (2 * F::J - 1 - i) * digit);
  }
};

// Bands are summed by threes. A thread's first weights wait in registers, where those suffice.
constexpr int kRealBands = 3;
template <class F, bool Ahead>
struct RealAhead {
  float value[Ahead ? kRealBands : 1][RealWeights<F>::count];

  __device__ __forceinline__ void load(const float* masks, int bands) {
    if constexpr (Ahead) {
      const RealColumns<F> item(min(threadIdx.x, F::pairs - 1));
      const RealWeights<F> weights(masks, item);
#pragma unroll
      for (int b = 0; b < kRealBands; ++b)
#pragma unroll
        for (int i = 0; i < weights.count; ++i) value[b][i] = weights(min(b, bands - 1), i);
    }
  }
};

// The columns' butterfly and weighted powers of a plane, times 2, added to mine: lane 8 i + g has band 3 g + i of its
// warp. The block is synchronised on entry.
template <class F, int Threads, bool Ahead>
__device__ __forceinline__ void real_powers(float2* plane, const float* masks, int bands,
                                            const RealAhead<F, Ahead>& ahead, double& mine) {
  constexpr int R = F::J;
  static_assert(!Ahead || F::pairs <= Threads);
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < (F::pairs + 31) / 32 * 32; t += Threads) {
    const bool active = F::pairs % 32 == 0 || t < F::pairs;
    const RealColumns<F> item(active ? t : F::pairs - 1);
    float2* const at = plane + item.at(item.ky, item.u);
    float2* const other = plane + item.at(item.other_ky, item.other_u);
    float2 a[R], b[R];
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = active ? at[i * F::pitch] : float2{0, 0};
    dft<R>(a);
#pragma unroll
    for (int i = 0; i < R; ++i) b[i] = active ? other[i * F::pitch] : float2{0, 0};
    dft<R>(b);
    const RealSelves<F> selves(item);
    if (selves.any) {
      if (item.self)
#pragma unroll
        for (int i = 0; i < R; ++i) {
          at[i * F::pitch] = a[i];
          other[i * F::pitch] = b[i];
        }
      __syncwarp();
    }
    float power[2 * R];
    const float2 root = real_root<F>(item.u);
    float scale = 1;
    int exponent = 0;
#pragma unroll 1
    for (bool again = false;; again = true) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const RealPowers p(a[i], item.ky == 0 ? b[(R - i) % R] : b[R - 1 - i], root);
        power[i] = p.low;
        power[R + i] = p.high;
        total += p.low + p.high;
      }
      if (again || __all_sync(0xffffffffu, safe_power(total) || !active)) break;
      // Far from 1, zero, infinite or NaN: as powers() does.
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < R; ++i)
        bits = max(max(max(bits, __float_as_uint(a[i].x) & 0x7fffffffu), __float_as_uint(a[i].y) & 0x7fffffffu),
                   max(__float_as_uint(b[i].x) & 0x7fffffffu, __float_as_uint(b[i].y) & 0x7fffffffu));
      bits = __reduce_max_sync(0xffffffffu, active ? bits : 0);
      exponent = bits == 0 || bits >= 0x7f800000u ? 0 : max(-126, min(120, ilogbf(__uint_as_float(bits)) + 1));
      scale = scalbnf(1.0f, -exponent);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        a[i] = {a[i].x * scale, a[i].y * scale};
        b[i] = {b[i].x * scale, b[i].y * scale};
      }
    }
    const double back = __hiloint2double((1023 + 2 * exponent) << 20, 0);
    const RealPowers self = selves.powers(plane, scale);
    const RealWeights<F> weights(masks, item);
#pragma unroll 1
    for (int k = 0; k < bands; k += kRealBands) {
      float sum[kRealBands] = {0, 0, 0};
      const auto add = [&](const auto& weight) {
#pragma unroll
        for (int i = 0; i < 2 * R; ++i)
#pragma unroll
          for (int b3 = 0; b3 < kRealBands; ++b3) sum[b3] = fmaf(power[i], weight(b3, i), sum[b3]);
      };
      if (Ahead && k == 0)
        add([&](int b3, int i) { return ahead.value[Ahead ? b3 : 0][i]; });
      else
        add([&](int b3, int i) { return weights(min(k + b3, bands - 1), i); });
      if (selves.any)
#pragma unroll
        for (int b3 = 0; b3 < kRealBands; ++b3)
          sum[b3] = selves.weighted(self, masks + min(k + b3, bands - 1) * weights.table, item.self ? 0 : sum[b3]);
      const float warp = warp_sums(float4{sum[0], sum[1], sum[2], 0});
      if (lane % 8 == k / kRealBands) mine += warp * back;
    }
  }
}

// The block's sums of `mine`: to(k, sum), one a band. The block is synchronised on entry.
template <int Threads, class To>
__device__ __forceinline__ void real_add(double mine, int bands, double* arrived, const To& to) {
  constexpr int warps = Threads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = kRealBands * (lane % 8) + lane / 8;
  if (lane / 8 < kRealBands && k < bands) arrived[k * warps + warp] = mine;
  __syncthreads();
  for (int k = warp; k < bands; k += warps) {
    double sum = lane < warps ? arrived[k * warps + lane] : 0;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) to(k, sum);
  }
}

// The weights on their way to L1 while the first plane comes: a line by a thread, for the first bands.
template <class F, int Threads>
__device__ __forceinline__ void warm_weights(const float* masks, int bands) {
  const int count = min(bands, 4) * F::H * (F::W + 1);
#pragma unroll 1
  for (int i = threadIdx.x * 32; i < count; i += Threads * 32) {
    float unused;
    asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(unused) : "l"(masks + i));
  }
}

// Shared memory of a block: the plane, and in its place the sums of the warps and then what meets, unless the blocks of
// a sample meet in their cluster, where the first ones to be done write to another that is not.
template <class F>
constexpr size_t real_bytes(bool together) {
  return F::bytes + (together ? sizeof(PlaneMeeting) : 0);
}

// Planes of a block one after the other; the launch is cooperative, and the sums meet through partial (N, P, K) at the
// grid's barrier. Or (together) a cluster of P blocks has a sample, a plane each, and they meet in its first one.
template <class F, int Threads, int Blocks>
__global__ void __launch_bounds__(Threads, Blocks)
    real_energies(const __grid_constant__ Source source, const float* masks, int bands,
                  const __grid_constant__ Finish<float> finish, double* partial, bool together) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr bool Ahead = Blocks == 1;
  extern __shared__ __align__(16) unsigned char raw[];
  float2* const plane = reinterpret_cast<float2*>(raw);
  PlaneMeeting& meeting = *reinterpret_cast<PlaneMeeting*>(raw + (together ? F::bytes : 0));
  if (together) cluster_arrive_relaxed();  // it has started, and may be written to
  const unsigned planes = source.n * source.p, each = (planes + gridDim.x - 1) / gridDim.x;
  const unsigned begin = blockIdx.x * each, end = min(planes, begin + each);
  const int rank = cluster_rank();
  if constexpr (!Ahead) warm_weights<F, Threads>(masks, bands);
  double mine = 0;
#pragma unroll 1
  for (unsigned i = begin; i < end; ++i) {
    const unsigned n = i / source.p, next = (i + 1) / source.p;
    if (i > begin) __syncthreads();  // the columns of the one before have been read
    real_forward<F, Threads>(plane, source, n, i - n * source.p);
    RealAhead<F, Ahead> ahead;
    ahead.load(masks, bands);
    __syncthreads();
    if (i + 1 < end) prefetch_plane(source, next, i + 1 - next * source.p);  // not before this one is here
    real_powers<F, Threads, Ahead>(plane, masks, bands, ahead, mine);
    double* const sums = partial + static_cast<int64_t>(i) * bands;
    if (i + 1 < end && next == n) {  // with the next one's
      if (static_cast<int>(threadIdx.x) < bands) sums[threadIdx.x] = 0;
      continue;
    }
    __syncthreads();
    if (together) cluster_wait();
    real_add<Threads>(mine, bands, reinterpret_cast<double*>(raw), [&](int k, double sum) {
      if (together)
        store_remote(remote_address(shared_address(&meeting.gathered[rank][k]), 0), sum);
      else
        sums[k] = sum;
    });
    mine = 0;
  }
  plane_finish(source.n, bands, finish, partial, together, rank, source.p, 0.5 / (2.0 * F::H * F::W), meeting);
#else
  asm("trap;");  // real_takes never chooses an older image
#endif
}

}  // namespace fera::cuda
