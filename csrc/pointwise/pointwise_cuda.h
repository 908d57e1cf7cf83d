/* The launchers of the pointwise family. */
#ifndef MODELBATCH_POINTWISE_POINTWISE_CUDA_H
#define MODELBATCH_POINTWISE_POINTWISE_CUDA_H

#include <cuda_runtime.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* y[i] = tanh(x[i]) for 0 <= i < numel, numel > 0. */
cudaError_t mb_tanh_cuda(const float* x, float* y, int64_t numel, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* MODELBATCH_POINTWISE_POINTWISE_CUDA_H */
