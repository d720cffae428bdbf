// Included once by a kernels_<level>.cpp, after every other header: what follows is compiled for FERA_ISA_LEVEL.
// No include guard matters: one level a file.
#define FERA_ISA_OPEN 1
#if FERA_ISA_LEVEL == 2
#define FERA_ISA avx512
#define FERA_VECTOR_BYTES 64
#elif FERA_ISA_LEVEL == 1
#define FERA_ISA avx2
#define FERA_VECTOR_BYTES 32
#else
#define FERA_ISA generic
#define FERA_VECTOR_BYTES 16
#endif

#if defined(__clang__)
#if FERA_ISA_LEVEL == 2
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#elif FERA_ISA_LEVEL == 1
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#endif
#else
#pragma GCC push_options
#if FERA_ISA_LEVEL == 2
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#elif FERA_ISA_LEVEL == 1
#pragma GCC target("avx2,fma")
#endif
#endif
