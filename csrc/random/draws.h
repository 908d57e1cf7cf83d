/* From random words to numbers. Shared by the CPU and the CUDA kernels.
 *
 * The logarithm, sine and cosine are polynomials of our own instead of libm's, and the family is
 * compiled without contraction of a * b + c: the normal numbers of a model are then the same, bit
 * for bit, on every instruction set.
 */
#ifndef MODELBATCH_RANDOM_DRAWS_H
#define MODELBATCH_RANDOM_DRAWS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "random/philox.h"

/* ---- dropout -------------------------------------------------------------------------------- */

/* An element is dropped iff its word is below this: floor(p 2^32), so 2^32 (all) for p = 1. */
MB_HOST_DEVICE static inline uint64_t mb_dropout_threshold(double p) {
  return (uint64_t)(p * 4294967296.0);
}

/* ---- uniform numbers in [0, 1) -------------------------------------------------------------- */

MB_HOST_DEVICE static inline float mb_uniform_f32(uint32_t word) {
  return (float)(int32_t)(word >> 8) * 0x1p-24f;
}

MB_HOST_DEVICE static inline double mb_uniform_f64(uint32_t word0, uint32_t word1) {
  const int64_t bits = (int64_t)(word0 >> 5) << 26 | (int64_t)(word1 >> 6);
  return (double)bits * 0x1p-53;
}

/* The float32 number rounded toward zero, so that 1.0 never occurs: the bits of a bfloat16. */
MB_HOST_DEVICE static inline uint16_t mb_uniform_bf16(uint32_t word) {
  const float value = mb_uniform_f32(word);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return (uint16_t)(bits >> 16);
}

/* The same for float16. Below 2^-14 the format counts in units of 2^-24, as the number itself does.
 */
MB_HOST_DEVICE static inline uint16_t mb_uniform_f16(uint32_t word) {
  const uint32_t units = word >> 8;
  const float value = mb_uniform_f32(word);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t normal = (bits >> 13) - (112u << 10);
  return (uint16_t)(units < 1024u ? units : normal);
}

/* ---- standard normal numbers: Box-Muller ---------------------------------------------------- */

/* -2 log(u), 0 < u <= 1 and normal, by log(m) = 2 atanh((m - 1) / (m + 1)), sqrt(1/2) <= m <
 * sqrt(2). */
MB_HOST_DEVICE static inline float mb_minus_two_log_f32(float u) {
  uint32_t bits;
  memcpy(&bits, &u, sizeof bits);
  const uint32_t shifted = bits + (0x3f800000u - 0x3f3504f3u); /* 1.0 and sqrt(1/2) */
  const float exponent = (float)((int32_t)(shifted >> 23) - 127);
  const uint32_t mantissa_bits = (shifted & 0x007fffffu) + 0x3f3504f3u;
  float m;
  memcpy(&m, &mantissa_bits, sizeof m);
  const float s = (m - 1.0f) / (m + 1.0f);
  const float z = s * s;
  const float tail = z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9))));
  /* log(2) in two parts: the product with the exponent is exact for the high one. */
  const float high = exponent * 0x1.62e4p-1f;
  const float low = exponent * 0x1.7f7d1cp-20f;
  return -2.0f * (high + (2.0f * s + (2.0f * s * tail + low)));
}

MB_HOST_DEVICE static inline double mb_minus_two_log_f64(double u) {
  uint64_t bits;
  memcpy(&bits, &u, sizeof bits);
  const uint64_t shifted = bits + (0x3ff0000000000000u - 0x3fe6a09e667f3bcdu);
  const double exponent = (double)((int32_t)(shifted >> 52) - 1023);
  const uint64_t mantissa_bits = (shifted & 0x000fffffffffffffu) + 0x3fe6a09e667f3bcdu;
  double m;
  memcpy(&m, &mantissa_bits, sizeof m);
  const double s = (m - 1.0) / (m + 1.0);
  const double z = s * s;
  double tail = 1.0 / 23;
  tail = 1.0 / 21 + z * tail;
  tail = 1.0 / 19 + z * tail;
  tail = 1.0 / 17 + z * tail;
  tail = 1.0 / 15 + z * tail;
  tail = 1.0 / 13 + z * tail;
  tail = 1.0 / 11 + z * tail;
  tail = 1.0 / 9 + z * tail;
  tail = 1.0 / 7 + z * tail;
  tail = 1.0 / 5 + z * tail;
  tail = z * (1.0 / 3 + z * tail);
  const double high = exponent * 0x1.62e42fefa38p-1;
  const double low = exponent * 0x1.ef35793c7673p-45;
  return -2.0 * (high + (2.0 * s + (2.0 * s * tail + low)));
}

/* cos and sin of 2 pi u, 0 <= u < 1. The reduction to |x| <= pi / 4 is exact; Taylor does the rest.
 */
MB_HOST_DEVICE static inline void mb_cos_sin_turn_f32(float u, float* cosine, float* sine) {
  const float quarters = 4.0f * u;
  const int32_t quadrant = (int32_t)(quarters + 0.5f);
  const float x = (quarters - (float)quadrant) * 0x1.921fb6p+0f; /* pi / 2 */
  const float z = x * x;
  const float s =
      x + x * (z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880)))));
  const float c =
      1.0f + z * (-0.5f +
                  z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 + z * (-1.0f / 3628800)))));
  const float c_or_s = (quadrant & 1) != 0 ? s : c;
  const float s_or_c = (quadrant & 1) != 0 ? c : s;
  *cosine = ((quadrant + 1) & 2) != 0 ? -c_or_s : c_or_s;
  *sine = (quadrant & 2) != 0 ? -s_or_c : s_or_c;
}

MB_HOST_DEVICE static inline void mb_cos_sin_turn_f64(double u, double* cosine, double* sine) {
  const double quarters = 4.0 * u;
  const int32_t quadrant = (int32_t)(quarters + 0.5);
  const double x = (quarters - (double)quadrant) * 0x1.921fb54442d18p+0;
  const double z = x * x;
  double s = 1.0 / 355687428096000.0; /* 17! */
  s = -1.0 / 1307674368000.0 + z * s; /* 15! */
  s = 1.0 / 6227020800.0 + z * s;     /* 13! */
  s = -1.0 / 39916800.0 + z * s;      /* 11! */
  s = 1.0 / 362880.0 + z * s;         /* 9! */
  s = -1.0 / 5040.0 + z * s;
  s = 1.0 / 120.0 + z * s;
  s = x + x * (z * (-1.0 / 6.0 + z * s));
  double c = 1.0 / 20922789888000.0; /* 16! */
  c = -1.0 / 87178291200.0 + z * c;  /* 14! */
  c = 1.0 / 479001600.0 + z * c;     /* 12! */
  c = -1.0 / 3628800.0 + z * c;      /* 10! */
  c = 1.0 / 40320.0 + z * c;
  c = -1.0 / 720.0 + z * c;
  c = 1.0 / 24.0 + z * c;
  c = 1.0 + z * (-0.5 + z * c);
  const double c_or_s = (quadrant & 1) != 0 ? s : c;
  const double s_or_c = (quadrant & 1) != 0 ? c : s;
  *cosine = ((quadrant + 1) & 2) != 0 ? -c_or_s : c_or_s;
  *sine = (quadrant & 2) != 0 ? -s_or_c : s_or_c;
}

/* Two normal numbers from two words. The radius uses all 32 bits, so tails reach 6.7 sigma. */
MB_HOST_DEVICE static inline void mb_normal_pair_f32(uint32_t word0, uint32_t word1, float* first,
                                                     float* second) {
  const float u = (float)word0 * 0x1p-32f + 0x1p-33f; /* (0, 1] */
  const float radius = sqrtf(mb_minus_two_log_f32(u));
  float cosine, sine;
  mb_cos_sin_turn_f32(mb_uniform_f32(word1), &cosine, &sine);
  *first = radius * cosine;
  *second = radius * sine;
}

/* Two normal numbers from the four words of a block. */
MB_HOST_DEVICE static inline void mb_normal_pair_f64(const uint32_t* words, double* first,
                                                     double* second) {
  const double u = 1.0 - mb_uniform_f64(words[0], words[1]); /* (0, 1] */
  const double radius = sqrt(mb_minus_two_log_f64(u));
  double cosine, sine;
  mb_cos_sin_turn_f64(mb_uniform_f64(words[2], words[3]), &cosine, &sine);
  *first = radius * cosine;
  *second = radius * sine;
}

#endif /* MODELBATCH_RANDOM_DRAWS_H */
