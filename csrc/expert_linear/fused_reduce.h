// dA, dB and dgate of the "wgmma" variant from the partial sums that the items beside its product leave.
#pragma once

#include <cuda_runtime.h>

#include "expert_linear/skinny_up.cuh"

namespace fera::cuda {

// Of up to four linears, R padded to `rank` = 16 or 32, right after the kernel that writes the partial sums: it may
// start before that ends.
fera_status launch_reduce(const char* op, int members, int rank, const ReduceArgs* member, cudaStream_t stream);

}  // namespace fera::cuda
