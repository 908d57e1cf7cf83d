/* The logistic function and tanh of vectors, for `*_cpu.c` files. NaN stays NaN; infinite arguments
 * give the limits.
 *
 * exp(x) = 2^n exp(r) with |r| <= log(2) / 2, by Cody-Waite reduction; exp(r) - 1 = r + r^2 q(r).
 * The float polynomial interpolates at Chebyshev nodes, the double one is Taylor's. In float both
 * functions stay within two units in the last place, which tests/ops/test_rnn_kernels.py checks.
 * They may differ in the last bits between instruction sets.
 */
#ifndef MODELBATCH_COMMON_VECTOR_FUNCTIONS_H
#define MODELBATCH_COMMON_VECTOR_FUNCTIONS_H

#include "common/vectors.h"

/* Adding this to |n| < 2^22 leaves n + 126 in the low bits: the biased exponent of 2^(n - 1). 2^n
 * may be too large for a number. */
#define MB_SHIFTER_F32 (12582912.0f + 126.0f)        /* 1.5 2^23 */
#define MB_SHIFTER_F64 (6755399441055744.0 + 1022.0) /* 1.5 2^52 */

/* 1 / (1 + exp(-x)). The sum begins with its small terms. */
MB_INLINED f32v sigmoid_f32(f32v x) {
  const f32v bounded = bounded_f32(x, -89.0f, 80.0f);
  const f32v rounded = bounded * -1.44269504f + MB_SHIFTER_F32;
  const f32v n = rounded - MB_SHIFTER_F32;
  const f32v s = (bounded + n * 0.693359375f) - n * 2.12194440e-4f; /* -r; log(2) in two parts */
  f32v q = s * 1.3926440e-3f - 8.3633849e-3f;
  q = q * s + 4.1666552e-2f;
  q = q * s - 1.6666576e-1f;
  q = q * s + 0.5f;
  const f32v rest = (s * s) * q - s; /* exp(r) - 1 */
  const f32v half_scale = (f32v)((i32v)rounded << 23);
  const f32v half = (half_scale * rest + 0.5f) + half_scale;
  return 1.0f / (half + half);
}

/* Odd. A small term is subtracted from 1 or, near zero, added to |x|, so that its own error hardly
 * shows: the polynomial in x^2 is the one of mb_tanh_f32. */
MB_INLINED f32v tanh_f32(f32v x) {
  const i32v sign = (i32v)x & (i32v)broadcast_f32(-0.0f);
  const f32v a = (f32v)((i32v)x ^ sign);
  const f32v bounded = at_most_f32(a, 10.0f);
  /* exp(2a) / 2 = half_scale e; u = r / 2 */
  const f32v rounded = bounded * 2.88539008f + MB_SHIFTER_F32;
  const f32v n = rounded - MB_SHIFTER_F32;
  const f32v u = (bounded - n * 0.3466796875f) + n * 1.06097220e-4f;
  f32v e = u * 8.9129212e-2f + 2.6762832e-1f;
  e = e * u + 6.6666484e-1f;
  e = e * u + 1.3333261f;
  e = e * u + 2.0f;
  e = e * u + 2.0f;
  e = e * u + 1.0f;
  const f32v half_scale = (f32v)((i32v)rounded << 23);
  const f32v large = 1.0f - 1.0f / (half_scale * e + 0.5f);
  const f32v z = a * a;
  f32v p = z * 2.2926473569971763e-3f - 8.343859504509922e-3f;
  p = p * z + 2.1768892383791812e-2f;
  p = p * z - 5.395925634929311e-2f;
  p = p * z + 1.3333303543284378e-1f;
  p = p * z - 3.333333317205048e-1f;
  const f32v small = a + a * (z * p);
  const i32v is_small = a < 0.625f;
  return (f32v)((is_small & (i32v)small) | (~is_small & (i32v)large) | sign);
}

/* exp(x) = 2 half_scale (1 + rest), -700 <= x <= 710 */
typedef struct mb_exp_f64 {
  f64v half_scale, rest;
} mb_exp_f64;

MB_INLINED mb_exp_f64 split_exp_f64(f64v x) {
  const f64v rounded = x * 1.4426950408889634 + MB_SHIFTER_F64;
  const f64v n = rounded - MB_SHIFTER_F64;
  const f64v r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  f64v q = r * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
  q = q * r + 1.0 / 39916800.0;
  q = q * r + 1.0 / 3628800.0;
  q = q * r + 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  const mb_exp_f64 result = {(f64v)((i64v)rounded << 52), r + (r * r) * q};
  return result;
}

MB_INLINED f64v sigmoid_f64(f64v x) {
  const mb_exp_f64 e = split_exp_f64(-bounded_f64(x, -710.0, 700.0));
  const f64v half = (e.half_scale * e.rest + 0.5) + e.half_scale;
  return 1.0 / (half + half);
}

/* tanh(x) = (exp(2x) - 1) / (exp(2x) + 1), odd. There is no cancellation near 0, where the scale is
 * 1. Beyond the bound tanh rounds to 1. */
MB_INLINED f64v tanh_f64(f64v x) {
  const i64v sign = (i64v)x & (i64v)broadcast_f64(-0.0);
  const f64v bounded = bounded_f64((f64v)((i64v)x ^ sign), 0.0, 19.2);
  const mb_exp_f64 e = split_exp_f64(bounded + bounded);
  const f64v scale = e.half_scale + e.half_scale;
  const f64v less_one = scale * e.rest + (scale - 1.0);
  return (f64v)((i64v)(less_one / (less_one + 2.0)) | sign);
}

#endif /* MODELBATCH_COMMON_VECTOR_FUNCTIONS_H */
