// Spectral filters by planes: a complex plane lies in the shared memory of a block, or of a cluster of S blocks, and is
// transformed in place.
//
// As in cluster.cuh two real planes make a complex one and the spectrum is never sorted. A direction is three
// butterflies, of 9 to 32 points each (plane_size.cuh): patches come from global memory with lanes along rows, their
// lines follow in the same block and mostly in the same warp, and only the columns need every row. So a plane costs two
// barriers, of the block or of the cluster, where two radices an axis take six, and four trips through shared memory
// where those take six. Between blocks a warp's lanes write along rows, 64 bytes at least: stores of 8 bytes scattered
// more widely take three times as long. The weights are read from global memory, where lanes read along rows and L1
// holds them; a thread's first ones before anything else, where registers allow. FECL's two signals: plane_fecl.cuh.
#pragma once

#include <cooperative_groups.h>

#include "band_energy/cluster_back.cuh"
#include "band_energy/plane_size.cuh"

namespace fera::cuda {

template <class F, int S>
struct PlaneScene {
  static constexpr int rows = F::template rows<S>, part = F::template part<S>, stride = S == 1 ? F::pitch : part;
  float2* own;                         // rows j = first ... first + count - 1 of the plane
  float2* columns;                     // slots of this share, of every j, `stride` apart; with S = 1 the same
  uint32_t rows_of[S], columns_of[S];  // each block's; without S = 1
  int share, first, count;

  __device__ __forceinline__ explicit PlaneScene(unsigned char* raw) : own(reinterpret_cast<float2*>(raw)) {
    const int rank = S == 1 ? 0 : cluster_rank();
    columns = S == 1 ? own : own + rows * F::pitch;
    share = rank % S;
    first = share * rows;
    count = S == 1 ? F::J : max(0, min(rows, F::J - first));
    if constexpr (S > 1)
#pragma unroll
      for (int i = 0; i < S; ++i) {
        rows_of[i] = remote_address(shared_address(own), rank - share + i);
        columns_of[i] = remote_address(shared_address(columns), rank - share + i);
      }
  }
  // Others may write to this block's columns from here on, until wait() has returned to all.
  __device__ __forceinline__ static void arrive() {
    if constexpr (S > 1) {
      __syncwarp();  // the cluster's barrier wants whole warps
      cluster_arrive();
    }
  }
  __device__ __forceinline__ static void wait() {
    if constexpr (S > 1) cluster_wait();
  }
  __device__ __forceinline__ static void barrier() {
    if constexpr (S == 1) {
      __syncthreads();
    } else {
      arrive();
      wait();
    }
  }
  // Row j of this block's to the blocks that have its columns, by `lanes` threads.
  __device__ __forceinline__ void send_row(int j, int lane, int lanes) const {
    if constexpr (S > 1)
#pragma unroll
      for (int d = 0; d < S; ++d)
#pragma unroll 4
        for (int i = lane; i < part; i += lanes)
          store_remote(columns_of[d], (first + j) * part + i, own[j * F::pitch + d * part + i]);
  }
  // Point j of the column at `at`, back to the block that has the row.
  __device__ __forceinline__ void store(unsigned at, int j, float2 v) const {
    if constexpr (S == 1)
      own[j * F::pitch + at] = v;
    else
      store_remote(rows_of[j / rows], j % rows * F::pitch + share * part + at, v);
  }
};

// Columns of a block, S of which share F::columns: item t of them.
template <class F, int S>
struct PlaneColumn {
  static constexpr unsigned count = F::columns / S;
  static_assert(F::hb % S == 0);
  unsigned ky, u, at;

  __device__ __forceinline__ PlaneColumn(int share, unsigned t) {
    const unsigned slot = t / F::W;
    u = t % F::W;
    ky = F::digit_of(share * (F::hb / S) + slot);
    at = slot * F::block + u % F::wb * F::step + u / F::wb;
  }
};

// The weights of a column's frequencies (ky + i hb, u), i < J, in a half-spectrum table. Where u is in the other half,
// those of the opposite frequencies, (hb - ky + (J - 1 - i) hb, W - u): the same distance apart, in reverse.
template <class F>
struct PlaneWeights {
  static constexpr int row = F::W / 2 + 1, plane = F::H * row;
  const float *from, *last;  // of the first in memory, and of the last, which may be frequency 0
  bool reverse;

  __device__ __forceinline__ PlaneWeights(const float* masks, unsigned u, unsigned ky) {
    reverse = u > F::W / 2;
    masks += reverse ? F::W - u : u;
    from = masks + (reverse ? F::hb - ky : ky) * row;
    last = reverse && ky == 0 ? masks : from + (F::J - 1) * F::hb * row;
  }
  // The i-th in memory.
  __device__ __forceinline__ float operator()(int band, int i) const {
    return __ldg((i == F::J - 1 ? last : from + i * F::hb * row) + band * plane);
  }
  // Values by frequency in the order of memory, or back.
  __device__ __forceinline__ void sort(float (&v)[F::J]) const {
#pragma unroll
    for (int i = 0; i < F::J / 2; ++i) {
      const float first = v[i], other = v[F::J - 1 - i];
      v[i] = reverse ? other : first;
      v[F::J - 1 - i] = reverse ? first : other;
    }
  }
};

// Weights of up to three bands of a thread's next column, on their way before its points.
constexpr int kAheadBands = 3;
template <class F, int S, bool Ahead>
struct WeightsAhead {
  float value[Ahead ? kAheadBands : 1][F::J];

  // Of item t.
  __device__ __forceinline__ void load(const float* masks, int bands, int share, unsigned t) {
    if constexpr (Ahead) {
      const PlaneColumn<F, S> column(share, min(t, PlaneColumn<F, S>::count - 1));  // threads without one too
      const PlaneWeights<F> weights(masks, column.u, column.ky);
#pragma unroll
      for (int k = 0; k < kAheadBands; ++k)
#pragma unroll
        for (int i = 0; i < F::J; ++i) value[k][i] = weights(min(k, bands - 1), i);
    }
  }
  // add(b, the weights of band b of memory's order) for those that wait here; returns how many bands those are.
  template <class Add>
  __device__ __forceinline__ int take(int bands, const Add& add) const {
    if constexpr (Ahead) {
#pragma unroll
      for (int b = 0; b < kAheadBands; ++b)
        if (b < bands) add(b, value[b]);
    }
    return Ahead ? kAheadBands : 0;
  }
};

// Points of the patch (j, m) of pair `pair`, of the latent or, of two signals, of this one's difference.
template <class F, int Signals>
__device__ __forceinline__ void read_patch(const Source& source, int64_t n, int pair, int signal, int j, int m,
                                           float2 (&a)[F::wb][F::hb]) {
  const int p = 2 * pair;
  const bool two = p + 1 < source.p;
#pragma unroll
  for (int x = 0; x < F::wb; ++x)
#pragma unroll
    for (int y = 0; y < F::hb; ++y) a[x][y] = {0, 0};
  auto load = [&](auto tag) {
    using T = decltype(tag);
    const auto read = [&](const View& v, bool subtract) {
      const T* const from = static_cast<const T*>(v.data) + n * v.stride_n + p * v.stride_p + j * v.stride_h + m;
      const int64_t row = F::J * v.stride_h;
      const auto take = [&](float& to, const T* at) {
        const float value = widen(load_once(at));
        to = subtract ? to - value : value;
      };
#pragma unroll
      for (int y = 0; y < F::hb; ++y)
#pragma unroll
        for (int x = 0; x < F::wb; ++x) take(a[x][y].x, from + y * row + x * F::M);
      if (two)
#pragma unroll
        for (int y = 0; y < F::hb; ++y)
#pragma unroll
          for (int x = 0; x < F::wb; ++x) take(a[x][y].y, from + v.stride_p + y * row + x * F::M);
    };
    read(source.whole, false);
    if constexpr (Signals == 2) read(source.minus[signal], true);
  };
  with_element(source.dtype, load);
}

// w_H^j and w_W^m of a patch, read before they are needed.
template <class F>
struct PatchTurn {
  float2 h, w;

  __device__ __forceinline__ PatchTurn(int j, int m) : h(kRoots<F::H>.root[j]), w(kRoots<F::W>.root[m]) {}
};

// Roots between a patch's butterflies and the next: w_H^{j ky} by index of ky, w_W^{m kx}.
template <class F>
struct PatchRoots {
  float2 h[F::hb], w[F::wb];

  __device__ __forceinline__ explicit PatchRoots(const PatchTurn<F>& turn) {
    powers_of<F::hb>(turn.h, h);
    powers_of<F::wb>(turn.w, w);
  }
};

// Both axes' first butterflies of a patch: put(ky, kx, value).
template <class F, class Put>
__device__ __forceinline__ void patch_forward(float2 (&a)[F::wb][F::hb], const PatchTurn<F>& turn, const Put& put) {
  const PatchRoots<F> roots(turn);
#pragma unroll
  for (int x = 0; x < F::wb; ++x) {
    dft<F::hb>(a[x]);
#pragma unroll
    for (int y = 1; y < F::hb; ++y) a[x][y] = times(a[x][y], roots.h[y]);
  }
#pragma unroll
  for (int y = 0; y < F::hb; ++y) {
    float2 row[F::wb];
#pragma unroll
    for (int x = 0; x < F::wb; ++x) row[x] = a[x][y];
    dft<F::wb>(row);
#pragma unroll
    for (int x = 0; x < F::wb; ++x) put(y, x, x == 0 ? row[0] : times(row[x], roots.w[x]));
  }
}

// The same backwards, of element(its place in the patch).
template <class F, class Element>
__device__ __forceinline__ void patch_back(const Element& element, const PatchTurn<F>& turn,
                                           float2 (&a)[F::wb][F::hb]) {
  const PatchRoots<F> roots(turn);
#pragma unroll
  for (int y = 0; y < F::hb; ++y) {
    float2 row[F::wb];
#pragma unroll
    for (int x = 0; x < F::wb; ++x) {
      row[x] = element(F::slot_of(y) * F::block + x * F::step);
      if (x > 0) row[x] = times(row[x], roots.w[x]);
    }
    dft<F::wb>(row);
#pragma unroll
    for (int x = 0; x < F::wb; ++x) a[x][y] = y == 0 ? row[x] : times(row[x], roots.h[y]);
  }
#pragma unroll
  for (int x = 0; x < F::wb; ++x) dft<F::hb>(a[x]);
}

// Pixels of the patch (j, m) of planes p and p + 1, whose values come exchanged, scaled.
template <class F>
__device__ __forceinline__ void write_patch(const Source& source, const Output& dz, int64_t n, int pair, int j, int m,
                                            float2 (&a)[F::wb][F::hb], const Scale<float>& scale) {
  const int p = 2 * pair;
  const int64_t at = dz.view.offset(n, p, j, m), row = F::J * dz.view.stride_h, step = F::M * dz.view.stride_w;
  const auto scaled = [&](auto fits) {
#pragma unroll
    for (int x = 0; x < F::wb; ++x)
#pragma unroll
      for (int y = 0; y < F::hb; ++y) a[x][y] = {scale.apply(fits, a[x][y].x), scale.apply(fits, a[x][y].y)};
  };
  if (scale.fits)
    scaled(std::true_type{});
  else
    scaled(std::false_type{});
  auto write = [&](auto tag) {
    using T = decltype(tag);
    T* const to = static_cast<T*>(dz.view.data) + at;
#pragma unroll
    for (int y = 0; y < F::hb; ++y)
#pragma unroll
      for (int x = 0; x < F::wb; ++x) to[y * row + x * step] = narrow<T>(a[x][y].y);
    if (p + 1 < source.p)
#pragma unroll
      for (int y = 0; y < F::hb; ++y)
#pragma unroll
        for (int x = 0; x < F::wb; ++x) to[dz.view.stride_p + y * row + x * step] = narrow<T>(a[x][y].x);
  };
  with_element(dz.wide ? FERA_F32 : source.dtype, write);
}

// A line's butterfly, in place: their second forward, their first on the way back.
template <class F>
__device__ __forceinline__ void plane_line(float2* own, unsigned j, unsigned line) {
  float2* const at = own + j * F::pitch + line / F::wb * F::block + line % F::wb * F::step;
  float2 a[F::M];
#pragma unroll
  for (int i = 0; i < F::M; ++i) a[i] = at[i];
  dft<F::M>(a);
#pragma unroll
  for (int i = 0; i < F::M; ++i) at[i] = a[i];
}

template <class F>
__device__ __forceinline__ void plane_lines(float2* own, int count) {
#pragma unroll 1
  for (int t = threadIdx.x; t < count * F::lines; t += blockDim.x) plane_line<F>(own, t / F::lines, t % F::lines);
}

// patch(j, m, turn), j from 0 on, for all patches of a block and the lines of the same rows; Back: after them.
// done(j, lane, lanes) by the threads that have just made row j.
template <class F, int S, bool Back, class Patch, class Done>
__device__ __forceinline__ void plane_rows(const PlaneScene<F, S>& c, const Patch& patch, const Done& done) {
  const auto turn = [&](int j, int m) { return PatchTurn<F>(min(c.first + j, F::J - 1), m); };
  if constexpr (F::by_warp) {
    constexpr int at_once = 32 / F::M;
    const int lane = threadIdx.x % 32, m = lane % F::M;
#pragma unroll 1
    for (int j0 = threadIdx.x / 32 * at_once; j0 < c.count; j0 += blockDim.x / 32 * at_once) {
      const int j = j0 + lane / F::M;
      const bool mine = at_once == 1 || j < c.count;
      const PatchTurn<F> early = turn(j, m);
      if constexpr (!Back) {
        if (mine) patch(j, m, early);
        __syncwarp();
      }
#pragma unroll 1
      for (int t = lane; t < at_once * F::lines; t += 32)
        if (at_once == 1 || j0 + t / F::lines < c.count) plane_line<F>(c.own, j0 + t / F::lines, t % F::lines);
      __syncwarp();
      if constexpr (Back) {
        if (mine) patch(j, m, early);
        __syncwarp();
      }
#pragma unroll 1
      for (int i = j0; i < min(j0 + at_once, c.count); ++i) done(i, lane, 32);
    }
  } else {
    PatchTurn<F> early = turn(threadIdx.x / F::M, threadIdx.x % F::M);
    const auto patches = [&] {
#pragma unroll 1
      for (int t = threadIdx.x; t < c.count * F::M; t += blockDim.x) {
        if (t >= int(blockDim.x)) early = turn(t / F::M, t % F::M);
        patch(t / F::M, t % F::M, early);
      }
    };
    if constexpr (!Back) {
      patches();
      __syncthreads();
    }
    plane_lines<F>(c.own, c.count);
    if constexpr (S > 1 || Back) __syncthreads();
    if constexpr (Back) patches();
#pragma unroll 1
    for (int i = 0; i < c.count; ++i) done(i, threadIdx.x, blockDim.x);
  }
}

// Global memory -> lines, in the columns' place. The cluster has arrived, or will, for the barrier that says that the
// columns may be written to; nothing is synchronised on return.
template <class F, int S, int Signals>
__device__ __forceinline__ void plane_forward(const PlaneScene<F, S>& c, const Source& source, int64_t n, int pair,
                                              int signal) {
  bool waited = false;
  plane_rows<F, S, false>(
      c,
      [&](int j, int m, const PatchTurn<F>& turn) {
        float2 a[F::wb][F::hb];
        read_patch<F, Signals>(source, n, pair, signal, c.first + j, m, a);
        float2* const to = c.own + j * F::pitch + m;
        patch_forward<F>(a, turn, [&](int y, int x, float2 v) { to[F::slot_of(y) * F::block + x * F::step] = v; });
      },
      [&](int j, int lane, int lanes) {
        if (!waited) c.wait();
        waited = true;
        c.send_row(j, lane, lanes);
      });
  if (!waited) c.wait();
}

// The columns' butterfly, powers and sums: to(k, sum) takes the block's, one a band and, with Whole, the norm squared.
// keep(a column's place, its values) may keep the spectrum. The first column's weights are
// on their way. arrived: (sums, warps). The block is synchronised on return, but for `to`.
template <class F, int S, bool Whole, bool Ahead, class Keep, class To>
__device__ __forceinline__ void plane_sums(const PlaneScene<F, S>& c, const float* masks, int bands,
                                           WeightsAhead<F, S, Ahead>& ahead, const Keep& keep, double* arrived,
                                           const To& to) {
  constexpr int R = F::J;
  constexpr unsigned items = PlaneColumn<F, S>::count;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, sums = bands + (Whole ? 1 : 0);
  double mine = 0;  // lane 8 i + g: sum 4 g + i of this warp
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < (items + 31) / 32 * 32; t += blockDim.x) {
    const bool active = items % 32 == 0 || t < items;
    const PlaneColumn<F, S> column(c.share, active ? t : 0);
    float2 a[R];
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = active ? c.columns[i * c.stride + column.at] : float2{0, 0};
    dft<R>(a);
    if (active) keep(column.at, a);
    float power[R];
    const double back = powers(a, active, power);
    const PlaneWeights<F> weights(masks, column.u, column.ky);
    weights.sort(power);
    float total = 0;
    if constexpr (Whole)
#pragma unroll
      for (int i = 0; i < R; ++i) total += power[i];
    const auto weighted = [&](const auto& weight) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < R; ++i) sum = fmaf(power[i], weight(i), sum);
      return sum;
    };
#pragma unroll 1
    for (int k = 0; k < sums; k += 4) {
      float four[4];
      int known = 0;
      if (k == 0)
        known = ahead.take(bands, [&](int b, const float (&w)[R]) { four[b] = weighted([&](int i) { return w[i]; }); });
#pragma unroll
      for (int b = 0; b < 4; ++b) {
        if (k + b >= bands)
          four[b] = k + b == bands ? total : 0;
        else if (b >= known)
          four[b] = weighted([&](int i) { return weights(k + b, i); });
      }
      const float sum = warp_sums(float4{four[0], four[1], four[2], four[3]});
      if (lane % 8 == k / 4) mine += sum * back;
    }
    if (t + blockDim.x < PlaneColumn<F, S>::count) ahead.load(masks, bands, c.share, t + blockDim.x);
  }
  if (4 * (lane % 8) + lane / 8 < sums) arrived[(4 * (lane % 8) + lane / 8) * warps + warp] = mine;
  __syncthreads();
  for (int k = warp; k < sums; k += warps) {
    double sum = lane < warps ? arrived[k * warps + lane] : 0;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) to(k, sum);
  }
}

// The columns times sum_k c_k M_k + c_K, exchanged, and their butterfly backwards. spectrum(a column's
// place, its values) brings them. The first column's weights are on their way.
template <class F, int S, bool Ahead, class Spectrum>
__device__ __forceinline__ void plane_filter(const PlaneScene<F, S>& c, const float* masks, int bands,
                                             WeightsAhead<F, S, Ahead>& ahead, const float* coefficients,
                                             const Spectrum& spectrum) {
  constexpr int R = F::J;
  const float whole = coefficients[bands];
#pragma unroll 1
  for (unsigned t = threadIdx.x; t < PlaneColumn<F, S>::count; t += blockDim.x) {
    const PlaneColumn<F, S> column(c.share, t);
    const PlaneWeights<F> weights(masks, column.u, column.ky);
    float2 a[R];
    spectrum(column.at, a);
    float transfer[R];
#pragma unroll
    for (int i = 0; i < R; ++i) transfer[i] = whole;
    const auto add = [&](float c, const auto& weight) {
#pragma unroll
      for (int i = 0; i < R; ++i) transfer[i] = fmaf(c, weight(i), transfer[i]);
    };
    int k = ahead.take(bands, [&](int b, const float (&w)[R]) { add(coefficients[b], [&](int i) { return w[i]; }); });
#pragma unroll 1
    for (; k < bands; ++k) add(coefficients[k], [&](int i) { return weights(k, i); });
    weights.sort(transfer);
#pragma unroll
    for (int i = 0; i < R; ++i) a[i] = {transfer[i] * a[i].y, transfer[i] * a[i].x};
    dft<R>(a);
#pragma unroll
    for (int i = 0; i < R; ++i) c.store(column.at, i, a[i]);
    if (t + blockDim.x < PlaneColumn<F, S>::count) ahead.load(masks, bands, c.share, t + blockDim.x);
  }
}

// The columns' butterfly forward, as plane_filter's spectrum.
template <class F, int S>
struct ColumnsForward {
  const PlaneScene<F, S>& c;

  __device__ __forceinline__ void operator()(unsigned at, float2 (&a)[F::J]) const {
#pragma unroll
    for (int i = 0; i < F::J; ++i) a[i] = c.columns[i * c.stride + at];
    dft<F::J>(a);
  }
};

}  // namespace fera::cuda
