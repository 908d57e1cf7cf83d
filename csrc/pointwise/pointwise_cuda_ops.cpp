// modelbatch::tanh on CUDA: check, allocate, launch on the current stream.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "common/cuda_stream.h"
#include "pointwise/pointwise_args.h"
#include "pointwise/pointwise_cuda.h"

namespace modelbatch {
namespace {

Tensor tanh_cuda(const Tensor& input) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor dense = checked_pointwise_input(input, "tanh");
  Tensor output = pointwise_output(dense);
  if (dense.numel() == 0) return output;
  STD_CUDA_CHECK(mb_tanh_cuda(dense.const_data_ptr<float>(), output.mutable_data_ptr<float>(),
                              dense.numel(), current_cuda_stream(input.get_device_index())));
  return output;
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CUDA, m) {
  m.impl("tanh", TORCH_BOX(&modelbatch::tanh_cuda));
}
