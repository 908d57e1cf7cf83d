/* The loss family: kernels that compute one model's loss and its slope together. */
#ifndef MODELBATCH_LOSS_LOSS_H
#define MODELBATCH_LOSS_LOSS_H

#include <stdint.h>

enum { MB_LOSS_F32 = 0, MB_LOSS_F64 = 1, MB_LOSS_DTYPES = 2 };

/* Rows that a kernel handles at once. */
#define MB_LOSS_ROWS 64

/* The mean over the rows whose target is not `ignore_index` of -log softmax(logits)[target]; NaN
 * where no row counts, as the mean of nothing.
 *
 * logits [rows, classes]; target [rows], in [0, classes) or ignore_index; slope [rows, classes] is
 * the loss's derivative with respect to the logits. Without slope (NULL), `work` holds
 * MB_LOSS_ROWS * classes numbers of the same type. */
typedef double (*mb_cross_entropy_fn)(const void* logits, const int64_t* target, void* slope,
                                      void* work, int64_t rows, int64_t classes,
                                      int64_t ignore_index);

typedef struct mb_loss_kernels {
  mb_cross_entropy_fn cross_entropy[MB_LOSS_DTYPES];
} mb_loss_kernels;

#endif /* MODELBATCH_LOSS_LOSS_H */
