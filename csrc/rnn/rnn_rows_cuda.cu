// What the gradients of a layer need besides its steps: the states that the steps began with,
// beside one another for one GEMM over all steps, the gradients of the biases, and sums.
#include "common/cuda_launch.h"
#include "rnn/rnn_cuda.h"
#include "rnn/rnn_cuda_cells.h"

namespace modelbatch {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridX = 1 << 20;

unsigned blocks_for(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  return (unsigned)(blocks < kMaxGridX ? blocks : kMaxGridX);
}

unsigned models_of(int64_t num_models) {
  return (unsigned)(num_models < MB_MAX_GRID_Y ? num_models : MB_MAX_GRID_Y);
}

// ---- states before each step --------------------------------------------------------------------

template <class T>
__global__ void previous_kernel(mb_rnn_previous p) {
  const int64_t count = p.steps * p.batch * p.columns;
  for (int64_t model = blockIdx.y; model < p.num_models; model += gridDim.y) {
    const T* y = slice_of<const T>(p.y, model);
    const T* h0 = slice_of<const T>(p.h0, model);
    T* to = slice_of<T>(p.to, model) + p.first_row * p.columns;
    for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * kThreads) {
      const int64_t row = i / p.columns, column = i % p.columns;
      const int64_t step = row / p.batch, b = row % p.batch;
      // Rows of the neighbouring step, and how far it begins from this step.
      const bool is_edge = p.reverse ? step == p.steps - 1 : step == 0;
      const int64_t rows = is_edge ? p.neighbour : p.batch;
      const int64_t distance = p.reverse ? p.batch : -rows;
      to[i] = b < rows ? y[(p.first_row + row + distance) * p.columns + column]
                       : h0[b * p.columns + column];
    }
  }
}

// ---- gradients of biases ------------------------------------------------------------------------

constexpr int kColumns = 32;
constexpr int kLanes = 8;

// A block takes kColumns columns of one model; lane l adds rows l, l + kLanes, ..., and the lanes'
// sums are added in a fixed tree. So a model's sums do not depend on the other models.
template <class T>
__global__ void bias_gradient_kernel(int64_t num_models, int64_t rows, int64_t columns,
                                     const typename T::type* from, typename T::type* to) {
  using real = typename T::real;
  MB_SHARED_ARRAY(real, sums, kColumns * kLanes);
  const int x = (int)threadIdx.x, lane = (int)threadIdx.y;
  const int64_t column = (int64_t)blockIdx.x * kColumns + x;
  for (int64_t model = blockIdx.y; model < num_models; model += gridDim.y) {
    const typename T::type* slice = from + model * rows * columns;
    real sum = 0;
    if (column < columns) {
      for (int64_t row = lane; row < rows; row += kLanes) {
        sum += T::widen(slice[row * columns + column]);
      }
    }
    sums[lane * kColumns + x] = sum;
    __syncthreads();
    for (int width = kLanes / 2; width > 0; width /= 2) {
      if (lane < width) sums[lane * kColumns + x] += sums[(lane + width) * kColumns + x];
      __syncthreads();
    }
    if (lane == 0 && column < columns) to[model * columns + column] = T::narrow(sums[x]);
  }
}

// ---- sums ---------------------------------------------------------------------------------------

template <class T>
__global__ void add_kernel(int64_t num_models, int64_t count, mb_rnn_array a, mb_rnn_array b,
                           mb_rnn_array to) {
  using real = typename T::real;
  using type = typename T::type;
  for (int64_t model = blockIdx.y; model < num_models; model += gridDim.y) {
    for (int64_t i = (int64_t)blockIdx.x * kThreads + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * kThreads) {
      real sum = slice_of<const real>(a, model)[i];
      if (b.data != nullptr) sum += T::widen(slice_of<const type>(b, model)[i]);
      slice_of<type>(to, model)[i] = T::narrow(sum);
    }
  }
}

}  // namespace
}  // namespace modelbatch

extern "C" cudaError_t mb_rnn_previous_cuda(mb_rnn_previous previous) {
  using namespace modelbatch;
  const int64_t count = previous.steps * previous.batch * previous.columns;
  if (count == 0 || previous.num_models == 0) return cudaSuccess;
  const dim3 grid(blocks_for(count, kThreads), models_of(previous.num_models));
  switch (previous.element_size) {
    case 2:
      return MB_CUDA_LAUNCH(previous_kernel<uint16_t>, grid, dim3(kThreads), previous.stream,
                            previous);
    case 4:
      return MB_CUDA_LAUNCH(previous_kernel<uint32_t>, grid, dim3(kThreads), previous.stream,
                            previous);
    case 8:
      return MB_CUDA_LAUNCH(previous_kernel<uint64_t>, grid, dim3(kThreads), previous.stream,
                            previous);
    default:
      return cudaErrorInvalidValue;
  }
}

extern "C" cudaError_t mb_rnn_bias_gradient_cuda(int dtype, int64_t num_models, int64_t rows,
                                                 int64_t columns, const void* from, void* to,
                                                 cudaStream_t stream) {
  using namespace modelbatch;
  if (num_models == 0) return cudaSuccess;
  const dim3 grid((unsigned)((columns + kColumns - 1) / kColumns), models_of(num_models));
  return with_rnn_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    using type = typename T::type;
    return MB_CUDA_LAUNCH(bias_gradient_kernel<T>, grid, dim3(kColumns, kLanes), stream, num_models,
                          rows, columns, static_cast<const type*>(from), static_cast<type*>(to));
  });
}

extern "C" cudaError_t mb_rnn_add_cuda(int dtype, int64_t num_models, int64_t count, mb_rnn_array a,
                                       mb_rnn_array b, mb_rnn_array to, cudaStream_t stream) {
  using namespace modelbatch;
  if (count == 0 || num_models == 0) return cudaSuccess;
  const dim3 grid(blocks_for(count, kThreads), models_of(num_models));
  return with_rnn_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    return MB_CUDA_LAUNCH(add_kernel<T>, grid, dim3(kThreads), stream, num_models, count, a, b, to);
  });
}
