/* exp and log as branch-free polynomials, which compilers vectorise. Shared by the CPU and the CUDA
 * kernels: libm's functions are scalar, and differ between machines.
 *
 * Cody-Waite reduction and Taylor or atanh series; the error of the float functions stays within
 * two units in the last place, which tests/ops/test_loss.py checks.
 */
#ifndef MODELBATCH_COMMON_ELEMENTARY_H
#define MODELBATCH_COMMON_ELEMENTARY_H

#include <stdint.h>
#include <string.h>

#include "common/half.h"

/* exp(x) for x <= 0 (and NaN). Results below the smallest normal number become 0. */
MB_HOST_DEVICE static inline float mb_exp_nonpositive_f32(float x) {
  const float shifter = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
  const float bounded = x < -88.0f ? -88.0f : x;
  const float rounded = bounded * 1.44269504f + shifter;
  const float n = rounded - shifter;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f; /* log(2) in two parts */
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = (mb_float_bits(rounded) - mb_float_bits(shifter) + 127u) << 23;
  const float scaled = p * mb_bits_float(exponent);
  return x < -87.0f ? 0.0f : scaled;
}

/* log(x) for finite x >= 2^-126; NaN stays NaN. By log(m) = 2 atanh((m - 1) / (m + 1)),
 * sqrt(1/2) <= m < sqrt(2). */
MB_HOST_DEVICE static inline float mb_log_f32(float x) {
  const uint32_t shifted = mb_float_bits(x) + (0x3f800000u - 0x3f3504f3u); /* 1.0, sqrt(1/2) */
  const float exponent = (float)((int32_t)(shifted >> 23) - 127);
  const float m = mb_bits_float((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  const float tail = z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
  const float result =
      exponent * 0.693359375f + (2.0f * s + (2.0f * s * tail - exponent * 2.12194440e-4f));
  return x != x ? x : result;
}

/* tanh(x), odd; infinite arguments give 1, NaN stays NaN. A small term is subtracted from 1, or,
 * near zero, added to x: its own error then hardly shows. The polynomial in x^2 interpolates
 * (tanh(x) / x - 1) / x^2 at Chebyshev nodes. */
MB_HOST_DEVICE static inline float mb_tanh_f32(float x) {
  const float a = mb_bits_float(mb_float_bits(x) & 0x7fffffffu);
  const float t = mb_exp_nonpositive_f32(-2.0f * a);
  const float large = 1.0f - (t + t) / (1.0f + t);
  const float z = a * a;
  float p = 2.2926473569971763e-3f;
  p = p * z - 8.343859504509922e-3f;
  p = p * z + 2.1768892383791812e-2f;
  p = p * z - 5.395925634929311e-2f;
  p = p * z + 1.3333303543284378e-1f;
  p = p * z - 3.333333317205048e-1f;
  const float small = a + a * (z * p);
  const float magnitude = a < 0.625f ? small : large;
  return mb_bits_float(mb_float_bits(magnitude) | (mb_float_bits(x) & 0x80000000u));
}

#endif /* MODELBATCH_COMMON_ELEMENTARY_H */
