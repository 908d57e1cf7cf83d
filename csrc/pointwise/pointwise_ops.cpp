// modelbatch::tanh on the CPU: check, allocate, loop over chunks.
#include <torch/csrc/stable/library.h>

#include "common/dispatch.h"
#include "pointwise/pointwise.h"
#include "pointwise/pointwise_args.h"

MB_DECLARE_TABLE(mb_pointwise_kernels)

namespace modelbatch {
namespace {

// The fewest elements that are worth a thread.
constexpr int64_t kGrain = 16384;

const mb_pointwise_kernels& kernels() {
  static const mb_pointwise_kernels& table = MB_SELECT_TABLE(mb_pointwise_kernels);
  return table;
}

Tensor tanh_cpu(const Tensor& input) {
  const Tensor dense = checked_pointwise_input(input, "tanh");
  Tensor output = pointwise_output(dense);
  const float* x = dense.const_data_ptr<float>();
  float* y = output.mutable_data_ptr<float>();
  const mb_pointwise_fn kernel = kernels().tanh;
  torch::stable::parallel_for(0, dense.numel(), kGrain, [&](int64_t first, int64_t last) {
    kernel(x + first, y + first, last - first);
  });
  return output;
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) { m.impl("tanh", TORCH_BOX(&modelbatch::tanh_cpu)); }
