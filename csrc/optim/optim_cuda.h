/* The launchers of the optimizer family: all tensors of all models, on a stream, without waiting.
 *
 * Nothing is copied from host memory but the kernels' arguments, and nothing is read back, so the
 * launches can be captured in a graph.
 */
#ifndef MODELBATCH_OPTIM_OPTIM_CUDA_H
#define MODELBATCH_OPTIM_OPTIM_CUDA_H

#include <cuda_runtime.h>
#include <stdint.h>

#include "optim/optim.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Dimensions of a gradient's layout that a kernel can follow. */
#define MB_OPTIM_CUDA_MAX_DIMS 4

/* One stacked tensor and what belongs to it. Model m's slice of `param` begins at param + m *
 * param_stride elements and is a dense run of `numel`; so are the states'. The struct is in host
 * memory, what it points to on the device. */
typedef struct mb_optim_cuda_tensor {
  void* param; /* not read by mb_grad_stats_cuda */
  const void* grad;
  void* states[MB_OPTIM_MAX_STATES]; /* NULL where no model needs the state */
  int64_t numel;                     /* of one model */
  int64_t param_stride;
  int64_t grad_stride;
  int64_t state_strides[MB_OPTIM_MAX_STATES];
  /* How the gradient's slice lies in memory, read in the order of the parameter's: see
   * mb_optim_layout. 0 dims: a dense run, too. Otherwise numel is below 2^32. */
  int64_t grad_dims;
  int64_t grad_sizes[MB_OPTIM_CUDA_MAX_DIMS];
  int64_t grad_strides[MB_OPTIM_CUDA_MAX_DIMS];
} mb_optim_cuda_tensor;

/* What is one number per model; on the device. The last five may be NULL. */
typedef struct mb_optim_cuda_models {
  int64_t num_models; /* M, positive */
  float* step;        /* [M], counted up */
  int64_t step_stride;
  const double* hyper;                  /* [K, M] */
  float* scalars[MB_OPTIM_MAX_SCALARS]; /* [M] each, changed; NULL where the rule has none */
  const uint8_t* active;                /* [M] */
  const uint8_t* nonfinite;
  const float* inv_scale;
  const double* clip_factor;
  const double* clip_value;
} mb_optim_cuda_models;

/* One step of all models that are active and not nonfinite. dtype is MB_OPTIM_F32, ... */
cudaError_t mb_optim_step_cuda(int rule, int dtype, const mb_optim_cuda_models* models,
                               const mb_optim_cuda_tensor* tensors, int64_t num_tensors,
                               cudaStream_t stream);

/* How many partial sums a model has in mb_grad_stats_cuda. */
int64_t mb_grad_stats_partials(int dtype, const mb_optim_cuda_tensor* tensors, int64_t num_tensors);

/* sq_norm [M], nonfinite [M]; the workspaces partial_sums and partial_flags are [M, partials].
 * A model's sum is added in an order that depends on nothing but the tensors' sizes. */
cudaError_t mb_grad_stats_cuda(int dtype, int64_t num_models, const mb_optim_cuda_tensor* tensors,
                               int64_t num_tensors, double* partial_sums, uint8_t* partial_flags,
                               double* sq_norm, uint8_t* nonfinite, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif /* MODELBATCH_OPTIM_OPTIM_CUDA_H */
