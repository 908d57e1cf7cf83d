/* Vectors of the widest registers that the instruction set in use has, for `*_cpu.c` files.
 *
 * f32v and f64v are values; loads and stores take any aligned element. The partial ones touch the
 * first `count` elements only, 0 <= count <= lanes, and fill up with zeros.
 */
#ifndef MODELBATCH_COMMON_VECTORS_H
#define MODELBATCH_COMMON_VECTORS_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi" /* Vectors are passed between inlined functions only. */
#endif

#if defined(__AVX512F__)
#define MB_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define MB_VECTOR_BYTES 32
#else
#define MB_VECTOR_BYTES 16
#endif

#define MB_F32_LANES (MB_VECTOR_BYTES / 4)
#define MB_F64_LANES (MB_VECTOR_BYTES / 8)

#define MB_INLINED static inline __attribute__((always_inline))

typedef float f32v __attribute__((vector_size(MB_VECTOR_BYTES)));
typedef double f64v __attribute__((vector_size(MB_VECTOR_BYTES)));
typedef int32_t i32v __attribute__((vector_size(MB_VECTOR_BYTES)));
typedef int64_t i64v __attribute__((vector_size(MB_VECTOR_BYTES)));
typedef float f32v_in_memory __attribute__((vector_size(MB_VECTOR_BYTES), aligned(4), may_alias));
typedef double f64v_in_memory __attribute__((vector_size(MB_VECTOR_BYTES), aligned(8), may_alias));

MB_INLINED f32v load_f32(const float* p) { return *(const f32v_in_memory*)p; }
MB_INLINED f64v load_f64(const double* p) { return *(const f64v_in_memory*)p; }
MB_INLINED void store_f32(float* p, f32v v) { *(f32v_in_memory*)p = v; }
MB_INLINED void store_f64(double* p, f64v v) { *(f64v_in_memory*)p = v; }
MB_INLINED f32v broadcast_f32(float value) {
  return value - (f32v){0}; /* keeps the sign of -0.0 */
}
MB_INLINED f64v broadcast_f64(double value) { return value - (f64v){0}; }

/* The nearest value between the bounds, or up to one; NaN stays NaN. */
#if defined(__AVX512F__)
MB_INLINED f32v at_most_f32(f32v x, float high) {
  return (f32v)_mm512_min_ps((__m512)broadcast_f32(high), (__m512)x);
}
MB_INLINED f32v bounded_f32(f32v x, float low, float high) {
  const __m512 least = (__m512)broadcast_f32(low), most = (__m512)broadcast_f32(high);
  return (f32v)_mm512_max_ps(least, _mm512_min_ps(most, (__m512)x));
}
MB_INLINED f64v bounded_f64(f64v x, double low, double high) {
  const __m512d least = (__m512d)broadcast_f64(low), most = (__m512d)broadcast_f64(high);
  return (f64v)_mm512_max_pd(least, _mm512_min_pd(most, (__m512d)x));
}
#elif defined(__AVX2__)
MB_INLINED f32v at_most_f32(f32v x, float high) {
  return (f32v)_mm256_min_ps((__m256)broadcast_f32(high), (__m256)x);
}
MB_INLINED f32v bounded_f32(f32v x, float low, float high) {
  const __m256 least = (__m256)broadcast_f32(low), most = (__m256)broadcast_f32(high);
  return (f32v)_mm256_max_ps(least, _mm256_min_ps(most, (__m256)x));
}
MB_INLINED f64v bounded_f64(f64v x, double low, double high) {
  const __m256d least = (__m256d)broadcast_f64(low), most = (__m256d)broadcast_f64(high);
  return (f64v)_mm256_max_pd(least, _mm256_min_pd(most, (__m256d)x));
}
#else
MB_INLINED f32v at_most_f32(f32v x, float high) {
  const i32v above = x > high;
  return (f32v)(((i32v)x & ~above) | (above & (i32v)broadcast_f32(high)));
}
MB_INLINED f32v bounded_f32(f32v x, float low, float high) {
  const i32v below = x<low, above = x> high;
  const i32v inside = (i32v)x & ~(below | above);
  return (f32v)(inside | (below & (i32v)broadcast_f32(low)) | (above & (i32v)broadcast_f32(high)));
}
MB_INLINED f64v bounded_f64(f64v x, double low, double high) {
  const i64v below = x<low, above = x> high;
  const i64v inside = (i64v)x & ~(below | above);
  return (f64v)(inside | (below & (i64v)broadcast_f64(low)) | (above & (i64v)broadcast_f64(high)));
}
#endif

#if defined(__AVX512F__)

MB_INLINED f32v load_part_f32(const float* p, int64_t count) {
  return (f32v)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1u), p);
}
MB_INLINED f64v load_part_f64(const double* p, int64_t count) {
  return (f64v)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1u), p);
}
MB_INLINED void store_part_f32(float* p, f32v v, int64_t count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1u), (__m512)v);
}
MB_INLINED void store_part_f64(double* p, f64v v, int64_t count) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1u), (__m512d)v);
}

#elif defined(__AVX2__)

MB_INLINED __m256i mask_of_f32(int64_t count) {
  const i32v lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)(lanes < (int32_t)count);
}
MB_INLINED __m256i mask_of_f64(int64_t count) {
  const i64v lanes = {0, 1, 2, 3};
  return (__m256i)(lanes < count);
}
MB_INLINED f32v load_part_f32(const float* p, int64_t count) {
  return (f32v)_mm256_maskload_ps(p, mask_of_f32(count));
}
MB_INLINED f64v load_part_f64(const double* p, int64_t count) {
  return (f64v)_mm256_maskload_pd(p, mask_of_f64(count));
}
MB_INLINED void store_part_f32(float* p, f32v v, int64_t count) {
  _mm256_maskstore_ps(p, mask_of_f32(count), (__m256)v);
}
MB_INLINED void store_part_f64(double* p, f64v v, int64_t count) {
  _mm256_maskstore_pd(p, mask_of_f64(count), (__m256d)v);
}

#else

MB_INLINED f32v load_part_f32(const float* p, int64_t count) {
  float lanes[MB_F32_LANES] = {0};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load_f32(lanes);
}
MB_INLINED f64v load_part_f64(const double* p, int64_t count) {
  double lanes[MB_F64_LANES] = {0};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load_f64(lanes);
}
MB_INLINED void store_part_f32(float* p, f32v v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}
MB_INLINED void store_part_f64(double* p, f64v v, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
}

#endif

#endif /* MODELBATCH_COMMON_VECTORS_H */
