// What this build holds.
#include "common/cpu_isa.h"
#include "fera/fera.h"

#ifndef FERA_CUDA_TARGETS
#define FERA_CUDA_TARGETS ""
#endif

extern "C" const char* fera_cpu_isa(void) { return fera::cpu::cpu_isa_name(); }

extern "C" int fera_has_cuda(void) {
#if defined(FERA_WITH_CUDA)
  return 1;
#else
  return 0;
#endif
}

extern "C" const char* fera_cuda_targets(void) { return FERA_CUDA_TARGETS; }
