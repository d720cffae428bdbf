// dA, dB and dgate of the "wgmma" variant where its product has made dh (fused_sums.cuh), for R <= 32.
#pragma once

#include <cuda_runtime.h>

#include "common/checks.h"

namespace fera::cuda {

// Whether gate rows are long enough: a tile of tokens crosses at most one border of them.
bool sums_take(const fera_experts& e);

// The workspace of a call, and where in it the product writes dh, (T, R padded to 16 or 32) in float32; NULL where
// nobody reads it.
size_t sums_workspace(const fera_expert_update_backward_args& a);
float* sums_hidden(const fera_expert_update_backward_args& a, void* workspace);

// Of up to four linears of one x, R padded alike, right after the kernel that writes dh: it may start before that ends.
fera_status launch_sums(const char* op, int members, const fera_expert_update_backward_args* const* member,
                        void* const* workspace, cudaStream_t stream);

}  // namespace fera::cuda
