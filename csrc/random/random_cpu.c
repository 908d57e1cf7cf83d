#include <string.h>

#include "common/half.h"
#include "common/isa.h"
#include "random/draws.h"
#include "random/random.h"

#define LANES 16
#define TILE MB_RANDOM_TILE /* LANES blocks of four words */

static int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t max_i64(int64_t a, int64_t b) { return a > b ? a : b; }

/* ---- sixteen blocks at once: the rounds of mb_philox_block, one block per lane ----------------
 */

#if defined(__SSE2__)
#include <immintrin.h>

/* A 32-bit word per 64-bit lane, whose upper half is never read. Compilers do not find the one
 * instruction for 32 x 32 -> 64 bits by themselves. */
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define WIDE_MULTIPLY(a, b) ((vector)_mm512_mul_epu32((__m512i)(a), (__m512i)(b)))
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define WIDE_MULTIPLY(a, b) ((vector)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
#else
#define VECTOR_BYTES 16
#define WIDE_MULTIPLY(a, b) ((vector)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
#endif

typedef uint64_t vector __attribute__((vector_size(VECTOR_BYTES)));
#define PER_VECTOR ((int)(VECTOR_BYTES / sizeof(uint64_t)))

/* Blocks whose indices are `index`; words01 = word 0 | word 1 << 32 of each, words23 likewise. */
static inline void philox_vector(uint64_t* restrict words01, uint64_t* restrict words23,
                                 vector index, mb_philox_stream stream) {
  vector x0 = index, x1 = index >> 32;
  vector x2 = (vector){0} + stream.counter2, x3 = (vector){0} + stream.counter3;
  const vector multiplier0 = (vector){0} + MB_PHILOX_MULTIPLIER_0;
  const vector multiplier1 = (vector){0} + MB_PHILOX_MULTIPLIER_1;
  uint32_t key0 = stream.key0, key1 = stream.key1;
  for (int round = 0; round < MB_PHILOX_ROUNDS; ++round) {
    const vector product0 = WIDE_MULTIPLY(x0, multiplier0);
    const vector product1 = WIDE_MULTIPLY(x2, multiplier1);
    x0 = (product1 >> 32) ^ x1 ^ key0;
    x1 = product1;
    x2 = (product0 >> 32) ^ x3 ^ key1;
    x3 = product0;
    key0 += MB_PHILOX_WEYL_0;
    key1 += MB_PHILOX_WEYL_1;
  }
  const vector pair01 = (x0 & UINT32_MAX) | x1 << 32;
  const vector pair23 = (x2 & UINT32_MAX) | x3 << 32;
  memcpy(words01, &pair01, sizeof pair01);
  memcpy(words23, &pair23, sizeof pair23);
}

/* The words of blocks `block` to `block + LANES - 1`, in order: words = [LANES, 4]. */
static void philox_tile(uint32_t* restrict words, uint64_t block, mb_philox_stream stream) {
  uint64_t words01[LANES], words23[LANES], pairs[2 * LANES];
  vector index;
  for (int lane = 0; lane < PER_VECTOR; ++lane) index[lane] = block + (uint64_t)lane;
  for (int lane = 0; lane < LANES; lane += PER_VECTOR) {
    philox_vector(words01 + lane, words23 + lane, index, stream);
    index += PER_VECTOR;
  }
  for (int lane = 0; lane < LANES; ++lane) {
    pairs[2 * lane] = words01[lane];
    pairs[2 * lane + 1] = words23[lane];
  }
  memcpy(words, pairs, sizeof pairs); /* x86 is little-endian */
}

#else

static void philox_tile(uint32_t* restrict words, uint64_t block, mb_philox_stream stream) {
  for (int lane = 0; lane < LANES; ++lane) {
    mb_philox_block(words + 4 * lane, block + (uint64_t)lane, stream);
  }
}

#endif

/* ---- dropout -------------------------------------------------------------------------------- */

static float f32_of_f32(float value) { return value; }
static double f64_of_f64(double value) { return value; }

/* The scale is 1 / (1 - p) in the type that the product is computed in, as torch rounds it. A
 * dropped element is selected, never multiplied by zero: the product of NaN and zero is NaN. */
#define DEFINE_DROPOUT(name, type, compute, widen, narrow)                                     \
  static void name(const void* input, void* output, int64_t begin, int64_t end, int64_t group, \
                   double p, mb_philox_stream stream) {                                        \
    const type* restrict x = input;                                                            \
    type* restrict y = output;                                                                 \
    const uint64_t threshold = mb_dropout_threshold(p);                                        \
    const size_t bytes = (size_t)(end - begin) * sizeof(type);                                 \
    if (p == 0.0) {                                                                            \
      memcpy(y + begin, x + begin, bytes);                                                     \
      return;                                                                                  \
    }                                                                                          \
    if (threshold > UINT32_MAX) {                                                              \
      memset(y + begin, 0, bytes);                                                             \
      return;                                                                                  \
    }                                                                                          \
    const uint32_t limit = (uint32_t)threshold;                                                \
    const compute scale = (compute)1 / (compute)(1.0 - p);                                     \
    uint32_t words[TILE];                                                                      \
    if (group == 1) {                                                                          \
      int64_t e = begin;                                                                       \
      for (; e + TILE <= end; e += TILE) {                                                     \
        philox_tile(words, (uint64_t)e / 4, stream);                                           \
        for (int i = 0; i < TILE; ++i) {                                                       \
          const type kept = narrow(widen(x[e + i]) * scale);                                   \
          y[e + i] = words[i] < limit ? (type)0 : kept;                                        \
        }                                                                                      \
      }                                                                                        \
      if (e < end) philox_tile(words, (uint64_t)e / 4, stream);                                \
      for (int i = 0; e + i < end; ++i) {                                                      \
        const type kept = narrow(widen(x[e + i]) * scale);                                     \
        y[e + i] = words[i] < limit ? (type)0 : kept;                                          \
      }                                                                                        \
      return;                                                                                  \
    }                                                                                          \
    for (int64_t tile = begin / group / 4 * 4; tile * group < end; tile += TILE) {             \
      philox_tile(words, (uint64_t)tile / 4, stream);                                          \
      for (int i = 0; i < TILE && (tile + i) * group < end; ++i) {                             \
        const int64_t first = max_i64((tile + i) * group, begin);                              \
        const int64_t last = min_i64((tile + i + 1) * group, end);                             \
        if (words[i] < limit) {                                                                \
          for (int64_t e = first; e < last; ++e) y[e] = (type)0;                               \
        } else {                                                                               \
          for (int64_t e = first; e < last; ++e) y[e] = narrow(widen(x[e]) * scale);           \
        }                                                                                      \
      }                                                                                        \
    }                                                                                          \
  }

DEFINE_DROPOUT(dropout_f32, float, float, f32_of_f32, f32_of_f32)
DEFINE_DROPOUT(dropout_f64, double, double, f64_of_f64, f64_of_f64)
DEFINE_DROPOUT(dropout_bf16, uint16_t, float, mb_bf16_to_f32, mb_f32_to_bf16)
DEFINE_DROPOUT(dropout_f16, uint16_t, float, mb_f16_to_f32, mb_f32_to_f16)

/* ---- uniform and normal numbers ------------------------------------------------------------- */

/* `fill` turns the TILE words of a tile into `per_tile` numbers; the last tile goes through a copy.
 */
#define DEFINE_DRAW(name, type, per_tile, fill)                                         \
  static void name(void* output, int64_t begin, int64_t end, mb_philox_stream stream) { \
    type* y = output;                                                                   \
    uint32_t words[TILE];                                                               \
    type last[per_tile];                                                                \
    for (int64_t e = begin; e < end; e += (per_tile)) {                                 \
      philox_tile(words, (uint64_t)(e / (per_tile)) * LANES, stream);                   \
      if (e + (per_tile) <= end) {                                                      \
        fill(words, y + e);                                                             \
      } else {                                                                          \
        fill(words, last);                                                              \
        memcpy(y + e, last, (size_t)(end - e) * sizeof(type));                          \
      }                                                                                 \
    }                                                                                   \
  }

static void fill_uniform_f32(const uint32_t* restrict words, float* restrict y) {
  for (int i = 0; i < TILE; ++i) y[i] = mb_uniform_f32(words[i]);
}

static void fill_uniform_f64(const uint32_t* restrict words, double* restrict y) {
  for (int i = 0; i < TILE / 2; ++i) y[i] = mb_uniform_f64(words[2 * i], words[2 * i + 1]);
}

static void fill_uniform_bf16(const uint32_t* restrict words, uint16_t* restrict y) {
  for (int i = 0; i < TILE; ++i) y[i] = mb_uniform_bf16(words[i]);
}

static void fill_uniform_f16(const uint32_t* restrict words, uint16_t* restrict y) {
  for (int i = 0; i < TILE; ++i) y[i] = mb_uniform_f16(words[i]);
}

static void fill_normal_f32(const uint32_t* restrict words, float* restrict y) {
  for (int i = 0; i < TILE; i += 2) mb_normal_pair_f32(words[i], words[i + 1], y + i, y + i + 1);
}

static void fill_normal_f64(const uint32_t* restrict words, double* restrict y) {
  for (int i = 0; i < TILE / 2; i += 2) mb_normal_pair_f64(words + 2 * i, y + i, y + i + 1);
}

static void fill_normal_bf16(const uint32_t* restrict words, uint16_t* restrict y) {
  float wide[TILE];
  fill_normal_f32(words, wide);
  for (int i = 0; i < TILE; ++i) y[i] = mb_f32_to_bf16(wide[i]);
}

static void fill_normal_f16(const uint32_t* restrict words, uint16_t* restrict y) {
  float wide[TILE];
  fill_normal_f32(words, wide);
  for (int i = 0; i < TILE; ++i) y[i] = mb_f32_to_f16(wide[i]);
}

DEFINE_DRAW(uniform_f32, float, TILE, fill_uniform_f32)
DEFINE_DRAW(uniform_f64, double, TILE / 2, fill_uniform_f64)
DEFINE_DRAW(uniform_bf16, uint16_t, TILE, fill_uniform_bf16)
DEFINE_DRAW(uniform_f16, uint16_t, TILE, fill_uniform_f16)
DEFINE_DRAW(normal_f32, float, TILE, fill_normal_f32)
DEFINE_DRAW(normal_f64, double, TILE / 2, fill_normal_f64)
DEFINE_DRAW(normal_bf16, uint16_t, TILE, fill_normal_bf16)
DEFINE_DRAW(normal_f16, uint16_t, TILE, fill_normal_f16)

const mb_random_kernels MB_NAME(mb_random_kernels) = {
    .dropout = {dropout_f32, dropout_f64, dropout_bf16, dropout_f16},
    .uniform = {uniform_f32, uniform_f64, uniform_bf16, uniform_f16},
    .normal = {normal_f32, normal_f64, normal_bf16, normal_f16},
};
