#include "router/router.h"

#include "common/entry.h"

FERA_ENTRY(router_softmax)
FERA_ENTRY(router_softmax_backward)
FERA_ENTRY(latent_gate)
