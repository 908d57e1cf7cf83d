// The optimizer operators on the CPU: check, plan, loop over models and slices.
//
// An element's update reads nothing but its own place and its model's coefficients, and sums of
// squares are taken over fixed ranges, so no result depends on how the work is split.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <memory>
#include <tuple>

#include "common/dispatch.h"
#include "optim/optim_args.h"
#include "optim/rules.h"

MB_DECLARE_TABLE(mb_optim_kernels)

namespace modelbatch {
namespace {

// A model's elements per unit of work, and the fewest elements that are worth a thread.
constexpr int64_t kUnit = 8192;
constexpr int64_t kGrain = 16384;

// The most models that are worked on together.
constexpr int64_t kMaxBlock = 16;

const mb_optim_kernels& kernels() {
  static const mb_optim_kernels& table = MB_SELECT_TABLE(mb_optim_kernels);
  return table;
}

constexpr std::array<int64_t, MB_OPTIM_DTYPES> kBytes = {4, 8, 2, 2};
constexpr int64_t state_bytes(int dtype) { return dtype == MB_OPTIM_F64 ? 8 : 4; }

// ---- memory layouts -----------------------------------------------------------------------------

using Ints = std::vector<int64_t>;

// The slice's dimensions longer than 1, outermost in memory first.
void memory_order(const StackedTensor& tensor, Ints& order) {
  order.clear();
  for (int64_t dim = 1; dim < tensor.dims; ++dim) {
    if (tensor.sizes[dim] == 1) continue;
    order.push_back(dim);
    for (size_t at = order.size() - 1; at > 0; --at) {
      if (tensor.strides[order[at - 1]] >= tensor.strides[dim]) break;
      std::swap(order[at - 1], order[at]);
    }
  }
}

void row_major_order(const StackedTensor& tensor, Ints& order) {
  order.clear();
  for (int64_t dim = 1; dim < tensor.dims; ++dim) {
    if (tensor.sizes[dim] != 1) order.push_back(dim);
  }
}

// Whether the slice is one run of memory in that order of its dimensions.
bool is_dense(const StackedTensor& tensor, const Ints& order) {
  int64_t expected = 1;
  for (size_t at = order.size(); at-- > 0;) {
    if (tensor.strides[order[at]] != expected) return false;
    expected *= tensor.sizes[order[at]];
  }
  return true;
}

// How a slice that is not dense in that order is gathered.
struct Layout {
  Ints sizes, strides;

  Layout(const StackedTensor& tensor, const Ints& order) {
    for (int64_t dim : order) {
      const int64_t size = tensor.sizes[dim], stride = tensor.strides[dim];
      if (!sizes.empty() && strides.back() == stride * size) {
        sizes.back() *= size;
        strides.back() = stride;
      } else {
        sizes.push_back(size);
        strides.push_back(stride);
      }
    }
  }
  mb_optim_layout view() const {
    return {static_cast<int64_t>(sizes.size()), sizes.data(), strides.data()};
  }
};

// A tensor as the kernels see it: the bytes where model 0's slice begins and from one model's slice
// to the next.
struct Slices {
  char* data = nullptr;
  int64_t step = 0;

  Slices() = default;
  Slices(const StackedTensor& tensor, int64_t element_bytes)
      : data(static_cast<char*>(tensor.data)),
        step(tensor.dims > 0 ? tensor.strides[0] * element_bytes : 0) {}
  char* of(int64_t model) const { return data + model * step; }
};

struct Gradient {
  Slices slices;
  int64_t layout = -1;  // index of the layout to gather by, or -1: dense
};

Gradient planned_gradient(const StackedTensor& grad, const Ints& order, int64_t bytes,
                          std::vector<Layout>& layouts) {
  Gradient plan;
  plan.slices = Slices(grad, bytes);
  if (!is_dense(grad, order)) {
    plan.layout = static_cast<int64_t>(layouts.size());
    layouts.emplace_back(grad, order);
  }
  return plan;
}

// The units of all tensors of one model, one after the other.
struct Unit {
  int64_t tensor, begin, end;
};

class Units {
 public:
  void add(int64_t slice_numel) {
    numel_.push_back(slice_numel);
    first_.push_back(count_);
    count_ += (slice_numel + kUnit - 1) / kUnit;
    total_numel_ += slice_numel;
  }
  int64_t count() const { return count_; }
  int64_t total_numel() const { return total_numel_; }
  Unit at(int64_t unit) const {
    const auto after = std::upper_bound(first_.begin(), first_.end(), unit);
    Unit found{after - first_.begin() - 1, 0, 0};
    found.begin = (unit - first_[found.tensor]) * kUnit;
    found.end = std::min(found.begin + kUnit, numel_[found.tensor]);
    return found;
  }
  // The unit after `unit`, which is not the last one.
  Unit after(Unit unit) const {
    if (unit.end < numel_[unit.tensor]) {
      unit.begin = unit.end;
    } else {
      do ++unit.tensor;
      while (numel_[unit.tensor] == 0);
      unit.begin = 0;
    }
    unit.end = std::min(unit.begin + kUnit, numel_[unit.tensor]);
    return unit;
  }

 private:
  Ints numel_, first_;
  int64_t count_ = 0, total_numel_ = 0;
};

// How many models make a block.
int64_t block_of(const Units& units) {
  return std::clamp<int64_t>(kUnit / units.total_numel(), 1, kMaxBlock);
}

// Models follow one another in memory, tensor by tensor. So the models of a small network are taken
// in blocks, and within a block tensor by tensor: few and long runs of memory instead of many short
// ones.
//
// body(own, begin, end, index, unit) is called for unit number `index` of the rows (models) begin
// to end - 1, a block or, at the end, less; open() makes what each thread needs of its own.
template <class Open, class Body>
void for_each_unit(int64_t rows, const Units& units, const Open& open, const Body& body) {
  const int64_t count = units.count();
  if (rows == 0 || count == 0) return;
  const int64_t block = block_of(units);
  const int64_t blocks = (rows + block - 1) / block;
  const int64_t grain = std::max<int64_t>(1, kGrain * count / (units.total_numel() * block));
  torch::stable::parallel_for(0, blocks * count, grain, [&](int64_t first, int64_t last) {
    auto own = open();
    int64_t begin = first / count * block, index = first % count;
    Unit unit = units.at(index);
    for (int64_t task = first; task < last; ++task) {
      body(own, begin, std::min(begin + block, rows), index, unit);
      if (task + 1 == last) break;
      if (++index == count) {
        index = 0;
        begin += block;
        unit = units.at(0);
      } else {
        unit = units.after(unit);
      }
    }
  });
}

// The gradient's elements of a unit as a dense run, gathered into `buffer` where it is not.
const void* dense_gradient(const Gradient& grad, const std::vector<Layout>& layouts, int64_t model,
                           const Unit& unit, int dtype, std::unique_ptr<char[]>& buffer) {
  const char* slice = grad.slices.of(model);
  if (grad.layout < 0) return slice + unit.begin * kBytes[dtype];
  if (buffer == nullptr) buffer.reset(new char[kUnit * kBytes[dtype]]);
  const mb_optim_layout layout = layouts[grad.layout].view();
  kernels().gather[dtype](buffer.get(), slice, &layout, unit.begin, unit.end);
  return buffer.get();
}

// ---- coefficients -------------------------------------------------------------------------------

// A model's coefficients, in the type of the arithmetic, as the kernels read them.
union Coefficients {
  mb_sgd_f32 sgd_f32;
  mb_sgd_f64 sgd_f64;
  mb_adam_f32 adam_f32;
  mb_adam_f64 adam_f64;
  mb_rmsprop_f32 rmsprop_f32;
  mb_rmsprop_f64 rmsprop_f64;
  mb_adagrad_f32 adagrad_f32;
  mb_adagrad_f64 adagrad_f64;
};

union Transform {
  mb_grad_transform_f32 f32;
  mb_grad_transform_f64 f64;
};

// What a thread keeps from one unit to the next: what belongs to the models of a block.
struct Worker {
  int64_t first_row = -1;
  std::array<Coefficients, kMaxBlock> coefficients;
  std::array<Transform, kMaxBlock> transforms;
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
    switch (args.rule->id) {
      case MB_RULE_SGD: {
        const mb_sgd_f64 c = mb_sgd_coefficients(args.hyper, count, model, step);
        wide ? void(to.sgd_f64 = c) : void(to.sgd_f32 = mb_sgd_round_f32(c));
        break;
      }
      case MB_RULE_ADAM:
      case MB_RULE_ADAMW: {
        const double beta1 = args.hyper[MB_ADAM_BETA1 * count + model];
        const double beta2 = args.hyper[MB_ADAM_BETA2 * count + model];
        if (correction.step != step || correction.beta1 != beta1 || correction.beta2 != beta2) {
          correction = mb_make_adam_correction(beta1, beta2, step);
        }
        const mb_adam_f64 c = mb_adam_coefficients_with(args.hyper, count, model, &correction,
                                                        args.rule->id == MB_RULE_ADAMW);
        wide ? void(to.adam_f64 = c) : void(to.adam_f32 = mb_adam_round_f32(c));
        break;
      }
      case MB_RULE_RMSPROP: {
        const mb_rmsprop_f64 c = mb_rmsprop_coefficients(args.hyper, count, model, step);
        wide ? void(to.rmsprop_f64 = c) : void(to.rmsprop_f32 = mb_rmsprop_round_f32(c));
        break;
      }
      default: {
        const mb_adagrad_f64 c = mb_adagrad_coefficients(args.hyper, count, model, step);
        wide ? void(to.adagrad_f64 = c) : void(to.adagrad_f32 = mb_adagrad_round_f32(c));
      }
    }
    if (!args.transforms_grad()) return;
    const float inv_scale = args.inv_scale != nullptr ? args.inv_scale[model] : 1.0f;
    const float clip_factor = args.clip_factor != nullptr ? args.clip_factor[model] : 1.0f;
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
  std::vector<Layout> layouts;
  Units units;
  // Tensors of unusual strides are worked on as contiguous copies: (tensor, copy).
  std::vector<std::pair<Tensor, Tensor>> copies;
};

bool same_order(const StackedTensor& a, const StackedTensor& b, const Ints& order) {
  return std::all_of(order.begin(), order.end(),
                     [&](int64_t dim) { return a.strides[dim] == b.strides[dim]; });
}

// The tensor, or a contiguous copy that is written back after the step.
StackedTensor contiguous_or_copy(const Tensor& tensor, const StackedTensor& stacked,
                                 const Ints& row_major, StepPlan& plan) {
  if (is_dense(stacked, row_major)) return stacked;
  plan.copies.emplace_back(tensor, torch::stable::contiguous(tensor));
  return read_stacked(plan.copies.back().second, true);
}

StepPlan planned_step(OptimArgs& args, const TensorList& params,
                      std::initializer_list<const TensorList*> states) {
  StepPlan plan;
  plan.entries.reserve(args.entries.size());
  Ints order;
  const int64_t bytes = kBytes[args.dtype], wide_bytes = state_bytes(args.dtype);
  for (size_t i = 0; i < args.entries.size(); ++i) {
    OptimEntry& entry = args.entries[i];
    EntryPlan& to = plan.entries.emplace_back();
    plan.units.add(entry.slice_numel);
    if (entry.slice_numel == 0 || args.num_models == 0) continue;
    row_major_order(entry.param, order);
    if (!is_dense(entry.param, order)) memory_order(entry.param, order);
    bool is_usual = is_dense(entry.param, order);
    for (const StackedTensor& state : entry.states) {
      is_usual = is_usual && (state.data == nullptr || same_order(state, entry.param, order));
    }
    if (!is_usual) {
      row_major_order(entry.param, order);
      entry.param = contiguous_or_copy(params[i], entry.param, order, plan);
      int index = 0;
      for (const TensorList* list : states) {
        StackedTensor& state = entry.states[index++];
        if (state.data != nullptr) state = contiguous_or_copy((*list)[i], state, order, plan);
      }
    }
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

void step_cpu(mb_optim_rule rule, const TensorList& params, const TensorList& grads,
              std::initializer_list<const TensorList*> states, const Tensor& step,
              const Tensor& hyper, const std::optional<Tensor>& active,
              const std::optional<Tensor>& nonfinite, const std::optional<Tensor>& inv_scale,
              const std::optional<Tensor>& clip_factor, const std::optional<Tensor>& clip_value) {
  OptimArgs args = checked_optim_args(rule, params, grads, states, step, hyper, active, nonfinite,
                                      inv_scale, clip_factor, clip_value);
  check_states_asked_for(args);
  StepPlan plan = planned_step(args, params, states);
  const Ints live = live_models(args);
  const mb_optim_update_fn update = kernels().update[rule][args.dtype];
  const int64_t bytes = kBytes[args.dtype], wide_bytes = state_bytes(args.dtype);
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
  for (int64_t model : live) {
    if (rule != MB_RULE_SGD || mb_sgd_counts_step(args.hyper, args.num_models, model)) {
      args.step[model * args.step_stride] += 1.0f;
    }
  }
  for (const auto& [tensor, copy] : plan.copies) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(tensor.get(), copy.get(), 0));
  }
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

// ---- statistics of gradients --------------------------------------------------------------------

// Elements are added in the order of their indices, whatever their strides: lane by lane within
// units, unit by unit within tensors, tensor by tensor.
std::tuple<Tensor, Tensor> grad_stats_cpu(const TensorList& grads) {
  const GradStatsArgs args = checked_grad_stats_args(grads);
  std::vector<Gradient> gradients;
  std::vector<Layout> layouts;
  Units units;
  Ints order;
  for (const StackedTensor& grad : args.grads) {
    int64_t slice_numel = 1;
    for (int64_t dim = 1; dim < grad.dims; ++dim) slice_numel *= grad.sizes[dim];
    units.add(slice_numel);
    row_major_order(grad, order);
    gradients.push_back(planned_gradient(grad, order, kBytes[args.dtype], layouts));
  }
  const int64_t num_models = args.num_models, count = units.count();
  std::vector<double> sums(num_models * count);
  std::vector<int> flags(num_models * count);
  const mb_optim_sum_squares_fn sum_squares = kernels().sum_squares[args.dtype];
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
  m.impl("sgd_step_", TORCH_BOX(&modelbatch::sgd_step_cpu));
  m.impl("adam_step_", TORCH_BOX(&modelbatch::adam_step_cpu<MB_RULE_ADAM>));
  m.impl("adamw_step_", TORCH_BOX(&modelbatch::adam_step_cpu<MB_RULE_ADAMW>));
  m.impl("rmsprop_step_", TORCH_BOX(&modelbatch::rmsprop_step_cpu));
  m.impl("adagrad_step_", TORCH_BOX(&modelbatch::adagrad_step_cpu));
  m.impl("grad_stats", TORCH_BOX(&modelbatch::grad_stats_cpu));
}
