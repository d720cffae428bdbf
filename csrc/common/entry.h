// What every operator's entry points share: the workspace query by device, and, in a build without CUDA,
// a CUDA entry point that says so.
#pragma once

#include "common/status.h"

#define FERA_WORKSPACE_ENTRY(op, cuda_bytes)                                               \
  extern "C" size_t fera_##op##_workspace(const fera_##op##_args* a, fera_device device) { \
    return device == FERA_CPU ? ::fera::op##_workspace_cpu(*a) : (cuda_bytes);             \
  }

#if defined(FERA_WITH_CUDA)
#define FERA_ENTRY(op) FERA_WORKSPACE_ENTRY(op, ::fera::op##_workspace_cuda(*a))
#else
#define FERA_ENTRY(op)                                                                        \
  FERA_WORKSPACE_ENTRY(op, 0)                                                                 \
  extern "C" fera_status fera_##op##_cuda(const fera_##op##_args*, const fera_context*) {     \
    ::fera::set_last_error(#op ": device must be the CPU in a build without CUDA, got CUDA"); \
    return FERA_UNSUPPORTED;                                                                  \
  }
#endif
