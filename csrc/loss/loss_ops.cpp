// modelbatch::cross_entropy on the CPU: check, allocate, one model after another on each thread.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "loss/loss_args.h"

MB_DECLARE_TABLE(mb_loss_kernels)

namespace modelbatch {
namespace {

// The fewest logits that are worth a thread.
constexpr int64_t kGrain = 16384;

const mb_loss_kernels& kernels() {
  static const mb_loss_kernels& table = MB_SELECT_TABLE(mb_loss_kernels);
  return table;
}

void check_labels(const ClassLoss& loss, int64_t ignore_index) {
  const int64_t* target = loss.target.const_data_ptr<int64_t>();
  const int64_t lists = loss.target_stride == 0 ? 1 : loss.num_models;
  for (int64_t i = 0; i < lists * loss.rows; ++i) {
    MB_CHECK((target[i] >= 0 && target[i] < loss.classes) || target[i] == ignore_index,
             "modelbatch::cross_entropy: target ", target[i], " of sample ", i % loss.rows,
             lists == 1 ? "" : " of model ", lists == 1 ? "" : std::to_string(i / loss.rows),
             " is not one of the ", loss.classes, " classes");
  }
}

std::tuple<Tensor, Tensor> cross_entropy_cpu(const Tensor& logits, const Tensor& target,
                                             int64_t ignore_index, bool need_slope) {
  const ClassLoss loss = checked_class_loss(logits, target);
  check_labels(loss, ignore_index);
  ClassLossResult result = class_loss_result(loss, need_slope);
  const int64_t per_model = loss.rows * loss.classes;
  const int64_t bytes = static_cast<int64_t>(logits.element_size());
  const char* x = static_cast<const char*>(loss.logits.const_data_ptr());
  const int64_t* labels = loss.target.const_data_ptr<int64_t>();
  char* slope = need_slope ? static_cast<char*>(result.slope.mutable_data_ptr()) : nullptr;
  void* losses = result.losses.mutable_data_ptr();
  const mb_cross_entropy_fn kernel = kernels().cross_entropy[loss.dtype];
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(per_model, 1));
  torch::stable::parallel_for(0, loss.num_models, grain, [&](int64_t first, int64_t last) {
    std::vector<double> work(need_slope ? 0 : MB_LOSS_ROWS * loss.classes);
    for (int64_t model = first; model < last; ++model) {
      const int64_t offset = model * per_model * bytes;
      const double value = kernel(x + offset, labels + model * loss.target_stride,
                                  need_slope ? slope + offset : nullptr, work.data(), loss.rows,
                                  loss.classes, ignore_index);
      if (loss.dtype == MB_LOSS_F32) {
        static_cast<float*>(losses)[model] = static_cast<float>(value);
      } else {
        static_cast<double*>(losses)[model] = value;
      }
    }
  });
  return {result.losses, result.slope};
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("cross_entropy", TORCH_BOX(&modelbatch::cross_entropy_cpu));
}
