// Which instruction set the CPU kernels use. Each vectorised kernel is compiled once per level, in a file of
// its own (kernels_<level>.cpp), and chosen at run time, so that one build runs on every machine.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FERA_CPU_X86 1
#else
#define FERA_CPU_X86 0
#endif

namespace fera::cpu {

enum class Isa { generic = 0, avx2 = 1, avx512 = 2 };

// The widest level this machine has, or the lower one that the environment variable FERA_CPU_ISA names
// (generic, avx2, avx512). Read once.
Isa cpu_isa();
const char* cpu_isa_name();

}  // namespace fera::cpu
