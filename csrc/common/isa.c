#include "common/isa.h"

#if MB_HAS_X86_ISAS
#include <cpuid.h>

/* F16C has no name in __builtin_cpu_supports of older compilers. */
static int has_f16c(void) {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}

static int has_avx2(void) {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}

static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
}
#endif

const char* mb_isa_name(mb_isa isa) {
  switch (isa) {
    case MB_ISA_AVX2:
      return "avx2";
    case MB_ISA_AVX512:
      return "avx512";
    default:
      return "baseline";
  }
}

int mb_isa_is_built(mb_isa isa) { return isa == MB_ISA_BASELINE || MB_HAS_X86_ISAS; }

int mb_isa_is_supported(mb_isa isa) {
#if MB_HAS_X86_ISAS
  if (isa == MB_ISA_AVX2) return has_avx2();
  if (isa == MB_ISA_AVX512) return has_avx512();
#endif
  return isa == MB_ISA_BASELINE;
}
