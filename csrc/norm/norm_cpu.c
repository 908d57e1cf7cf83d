/* Batch normalisation of one model. Sums are double for every dtype: widening in registers costs
 * nothing next to the loads, and two passes (mean, then squared differences) do not cancel.
 *
 * norm_body.h is the code of one dtype; it is included once for each.
 */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "common/half.h"
#include "common/isa.h"
#include "norm/norm.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* Vectors are passed between inlined functions only. */
#endif

#define LANES 8
#define BLOCK MB_NORM_CHANNEL_BLOCK
#define ROWS \
  64 /* rows of a channels-last slice that stay in L1 while all their channels are read */

/* Code that is compiled once for samples of equal weight and once for weights of their own. */
#define INLINED static inline __attribute__((always_inline))

typedef float f32x8 __attribute__((vector_size(32)));
typedef double f64x8 __attribute__((vector_size(64)));

static inline double sum_lanes(const f64x8* sum0, const f64x8* sum1) {
  const f64x8 v = *sum0 + *sum1;
  return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7]));
}

#define NAME(stem) stem##_f32
#define STORAGE float
#define REAL float
#define VECTOR f32x8
#define WIDEN(value) (value)
#define NARROW(value) (value)
#include "norm/norm_body.h"

#define NAME(stem) stem##_f64
#define STORAGE double
#define REAL double
#define VECTOR f64x8
#define WIDEN(value) (value)
#define NARROW(value) (value)
#include "norm/norm_body.h"

#define NAME(stem) stem##_bf16
#define STORAGE uint16_t
#define REAL float
#define VECTOR f32x8
#define WIDEN(value) mb_bf16_to_f32(value)
#define NARROW(value) mb_f32_to_bf16(value)
#include "norm/norm_body.h"

#define NAME(stem) stem##_f16
#define STORAGE uint16_t
#define REAL float
#define VECTOR f32x8
#define WIDEN(value) mb_f16_to_f32(value)
#define NARROW(value) mb_f32_to_f16(value)
#include "norm/norm_body.h"

#define TABLE(stem) {stem##_f32, stem##_f64, stem##_bf16, stem##_f16}

const mb_norm_kernels MB_NAME(mb_norm_kernels) = {
    .forward = {TABLE(forward_planar), TABLE(forward_channels_last)},
    .backward = {TABLE(backward_planar), TABLE(backward_channels_last)},
};
