// modelbatch::cross_entropy on CUDA: check, allocate, launch on the current stream. The targets'
// values stay unchecked, because reading them here would wait for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cuda_stream.h"
#include "loss/loss_args.h"
#include "loss/loss_cuda.h"

namespace modelbatch {
namespace {

std::tuple<Tensor, Tensor> cross_entropy_cuda(const Tensor& logits, const Tensor& target,
                                              int64_t ignore_index, bool need_slope) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const ClassLoss loss = checked_class_loss(logits, target);
  ClassLossResult result = class_loss_result(loss, need_slope);
  if (loss.num_models == 0) return {result.losses, result.slope};
  mb_cross_entropy_launch launch;
  launch.dtype = loss.dtype;
  launch.logits = loss.logits.const_data_ptr();
  launch.target = loss.target.const_data_ptr<int64_t>();
  launch.target_stride = loss.target_stride;
  launch.ignore_index = ignore_index;
  launch.losses = result.losses.mutable_data_ptr();
  launch.slope = need_slope ? result.slope.mutable_data_ptr() : nullptr;
  launch.num_models = loss.num_models;
  launch.rows = loss.rows;
  launch.classes = loss.classes;
  launch.stream = current_cuda_stream(logits.get_device_index());
  STD_CUDA_CHECK(mb_cross_entropy_cuda(launch));
  return {result.losses, result.slope};
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CUDA, m) {
  m.impl("cross_entropy", TORCH_BOX(&modelbatch::cross_entropy_cuda));
}
