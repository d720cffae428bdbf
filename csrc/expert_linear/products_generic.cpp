// The products for the generic level; see common/cpu_isa.h.
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "expert_linear/products_cpu.h"

#define FERA_ISA_LEVEL 0
#include "common/isa_push.h"
// After the line above, not sorted with the others.
#include "expert_linear/products_isa.h"
#include "common/isa_pop.h"
