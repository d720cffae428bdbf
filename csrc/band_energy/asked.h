// What a device says about a kernel, asked once: occupancy and attributes cost the host more than a launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace fera::cuda {

// Two numbers, not negative; both 0 where the device does not run the kernel.
struct Answer {
  int first, second;
};

// Answers of every device to as many questions as a launcher has kernels. Threads may ask side by side; they hear the
// same.
template <size_t Questions>
class Asked {
 public:
  // ask(device, answer) gives false, and the CUDA error is dropped, where the device refuses: that is an answer here,
  // and an error where something is launched.
  template <class Ask>
  Answer operator()(size_t question, const Ask& ask) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) {
      cudaGetLastError();
      return {0, 0};
    }
    if (device >= kDevices) return {0, 0};
    std::atomic<int64_t>& slot = known_[device][question];
    int64_t value = slot.load(std::memory_order_acquire);
    if (value == 0) {
      Answer answer{0, 0};
      if (!ask(device, &answer)) {
        cudaGetLastError();
        answer = {0, 0};
      }
      value = (static_cast<int64_t>(answer.second) << 32 | answer.first) + 1;
      slot.store(value, std::memory_order_release);
    }
    --value;
    return {static_cast<int>(value & 0xffffffff), static_cast<int>(value >> 32)};
  }

 private:
  static constexpr int kDevices = 64;
  std::atomic<int64_t> known_[kDevices][Questions] = {};  // (second << 32 | first) + 1; 0 is unknown
};

}  // namespace fera::cuda
