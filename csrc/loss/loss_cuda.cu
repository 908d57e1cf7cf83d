// Cross entropy on a GPU: one block owns one model, a thread takes every kThreads-th row, and the
// rows' losses are added in a fixed tree. No atomics, so a model's loss does not depend on the
// rest.
#include "common/cuda_launch.h"
#include "loss/loss.h"
#include "loss/loss_cuda.h"

namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGrid = 65535;

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float logarithm(float x) { return logf(x); }
__device__ inline double logarithm(double x) { return log(x); }

// The sum over the block's threads, in every thread. kThreads is a power of two.
__device__ double block_sum(double value, double* shared) {
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if ((int)threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
    __syncthreads();
  }
  const double sum = shared[0];
  __syncthreads();  // before the memory is used again
  return sum;
}

template <class T>
__global__ void cross_entropy_kernel(mb_cross_entropy_launch launch) {
  MB_SHARED_ARRAY(double, shared, kThreads);
  const int64_t classes = launch.classes;
  for (int64_t model = blockIdx.x; model < launch.num_models; model += gridDim.x) {
    const int64_t offset = model * launch.rows * classes;
    const T* logits = static_cast<const T*>(launch.logits) + offset;
    T* slope = launch.slope == nullptr ? nullptr : static_cast<T*>(launch.slope) + offset;
    const int64_t* target = launch.target + model * launch.target_stride;
    double own_count = 0.0;
    for (int64_t r = threadIdx.x; r < launch.rows; r += kThreads) {
      own_count += target[r] != launch.ignore_index ? 1.0 : 0.0;
    }
    const double counted = block_sum(own_count, shared);
    const T share = (T)1 / (T)counted;
    double own_total = 0.0;
    for (int64_t r = threadIdx.x; r < launch.rows; r += kThreads) {
      const T* row = logits + r * classes;
      const int64_t label = target[r];
      const bool counts = label != launch.ignore_index;
      const bool exists = label >= 0 && label < classes;
      T top = row[0];
      for (int64_t c = 1; c < classes; ++c) top = row[c] > top || row[c] != row[c] ? row[c] : top;
      T sum = 0;
      for (int64_t c = 0; c < classes; ++c) sum += exponential(row[c] - top);
      if (counts) {
        own_total += exists ? (double)(logarithm(sum) - (row[label] - top)) : (double)NAN;
      }
      if (slope == nullptr) continue;
      const T factor = share / sum;
      for (int64_t c = 0; c < classes; ++c) {
        const T p = counts ? exponential(row[c] - top) * factor : (T)0;
        slope[r * classes + c] = counts && c == label ? p - share : p;
      }
    }
    const double total = block_sum(own_total, shared);
    if (threadIdx.x == 0) static_cast<T*>(launch.losses)[model] = (T)(total / counted);
  }
}

}  // namespace

extern "C" cudaError_t mb_cross_entropy_cuda(mb_cross_entropy_launch launch) {
  const dim3 grid((unsigned)(launch.num_models < kMaxGrid ? launch.num_models : kMaxGrid));
  switch (launch.dtype) {
    case MB_LOSS_F32:
      return MB_CUDA_LAUNCH(cross_entropy_kernel<float>, grid, dim3(kThreads), launch.stream,
                            launch);
    case MB_LOSS_F64:
      return MB_CUDA_LAUNCH(cross_entropy_kernel<double>, grid, dim3(kThreads), launch.stream,
                            launch);
    default:
      return cudaErrorInvalidValue;
  }
}
