#include "fecl/fecl.h"

#include "common/entry.h"

FERA_ENTRY(fecl_loss)
FERA_ENTRY(fecl_loss_backward)
