// modelbatch::dropout, uniform and normal on CUDA: check, allocate, launch on the current stream.
// The values of p and step stay unchecked, because reading them here would wait for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/cuda_stream.h"
#include "random/random_args.h"
#include "random/random_cuda.h"

namespace modelbatch {
namespace {

mb_random_launch launch_of(const Streams& streams, int64_t op_index, int dtype,
                           int64_t slice_numel) {
  mb_random_launch launch;
  launch.dtype = dtype;
  launch.seed = streams.seed.const_data_ptr<int64_t>();
  launch.step = streams.step.const_data_ptr<int64_t>();
  launch.op_index = op_index;
  launch.num_models = streams.num_models;
  launch.slice_numel = slice_numel;
  launch.stream = current_cuda_stream(streams.seed.get_device_index());
  return launch;
}

Tensor dropout_cuda(const Tensor& input, const Tensor& p, const Tensor& seed, const Tensor& step,
                    int64_t op_index, int64_t group) {
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  const Streams streams = checked_streams(seed, step, op_index, "dropout");
  const int64_t num_models = streams.num_models;
  MB_CHECK(group >= 1, "modelbatch::dropout: group must be at least 1, got ", group);
  MB_CHECK(input.device() == seed.device(),
           "modelbatch::dropout: input must be on the device of the other tensors");
  const int dtype = random_dtype(input.scalar_type(), "dropout");
  const Tensor rates = per_model_vector(p, "dropout", "p", ScalarType::Double, num_models, seed);
  const Slices slices = checked_slices(input, num_models, "dropout");
  Tensor output = empty_on_device_of(input, sizes_of(input), input.scalar_type());
  if (num_models == 0 || slices.slice_numel == 0) return output;
  const mb_random_launch launch = launch_of(streams, op_index, dtype, slices.slice_numel);
  STD_CUDA_CHECK(mb_dropout_cuda(launch, slices.tensor.const_data_ptr(), slices.model_stride,
                                 output.mutable_data_ptr(), rates.const_data_ptr<double>(), group));
  return output;
}

Tensor draw_cuda(const char* op, cudaError_t (*launcher)(mb_random_launch, void*),
                 const Tensor& seed, const Tensor& step, int64_t op_index,
                 const std::vector<int64_t>& size, ScalarType dtype) {
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  const Streams streams = checked_streams(seed, step, op_index, op);
  const int column = random_dtype(dtype, op);
  int64_t slice_numel = 0;
  const std::vector<int64_t> stacked = stacked_size(streams.num_models, size, op, &slice_numel);
  Tensor output = empty_on_device_of(seed, stacked, dtype);
  if (streams.num_models == 0 || slice_numel == 0) return output;
  const mb_random_launch launch = launch_of(streams, op_index, column, slice_numel);
  STD_CUDA_CHECK(launcher(launch, output.mutable_data_ptr()));
  return output;
}

Tensor uniform_cuda(const Tensor& seed, const Tensor& step, int64_t op_index,
                    const std::vector<int64_t>& size, ScalarType dtype) {
  return draw_cuda("uniform", mb_uniform_cuda, seed, step, op_index, size, dtype);
}

Tensor normal_cuda(const Tensor& seed, const Tensor& step, int64_t op_index,
                   const std::vector<int64_t>& size, ScalarType dtype) {
  return draw_cuda("normal", mb_normal_cuda, seed, step, op_index, size, dtype);
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CUDA, m) {
  m.impl("dropout", TORCH_BOX(&modelbatch::dropout_cuda));
  m.impl("uniform", TORCH_BOX(&modelbatch::uniform_cuda));
  m.impl("normal", TORCH_BOX(&modelbatch::normal_cuda));
}
