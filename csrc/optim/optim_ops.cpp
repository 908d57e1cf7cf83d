// One step of every model's optimizer on the CPU: check, plan, loop over models and slices.
//
// An element's update reads nothing but its own place and its model's coefficients, so no result
// depends on how the work is split.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "optim/coefficients.h"
#include "optim/optim_plan.h"

namespace modelbatch {
namespace {

constexpr int64_t state_bytes(int dtype) { return dtype == MB_OPTIM_F64 ? 8 : 4; }

// ---- what happens to a gradient -----------------------------------------------------------------

union Transform {
  mb_grad_transform_f32 f32;
  mb_grad_transform_f64 f64;
};

// ---- further numbers per model ------------------------------------------------------------------

double scalar(const OptimArgs& args, int which, int64_t model) {
  return args.wide_scalars[which] != nullptr ? args.wide_scalars[which][model]
                                             : static_cast<double>(args.scalars[which][model]);
}

void set_scalar(const OptimArgs& args, int which, int64_t model, double value) {
  if (args.wide_scalars[which] != nullptr) {
    args.wide_scalars[which][model] = value;
  } else {
    args.scalars[which][model] = static_cast<float>(value);
  }
}

// NAdam's product of the momenta up to step number `step`, from that of the step before.
double nadam_product(const OptimArgs& args, int64_t model, double step) {
  if (args.wide_scalars[0] != nullptr) {
    return mb_nadam_wide_mu_product(args.hyper, args.num_models, model, step,
                                    args.wide_scalars[0][model]);
  }
  return static_cast<double>(
      mb_nadam_mu_product(args.hyper, args.num_models, model, step, args.scalars[0][model]));
}

// ---- what a thread keeps ------------------------------------------------------------------------

// What a thread keeps from one unit to the next: what belongs to the models of a block.
struct Worker {
  int64_t first_row = -1;
  std::array<Coefficients, kOptimBlock> coefficients;
  std::array<Transform, kOptimBlock> transforms;
  mb_adam_correction correction{};  // of step 0: no model's
  std::unique_ptr<char[]> buffer;

  void take(const OptimArgs& args, const Ints& live, int64_t begin, int64_t end) {
    if (begin == first_row) return;
    first_row = begin;
    for (int64_t row = begin; row < end; ++row) {
      take_model(args, live[row], coefficients[row - begin], transforms[row - begin]);
    }
  }

 private:
  void take_model(const OptimArgs& args, int64_t model, Coefficients& to, Transform& transform) {
    const double step = static_cast<double>(args.step[model * args.step_stride] + 1.0f);
    const bool wide = args.dtype == MB_OPTIM_F64;
    const int64_t count = args.num_models;
    if (args.rule->id == MB_RULE_NADAM) {
      const mb_nadam_f64 c = mb_nadam_coefficients_with(args.hyper, count, model, step,
                                                        nadam_product(args, model, step));
      wide ? void(to.nadam_f64 = c) : void(to.nadam_f32 = mb_nadam_round_f32(c));
    } else if (args.rule->id == MB_RULE_ASGD) {
      const mb_asgd_f64 c =
          mb_asgd_coefficients(args.hyper, count, model, step, scalar(args, 0, model),
                               scalar(args, 1, model), args.wide_scalars[0] != nullptr);
      wide ? void(to.asgd_f64 = c) : void(to.asgd_f32 = mb_asgd_round_f32(c));
    } else {
      fill_coefficients(args.rule->id, args.hyper, count, model, step, wide, correction, to);
    }
    if (!args.transforms_grad()) return;
    const float inv_scale = args.inv_scale != nullptr ? args.inv_scale[model] : 1.0f;
    const double clip_factor = args.clip_factor != nullptr ? args.clip_factor[model] : 1.0;
    const double clip_value = args.clip_value != nullptr ? args.clip_value[model]
                                                         : std::numeric_limits<double>::infinity();
    if (wide) {
      transform.f64 = mb_make_grad_transform_f64(inv_scale, clip_factor, clip_value);
    } else {
      transform.f32 = mb_make_grad_transform_f32(inv_scale, clip_factor, clip_value);
    }
  }
};

// ---- one step -----------------------------------------------------------------------------------

struct EntryPlan {
  Slices param;
  std::array<Slices, MB_OPTIM_MAX_STATES> states;
  Gradient grad;
};

struct StepPlan {
  std::vector<EntryPlan> entries;
  std::vector<StridedLayout> layouts;
  Units units;
  WorkingCopies copies;
};

StepPlan planned_step(OptimArgs& args, const TensorList& params,
                      std::initializer_list<const TensorList*> states) {
  StepPlan plan;
  plan.entries.reserve(args.entries.size());
  Ints order;
  const int64_t bytes = kOptimBytes[args.dtype], wide_bytes = state_bytes(args.dtype);
  for (size_t i = 0; i < args.entries.size(); ++i) {
    OptimEntry& entry = args.entries[i];
    EntryPlan& to = plan.entries.emplace_back();
    plan.units.add(entry.slice_numel);
    if (entry.slice_numel == 0 || args.num_models == 0) continue;
    find_common_order(entry, params[i], states, i, order, plan.copies);
    to.param = Slices(entry.param, bytes);
    for (int state = 0; state < MB_OPTIM_MAX_STATES; ++state) {
      if (entry.states[state].data != nullptr) {
        to.states[state] = Slices(entry.states[state], wide_bytes);
      }
    }
    to.grad = planned_gradient(entry.grad, order, bytes, plan.layouts);
  }
  return plan;
}

// The models to update, in order.
Ints live_models(const OptimArgs& args) {
  Ints live;
  live.reserve(args.num_models);
  for (int64_t model = 0; model < args.num_models; ++model) {
    const bool is_live = (args.active == nullptr || args.active[model]) &&
                         (args.nonfinite == nullptr || !args.nonfinite[model]);
    if (is_live) live.push_back(model);
  }
  return live;
}

// What changes once per model, after its parameters.
void count_step(const OptimArgs& args, int64_t model) {
  const double* hyper = args.hyper;
  const int64_t count = args.num_models;
  float& done = args.step[model * args.step_stride];
  if (args.rule->id == MB_RULE_SGD && !mb_sgd_counts_step(hyper, count, model)) return;
  done += 1.0f;
  const double step = static_cast<double>(done);
  if (args.rule->id == MB_RULE_NADAM) {
    set_scalar(args, 0, model, nadam_product(args, model, step));
  } else if (args.rule->id == MB_RULE_ASGD) {
    set_scalar(args, 0, model, mb_asgd_next_eta(hyper, count, model, step));
    set_scalar(args, 1, model, mb_asgd_next_mu(hyper, count, model, step));
  }
}

void step_cpu(mb_optim_rule rule, const TensorList& params, const TensorList& grads,
              std::initializer_list<const TensorList*> states, const Tensor& step,
              const Tensor& hyper, const std::optional<Tensor>& active,
              const std::optional<Tensor>& nonfinite, const std::optional<Tensor>& inv_scale,
              const std::optional<Tensor>& clip_factor, const std::optional<Tensor>& clip_value,
              std::initializer_list<const Tensor*> scalars = {}) {
  OptimArgs args =
      checked_optim_args(rule, params, grads, states, step, hyper, active, nonfinite, inv_scale,
                         clip_factor, clip_value, scalars, /*may_be_wide=*/true);
  check_states_asked_for(args);
  StepPlan plan = planned_step(args, params, states);
  const Ints live = live_models(args);
  const mb_optim_update_fn update = optim_kernels().update[rule][args.dtype];
  const int64_t bytes = kOptimBytes[args.dtype], wide_bytes = state_bytes(args.dtype);
  const bool transforms = args.transforms_grad();
  const auto body = [&](Worker& worker, int64_t begin, int64_t end, int64_t, const Unit& unit) {
    worker.take(args, live, begin, end);
    const EntryPlan& entry = plan.entries[unit.tensor];
    std::array<void*, MB_OPTIM_MAX_STATES> state{};
    for (int64_t row = begin; row < end; ++row) {
      const int64_t model = live[row];
      for (int i = 0; i < MB_OPTIM_MAX_STATES; ++i) {
        if (entry.states[i].data != nullptr) {
          state[i] = entry.states[i].of(model) + unit.begin * wide_bytes;
        }
      }
      update(&worker.coefficients[row - begin],
             transforms ? &worker.transforms[row - begin] : nullptr,
             entry.param.of(model) + unit.begin * bytes,
             dense_gradient(entry.grad, plan.layouts, model, unit, args.dtype, worker.buffer),
             state.data(), unit.end - unit.begin);
    }
  };
  for_each_unit(static_cast<int64_t>(live.size()), plan.units, [] { return Worker(); }, body);
  for (int64_t model : live) count_step(args, model);
  write_back(plan.copies);
}

using Maybe = std::optional<Tensor>;

void sgd_step_cpu(const TensorList& params, const TensorList& grads,
                  const TensorList& momentum_buffers, const Tensor& step, const Tensor& hyper,
                  const Maybe& active, const Maybe& nonfinite, const Maybe& inv_scale,
                  const Maybe& clip_factor, const Maybe& clip_value) {
  step_cpu(MB_RULE_SGD, params, grads, {&momentum_buffers}, step, hyper, active, nonfinite,
           inv_scale, clip_factor, clip_value);
}

template <mb_optim_rule rule>
void adam_step_cpu(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                   const TensorList& exp_avg_sqs, const TensorList& max_exp_avg_sqs,
                   const Tensor& step, const Tensor& hyper, const Maybe& active,
                   const Maybe& nonfinite, const Maybe& inv_scale, const Maybe& clip_factor,
                   const Maybe& clip_value) {
  step_cpu(rule, params, grads, {&exp_avgs, &exp_avg_sqs, &max_exp_avg_sqs}, step, hyper, active,
           nonfinite, inv_scale, clip_factor, clip_value);
}

void rmsprop_step_cpu(const TensorList& params, const TensorList& grads,
                      const TensorList& square_avgs, const TensorList& grad_avgs,
                      const TensorList& momentum_buffers, const Tensor& step, const Tensor& hyper,
                      const Maybe& active, const Maybe& nonfinite, const Maybe& inv_scale,
                      const Maybe& clip_factor, const Maybe& clip_value) {
  step_cpu(MB_RULE_RMSPROP, params, grads, {&square_avgs, &grad_avgs, &momentum_buffers}, step,
           hyper, active, nonfinite, inv_scale, clip_factor, clip_value);
}

void adagrad_step_cpu(const TensorList& params, const TensorList& grads, const TensorList& sums,
                      const Tensor& step, const Tensor& hyper, const Maybe& active,
                      const Maybe& nonfinite, const Maybe& inv_scale, const Maybe& clip_factor,
                      const Maybe& clip_value) {
  step_cpu(MB_RULE_ADAGRAD, params, grads, {&sums}, step, hyper, active, nonfinite, inv_scale,
           clip_factor, clip_value);
}

// Rules with two states that every model needs.
template <mb_optim_rule rule>
void two_state_step_cpu(const TensorList& params, const TensorList& grads, const TensorList& first,
                        const TensorList& second, const Tensor& step, const Tensor& hyper,
                        const Maybe& active, const Maybe& nonfinite, const Maybe& inv_scale,
                        const Maybe& clip_factor, const Maybe& clip_value) {
  step_cpu(rule, params, grads, {&first, &second}, step, hyper, active, nonfinite, inv_scale,
           clip_factor, clip_value);
}

void nadam_step_cpu(const TensorList& params, const TensorList& grads, const TensorList& exp_avgs,
                    const TensorList& exp_avg_sqs, const Tensor& mu_product, const Tensor& step,
                    const Tensor& hyper, const Maybe& active, const Maybe& nonfinite,
                    const Maybe& inv_scale, const Maybe& clip_factor, const Maybe& clip_value) {
  step_cpu(MB_RULE_NADAM, params, grads, {&exp_avgs, &exp_avg_sqs}, step, hyper, active, nonfinite,
           inv_scale, clip_factor, clip_value, {&mu_product});
}

void asgd_step_cpu(const TensorList& params, const TensorList& grads, const TensorList& axs,
                   const Tensor& eta, const Tensor& mu, const Tensor& step, const Tensor& hyper,
                   const Maybe& active, const Maybe& nonfinite, const Maybe& inv_scale,
                   const Maybe& clip_factor, const Maybe& clip_value) {
  step_cpu(MB_RULE_ASGD, params, grads, {&axs}, step, hyper, active, nonfinite, inv_scale,
           clip_factor, clip_value, {&eta, &mu});
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("nadam_step_", TORCH_BOX(&modelbatch::nadam_step_cpu));
  m.impl("asgd_step_", TORCH_BOX(&modelbatch::asgd_step_cpu));
  m.impl("sgd_step_", TORCH_BOX(&modelbatch::sgd_step_cpu));
  m.impl("adam_step_", TORCH_BOX(&modelbatch::adam_step_cpu<MB_RULE_ADAM>));
  m.impl("adamw_step_", TORCH_BOX(&modelbatch::adam_step_cpu<MB_RULE_ADAMW>));
  m.impl("rmsprop_step_", TORCH_BOX(&modelbatch::rmsprop_step_cpu));
  m.impl("adagrad_step_", TORCH_BOX(&modelbatch::adagrad_step_cpu));
  m.impl("adadelta_step_", TORCH_BOX(&modelbatch::two_state_step_cpu<MB_RULE_ADADELTA>));
  m.impl("adamax_step_", TORCH_BOX(&modelbatch::two_state_step_cpu<MB_RULE_ADAMAX>));
  m.impl("radam_step_", TORCH_BOX(&modelbatch::two_state_step_cpu<MB_RULE_RADAM>));
  m.impl("rprop_step_", TORCH_BOX(&modelbatch::two_state_step_cpu<MB_RULE_RPROP>));
}
