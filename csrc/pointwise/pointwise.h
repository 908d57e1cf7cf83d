/* The pointwise family: functions of single elements that are faster here than in torch. */
#ifndef MODELBATCH_POINTWISE_POINTWISE_H
#define MODELBATCH_POINTWISE_POINTWISE_H

#include <stdint.h>

/* y[i] = f(x[i]) for 0 <= i < numel. */
typedef void (*mb_pointwise_fn)(const float* x, float* y, int64_t numel);

typedef struct mb_pointwise_kernels {
  mb_pointwise_fn tanh;
} mb_pointwise_kernels;

#endif /* MODELBATCH_POINTWISE_POINTWISE_H */
