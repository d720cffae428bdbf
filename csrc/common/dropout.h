// Which elements of the experts' input dropout keeps: a pure function of a seed, a stream, a row and a column, the same
// on every device. So nothing of it is stored, and backward and a recomputation find the forward's.
//
// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011): the key is the seed, the counter
// (column / 8, row, stream, 0). Its 128 bits are eight 16-bit numbers, one for each of 8 neighbouring columns, in the
// order of memory on a little-endian machine: the even column of two has the low half of a word.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fera/fera.h"

#if defined(__CUDACC__)
#define FERA_DROPOUT_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define FERA_DROPOUT_INLINE inline __attribute__((always_inline))
#else
#define FERA_DROPOUT_INLINE inline
#endif

namespace fera {

constexpr int kDropoutColumns = 8;  // of one counter
constexpr int kDropoutRounds = 10;

struct Dropout {
  const int64_t* seed;  // on the device of the call
  uint32_t stream;
  uint32_t threshold;  // a number below it drops its element; at most 65535, so that it fits the numbers' 16 bits
  double scale;        // 1 / (1 - p), of what is kept
};

inline Dropout dropout_of(double p, const int64_t* seed, uint32_t stream) {
  return {seed, stream, static_cast<uint32_t>(std::min(65535.0, std::nearbyint(p * 65536))), 1 / (1 - p)};
}
inline Dropout dropout_of(const fera_experts& e) { return dropout_of(e.dropout, e.seed, e.stream); }

// One round; the caller raises the key by kPhiloxKey0 and kPhiloxKey1 after it.
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;
constexpr uint32_t kPhilox0 = 0xD2511F53u, kPhilox1 = 0xCD9E8D57u;
FERA_DROPOUT_INLINE void philox_round(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t key0,
                                      uint32_t key1) {
  const uint64_t a = uint64_t{kPhilox0} * c0, b = uint64_t{kPhilox1} * c2;
  c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
  c1 = static_cast<uint32_t>(b);
  c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
  c3 = static_cast<uint32_t>(a);
}

// The eight numbers of columns 8 group to 8 group + 7 of a row.
FERA_DROPOUT_INLINE void dropout_numbers(uint64_t seed, uint32_t stream, uint32_t row, uint32_t group,
                                         uint32_t (&words)[4]) {
  uint32_t c0 = group, c1 = row, c2 = stream, c3 = 0;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int i = 0; i < kDropoutRounds; ++i, key0 += kPhiloxKey0, key1 += kPhiloxKey1)
    philox_round(c0, c1, c2, c3, key0, key1);
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

}  // namespace fera
