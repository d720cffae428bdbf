// The one dtype dispatcher: calls f(Tag<T>{}) with T the storage type of `dtype`.
// Half and Bfloat are the device's own 16-bit types (CUDA's, or those of common/cpu_types.h).
#pragma once

#include "common/status.h"

namespace fera {

template <class T>
struct Tag {
  using type = T;
};

template <class Half, class Bfloat, class F>
fera_status dispatch_dtype(fera_dtype dtype, F&& f) {
  switch (dtype) {
    case FERA_F32:
      return f(Tag<float>{});
    case FERA_F16:
      return f(Tag<Half>{});
    case FERA_BF16:
      return f(Tag<Bfloat>{});
    case FERA_F64:
      return f(Tag<double>{});
  }
  return invalid("dispatch", "dtype", "float32, float16, bfloat16 or float64", static_cast<int>(dtype));
}

// The compute dtype alone: float or double.
template <class F>
fera_status dispatch_compute(fera_dtype dtype, F&& f) {
  return dtype == FERA_F64 ? f(Tag<double>{}) : f(Tag<float>{});
}

}  // namespace fera
