/* Further elementary functions in float32: branch-free, so that loops over them become vectors. */
#ifndef MODELBATCH_ENGINE_ELEMENTARY_F32_H
#define MODELBATCH_ENGINE_ELEMENTARY_F32_H

#include <math.h>

#include "common/elementary.h"

/* exp(x) - 1 for x <= 0 (and NaN). */
static inline float mb_expm1_nonpositive_f32(float x) {
  float p = 1.0f / 40320;
  p = p * x + 1.0f / 5040;
  p = p * x + 1.0f / 720;
  p = p * x + 1.0f / 120;
  p = p * x + 1.0f / 24;
  p = p * x + 1.0f / 6;
  p = p * x + 0.5f;
  const float small = x + x * x * p;
  return x > -0.5f ? small : mb_exp_nonpositive_f32(x) - 1.0f;
}

/* log(1 + t) for 0 <= t <= 1 (and NaN), by 2 atanh(t / (2 + t)). */
static inline float mb_log1p_unit_f32(float t) {
  const float s = t / (2.0f + t);
  const float z = s * s;
  float p = 1.0f / 15;
  p = p * z + 1.0f / 13;
  p = p * z + 1.0f / 11;
  p = p * z + 1.0f / 9;
  p = p * z + 1.0f / 7;
  p = p * z + 1.0f / 5;
  p = p * z + 1.0f / 3;
  return 2.0f * (s + s * (z * p));
}

/* The distribution function of the normal distribution, given exp(-x^2 / 2). The polynomial in
 * t = 1 / (1 + a / 2), a = |x| / sqrt(2), fits exp(a^2) erfc(a) / t. */
static inline float mb_normal_cdf_f32(float x, float bell) {
  const float a = mb_bits_float(mb_float_bits(x) & 0x7fffffffu) * 0.707106781f;
  const float t = 1.0f / (1.0f + 0.5f * a);
  float p = -0.059912317f;
  p = p * t + 0.28854761f;
  p = p * t - 0.495103088f;
  p = p * t + 0.286705386f;
  p = p * t - 0.0322745709f;
  p = p * t + 0.204939639f;
  p = p * t + 0.24257117f;
  p = p * t + 0.28244328f;
  p = p * t + 0.282082843f;
  const float tail = 0.5f * bell * t * p;
  return x < 0.0f ? tail : 1.0f - tail;
}

#endif /* MODELBATCH_ENGINE_ELEMENTARY_F32_H */
