// Every model's squared gradient norm and whether it has a non-finite gradient, on a GPU: partial
// sums of slices, then their sum. No atomics: the order of additions is always the same.
#include "optim/optim.h"
#include "optim/optim_cuda.h"
#include "optim/optim_cuda_tensors.h"

namespace modelbatch {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum of a warp's values, in lane 0; always the same tree.
__device__ inline double warp_sum(double value) {
  for (int delta = 16; delta > 0; delta /= 2) {
    value += __shfl_down_sync(kAllLanes, value, delta);
  }
  return value;
}

// partial_sums and partial_flags are [M, partials]; this launch fills from `first_partial` on.
template <class T>
__global__ void __launch_bounds__(kThreads)
    partial_stats_kernel(int64_t num_models, int64_t partials, int64_t first_partial,
                         double* __restrict__ partial_sums, uint8_t* __restrict__ partial_flags,
                         const __grid_constant__ Table table) {
  MB_SHARED_ARRAY(double, sums, kWarps);
  MB_SHARED_ARRAY(unsigned, flags, kWarps);
  const int warp = (int)threadIdx.x / 32;
  for (int64_t model = blockIdx.y; model < num_models; model += gridDim.y) {
    double sum = 0.0;
    bool is_nonfinite = false;
    for_each_pack<T::kPack>(table, [&](const Entry& entry, int64_t first) {
      // Elements beyond the end are zero.
      const Pack<typename T::type, T::kPack> grad = load_grad<T>(table, entry, model, first);
#pragma unroll
      for (int i = 0; i < T::kPack; ++i) {
        const double value = (double)T::widen(grad.values[i]);
        is_nonfinite = is_nonfinite || !(value - value == 0.0);
        sum += value * value;
      }
    });
    sum = warp_sum(sum);
    const unsigned votes = __ballot_sync(kAllLanes, is_nonfinite);
    __syncthreads();  // Nobody reads the model before any more.
    if (threadIdx.x % 32 == 0) {
      sums[warp] = sum;
      flags[warp] = votes;
    }
    __syncthreads();
    if (threadIdx.x != 0) continue;
    double total = 0.0;
    unsigned any = 0;
    for (int w = 0; w < kWarps; ++w) {
      total += sums[w];
      any |= flags[w];
    }
    const int64_t partial = model * partials + first_partial + blockIdx.x;
    partial_sums[partial] = total;
    partial_flags[partial] = any != 0;
  }
}

// One warp per model.
__global__ void __launch_bounds__(kThreads)
    total_stats_kernel(int64_t num_models, int64_t partials,
                       const double* __restrict__ partial_sums,
                       const uint8_t* __restrict__ partial_flags, double* __restrict__ sq_norm,
                       uint8_t* __restrict__ nonfinite) {
  const int64_t model = (int64_t)blockIdx.x * kWarps + threadIdx.x / 32;
  const int lane = (int)threadIdx.x % 32;
  if (model >= num_models) return;  // The whole warp.
  double sum = 0.0;
  bool is_nonfinite = false;
  for (int64_t i = lane; i < partials; i += 32) {
    sum += partial_sums[model * partials + i];
    is_nonfinite = is_nonfinite || partial_flags[model * partials + i] != 0;
  }
  sum = warp_sum(sum);
  const unsigned votes = __ballot_sync(kAllLanes, is_nonfinite);
  if (lane != 0) return;
  sq_norm[model] = sum;
  nonfinite[model] = votes != 0;
}

template <class T>
cudaError_t launch_partial_stats(int64_t num_models, const mb_optim_cuda_tensor* tensors,
                                 int64_t num_tensors, int64_t partials, double* partial_sums,
                                 uint8_t* partial_flags, cudaStream_t stream) {
  int64_t first_partial = 0;
  return for_each_table(
      tensors, num_tensors, T::kPack, [&](const Table& table, int64_t num_slices) {
        const cudaError_t error = MB_CUDA_LAUNCH(
            partial_stats_kernel<T>, grid_of(num_slices, num_models), dim3(kThreads), stream,
            num_models, partials, first_partial, partial_sums, partial_flags, table);
        first_partial += num_slices;
        return error;
      });
}

int pack_of(int dtype) {
  return dtype == MB_OPTIM_BF16 || dtype == MB_OPTIM_F16 ? F16::kPack : F32::kPack;
}

}  // namespace
}  // namespace modelbatch

extern "C" int64_t mb_grad_stats_partials(int dtype, const mb_optim_cuda_tensor* tensors,
                                          int64_t num_tensors) {
  using namespace modelbatch;
  int64_t partials = 0;
  for_each_table(tensors, num_tensors, pack_of(dtype), [&](const Table&, int64_t num_slices) {
    partials += num_slices;
    return cudaSuccess;
  });
  return partials;
}

extern "C" cudaError_t mb_grad_stats_cuda(int dtype, int64_t num_models,
                                          const mb_optim_cuda_tensor* tensors, int64_t num_tensors,
                                          double* partial_sums, uint8_t* partial_flags,
                                          double* sq_norm, uint8_t* nonfinite,
                                          cudaStream_t stream) {
  using namespace modelbatch;
  const int64_t partials = mb_grad_stats_partials(dtype, tensors, num_tensors);
  const auto launch = dtype == MB_OPTIM_F32    ? launch_partial_stats<F32>
                      : dtype == MB_OPTIM_F64  ? launch_partial_stats<F64>
                      : dtype == MB_OPTIM_BF16 ? launch_partial_stats<BF16>
                      : dtype == MB_OPTIM_F16  ? launch_partial_stats<F16>
                                               : nullptr;
  if (launch == nullptr) return cudaErrorInvalidValue;
  const cudaError_t error =
      launch(num_models, tensors, num_tensors, partials, partial_sums, partial_flags, stream);
  if (error != cudaSuccess) return error;
  return MB_CUDA_LAUNCH(total_stats_kernel, dim3((unsigned)divide_up(num_models, kWarps)),
                        dim3(kThreads), stream, num_models, partials, partial_sums, partial_flags,
                        sq_norm, nonfinite);
}
