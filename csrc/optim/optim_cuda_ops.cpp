// The optimizer operators on CUDA: check, describe the tensors, launch on the current stream. The
// values of hyper stay unchecked, because reading them here would wait for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "common/cuda_stream.h"
#include "optim/optim_args.h"
#include "optim/optim_cuda.h"
#include "optim/optim_layout.h"

namespace modelbatch {
namespace {

using Maybe = std::optional<Tensor>;
using CudaTensors = std::vector<mb_optim_cuda_tensor>;

// 0 where all models share a slice, as for an expanded gradient.
int64_t model_stride(const StackedTensor& tensor) { return tensor.strides[0]; }

// Describes the gradient in that order of its dimensions; false where a kernel cannot follow it.
bool describe_gradient(const StackedTensor& grad, const Ints& order, mb_optim_cuda_tensor& to) {
  to.grad = grad.data;
  to.grad_stride = model_stride(grad);
  if (is_dense(grad, order)) return true;
  const StridedLayout layout(grad, order);
  to.grad_dims = static_cast<int64_t>(layout.sizes.size());
  if (to.grad_dims > MB_OPTIM_CUDA_MAX_DIMS || to.numel > std::numeric_limits<uint32_t>::max()) {
    return false;
  }
  std::copy(layout.sizes.begin(), layout.sizes.end(), to.grad_sizes);
  std::copy(layout.strides.begin(), layout.strides.end(), to.grad_strides);
  return true;
}

Tensor permuted(const Tensor& tensor, const Ints& dims) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensor),
                                    torch::stable::detail::from(dims)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::permute", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A contiguous copy with the dimensions of the slice in that order, described.
Tensor describe_copy(const Tensor& grad, const Ints& order, mb_optim_cuda_tensor& to) {
  Ints dims{0};
  for (int64_t dim = 1; dim < grad.dim(); ++dim) {
    if (grad.size(dim) == 1) dims.push_back(dim);  // Wherever: it moves no element.
  }
  dims.insert(dims.end(), order.begin(), order.end());
  Tensor copy = torch::stable::contiguous(permuted(grad, dims));
  to.grad = copy.const_data_ptr();
  to.grad_stride = to.numel;
  to.grad_dims = 0;
  return copy;
}

void step_cuda(mb_optim_rule rule, const TensorList& params, const TensorList& grads,
               std::initializer_list<const TensorList*> states, const Tensor& step,
               const Tensor& hyper, const Maybe& active, const Maybe& nonfinite,
               const Maybe& inv_scale, const Maybe& clip_factor, const Maybe& clip_value,
               std::initializer_list<const Tensor*> scalars = {}) {
  OptimArgs args = checked_optim_args(rule, params, grads, states, step, hyper, active, nonfinite,
                                      inv_scale, clip_factor, clip_value, scalars);
  if (args.num_models == 0) return;
  const int32_t device = step.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  CudaTensors tensors;
  tensors.reserve(args.entries.size());
  WorkingCopies copies;
  Ints order;
  for (size_t i = 0; i < args.entries.size(); ++i) {
    OptimEntry& entry = args.entries[i];
    if (entry.slice_numel == 0) continue;
    find_common_order(entry, params[i], states, i, order, copies);
    mb_optim_cuda_tensor& to = tensors.emplace_back();
    to.numel = entry.slice_numel;
    to.param = entry.param.data;
    to.param_stride = model_stride(entry.param);
    for (int state = 0; state < MB_OPTIM_MAX_STATES; ++state) {
      if (entry.states[state].data == nullptr) continue;
      to.states[state] = entry.states[state].data;
      to.state_strides[state] = model_stride(entry.states[state]);
    }
    if (!describe_gradient(entry.grad, order, to)) {
      args.kept.push_back(describe_copy(grads[i], order, to));
    }
  }
  mb_optim_cuda_models models{};
  models.num_models = args.num_models;
  models.step = args.step;
  models.step_stride = args.step_stride;
  models.hyper = args.hyper;
  std::copy(args.scalars.begin(), args.scalars.end(), models.scalars);
  models.active = reinterpret_cast<const uint8_t*>(args.active);
  models.nonfinite = reinterpret_cast<const uint8_t*>(args.nonfinite);
  models.inv_scale = args.inv_scale;
  models.clip_factor = args.clip_factor;
  models.clip_value = args.clip_value;
  STD_CUDA_CHECK(mb_optim_step_cuda(rule, args.dtype, &models, tensors.data(),
                                    static_cast<int64_t>(tensors.size()),
                                    current_cuda_stream(device)));
  write_back(copies);
}

void sgd_step_cuda(const TensorList& params, const TensorList& grads,
                   const TensorList& momentum_buffers, const Tensor& step, const Tensor& hyper,
                   const Maybe& active, const Maybe& nonfinite, const Maybe& inv_scale,
                   const Maybe& clip_factor, const Maybe& clip_value) {
  step_cuda(MB_RULE_SGD, params, grads, {&momentum_buffers}, step, hyper, active, nonfinite,
            inv_scale, clip_factor, clip_value);
}

template <mb_optim_rule rule>
void adam_step_cuda(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                    const Tensor& step, const Tensor& hyper, const Maybe& active,
                    const Maybe& nonfinite, const Maybe& inv_scale, const Maybe& clip_factor,
                    const Maybe& clip_value) {
  step_cuda(rule, params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, step, hyper, active,
            nonfinite, inv_scale, clip_factor, clip_value);
}

void rmsprop_step_cuda(const TensorList& params, const TensorList& grads,
                       const TensorList& square_avgs, const TensorList& grad_avgs,
                       const TensorList& momentum_buffers, const Tensor& step, const Tensor& hyper,
                       const Maybe& active, const Maybe& nonfinite, const Maybe& inv_scale,
                       const Maybe& clip_factor, const Maybe& clip_value) {
  step_cuda(MB_RULE_RMSPROP, params, grads, {&square_avgs, &grad_avgs, &momentum_buffers}, step,
            hyper, active, nonfinite, inv_scale, clip_factor, clip_value);
}

void adagrad_step_cuda(const TensorList& params, const TensorList& grads, const TensorList& sums,
                       const Tensor& step, const Tensor& hyper, const Maybe& active,
                       const Maybe& nonfinite, const Maybe& inv_scale, const Maybe& clip_factor,
                       const Maybe& clip_value) {
  step_cuda(MB_RULE_ADAGRAD, params, grads, {&sums}, step, hyper, active, nonfinite, inv_scale,
            clip_factor, clip_value);
}

// Adadelta, Adamax, RAdam and Rprop.
template <mb_optim_rule rule>
void two_state_step_cuda(const TensorList& params, const TensorList& grads,
                         const TensorList& first_states, const TensorList& second_states,
                         const Tensor& step, const Tensor& hyper, const Maybe& active,
                         const Maybe& nonfinite, const Maybe& inv_scale, const Maybe& clip_factor,
                         const Maybe& clip_value) {
  step_cuda(rule, params, grads, {&first_states, &second_states}, step, hyper, active, nonfinite,
            inv_scale, clip_factor, clip_value);
}

void nadam_step_cuda(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                     const TensorList& exp_avg_sqs, const Tensor& mu_product, const Tensor& step,
                     const Tensor& hyper, const Maybe& active, const Maybe& nonfinite,
                     const Maybe& inv_scale, const Maybe& clip_factor, const Maybe& clip_value) {
  step_cuda(MB_RULE_NADAM, params, grads, {&exp_avgs, &exp_avg_sqs}, step, hyper, active, nonfinite,
            inv_scale, clip_factor, clip_value, {&mu_product});
}

void asgd_step_cuda(const TensorList& params, const TensorList& grads, const TensorList& axs,
                    const Tensor& eta, const Tensor& mu, const Tensor& step, const Tensor& hyper,
                    const Maybe& active, const Maybe& nonfinite, const Maybe& inv_scale,
                    const Maybe& clip_factor, const Maybe& clip_value) {
  step_cuda(MB_RULE_ASGD, params, grads, {&axs}, step, hyper, active, nonfinite, inv_scale,
            clip_factor, clip_value, {&eta, &mu});
}

std::tuple<Tensor, Tensor> grad_stats_cuda(const TensorList& grads) {
  const GradStatsArgs args = checked_grad_stats_args(grads);
  const auto device = grads[0].device();
  const torch::stable::accelerator::DeviceGuard guard(grads[0].get_device_index());
  const auto empty = [&](const Ints& size, ScalarType dtype) {
    return torch::stable::empty(size, dtype, std::nullopt, device);
  };
  Tensor sq_norm = empty({args.num_models}, ScalarType::Double);
  Tensor nonfinite = empty({args.num_models}, ScalarType::Bool);
  if (args.num_models == 0) return {sq_norm, nonfinite};
  CudaTensors tensors;
  TensorList copies;
  Ints order;
  for (size_t i = 0; i < grads.size(); ++i) {
    mb_optim_cuda_tensor& to = tensors.emplace_back();
    to.numel = slice_numel_of(args.grads[i]);
    if (to.numel == 0) continue;
    // Always in the order of the indices, so that strides do not change the sum.
    row_major_order(args.grads[i], order);
    if (!describe_gradient(args.grads[i], order, to)) {
      copies.push_back(describe_copy(grads[i], order, to));
    }
  }
  const auto count = static_cast<int64_t>(tensors.size());
  const int64_t partials = mb_grad_stats_partials(args.dtype, tensors.data(), count);
  Tensor partial_sums = empty({args.num_models, partials}, ScalarType::Double);
  Tensor partial_flags = empty({args.num_models, partials}, ScalarType::Bool);
  STD_CUDA_CHECK(mb_grad_stats_cuda(args.dtype, args.num_models, tensors.data(), count,
                                    static_cast<double*>(partial_sums.mutable_data_ptr()),
                                    static_cast<uint8_t*>(partial_flags.mutable_data_ptr()),
                                    static_cast<double*>(sq_norm.mutable_data_ptr()),
                                    static_cast<uint8_t*>(nonfinite.mutable_data_ptr()),
                                    current_cuda_stream(grads[0].get_device_index())));
  return {sq_norm, nonfinite};
}

// On a GPU the flags are read from memory as fast with the sums as without.
Tensor nonfinite_cuda(const TensorList& tensors) { return std::get<1>(grad_stats_cuda(tensors)); }

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CUDA, m) {
  m.impl("sgd_step_", TORCH_BOX(&modelbatch::sgd_step_cuda));
  m.impl("adam_step_", TORCH_BOX(&modelbatch::adam_step_cuda<MB_RULE_ADAM>));
  m.impl("adamw_step_", TORCH_BOX(&modelbatch::adam_step_cuda<MB_RULE_ADAMW>));
  m.impl("rmsprop_step_", TORCH_BOX(&modelbatch::rmsprop_step_cuda));
  m.impl("adagrad_step_", TORCH_BOX(&modelbatch::adagrad_step_cuda));
  m.impl("adadelta_step_", TORCH_BOX(&modelbatch::two_state_step_cuda<MB_RULE_ADADELTA>));
  m.impl("adamax_step_", TORCH_BOX(&modelbatch::two_state_step_cuda<MB_RULE_ADAMAX>));
  m.impl("radam_step_", TORCH_BOX(&modelbatch::two_state_step_cuda<MB_RULE_RADAM>));
  m.impl("rprop_step_", TORCH_BOX(&modelbatch::two_state_step_cuda<MB_RULE_RPROP>));
  m.impl("nadam_step_", TORCH_BOX(&modelbatch::nadam_step_cuda));
  m.impl("asgd_step_", TORCH_BOX(&modelbatch::asgd_step_cuda));
  m.impl("grad_stats", TORCH_BOX(&modelbatch::grad_stats_cuda));
  m.impl("nonfinite", TORCH_BOX(&modelbatch::nonfinite_cuda));
}
