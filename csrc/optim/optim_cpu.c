/* The update rules and the gradient's statistics for a slice of one model; optim_cpu_body.h is the
 * code of one dtype. Products and sums never fuse (setup.py), so that an element's result depends
 * neither on the instruction set nor on where in a slice it stands. */
#include <float.h>
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "common/half.h"
#include "common/isa.h"
#include "optim/optim.h"
#include "optim/rules.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* Vectors stay within functions. */
#endif

#define LANES 16
#define GATHER_COLUMNS 16

/* Tells GCC, which does not see it from restrict pointers other than parameters, that no iteration
 * writes what another one reads. */
#if defined(__GNUC__) && !defined(__clang__)
#define NO_OVERLAP _Pragma("GCC ivdep")
#else
#define NO_OVERLAP
#endif

static int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

#define NAME(stem) stem##_f32
#define RULE(stem) stem##_f32
#define STORAGE float
#define REAL float
#define WIDEN(value) (value)
#define NARROW(value) (value)
#include "optim/optim_cpu_body.h"

#define NAME(stem) stem##_f64
#define RULE(stem) stem##_f64
#define STORAGE double
#define REAL double
#define WIDEN(value) (value)
#define NARROW(value) (value)
#include "optim/optim_cpu_body.h"

#define NAME(stem) stem##_bf16
#define RULE(stem) stem##_f32
#define STORAGE uint16_t
#define REAL float
#define WIDEN(value) mb_bf16_to_f32(value)
#define NARROW(value) mb_f32_to_bf16(value)
#include "optim/optim_cpu_body.h"

#define NAME(stem) stem##_f16
#define RULE(stem) stem##_f32
#define STORAGE uint16_t
#define REAL float
#define WIDEN(value) mb_f16_to_f32(value)
#define NARROW(value) mb_f32_to_f16(value)
#include "optim/optim_cpu_body.h"

/* ---- strided slices -------------------------------------------------------------------------- */

#define BITS 16
#include "optim/gather_body.h"
#define BITS 32
#include "optim/gather_body.h"
#define BITS 64
#include "optim/gather_body.h"

/* ---- non-finite elements ----------------------------------------------------------------------
 */

/* Without its sign, a number is infinite or NaN if its bits, as an integer, are not below those of
 * infinity. So the largest of these integers tells, and no floating-point unit is asked. */
#define DEFINE_NONFINITE(stem, bits_type, infinity)                 \
  static int nonfinite_##stem(const void* data, int64_t numel) {    \
    const unsigned char* bytes = data;                              \
    bits_type largest = 0;                                          \
    for (int64_t e = 0; e < numel; ++e) {                           \
      bits_type bits;                                               \
      memcpy(&bits, bytes + e * (int64_t)sizeof bits, sizeof bits); \
      bits &= (bits_type)((bits_type) ~(bits_type)0 >> 1);          \
      largest = bits > largest ? bits : largest;                    \
    }                                                               \
    return largest >= infinity;                                     \
  }

DEFINE_NONFINITE(f32, uint32_t, 0x7f800000u)
DEFINE_NONFINITE(f64, uint64_t, 0x7ff0000000000000u)
DEFINE_NONFINITE(bf16, uint16_t, 0x7f80u)
DEFINE_NONFINITE(f16, uint16_t, 0x7c00u)

#define TABLE(stem) {stem##_f32, stem##_f64, stem##_bf16, stem##_f16}

const mb_optim_kernels MB_NAME(mb_optim_kernels) = {
    .update = {TABLE(sgd), TABLE(adam), TABLE(adam), TABLE(rmsprop), TABLE(adagrad),
               TABLE(adadelta), TABLE(adamax), TABLE(radam), TABLE(rprop), TABLE(nadam),
               TABLE(asgd)},
    .gather = {gather_32, gather_64, gather_16, gather_16},
    .sum_squares = TABLE(sum_squares),
    .nonfinite = TABLE(nonfinite),
};
