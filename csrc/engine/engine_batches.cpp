// Inputs, targets and sample weights in the lanes of the kernels.
#include "engine/engine_batches.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "common/dispatch.h"

MB_DECLARE_TABLE(mb_optim_kernels)

namespace modelbatch {

EngineBatches::EngineBatches(const EngineArgs& args, const EnginePlan& plan,
                             const mb_engine_kernels& kernels)
    : args_(args),
      plan_(plan),
      kernels_(kernels),
      dtype_(args.is_double ? MB_ENGINE_F64 : MB_ENGINE_F32),
      bytes_(args.element_bytes()),
      features_(args.program.values[0].features()),
      target_features_(args.program.has_classes() ? 1 : args.program.out().features()) {
  const bool weighs = args.weight.data != nullptr;
  shares_weight_ = !weighs || args.weight.is_shared;
  shares_target_ = args.target.is_shared && (shares_weight_ || !args.program.has_classes());
  shares_x_ = args.x.is_shared && !args.program.embeds();
  if (weighs) {
    const int64_t rows = args.num_steps * (args.weight.is_shared ? 1 : args.num_models);
    const double* w = reinterpret_cast<const double*>(args.weight.data);
    weight_sums_.resize(rows);
    for (int64_t row = 0; row < rows; ++row) {
      double sum = 0;
      for (int64_t b = 0; b < args.batch; ++b) sum += w[row * args.batch + b];
      weight_sums_[row] = sum;
    }
  }
  prepare_shared();
}

bool EngineBatches::has_samples(int64_t step, int64_t model) const {
  if (weight_sums_.empty()) return true;
  return weight_sums_[shares_weight_ ? step : step * args_.num_models + model] != 0;
}

void EngineBatches::prepare_shared() {
  const int64_t padded = plan_.plan.padded, steps = args_.num_steps;
  if (shares_weight_) {
    const int64_t count = args_.weight.data == nullptr ? 1 : steps;
    weight_ = AlignedBuffer(count * padded * bytes_);
    for (int64_t k = 0; k < count; ++k) {
      lane_weights(args_.weights(k, 0), part(weight_, k, padded));
    }
  }
  if (shares_target_) {
    target_ = AlignedBuffer(steps * target_features_ * padded * bytes_);
    for (int64_t k = 0; k < steps; ++k) {
      target_panels(k, 0, part(target_, k, target_features_ * padded));
    }
  }
  if (!shares_x_) return;
  if (args_.weight.data != nullptr) {
    const mb_optim_kernels& table = MB_SELECT_TABLE(mb_optim_kernels);
    for (int64_t k = 0; k < steps; ++k) {
      has_nonfinite_.push_back(table.nonfinite[dtype_](args_.x.of(k, 0), args_.batch * features_) !=
                               0);
    }
  }
  if (!plan_.reads_panels) return;
  x_ = AlignedBuffer(steps * features_ * padded * bytes_);
  const int64_t grain = std::max<int64_t>(1, 65536 / (features_ * padded));
  torch::stable::parallel_for(0, steps, grain, [&](int64_t first, int64_t last) {
    for (int64_t k = first; k < last; ++k) {
      kernels_.panels[dtype_](args_.x.of(k, 0), nullptr, args_.batch, features_,
                              part(x_, k, features_ * padded));
    }
  });
}

// For each sample itself or, if it has weight 0, the first one that has weight, as
// modelbatch/weights.py fills a batch. Whether that changes anything.
bool EngineBatches::sources(const double* weights, std::vector<int64_t>& source) const {
  if (weights == nullptr) return false;
  const double* end = weights + args_.batch;
  const int64_t used = std::find_if(weights, end, [](double w) { return w != 0; }) - weights;
  bool changes = false;
  source.resize(args_.batch);
  for (int64_t b = 0; b < args_.batch; ++b) {
    source[b] = weights[b] != 0 ? b : used;
    changes |= source[b] != b;
  }
  return changes;
}

void EngineBatches::lane_weights(const double* weights, char* to) const {
  for (int64_t b = 0; b < plan_.plan.padded; ++b) {
    const double w = b >= args_.batch ? 0.0 : weights == nullptr ? 1.0 : weights[b];
    if (args_.is_double) {
      reinterpret_cast<double*>(to)[b] = w;
    } else {
      reinterpret_cast<float*>(to)[b] = static_cast<float>(w);
    }
  }
}

void EngineBatches::target_panels(int64_t step, int64_t model, char* to) const {
  const char* from = args_.target.of(step, model);
  if (args_.program.has_classes()) {
    kernels_.labels[dtype_](reinterpret_cast<const int64_t*>(from), args_.weights(step, model),
                            args_.batch, plan_.plan.padded,
                            args_.program.loss_parameters[MB_LOSS_IGNORE_INDEX], to);
  } else {
    kernels_.panels[dtype_](from, nullptr, args_.batch, target_features_, to);
  }
}

void EngineBatches::prepare(int64_t step, int64_t model, EngineThread& own,
                            mb_engine_model& to) const {
  const int64_t padded = plan_.plan.padded;
  char* workspace = own.workspace.data();
  const double* weights = args_.weights(step, model);
  to.sample_weight = weights;
  to.weight_sum = weights == nullptr ? static_cast<double>(args_.batch)
                  : shares_weight_   ? weight_sums_[step]
                                     : weight_sums_[step * args_.num_models + model];
  if (shares_weight_) {
    to.lane_weight = part(weight_, weights == nullptr ? 0 : step, padded);
  } else {
    char* place = workspace + plan_.lane_weight * bytes_;
    lane_weights(weights, place);
    to.lane_weight = place;
  }
  if (shares_target_) {
    to.target_panels = part(target_, step, target_features_ * padded);
  } else {
    char* place = workspace + plan_.target * bytes_;
    target_panels(step, model, place);
    to.target_panels = place;
  }
  const char* x = args_.x.of(step, model);
  if (args_.program.embeds()) {
    to.x_index = reinterpret_cast<const int64_t*>(x);
    if (sources(weights, own.source)) {
      own.index.resize(args_.batch * features_);
      for (int64_t b = 0; b < args_.batch; ++b) {
        std::copy_n(to.x_index + own.source[b] * features_, features_,
                    own.index.data() + b * features_);
      }
      to.x_index = own.index.data();
    }
    return;
  }
  const bool may_spill = weights != nullptr && (!shares_x_ || has_nonfinite_[step]);
  const bool fills = may_spill && sources(weights, own.source);
  to.x_rows = x;
  if (fills && plan_.reads_rows) {
    char* place = workspace + plan_.x_rows * bytes_;
    const int64_t row = features_ * bytes_;
    for (int64_t b = 0; b < args_.batch; ++b) {
      std::memcpy(place + b * row, x + own.source[b] * row, static_cast<size_t>(row));
    }
    to.x_rows = place;
  }
  if (!plan_.reads_panels) return;
  if (shares_x_ && !fills) {
    to.x_panels = part(x_, step, features_ * padded);
  } else {
    char* place = workspace + plan_.x_panels * bytes_;
    kernels_.panels[dtype_](x, fills ? own.source.data() : nullptr, args_.batch, features_, place);
    to.x_panels = place;
  }
}

}  // namespace modelbatch
