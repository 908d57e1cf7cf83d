/* Instruction sets: files named `*_cpu.c` are compiled once for each of them.
 *
 * Every symbol that such a file exports is wrapped in MB_NAME, which appends the instruction set:
 * MB_NAME(mb_random_kernels) is mb_random_kernels_avx2 in the AVX2 object. A family exports one
 * constant table of function pointers; common/dispatch.h picks the table to use, once.
 */
#ifndef MODELBATCH_COMMON_ISA_H
#define MODELBATCH_COMMON_ISA_H

#ifdef __cplusplus
extern "C" {
#endif

#define MB_JOIN_(a, b) a##_##b
#define MB_JOIN(a, b) MB_JOIN_(a, b)
#define MB_NAME(name) MB_JOIN(name, MB_ISA)

#if defined(__x86_64__)
#define MB_HAS_X86_ISAS 1
#else
#define MB_HAS_X86_ISAS 0
#endif

typedef enum mb_isa {
  MB_ISA_BASELINE = 0,
  MB_ISA_AVX2 = 1,
  MB_ISA_AVX512 = 2,
  MB_ISA_COUNT = 3
} mb_isa;

/* The name that MODELBATCH_ISA uses: "baseline", "avx2" or "avx512". */
const char* mb_isa_name(mb_isa isa);

/* Whether this build holds kernels for the instruction set. */
int mb_isa_is_built(mb_isa isa);

/* Whether the processor and the operating system can run it. */
int mb_isa_is_supported(mb_isa isa);

#ifdef __cplusplus
}
#endif

#endif /* MODELBATCH_COMMON_ISA_H */
