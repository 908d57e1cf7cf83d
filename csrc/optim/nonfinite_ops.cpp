// modelbatch::nonfinite on the CPU: which models have an infinite or NaN element anywhere.
#include <torch/csrc/stable/library.h>

#include "optim/optim_plan.h"

namespace modelbatch {
namespace {

Tensor nonfinite_cpu(const TensorList& tensors) {
  const GradStatsArgs args = checked_grad_stats_args(tensors);
  std::vector<Gradient> plans;
  std::vector<StridedLayout> layouts;
  Units units;
  Ints order;
  for (const StackedTensor& tensor : args.grads) {
    units.add(slice_numel_of(tensor));
    // In whatever order lies dense in memory: the order does not matter here.
    row_major_order(tensor, order);
    if (!is_dense(tensor, order)) memory_order(tensor, order);
    plans.push_back(planned_gradient(tensor, order, kOptimBytes[args.dtype], layouts));
  }
  const int64_t num_models = args.num_models, count = units.count();
  std::vector<unsigned char> flags(num_models * count);
  const mb_optim_nonfinite_fn nonfinite = optim_kernels().nonfinite[args.dtype];
  const auto body = [&](std::unique_ptr<char[]>& buffer, int64_t begin, int64_t end, int64_t index,
                        const Unit& unit) {
    for (int64_t model = begin; model < end; ++model) {
      const void* data =
          dense_gradient(plans[unit.tensor], layouts, model, unit, args.dtype, buffer);
      flags[model * count + index] = nonfinite(data, unit.end - unit.begin) != 0;
    }
  };
  for_each_unit(num_models, units, [] { return std::unique_ptr<char[]>(); }, body);
  Tensor result =
      torch::stable::empty({num_models}, ScalarType::Bool, std::nullopt, tensors[0].device());
  bool* flag = static_cast<bool*>(result.mutable_data_ptr());
  for (int64_t model = 0; model < num_models; ++model) {
    const auto first = flags.begin() + model * count;
    flag[model] = std::any_of(first, first + count, [](unsigned char own) { return own != 0; });
  }
  return result;
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("nonfinite", TORCH_BOX(&modelbatch::nonfinite_cpu));
}
