#include "expert_linear/expert_linear.h"

#include "common/entry.h"

FERA_ENTRY(expert_update)
FERA_ENTRY(expert_update_backward)
