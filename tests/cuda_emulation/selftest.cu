// Kernels that test the emulation itself: right ones, and ones with a planted mistake each.
#include "common/cuda_launch.h"

namespace {

constexpr int kThreads = 96;

// y[row] = the sum of x[row], by shuffles and shared memory, row after row in one block. Without
// either of its barriers the result depends on the order of the threads.
template <bool before_writing, bool before_reading>
__global__ void row_sums_kernel(const float* x, float* y, int rows) {
  MB_SHARED_ARRAY(float, partial, kThreads / 32);
  for (int row = 0; row < rows; ++row) {
    float sum = x[row * kThreads + (int)threadIdx.x];
    for (int delta = 16; delta > 0; delta /= 2) sum += __shfl_down_sync(0xffffffffu, sum, delta);
    if (before_writing) __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    if (before_reading) __syncthreads();
    if (threadIdx.x == 0) y[row] = partial[0] + partial[1] + partial[2];
  }
}

// y[i] = what lane i of one warp gets: [xor 1, down 3 in eights, from lane 5, ballot of odd lanes].
__global__ void warp_kernel(int* y) {
  const int lane = (int)threadIdx.x;
  y[lane] = __shfl_xor_sync(0xffffffffu, lane, 1);
  y[32 + lane] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
  y[64 + lane] = __shfl_sync(0xffffffffu, lane, 5);
  y[96 + lane] = (int)__ballot_sync(0xffffffffu, lane % 2);
  if (lane < 16) y[128 + lane] = __shfl_xor_sync(0x0000ffffu, lane, 15);  // Half a warp.
  __syncwarp(0xffffffffu);
}

// Reverses a block's elements through dynamic shared memory.
__global__ void reverse_kernel(float* x) {
  MB_DYNAMIC_SHARED(float, copy);
  copy[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = copy[blockDim.x - 1 - threadIdx.x];
}

__global__ void unwritten_shared_kernel(float* y) {
  MB_SHARED_ARRAY(float, never_written, kThreads);
  y[threadIdx.x] = never_written[threadIdx.x];
}

__global__ void early_exit_kernel(float* y) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  y[threadIdx.x] = 1.0f;
}

__global__ void divergent_barrier_kernel(float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1.0f;
}

__global__ void wrong_mask_kernel(int* y) {
  if (threadIdx.x < 16) y[threadIdx.x] = __shfl_down_sync(0xffffffffu, (int)threadIdx.x, 1);
}

__global__ void write_beyond_kernel(float* y, int64_t numel) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= numel) y[i] = 1.0f;
}

__global__ void write_beyond_shared_kernel(float* y) {
  MB_SHARED_ARRAY(float, values, kThreads);
  values[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}

__global__ void write_beyond_dynamic_kernel(float* y) {
  MB_DYNAMIC_SHARED(float, values);
  values[threadIdx.x + 1] = 1.0f;
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}

__global__ void write_beyond_local_kernel(float* y) {
  float values[4];
  for (int i = 0; i < 4 + (int)threadIdx.x / 64; ++i) values[i] = (float)i;
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x % 4];
}

struct alignas(16) Four {
  float values[4];
};

__global__ void misaligned_kernel(float* y) {
  reinterpret_cast<Four*>(y + 1)->values[threadIdx.x % 4] = 1.0f;
}

__global__ void signed_overflow_kernel(int* y) { y[threadIdx.x] += 2147483647; }

}  // namespace

#define LAUNCH(kernel, blocks, threads, ...) \
  MB_CUDA_LAUNCH(kernel, dim3(blocks), dim3(threads), nullptr, __VA_ARGS__)
#define LAUNCH_DYNAMIC(kernel, threads, ...)                                                \
  MB_CUDA_LAUNCH_SHARED(kernel, dim3(1), dim3(threads), sizeof(float) * (threads), nullptr, \
                        __VA_ARGS__)

extern "C" {

cudaError_t selftest_row_sums(const float* x, float* y, int rows) {
  return LAUNCH((row_sums_kernel<true, true>), 1, kThreads, x, y, rows);
}
cudaError_t selftest_written_too_early(const float* x, float* y, int rows) {
  return LAUNCH((row_sums_kernel<false, true>), 1, kThreads, x, y, rows);
}
cudaError_t selftest_read_too_early(const float* x, float* y, int rows) {
  return LAUNCH((row_sums_kernel<true, false>), 1, kThreads, x, y, rows);
}
cudaError_t selftest_warp(int* y) { return LAUNCH(warp_kernel, 1, 32, y); }
cudaError_t selftest_reverse(float* x, int threads) {
  return LAUNCH_DYNAMIC(reverse_kernel, threads, x);
}
cudaError_t selftest_unwritten_shared(float* y) {
  return LAUNCH(unwritten_shared_kernel, 2, kThreads, y);
}

cudaError_t selftest_early_exit(float* y) { return LAUNCH(early_exit_kernel, 1, kThreads, y); }
cudaError_t selftest_divergent_barrier(float* y) {
  return LAUNCH(divergent_barrier_kernel, 1, kThreads, y);
}
cudaError_t selftest_wrong_mask(int* y) { return LAUNCH(wrong_mask_kernel, 1, 32, y); }
cudaError_t selftest_empty_grid(float* y) { return LAUNCH(misaligned_kernel, 0, 1, y); }
cudaError_t selftest_large_block(float* y) { return LAUNCH(misaligned_kernel, 1, 1025, y); }

cudaError_t selftest_write_beyond(float* y, int64_t numel) {
  return LAUNCH(write_beyond_kernel, 4, 64, y, numel);
}
cudaError_t selftest_write_beyond_shared(float* y) {
  return LAUNCH(write_beyond_shared_kernel, 1, kThreads, y);
}
cudaError_t selftest_write_beyond_dynamic(float* y) {
  return LAUNCH_DYNAMIC(write_beyond_dynamic_kernel, kThreads, y);
}
cudaError_t selftest_write_beyond_local(float* y) {
  return LAUNCH(write_beyond_local_kernel, 1, kThreads, y);
}
cudaError_t selftest_misaligned(float* y) { return LAUNCH(misaligned_kernel, 1, 4, y); }
cudaError_t selftest_signed_overflow(int* y) { return LAUNCH(signed_overflow_kernel, 1, 4, y); }

}  // extern "C"
