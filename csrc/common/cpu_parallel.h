// Threads come from the caller's context; work is cut into units whose results do not depend on the cut.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fera/fera.h"

namespace fera::cpu {

// body(begin, end) over a partition of [0, count).
template <class F>
void parallel_for(const fera_context* context, int64_t count, int64_t grain, F&& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(1, grain);
  if (context->parallel == nullptr || count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  using Body = std::remove_reference_t<F>;
  context->parallel(
      context->pool, count, grain,
      [](void* data, int64_t begin, int64_t end) {
        if (begin < end) (*static_cast<Body*>(data))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Pieces of scratch: unit u works in slot u % slots, one thread walks a slot's units in order.
template <class F>
void for_units(const fera_context* context, int64_t units, int64_t slots, int64_t grain, F&& body) {
  parallel_for(context, slots, grain, [&](int64_t begin, int64_t end) {
    for (int64_t slot = begin; slot < end; ++slot)
      for (int64_t unit = slot; unit < units; unit += slots) body(unit, slot);
  });
}

}  // namespace fera::cpu
