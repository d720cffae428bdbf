// What the compiler works out for one latent size of plane.cuh: the three butterflies and where a plane's points lie.
//
// An axis of H = hb J points is read as y = j + J i, its frequencies as v = ky + hb kv, i and ky < hb, j and kv < J,
// and
//   w_H^{y v} = w_hb^{i ky} w_H^{j ky} w_J^{j kv}.
// W = wb M likewise, x = m + M i and u = kx + wb ku, kx < wb. A patch is the hb x wb points of one (j, m): both axes'
// first butterflies are done on it in registers. A line is the M points of one (j, ky, kx), the second butterfly along
// W; a column the J points of one (ky, u), the second along H. All are in place: index m becomes ku, j becomes kv.
#pragma once

#include "band_energy/cluster_size.cuh"

namespace fera::cuda {

template <int Height, int Width, int PatchRows, int PatchColumns>
struct PlaneSize {
  static constexpr int H = Height, W = Width, hb = PatchRows, wb = PatchColumns, J = H / hb, M = W / wb;
  static_assert(H % hb == 0 && W % wb == 0 && hb % 2 == 0);
  static constexpr int lines = hb * wb, columns = W * hb;  // lines of a j; columns of a plane

  // Opposite digits side by side: ky = 0, hb / 2, 1, hb - 1, 2, hb - 2, ... in slots 0, 1, 2, ... So the blocks that
  // share a plane by slots read few weights twice.
  __host__ __device__ static constexpr int digit_of(int slot) {
    return slot == 1 ? hb / 2 : slot % 2 == 0 ? slot / 2 : hb - slot / 2;
  }
  __host__ __device__ static constexpr int slot_of(int ky) {
    return ky == hb / 2 ? 1 : ky < hb / 2 ? 2 * ky : 2 * (hb - ky) + 1;
  }

  // Point (j, ky, kx, m) lies at j pitch + slot block + kx step + m. Lanes along m, lanes along kx and then slots (a
  // line each) and lanes along u (a column each: kx + wb ku) all meet sixteen pairs of banks, where wb divides 16; else
  // columns share some.
  static constexpr int stride_of_columns = 16 % wb == 0 ? 16 / wb : 1;
  __host__ __device__ static constexpr int step_of() {
    int step = M;
    while (step % stride_of_columns != 0 || step / stride_of_columns % 2 == 0) ++step;
    return step;
  }
  static constexpr int step = step_of(), block = wb * step + (16 % wb == 0 ? 1 : 0);
  static constexpr int pitch = M % 16 == 0 ? hb * block : hb * block + ((M - hb * block) % 16 + 16) % 16;

  // S blocks share a plane: its rows by j, its columns by slots.
  template <int S>
  static constexpr int rows = (J + S - 1) / S;
  template <int S>
  static constexpr int part = hb / S * block;
  template <int S>
  static constexpr size_t bytes = sizeof(float2) * (rows<S> * pitch + (S == 1 ? 0 : J * part<S>));

  // A warp does patches and then lines of the same j without waiting for others, where both fill it.
  static constexpr bool by_warp = 32 % M == 0 && 32 / M * lines % 32 == 0;
};

}  // namespace fera::cuda
