/* The C ABI compiles as C99. */
#include "fera/fera.h"

int fera_header_is_c(void) { return FERA_OK; }
