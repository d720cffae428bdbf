// The products for the avx512 level; see common/cpu_isa.h.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "expert_linear/products_cpu.h"

#if FERA_CPU_X86
#define FERA_ISA_LEVEL 2
#include "common/isa_push.h"
// After the line above, not sorted with the others.
#include "expert_linear/products_isa.h"
#include "common/isa_pop.h"
#endif
