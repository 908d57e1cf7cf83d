// The kernels of random_cpu.c on a GPU: the same words and the same arithmetic for every element.
//
// blockIdx.y strides over models, blockIdx.x over a model's slice; a thread takes the elements of
// one block of four words. No thread needs another's result, so there is neither an atomic nor a
// barrier.
#include "common/cuda_launch.h"
#include "common/half.h"
#include "random/draws.h"
#include "random/random.h"
#include "random/random_cuda.h"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxGridX = 1 << 16;
constexpr int64_t kMaxGridY = 65535;  // The hardware's limit.

// ---- element types ------------------------------------------------------------------------------

struct F32 {
  using type = float;
  using compute = float;
  static constexpr int kPerBlock = 4;  // elements of one block of words
  __device__ static float widen(float value) { return value; }
  __device__ static float narrow(float value) { return value; }
  __device__ static float uniform(uint32_t word) { return mb_uniform_f32(word); }
};

struct BF16 {
  using type = uint16_t;
  using compute = float;
  static constexpr int kPerBlock = 4;
  __device__ static float widen(uint16_t value) { return mb_bf16_to_f32(value); }
  __device__ static uint16_t narrow(float value) { return mb_f32_to_bf16(value); }
  __device__ static uint16_t uniform(uint32_t word) { return mb_uniform_bf16(word); }
};

struct F16 {
  using type = uint16_t;
  using compute = float;
  static constexpr int kPerBlock = 4;
  __device__ static float widen(uint16_t value) { return mb_f16_to_f32(value); }
  __device__ static uint16_t narrow(float value) { return mb_f32_to_f16(value); }
  __device__ static uint16_t uniform(uint32_t word) { return mb_uniform_f16(word); }
};

struct F64 {
  using type = double;
  using compute = double;
  static constexpr int kPerBlock = 2;
  __device__ static double widen(double value) { return value; }
  __device__ static double narrow(double value) { return value; }
};

// ---- what fills the elements of one block of words
// -----------------------------------------------

template <class T>
struct Uniform {
  __device__ static void fill(const uint32_t* words, typename T::type* values) {
    for (int i = 0; i < 4; ++i) values[i] = T::uniform(words[i]);
  }
};

template <>
struct Uniform<F64> {
  __device__ static void fill(const uint32_t* words, double* values) {
    values[0] = mb_uniform_f64(words[0], words[1]);
    values[1] = mb_uniform_f64(words[2], words[3]);
  }
};

template <class T>
struct Normal {
  __device__ static void fill(const uint32_t* words, typename T::type* values) {
    float wide[4];
    mb_normal_pair_f32(words[0], words[1], wide, wide + 1);
    mb_normal_pair_f32(words[2], words[3], wide + 2, wide + 3);
    for (int i = 0; i < 4; ++i) values[i] = T::narrow(wide[i]);
  }
};

template <>
struct Normal<F64> {
  __device__ static void fill(const uint32_t* words, double* values) {
    mb_normal_pair_f64(words, values, values + 1);
  }
};

// ---- kernels ------------------------------------------------------------------------------------

template <class T, class Draw>
__global__ void draw_kernel(mb_random_launch launch, typename T::type* __restrict__ y) {
  const int64_t blocks = (launch.slice_numel + T::kPerBlock - 1) / T::kPerBlock;
  const int64_t stride = (int64_t)gridDim.x * blockDim.x;
  for (int64_t model = blockIdx.y; model < launch.num_models; model += gridDim.y) {
    const mb_philox_stream stream =
        mb_philox_open(launch.seed[model], launch.step[model], launch.op_index);
    typename T::type* slice = y + model * launch.slice_numel;
    for (int64_t q = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; q < blocks; q += stride) {
      uint32_t words[4];
      typename T::type values[T::kPerBlock];
      mb_philox_block(words, (uint64_t)q, stream);
      Draw::fill(words, values);
      for (int i = 0; i < T::kPerBlock; ++i) {
        const int64_t e = q * T::kPerBlock + i;
        if (e < launch.slice_numel) slice[e] = values[i];
      }
    }
  }
}

template <class T>
__global__ void dropout_kernel(mb_random_launch launch, const typename T::type* __restrict__ x,
                               int64_t model_stride, typename T::type* __restrict__ y,
                               const double* __restrict__ p, int64_t group) {
  using compute = typename T::compute;
  const int64_t quads = (launch.slice_numel + 3) / 4;
  const int64_t stride = (int64_t)gridDim.x * blockDim.x;
  for (int64_t model = blockIdx.y; model < launch.num_models; model += gridDim.y) {
    const mb_philox_stream stream =
        mb_philox_open(launch.seed[model], launch.step[model], launch.op_index);
    const double rate = p[model];
    const uint64_t threshold = mb_dropout_threshold(rate);
    const compute scale = (compute)1 / (compute)(1.0 - rate);
    const typename T::type* source = x + model * model_stride;
    typename T::type* slice = y + model * launch.slice_numel;
    for (int64_t quad = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; quad < quads;
         quad += stride) {
      uint32_t words[4];
      int64_t drawn = -1;  // the block that `words` holds
      for (int64_t e = 4 * quad; e < 4 * quad + 4 && e < launch.slice_numel; ++e) {
        const int64_t decision = group == 1 ? e : e / group;
        if (decision / 4 != drawn) {
          drawn = decision / 4;
          mb_philox_block(words, (uint64_t)drawn, stream);
        }
        const bool dropped = words[decision % 4] < threshold;
        // Selected, not multiplied by zero: the product of NaN and zero is NaN.
        slice[e] = rate == 0.0 ? source[e]
                   : dropped   ? (typename T::type)0
                               : T::narrow(T::widen(source[e]) * scale);
      }
    }
  }
}

// ---- launchers ----------------------------------------------------------------------------------

dim3 grid_of(const mb_random_launch& launch, int64_t per_thread) {
  const int64_t per_block = per_thread * kThreads;
  const int64_t wanted = (launch.slice_numel + per_block - 1) / per_block;
  const int64_t models = launch.num_models;
  return dim3((unsigned)(wanted < kMaxGridX ? wanted : kMaxGridX),
              (unsigned)(models < kMaxGridY ? models : kMaxGridY));
}

template <class T>
cudaError_t launch_dropout(const mb_random_launch& launch, const void* x, int64_t model_stride,
                           void* y, const double* p, int64_t group) {
  using type = typename T::type;
  return MB_CUDA_LAUNCH(dropout_kernel<T>, grid_of(launch, 4), dim3(kThreads), launch.stream,
                        launch, static_cast<const type*>(x), model_stride, static_cast<type*>(y), p,
                        group);
}

template <class T, template <class> class Draw>
cudaError_t launch_draw(const mb_random_launch& launch, void* y) {
  return MB_CUDA_LAUNCH((draw_kernel<T, Draw<T>>), grid_of(launch, T::kPerBlock), dim3(kThreads),
                        launch.stream, launch, static_cast<typename T::type*>(y));
}

template <template <class> class Draw>
cudaError_t launch_draw_of_dtype(const mb_random_launch& launch, void* y) {
  switch (launch.dtype) {
    case MB_F32:
      return launch_draw<F32, Draw>(launch, y);
    case MB_F64:
      return launch_draw<F64, Draw>(launch, y);
    case MB_BF16:
      return launch_draw<BF16, Draw>(launch, y);
    case MB_F16:
      return launch_draw<F16, Draw>(launch, y);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" cudaError_t mb_dropout_cuda(mb_random_launch launch, const void* x, int64_t model_stride,
                                       void* y, const double* p, int64_t group) {
  switch (launch.dtype) {
    case MB_F32:
      return launch_dropout<F32>(launch, x, model_stride, y, p, group);
    case MB_F64:
      return launch_dropout<F64>(launch, x, model_stride, y, p, group);
    case MB_BF16:
      return launch_dropout<BF16>(launch, x, model_stride, y, p, group);
    case MB_F16:
      return launch_dropout<F16>(launch, x, model_stride, y, p, group);
    default:
      return cudaErrorInvalidValue;
  }
}

extern "C" cudaError_t mb_uniform_cuda(mb_random_launch launch, void* y) {
  return launch_draw_of_dtype<Uniform>(launch, y);
}

extern "C" cudaError_t mb_normal_cuda(mb_random_launch launch, void* y) {
  return launch_draw_of_dtype<Normal>(launch, y);
}
