// Ends what common/isa_push.h began.
#if defined(__clang__)
#if FERA_ISA_LEVEL > 0
#pragma clang attribute pop
#endif
#else
#pragma GCC pop_options
#endif
#undef FERA_ISA_OPEN
