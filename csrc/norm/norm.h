/* The kernels of the norm family: batch normalisation of one model, for a range of its channels. */
#ifndef MODELBATCH_NORM_NORM_H
#define MODELBATCH_NORM_NORM_H

#include <stdint.h>

enum { MB_NORM_F32 = 0, MB_NORM_F64 = 1, MB_NORM_BF16 = 2, MB_NORM_F16 = 3, MB_NORM_DTYPES = 4 };

/* Channels that the channels-last kernels take at once: ranges begin at multiples of it. */
#define MB_NORM_CHANNEL_BLOCK 16

/* Element (b, c, s) of a model's slice is at (b C + c) S + s, or, channels last, at (b S + s) C +
 * c. */
typedef struct mb_norm_size {
  int64_t batch;     /* B */
  int64_t channels;  /* C */
  int64_t positions; /* S */
} mb_norm_size;

/* What every row counts for in the statistics. A row of weight 0 is normalised by the statistics of
 * the others, and no gradient passes through it; nothing of it is read by any sum, so that it may
 * hold NaN. */
typedef struct mb_norm_samples {
  const double* weight; /* [B], for the channels-last kernels [B S]; NULL stands for ones */
  double count; /* the sum of the weights of all B S elements of a channel; 1 if that is 0 */
} mb_norm_samples;

/* For begin <= c < end, over the B S elements of channel c:
 *   mean[c], var[c] = their weighted mean and biased variance
 *   y = (x - mean[c]) / sqrt(var[c] + eps) * weight[c] + bias[c]
 * weight and bias hold all C channels; NULL stands for ones and zeros. */
typedef void (*mb_norm_forward_fn)(const void* x, const double* weight, const double* bias,
                                   double eps, mb_norm_size size, mb_norm_samples samples,
                                   int64_t begin, int64_t end, double* mean, double* var, void* y);

/* For begin <= c < end, with x_hat = (x - mean[c]) / sqrt(var[c] + eps), w the weight of the row:
 *   grad_bias[c] = sum of grad_y, grad_weight[c] = sum of grad_y x_hat, over the rows with w != 0
 *   grad_x = (grad_y - w (grad_bias[c] + x_hat grad_weight[c]) / count) weight[c] / sqrt(var[c] +
 * eps), 0 in the rows with w = 0. grad_x may be NULL. */
typedef void (*mb_norm_backward_fn)(const void* grad_y, const void* x, const double* weight,
                                    const double* mean, const double* var, double eps,
                                    mb_norm_size size, mb_norm_samples samples, int64_t begin,
                                    int64_t end, double* grad_weight, double* grad_bias,
                                    void* grad_x);

typedef struct mb_norm_kernels {
  mb_norm_forward_fn forward[2][MB_NORM_DTYPES]; /* [channels last][dtype] */
  mb_norm_backward_fn backward[2][MB_NORM_DTYPES];
} mb_norm_kernels;

#endif /* MODELBATCH_NORM_NORM_H */
