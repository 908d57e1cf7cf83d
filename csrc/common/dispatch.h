// Which of a family's kernel tables the `*_ops.cpp` files use.
//
//   MB_DECLARE_TABLE(mb_random_kernels);                  // the C type and the tables share a name
//   const mb_random_kernels& kernels() {
//     static const mb_random_kernels& table = MB_SELECT_TABLE(mb_random_kernels);
//     return table;
//   }
#pragma once

#include "common/isa.h"

namespace modelbatch {

// The instruction set in use: the best one that the machine supports, or the one that the
// environment variable MODELBATCH_ISA names. Decided at the first call; throws std::runtime_error
// where the variable names an unknown or unsupported one.
mb_isa active_isa();

}  // namespace modelbatch

#if MB_HAS_X86_ISAS
#define MB_DECLARE_TABLE(name)              \
  extern "C" {                              \
  extern const struct name name##_baseline; \
  extern const struct name name##_avx2;     \
  extern const struct name name##_avx512;   \
  }
#define MB_SELECT_TABLE(name)                                  \
  (::modelbatch::active_isa() == MB_ISA_AVX512 ? name##_avx512 \
   : ::modelbatch::active_isa() == MB_ISA_AVX2 ? name##_avx2   \
                                               : name##_baseline)
#else
#define MB_DECLARE_TABLE(name)              \
  extern "C" {                              \
  extern const struct name name##_baseline; \
  }
#define MB_SELECT_TABLE(name) (name##_baseline)
#endif
