/* The kernels of the random family, for one model and one range of its elements. */
#ifndef MODELBATCH_RANDOM_RANDOM_H
#define MODELBATCH_RANDOM_RANDOM_H

#include <stdint.h>

#include "random/philox.h"

/* Ranges begin at multiples of this, so that a range begins with a whole block of words. */
#define MB_RANDOM_TILE 64

enum { MB_F32 = 0, MB_F64 = 1, MB_BF16 = 2, MB_F16 = 3, MB_RANDOM_DTYPES = 4 };

/* y[e] = e is dropped ? 0 : x[e] / (1 - p) for begin <= e < end, where x and y are the model's
 * whole slices and do not overlap. `group` consecutive elements share one decision. */
typedef void (*mb_dropout_fn)(const void* x, void* y, int64_t begin, int64_t end, int64_t group,
                              double p, mb_philox_stream stream);

/* y[e] = the number of element e for begin <= e < end, where y is the model's whole slice. */
typedef void (*mb_draw_fn)(void* y, int64_t begin, int64_t end, mb_philox_stream stream);

typedef struct mb_random_kernels {
  mb_dropout_fn dropout[MB_RANDOM_DTYPES];
  mb_draw_fn uniform[MB_RANDOM_DTYPES];
  mb_draw_fn normal[MB_RANDOM_DTYPES];
} mb_random_kernels;

#endif /* MODELBATCH_RANDOM_RANDOM_H */
