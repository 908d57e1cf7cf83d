/* The launchers of the random family: every model in one launch, on a stream, without waiting. */
#ifndef MODELBATCH_RANDOM_RANDOM_CUDA_H
#define MODELBATCH_RANDOM_RANDOM_CUDA_H

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What all launchers need. The arrays are on the device; num_models and slice_numel are positive.
 */
typedef struct mb_random_launch {
  int dtype;           /* MB_F32, ... */
  const int64_t* seed; /* [M] */
  const int64_t* step; /* [M] */
  int64_t op_index;
  int64_t num_models;  /* M */
  int64_t slice_numel; /* elements of one model */
  cudaStream_t stream;
} mb_random_launch;

/* y [M, slice_numel]; model m's input begins at x + m * model_stride elements; p is [M]. */
cudaError_t mb_dropout_cuda(mb_random_launch launch, const void* x, int64_t model_stride, void* y,
                            const double* p, int64_t group);

/* y [M, slice_numel] */
cudaError_t mb_uniform_cuda(mb_random_launch launch, void* y);
cudaError_t mb_normal_cuda(mb_random_launch launch, void* y);

#ifdef __cplusplus
}
#endif

#endif /* MODELBATCH_RANDOM_RANDOM_CUDA_H */
