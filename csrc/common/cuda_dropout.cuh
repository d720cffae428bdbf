// The mask of common/dropout.h inside kernels.
#pragma once

#include "common/cuda_common.cuh"
#include "common/dropout.h"

namespace fera::cuda {

// The seed read: it is older than the kernels of the call, which may start before one another's end.
class Mask {
 public:
  __device__ explicit Mask(const Dropout& d) : seed_(static_cast<uint64_t>(*d.seed)), stream_(d.stream) {
    threshold_ = d.threshold;
  }
  // One element.
  __device__ bool keeps(int64_t row, int64_t column) const {
    uint32_t words[4];
    numbers(row, column / kDropoutColumns, words);
    const int i = static_cast<int>(column % kDropoutColumns);
    const uint32_t word = i < 4 ? (i < 2 ? words[0] : words[1]) : (i < 6 ? words[2] : words[3]);
    return (i % 2 == 0 ? word & 0xffffu : word >> 16) >= threshold_;
  }
  // Words of a row's eight 16-bit elements from a multiple of eight on: all ones where an element is kept.
  __device__ uint4 words(int row, int column) const {
    uint32_t found[4];
    numbers(row, column / kDropoutColumns, found);
    const uint32_t least = threshold_ | threshold_ << 16;
    return make_uint4(__vcmpgeu2(found[0], least), __vcmpgeu2(found[1], least), __vcmpgeu2(found[2], least),
                      __vcmpgeu2(found[3], least));
  }
  // Eight 16-bit elements, those that are dropped zero.
  __device__ uint4 apply(uint4 v, int row, int column) const {
    const uint4 kept = words(row, column);
    return make_uint4(v.x & kept.x, v.y & kept.y, v.z & kept.z, v.w & kept.w);
  }

 private:
  __device__ void numbers(int64_t row, int64_t group, uint32_t (&words)[4]) const {
    dropout_numbers(seed_, stream_, static_cast<uint32_t>(row), static_cast<uint32_t>(group), words);
  }
  uint64_t seed_;
  uint32_t stream_, threshold_;
};

}  // namespace fera::cuda
