// What the hosts of the tensor core kernels ask of their operands, and how their launches may follow one another.
#pragma once

#include <cstdlib>
#include <cstring>

#include "common/checks.h"

namespace fera::cuda {

// Tokens and columns are counted in 32 bits on the device.
constexpr int64_t kMostTokens = int64_t{1} << 28, kMostColumns = int64_t{1} << 24;

inline int64_t stacked_of(const fera_experts& e) { return int64_t{e.experts} * e.rank; }
// What the kernels for R <= 32 pad R to, with zeros.
inline int padded(const fera_experts& e) { return stacked_of(e) <= 16 ? 16 : 32; }
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
inline bool fits(const fera_rows& r) { return aligned(r.data) && r.stride % 8 == 0; }

// FERA_EXPERT_OVERLAP=0 starts each kernel after the one before it, for comparison.
inline bool overlap_wished() {
  static const bool wished = [] {
    const char* value = std::getenv("FERA_EXPERT_OVERLAP");
    return value == nullptr || std::strcmp(value, "0") != 0;
  }();
  return wished;
}

}  // namespace fera::cuda
