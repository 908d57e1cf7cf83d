/* The launcher of the loss family: every model in one launch, on a stream, without waiting. */
#ifndef MODELBATCH_LOSS_LOSS_CUDA_H
#define MODELBATCH_LOSS_LOSS_CUDA_H

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mb_cross_entropy_launch {
  int dtype;             /* MB_LOSS_F32 or MB_LOSS_F64 */
  const void* logits;    /* [M, rows, classes] */
  const int64_t* target; /* model m's begin at m * target_stride */
  int64_t target_stride; /* 0 where all models share them */
  int64_t ignore_index;
  void* losses; /* [M] */
  void* slope;  /* [M, rows, classes] or NULL */
  int64_t num_models, rows, classes;
  cudaStream_t stream;
} mb_cross_entropy_launch;

/* As mb_cross_entropy_fn for every model; a target that is no class makes its model's loss NaN. */
cudaError_t mb_cross_entropy_cuda(mb_cross_entropy_launch launch);

#ifdef __cplusplus
}
#endif

#endif /* MODELBATCH_LOSS_LOSS_CUDA_H */
