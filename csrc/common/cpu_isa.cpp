#include "common/cpu_isa.h"

#include <cstdlib>
#include <cstring>

namespace fera::cpu {
namespace {

Isa detect() {
  Isa widest = Isa::generic;
#if FERA_CPU_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) widest = Isa::avx2;
  if (widest == Isa::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    widest = Isa::avx512;
#endif
  const char* wanted = std::getenv("FERA_CPU_ISA");
  if (wanted == nullptr) return widest;
  if (std::strcmp(wanted, "generic") == 0) return Isa::generic;
  if (std::strcmp(wanted, "avx2") == 0 && widest >= Isa::avx2) return Isa::avx2;
  return widest;
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* cpu_isa_name() {
  switch (cpu_isa()) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace fera::cpu
