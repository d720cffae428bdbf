// Argument checks shared by the CPU and the CUDA launchers: one rule, one sentence, both devices.
#pragma once

#include "common/status.h"

namespace fera {

inline bool is_dtype(fera_dtype d) { return d >= FERA_F32 && d <= FERA_F64; }
inline fera_dtype compute_dtype(fera_dtype d) { return d == FERA_F64 ? FERA_F64 : FERA_F32; }
inline size_t dtype_size(fera_dtype d) { return d == FERA_F64 ? 8 : d == FERA_F32 ? 4 : 2; }
inline size_t align256(size_t bytes) { return (bytes + 255) / 256 * 256; }

fera_status check_latent(const char* op, const char* name, const fera_latent& z);
fera_status check_same_latent(const char* op, const char* name, const fera_latent& z, const fera_latent& like);
fera_status check_filters(const char* op, const fera_filters& filters);
fera_status check_router(const char* op, const fera_router& router);
fera_status check_workspace(const char* op, const fera_context* context, size_t needed);
fera_status check_experts(const char* op, const fera_experts& experts);
fera_status check_dropout(const char* op, double dropout, const int64_t* seed);

// Whole-operator checks; one per entry point of fera.h.
fera_status check(const fera_band_energy_args& a);
fera_status check(const fera_band_energy_backward_args& a);
fera_status check(const fera_router_softmax_args& a);
fera_status check(const fera_router_softmax_backward_args& a);
fera_status check(const fera_latent_gate_args& a);
fera_status check(const fera_fecl_loss_args& a);
fera_status check(const fera_fecl_loss_backward_args& a);
fera_status check(const fera_expert_update_args& a);
fera_status check(const fera_expert_update_backward_args& a);
fera_status check(const fera_expert_dropout_args& a);

}  // namespace fera
