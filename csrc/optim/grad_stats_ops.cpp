// modelbatch::grad_stats on the CPU: every model's squared gradient norm, and whether it is finite.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "optim/optim_plan.h"

namespace modelbatch {
namespace {

// Elements are added in the order of their indices, whatever their strides: lane by lane within
// units, unit by unit within tensors, tensor by tensor.
std::tuple<Tensor, Tensor> grad_stats_cpu(const TensorList& grads) {
  const GradStatsArgs args = checked_grad_stats_args(grads);
  std::vector<Gradient> gradients;
  std::vector<StridedLayout> layouts;
  Units units;
  Ints order;
  for (const StackedTensor& grad : args.grads) {
    units.add(slice_numel_of(grad));
    row_major_order(grad, order);
    gradients.push_back(planned_gradient(grad, order, kOptimBytes[args.dtype], layouts));
  }
  const int64_t num_models = args.num_models, count = units.count();
  std::vector<double> sums(num_models * count);
  std::vector<int> flags(num_models * count);
  const mb_optim_sum_squares_fn sum_squares = optim_kernels().sum_squares[args.dtype];
  const auto body = [&](std::unique_ptr<char[]>& buffer, int64_t begin, int64_t end, int64_t index,
                        const Unit& unit) {
    for (int64_t model = begin; model < end; ++model) {
      const void* grad =
          dense_gradient(gradients[unit.tensor], layouts, model, unit, args.dtype, buffer);
      const int64_t at = model * count + index;
      sums[at] = sum_squares(grad, unit.end - unit.begin, &flags[at]);
    }
  };
  for_each_unit(num_models, units, [] { return std::unique_ptr<char[]>(); }, body);
  const auto device = grads[0].device();
  Tensor sq_norm = torch::stable::empty({num_models}, ScalarType::Double, std::nullopt, device);
  Tensor nonfinite = torch::stable::empty({num_models}, ScalarType::Bool, std::nullopt, device);
  double* total = static_cast<double*>(sq_norm.mutable_data_ptr());
  bool* flag = static_cast<bool*>(nonfinite.mutable_data_ptr());
  for (int64_t model = 0; model < num_models; ++model) {
    total[model] = 0.0;
    flag[model] = false;
    for (int64_t index = model * count; index < (model + 1) * count; ++index) {
      total[model] += sums[index];
      flag[model] |= flags[index] != 0;
    }
  }
  return {sq_norm, nonfinite};
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("grad_stats", TORCH_BOX(&modelbatch::grad_stats_cpu));
}
