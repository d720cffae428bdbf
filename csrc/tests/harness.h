// What the kernel tests share: devices, memory on them, dtypes, strided tensors, thread partitions, a tally.
// Every check runs on each device of devices(); no torch.
#pragma once

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/cpu_types.h"
#include "fera/fera.h"

#if defined(FERA_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace test {

using Values = std::vector<double>;

inline int failures = 0;

inline void fail(const char* format, ...) {
  va_list list;
  va_start(list, format);
  if (++failures <= 20) {
    std::printf("FAIL ");
    std::vprintf(format, list);
    std::printf("\n");
  }
  va_end(list);
}

inline const char* name_of(fera_device d) { return d == FERA_CPU ? "cpu" : "cuda"; }
inline const char* name_of(fera_dtype t) {
  return t == FERA_F32 ? "float32" : t == FERA_F16 ? "float16" : t == FERA_BF16 ? "bfloat16" : "float64";
}
constexpr fera_dtype kDtypes[] = {FERA_F32, FERA_F16, FERA_BF16, FERA_F64};
inline fera_dtype compute_of(fera_dtype t) { return t == FERA_F64 ? FERA_F64 : FERA_F32; }
inline size_t bytes_of(fera_dtype t) { return t == FERA_F64 ? 8 : t == FERA_F32 ? 4 : 2; }

// CPU, and CUDA where the build and the machine have it; the reason is printed where not.
inline const std::vector<fera_device>& devices() {
  static const std::vector<fera_device> found = [] {
    std::vector<fera_device> all{FERA_CPU};
    const char* only = std::getenv("FERA_TEST_DEVICE");  // cpu or cuda; both when unset
    if (only != nullptr && std::string(only) == "cpu") return all;
#if defined(FERA_WITH_CUDA)
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) {
      all.push_back(FERA_CUDA);
      if (only != nullptr && std::string(only) == "cuda") all.erase(all.begin());
    } else {
      std::printf("skipped on cuda: %s\n", error == cudaSuccess ? "no GPU" : cudaGetErrorString(error));
    }
#else
    std::printf("skipped on cuda: %s\n",
                fera_has_cuda() ? "the tests were built without CUDA" : "a build without CUDA");
#endif
    return all;
  }();
  return found;
}

// Bytes on a device, aligned to 256.
class Buffer {
 public:
  Buffer() = default;
  Buffer(fera_device device, size_t bytes, [[maybe_unused]] bool poisoned = true) : device_(device), bytes_(bytes) {
    if (device == FERA_CPU) {
      data_ = std::aligned_alloc(256, (bytes + 511) / 256 * 256);
      std::memset(data_, 0xff, (bytes + 511) / 256 * 256);  // NaN: what a kernel does not write shows
    }
#if defined(FERA_WITH_CUDA)
    else {
      cudaMalloc(&data_, bytes + 256);
      if (poisoned) cudaMemset(data_, 0xff, bytes + 256);
    }
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Buffer() {
    if (data_ == nullptr) return;
    if (device_ == FERA_CPU) std::free(data_);
#if defined(FERA_WITH_CUDA)
    if (device_ == FERA_CUDA) cudaFree(data_);
#endif
  }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  void upload(const void* from) {
    if (device_ == FERA_CPU && bytes_ > 0) std::memcpy(data_, from, bytes_);
#if defined(FERA_WITH_CUDA)
    if (device_ == FERA_CUDA) cudaMemcpy(data_, from, bytes_, cudaMemcpyHostToDevice);
#endif
  }
  std::vector<char> download() const {
    std::vector<char> to(bytes_);
    if (device_ == FERA_CPU && bytes_ > 0) std::memcpy(to.data(), data_, bytes_);
#if defined(FERA_WITH_CUDA)
    if (device_ == FERA_CUDA) cudaMemcpy(to.data(), data_, bytes_, cudaMemcpyDeviceToHost);
#endif
    return to;
  }

 private:
  fera_device device_ = FERA_CPU;
  size_t bytes_ = 0;
  void* data_ = nullptr;
};

inline double get(const char* bytes, fera_dtype t, int64_t i) {
  const auto read = [&](auto typed) {
    std::memcpy(&typed, bytes + i * static_cast<int64_t>(sizeof typed), sizeof typed);
    return static_cast<double>(fera::cpu::widen(typed));
  };
  if (t == FERA_F64) return read(double{});
  if (t == FERA_F32) return read(float{});
  return t == FERA_F16 ? read(fera::cpu::Half{}) : read(fera::cpu::Bfloat{});
}
inline void put(char* bytes, fera_dtype t, int64_t i, double value) {
  const auto write = [&](auto typed) {
    if constexpr (sizeof typed == 8)
      fera::cpu::narrow(value, &typed);
    else
      fera::cpu::narrow(static_cast<float>(value), &typed);
    std::memcpy(bytes + i * static_cast<int64_t>(sizeof typed), &typed, sizeof typed);
  };
  if (t == FERA_F64) return write(double{});
  if (t == FERA_F32) return write(float{});
  return t == FERA_F16 ? write(fera::cpu::Half{}) : write(fera::cpu::Bfloat{});
}
inline double rounded(fera_dtype t, double value) {
  char bytes[8];
  put(bytes, t, 0, value);
  return get(bytes, t, 0);
}

// Under compute-sanitizer (FERA_TEST_UNPOISONED, see run) the tests leave out what is large.
inline bool brief() { return std::getenv("FERA_TEST_UNPOISONED") != nullptr; }

// (count, width) with a gap after every row; values are what the device holds.
struct Matrix {
  fera_rows view{};
  Buffer buffer;
  int64_t count, width;
  Matrix(fera_device device, fera_dtype t, int64_t rows, int64_t columns, int64_t gap) : count(rows), width(columns) {
    view = {nullptr, t, columns + gap};
    buffer = Buffer(device, bytes_of(t) * static_cast<size_t>(rows * view.stride));
    view.data = buffer.data();
  }
  void set(Values& values) {
    std::vector<char> bytes = buffer.download();
    for (int64_t i = 0; i < count * width; ++i) {
      put(bytes.data(), view.dtype, i / width * view.stride + i % width, values[i]);
      values[i] = rounded(view.dtype, values[i]);
    }
    buffer.upload(bytes.data());
  }
  Values values() const {
    const std::vector<char> bytes = buffer.download();
    Values out(static_cast<size_t>(count * width));
    for (int64_t i = 0; i < count * width; ++i)
      out[i] = get(bytes.data(), view.dtype, i / width * view.stride + i % width);
    return out;
  }
};

// A contiguous array on a device.
struct Array {
  Buffer buffer;
  fera_dtype dtype = FERA_F32;
  Array() = default;
  Array(fera_device device, fera_dtype t, int64_t count) : buffer(device, bytes_of(t) * count), dtype(t) {}
  // Rounds `values` to the dtype, in place too.
  Array(fera_device device, fera_dtype t, Values& values) : Array(device, t, static_cast<int64_t>(values.size())) {
    std::vector<char> bytes(buffer.bytes());
    for (size_t i = 0; i < values.size(); ++i) {
      put(bytes.data(), t, static_cast<int64_t>(i), values[i]);
      values[i] = get(bytes.data(), t, static_cast<int64_t>(i));
    }
    buffer.upload(bytes.data());
  }
  void* data() const { return buffer.data(); }
  Values values() const {
    const std::vector<char> bytes = buffer.download();
    Values out(bytes.size() / bytes_of(dtype));
    for (size_t i = 0; i < out.size(); ++i) out[i] = get(bytes.data(), dtype, static_cast<int64_t>(i));
    return out;
  }
};

enum class Layout { contiguous, channels_last, transposed, sliced };

// A strided (N, P, H, W) tensor; its values are in that order.
struct Latent {
  fera_latent view{};
  Buffer buffer;
  Latent(fera_device device, fera_dtype t, int64_t n, int64_t p, int64_t h, int64_t w, Layout layout) {
    view = {nullptr, t, n, p, h, w, p * h * w, h * w, w, 1};
    int64_t count = n * p * h * w;
    if (layout == Layout::channels_last) view.stride_p = 1, view.stride_h = w * p, view.stride_w = p;
    if (layout == Layout::transposed) view.stride_h = 1, view.stride_w = h;
    if (layout == Layout::sliced) {
      view.stride_h = w + 3, view.stride_p = (h + 1) * (w + 3), view.stride_n = (p + 1) * view.stride_p;
      count = n * view.stride_n;
    }
    buffer = Buffer(device, bytes_of(t) * static_cast<size_t>(count));
    view.data = buffer.data();
  }
  template <class F>
  void each(F&& f) const {
    int64_t i = 0;
    for (int64_t n = 0; n < view.n; ++n)
      for (int64_t p = 0; p < view.p; ++p)
        for (int64_t h = 0; h < view.h; ++h)
          for (int64_t w = 0; w < view.w; ++w)
            f(i++, n * view.stride_n + p * view.stride_p + h * view.stride_h + w * view.stride_w);
  }
  void set(Values& values) {  // rounds them in place
    std::vector<char> bytes = buffer.download();
    each([&](int64_t i, int64_t at) {
      put(bytes.data(), view.dtype, at, values[i]);
      values[i] = get(bytes.data(), view.dtype, at);
    });
    buffer.upload(bytes.data());
  }
  Values values() const {
    const std::vector<char> bytes = buffer.download();
    Values out(static_cast<size_t>(view.n * view.p * view.h * view.w));
    each([&](int64_t i, int64_t at) { out[i] = get(bytes.data(), view.dtype, at); });
    return out;
  }
};

inline std::mt19937_64& generator() {
  static std::mt19937_64 g(20240607);
  return g;
}
inline Values normal(int64_t count, double scale = 1) {
  std::normal_distribution<double> d;
  Values v(static_cast<size_t>(count));
  for (double& x : v) x = scale * d(generator());
  return v;
}

// Partitions of the work; results must not depend on them.
enum class Threads { none, reversed, two, many };

inline void partition(void* pool, int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* data) {
  const Threads threads = *static_cast<Threads*>(pool);
  if (threads == Threads::reversed) {
    for (int64_t end = count; end > 0; end -= grain) body(data, end > grain ? end - grain : 0, end);
    return;
  }
  const int64_t pieces = threads == Threads::two ? 2 : 5, piece = std::max(grain, (count + pieces - 1) / pieces);
  std::vector<std::thread> running;
  for (int64_t begin = 0; begin < count; begin += piece)
    running.emplace_back([=] { body(data, begin, std::min(count, begin + piece)); });
  for (std::thread& t : running) t.join();
}

template <class Args>
using Entry = fera_status (*)(const Args*, const fera_context*);

// Runs an operator with a workspace of exactly the bytes it asks for; returns its status.
template <class Args>
fera_status run(fera_device device, size_t (*workspace)(const Args*, fera_device), Entry<Args> cpu, Entry<Args> cuda,
                const Args& args, Threads threads = Threads::none) {
  const size_t bytes = workspace(&args, device);
  // initcheck wants the workspace as it came.
  const Buffer scratch(device, bytes, !brief());
  fera_context context{};
  context.workspace = scratch.data();
  context.workspace_bytes = bytes;
  if (threads != Threads::none) {
    context.parallel = partition;
    context.pool = &threads;
  }
  if (device == FERA_CPU) return cpu(&args, &context);
  const fera_status status = cuda(&args, &context);
#if defined(FERA_WITH_CUDA)
  if (cudaDeviceSynchronize() != cudaSuccess) fail("cuda: %s", cudaGetErrorString(cudaGetLastError()));
#endif
  return status;
}
#define FERA_RUN(op, device, ...) \
  test::run<fera_##op##_args>(device, fera_##op##_workspace, fera_##op##_cpu, fera_##op##_cuda, __VA_ARGS__)

#define EXPECT_OK(status)                                                                      \
  do {                                                                                         \
    if ((status) != FERA_OK) ::test::fail("%s:%d: %s", __FILE__, __LINE__, fera_last_error()); \
  } while (0)

// |got - want| <= tolerance * |want| + floor, in the 2-norm.
inline void expect_close(const Values& got, const Values& want, double tolerance, const std::string& what,
                         double floor = 0) {
  double error = 0, size = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  error = std::sqrt(error);
  size = std::sqrt(size);
  if (!(error <= tolerance * size + floor) || got.size() != want.size())
    fail("%s: |error| %.3g, |reference| %.3g, tolerance %.1g", what.c_str(), error, size, tolerance);
}
inline void expect_same_bits(const Buffer& a, const Buffer& b, const std::string& what) {
  if (a.download() != b.download()) fail("%s: the bits differ", what.c_str());
}
inline void expect_all_nan(const Values& v, const std::string& what) {
  for (double x : v)
    if (!std::isnan(x)) return fail("%s: a NaN was lost, got %g", what.c_str(), x);
}
inline void expect_error(fera_status status, fera_status wanted, const char* sentence) {
  if (status != wanted || std::strcmp(fera_last_error(), sentence) != 0)
    fail("wanted status %d \"%s\", got %d \"%s\"", wanted, sentence, status, fera_last_error());
}

inline void done(const char* group, fera_device device) { std::printf("%-40s %s\n", group, name_of(device)); }
inline int finish() {
  std::printf(failures == 0 ? "passed\n" : "%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace test
