// From torch tensors to the C ABI: views, workspace, stream, threads, errors. Header of the bindings only.
#pragma once

// Single-operator headers: the umbrella headers cost a minute of compile time a file.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cstdio>
#include <memory>
#include <string>

#include "fera/fera.h"

#if defined(FERA_TORCH_CUDA)
#include <ATen/cuda/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace fera::torch_binding {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Values as they read in a sentence; no streams, for the reason in common/status.h.
inline std::string text(const char* v) { return v; }
inline std::string text(const std::string& v) { return v; }
template <class Integer, std::enable_if_t<std::is_integral_v<Integer>, int> = 0>
std::string text(Integer v) {
  return std::to_string(v);
}
inline std::string text(at::ScalarType v) { return c10::toString(v); }
inline std::string text(c10::Device v) { return v.str(); }
inline std::string text(double v) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%g", v);
  return digits;
}
inline std::string text(at::IntArrayRef v) {
  std::string out = "[";
  for (size_t i = 0; i < v.size(); ++i) out += (i ? ", " : "") + std::to_string(v[i]);
  return out + "]";
}
template <class... Parts>
std::string join(const Parts&... parts) {
  return (text(parts) + ...);
}

[[noreturn]] inline void refuse(const std::string& sentence) {
  TORCH_CHECK_VALUE(false, sentence);
  std::abort();  // not reached
}

// Raises ValueError "<op>: <argument> must be <rule>, got <value>"; the last three are evaluated only then.
#define FERA_REQUIRE(op, condition, argument, rule, value)                                                         \
  do {                                                                                                             \
    if (!(condition)) ::fera::torch_binding::refuse(join(op, ": ", argument, " must be ", rule, ", got ", value)); \
  } while (0)

inline fera_dtype dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return FERA_F32;
    case at::kHalf:
      return FERA_F16;
    case at::kBFloat16:
      return FERA_BF16;
    case at::kDouble:
      return FERA_F64;
    default:
      refuse(join(op, ": ", name, " must be float32, float16, bfloat16 or float64, got ", t.scalar_type()));
  }
}

inline at::ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
// t itself where it has the dtype, which t.to() finds out through the dispatcher.
inline Tensor cast(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }
inline at::TensorOptions compute_options(const Tensor& t) { return t.options().dtype(compute_type(t)); }

// Contiguous, not initialised. Straight from the device's allocator: an operator makes up to a dozen tensors, and on
// the way through the dispatcher each costs the host as much as a launch.
inline Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
#if defined(FERA_TORCH_CUDA)
  if (options.device().is_cuda()) return at::detail::empty_cuda(sizes, dtype, options.device(), std::nullopt);
#endif
  return at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, std::nullopt);
}

inline void require_same_device(const char* op, const char* name, const Tensor& t, const Tensor& like,
                                const char* of = "") {
  FERA_REQUIRE(op, t.device() == like.device(), join(name, of), join("on ", like.device()), t.device());
}

inline void parallel_for(void*, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* data) {
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(data, begin, end); });
}

// The calling thread's own memory for a call on the CPU, which it keeps until it ends, up to 16 MiB; NULL where the
// call wants more, or nothing. What an allocator gives back to the system costs a page fault every 4 KiB when it comes
// again: up to 430 a call and a third of its time.
inline char* kept_by_thread(size_t bytes) {
  constexpr size_t kMost = size_t{16} << 20;
  thread_local std::unique_ptr<char[]> kept;
  thread_local size_t size = 0;
  if (bytes > kMost) return nullptr;
  if (bytes > size) {
    kept.reset();  // not beside the new one
    size = 0;
    kept.reset(new char[bytes]);
    size = bytes;
  }
  return kept.get();
}

// Of the current device; what it gives goes back in the order of the current stream.
inline c10::Allocator* allocator(bool on_cuda) {
#if defined(FERA_TORCH_CUDA)
  if (on_cuda) return c10::cuda::CUDACachingAllocator::get();
#else
  (void)on_cuda;
#endif
  return c10::GetAllocator(c10::kCPU);
}

// Runs one entry point of the core on the device of `like`, with a workspace from torch's allocator or the thread's.
template <class Args>
void call(const Tensor& like, const Args& args, size_t (*workspace)(const Args*, fera_device),
          fera_status (*cpu)(const Args*, const fera_context*), fera_status (*cuda)(const Args*, const fera_context*)) {
  const bool on_cuda = like.is_cuda();
  fera_context context{};
  const size_t bytes = workspace(&args, on_cuda ? FERA_CUDA : FERA_CPU);
  // 256 bytes more than asked, so that the start can be aligned whatever the allocator gives.
  const size_t padded = bytes ? bytes + 256 : 0;
  const void* given = on_cuda ? nullptr : kept_by_thread(padded);
  c10::DataPtr scratch;
  if (bytes && !given) {
    scratch = allocator(on_cuda)->allocate(padded);
    given = scratch.get();
  }
  const uintptr_t start = (reinterpret_cast<uintptr_t>(given) + 255) / 256 * 256;
  context.workspace = bytes ? reinterpret_cast<void*>(start) : nullptr;
  context.workspace_bytes = bytes;
  fera_status status;
  if (on_cuda) {
#if defined(FERA_TORCH_CUDA)
    context.stream = c10::cuda::getCurrentCUDAStream(like.get_device()).stream();
#endif
    status = cuda(&args, &context);
  } else {
    context.parallel = parallel_for;
    status = cpu(&args, &context);
  }
  if (status == FERA_INVALID) refuse(fera_last_error());
  TORCH_CHECK(status == FERA_OK, fera_last_error());
}

#define FERA_CALL(like, op, args) call(like, args, fera_##op##_workspace, fera_##op##_cpu, fera_##op##_cuda)

// Makes a tensor's device current for the scope (a no-op on the CPU).
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& t) {
#if defined(FERA_TORCH_CUDA)
    if (t.is_cuda()) guard_.emplace(t.device());
#else
    (void)t;
#endif
  }

 private:
#if defined(FERA_TORCH_CUDA)
  std::optional<c10::cuda::CUDAGuard> guard_;
#endif
};

// The stride of axes [first, last) merged into one whose rows hold `inner` elements each, or -1 where they do
// not merge. Axes of size 1 may have any stride, also in tensors that count as contiguous: they are passed over.
inline int64_t merged_stride(const Tensor& t, int64_t first, int64_t last, int64_t inner) {
  int64_t stride = inner, expected = -1;
  for (int64_t i = last - 1; i >= first; --i) {
    if (t.size(i) == 1) continue;
    if (expected < 0)
      stride = t.stride(i);
    else if (t.stride(i) != expected)
      return -1;
    expected = t.stride(i) * t.size(i);
  }
  return stride;
}

// z (N, ..., H, W) with its middle axes merged; copied only where their strides do not merge.
class Latent {
 public:
  Latent(const char* op, const char* name, const Tensor& z) : tensor(z) {
    FERA_REQUIRE(op, z.dim() >= 3, name, "(N, ..., H, W)", z.sizes());
    const fera_dtype dtype = dtype_of(op, name, z);
    const int64_t dims = z.dim(), n = z.size(0), h = z.size(dims - 2), w = z.size(dims - 1);
    int64_t planes = 1;
    for (int64_t i = 1; i + 2 < dims; ++i) planes *= z.size(i);
    const int64_t plane = merged_stride(z, 1, dims - 2, h * w);
    if (plane >= 0 || z.numel() == 0) {
      view = {tensor.data_ptr(), dtype, n, planes, h, w, z.stride(0), plane, z.stride(dims - 2), z.stride(dims - 1)};
    } else {
      tensor = z.contiguous();
      view = {tensor.data_ptr(), dtype, n, planes, h, w, planes * h * w, h * w, w, 1};
    }
  }

  Tensor tensor;
  fera_latent view;
};

// Filters in z's compute dtype, kept alive beside the struct that points into them.
class Filters {
 public:
  Filters(const char* op, const Tensor& z, const Tensor& table, const OptionalTensor& right, const OptionalTensor& mix,
          at::IntArrayRef reach) {
    const int64_t h = z.size(-2), w = z.size(-1);
    table_ = prepare(op, "table", table, z);
    view.bands = static_cast<int32_t>(table_.size(0));
    if (right.has_value()) {
      FERA_REQUIRE(op, mix.has_value(), "mix", "given with right", "None");
      right_ = prepare(op, "right", *right, z);
      mix_ = prepare(op, "mix", *mix, z);
      const int64_t blurs = table_.size(0);
      FERA_REQUIRE(op, (table_.sizes() == at::IntArrayRef{blurs, h, h}), "table", join("(J, ", h, ", ", h, ")"),
                   table_.sizes());
      FERA_REQUIRE(op, (right_.sizes() == at::IntArrayRef{blurs, w, w}), "right",
                   join("(", blurs, ", ", w, ", ", w, ")"), right_.sizes());
      FERA_REQUIRE(op, mix_.dim() == 2 && mix_.size(1) == blurs, "mix", join("(K, ", blurs, ")"), mix_.sizes());
      FERA_REQUIRE(op, static_cast<int64_t>(reach.size()) == blurs && blurs <= FERA_MAX_BANDS, "reach",
                   join("one number for each of at most 16 blurs"), reach.size());
      view.bands = static_cast<int32_t>(mix_.size(0));
      view.blurs = static_cast<int32_t>(blurs);
      for (int64_t j = 0; j < blurs; ++j) view.reach[j] = static_cast<int32_t>(reach[j]);
      view.right = right_.data_ptr();
      view.mix = mix_.data_ptr();
    } else {
      FERA_REQUIRE(op, table_.dim() == 3 && table_.size(1) == h && table_.size(2) == w / 2 + 1, "table",
                   join("(K, ", h, ", ", w / 2 + 1, ")"), table_.sizes());
    }
    view.table = table_.data_ptr();
  }

  fera_filters view{};

 private:
  static Tensor prepare(const char* op, const char* name, const Tensor& t, const Tensor& z) {
    require_same_device(op, name, t, z);
    return cast(t, compute_type(z)).contiguous();
  }
  Tensor table_, right_, mix_;
};

}  // namespace fera::torch_binding
