/* float16 and bfloat16 as bits, in C that compilers vectorise without hardware support.
 *
 * Widening is exact. Narrowing rounds to nearest, ties to even; NaN stays NaN, overflow becomes
 * infinity.
 */
#ifndef MODELBATCH_COMMON_HALF_H
#define MODELBATCH_COMMON_HALF_H

#include <stdint.h>
#include <string.h>

#include "common/host_device.h"

MB_HOST_DEVICE static inline uint32_t mb_float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

MB_HOST_DEVICE static inline float mb_bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

MB_HOST_DEVICE static inline float mb_bf16_to_f32(uint16_t value) {
  return mb_bits_float((uint32_t)value << 16);
}

MB_HOST_DEVICE static inline uint16_t mb_f32_to_bf16(float value) {
  const uint32_t bits = mb_float_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t quiet_nan = bits >> 16 | 0x0040u;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

MB_HOST_DEVICE static inline float mb_f16_to_f32(uint16_t value) {
  const uint32_t sign = (uint32_t)(value & 0x8000u) << 16;
  const uint32_t magnitude = value & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = magnitude << 13 | 0x7f800000u;
  const uint32_t subnormal = mb_float_bits((float)(int32_t)magnitude * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return mb_bits_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

MB_HOST_DEVICE static inline uint16_t mb_f32_to_f16(float value) {
  const uint32_t bits = mb_float_bits(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  /* Adding 1/2 leaves the number in units of 2^-24, float16's subnormal unit, correctly rounded. */
  const uint32_t subnormal = mb_float_bits(mb_bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = ((magnitude + 0x0fffu + (magnitude >> 13 & 1u)) >> 13) - (112u << 10);
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal; /* 2^-14 */
  const uint32_t bounded = magnitude >= 0x477ff000u ? 0x7c00u : finite; /* 65520 */
  const uint32_t quiet_nan = 0x7e00u | (magnitude >> 13 & 0x01ffu);
  return (uint16_t)(sign | (magnitude > 0x7f800000u ? quiet_nan : bounded));
}

#endif /* MODELBATCH_COMMON_HALF_H */
