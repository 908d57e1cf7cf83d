// The kernels of pointwise_cpu.c on a GPU, with the same arithmetic: one thread an element.
#include "common/cuda_launch.h"
#include "common/elementary.h"
#include "pointwise/pointwise_cuda.h"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;

__global__ void tanh_kernel(const float* __restrict__ x, float* __restrict__ y, int64_t numel) {
  const int64_t stride = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < numel; i += stride) {
    y[i] = mb_tanh_f32(x[i]);
  }
}

}  // namespace

extern "C" cudaError_t mb_tanh_cuda(const float* x, float* y, int64_t numel, cudaStream_t stream) {
  const int64_t blocks = (numel + kThreads - 1) / kThreads;
  const dim3 grid((unsigned)(blocks < kMaxBlocks ? blocks : kMaxBlocks));
  return MB_CUDA_LAUNCH(tanh_kernel, grid, dim3(kThreads), stream, x, y, numel);
}
