// Hands out 256-byte aligned pieces of the caller's workspace; with a null base it only counts.
#pragma once

#include "common/checks.h"

namespace fera {

struct Carver {
  char* base;
  size_t used = 0;
  template <class U>
  U* take(int64_t count) {
    U* const at = base == nullptr ? nullptr : reinterpret_cast<U*>(base + used);
    used += align256(sizeof(U) * static_cast<size_t>(count));
    return at;
  }
};

}  // namespace fera
