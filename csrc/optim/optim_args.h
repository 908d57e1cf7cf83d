// Arguments of the optimizer operators, checked and read once: what the CPU and CUDA sides share.
//
// Everything is checked before anything is changed. The structs borrow the memory, sizes and
// strides of the operator's arguments.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "optim/optim.h"

namespace modelbatch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using TensorList = std::vector<Tensor>;

// What the checks need to know of a rule.
struct OptimRule {
  mb_optim_rule id;
  const char* op;
  int64_t rows;  // of hyper
  int num_states;
  std::array<const char*, MB_OPTIM_MAX_STATES> states;  // the names of the operator's arguments
  // The row of hyper that is not 0 for the models that need the state; -1: every model does.
  std::array<int, MB_OPTIM_MAX_STATES> asking_row;
  std::array<const char*, MB_OPTIM_MAX_STATES> asking_name;
  std::array<const char*, MB_OPTIM_MAX_SCALARS> scalars{};  // names of further numbers per model
};

inline constexpr std::array<OptimRule, MB_RULE_COUNT> kOptimRules = {{
    {MB_RULE_SGD,
     "sgd_step_",
     MB_SGD_ROWS,
     1,
     {"momentum_buffers"},
     {MB_SGD_MOMENTUM},
     {"momentum"}},
    {MB_RULE_ADAM,
     "adam_step_",
     MB_ADAM_ROWS,
     3,
     {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"},
     {-1, -1, MB_ADAM_AMSGRAD},
     {"", "", "amsgrad"}},
    {MB_RULE_ADAMW,
     "adamw_step_",
     MB_ADAM_ROWS,
     3,
     {"exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs"},
     {-1, -1, MB_ADAM_AMSGRAD},
     {"", "", "amsgrad"}},
    {MB_RULE_RMSPROP,
     "rmsprop_step_",
     MB_RMSPROP_ROWS,
     3,
     {"square_avgs", "grad_avgs", "momentum_buffers"},
     {-1, MB_RMSPROP_CENTERED, MB_RMSPROP_MOMENTUM},
     {"", "centered", "momentum"}},
    {MB_RULE_ADAGRAD, "adagrad_step_", MB_ADAGRAD_ROWS, 1, {"sums"}, {-1}, {""}},
    {MB_RULE_ADADELTA,
     "adadelta_step_",
     MB_ADADELTA_ROWS,
     2,
     {"square_avgs", "acc_deltas"},
     {-1, -1},
     {"", ""}},
    {MB_RULE_ADAMAX,
     "adamax_step_",
     MB_ADAMAX_ROWS,
     2,
     {"exp_avgs", "exp_infs"},
     {-1, -1},
     {"", ""}},
    {MB_RULE_RADAM,
     "radam_step_",
     MB_RADAM_ROWS,
     2,
     {"exp_avgs", "exp_avg_sqs"},
     {-1, -1},
     {"", ""}},
    {MB_RULE_RPROP, "rprop_step_", MB_RPROP_ROWS, 2, {"prevs", "step_sizes"}, {-1, -1}, {"", ""}},
    {MB_RULE_NADAM,
     "nadam_step_",
     MB_NADAM_ROWS,
     2,
     {"exp_avgs", "exp_avg_sqs"},
     {-1, -1},
     {"", ""},
     {"mu_product"}},
    {MB_RULE_ASGD, "asgd_step_", MB_ASGD_ROWS, 1, {"axs"}, {-1}, {""}, {"eta", "mu"}},
}};

// A stacked tensor [M, ...], read once.
struct StackedTensor {
  void* data = nullptr;
  int64_t dims = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;  // in elements
};

// One parameter with its gradient and states; a state whose list is empty has data == nullptr.
struct OptimEntry {
  StackedTensor param, grad;
  std::array<StackedTensor, MB_OPTIM_MAX_STATES> states;
  int64_t slice_numel = 1;
};

struct OptimArgs {
  const OptimRule* rule = nullptr;
  int dtype = MB_OPTIM_F32;  // of parameters and gradients
  int64_t num_models = 0;
  std::vector<OptimEntry> entries;
  float* step = nullptr;
  int64_t step_stride = 1;
  const double* hyper = nullptr;
  // Of each further number per model one of the two is there: torch has some in double precision.
  std::array<float*, MB_OPTIM_MAX_SCALARS> scalars{};
  std::array<double*, MB_OPTIM_MAX_SCALARS> wide_scalars{};
  // [M], contiguous; nullptr where absent.
  const bool* active = nullptr;
  const bool* nonfinite = nullptr;
  const float* inv_scale = nullptr;
  const double* clip_factor = nullptr;
  const double* clip_value = nullptr;
  // Whether entry's state i was given.
  std::array<bool, MB_OPTIM_MAX_STATES> has_state{};
  std::vector<Tensor> kept;  // copies that pointers above refer to

  bool transforms_grad() const {
    return inv_scale != nullptr || clip_factor != nullptr || clip_value != nullptr;
  }
};

// ---- parts of the checks ------------------------------------------------------------------------

// Codes as the C functions give them; comparing them is all that most tensors need.
struct TensorKind {
  int32_t dtype = 0, device_type = 0, device_index = 0;

  bool same_device(const TensorKind& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
};

inline TensorKind kind_of(const Tensor& tensor) {
  TensorKind kind;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &kind.dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &kind.device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &kind.device_index));
  return kind;
}

inline StackedTensor read_stacked(const Tensor& tensor, bool is_written) {
  StackedTensor result;
  result.data = is_written ? tensor.mutable_data_ptr() : const_cast<void*>(tensor.const_data_ptr());
  int64_t* values = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &result.dims));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &values));
  result.sizes = values;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &values));
  result.strides = values;
  return result;
}

inline bool same_sizes(const StackedTensor& a, const StackedTensor& b) {
  return a.dims == b.dims && std::equal(a.sizes, a.sizes + a.dims, b.sizes);
}

// Whether several elements share one place, as in an expanded tensor.
inline bool is_expanded(const StackedTensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dims; ++dim) {
    if (tensor.sizes[dim] > 1 && tensor.strides[dim] == 0) return true;
  }
  return false;
}

inline int optim_dtype(ScalarType dtype, const char* op, const char* name) {
  switch (dtype) {
    case ScalarType::Float:
      return MB_OPTIM_F32;
    case ScalarType::Double:
      return MB_OPTIM_F64;
    case ScalarType::BFloat16:
      return MB_OPTIM_BF16;
    case ScalarType::Half:
      return MB_OPTIM_F16;
    default:
      fail("modelbatch::", op, ": ", name, "[0] must be float32, float64, bfloat16 or float16");
  }
}

// A vector with one number per model as a pointer, or nullptr where there is none.
template <class T>
const T* checked_vector(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype,
                        const char* dtype_name, const TensorKind& kind, OptimArgs& args) {
  if (!tensor.has_value()) return nullptr;
  const char* op = args.rule->op;
  MB_CHECK(tensor->scalar_type() == dtype, "modelbatch::", op, ": ", name, " must be ", dtype_name);
  MB_CHECK(tensor->dim() == 1 && tensor->size(0) == args.num_models, "modelbatch::", op, ": ", name,
           " must have shape [", args.num_models, "], one per model, got ", shape_text(*tensor));
  MB_CHECK(kind_of(*tensor).same_device(kind), "modelbatch::", op, ": ", name,
           " must be on the device of step");
  const Tensor& dense = tensor->is_contiguous()
                            ? *tensor
                            : args.kept.emplace_back(torch::stable::contiguous(*tensor));
  return static_cast<const T*>(dense.const_data_ptr());
}

// The same tensor twice would be updated twice, or read while it is written.
inline void check_distinct(const OptimArgs& args) {
  std::vector<std::pair<const void*, bool>> begins;  // address, is written
  begins.reserve(args.entries.size() * (2 + MB_OPTIM_MAX_STATES));
  for (const OptimEntry& entry : args.entries) {
    if (args.num_models == 0 || entry.slice_numel == 0) continue;
    begins.emplace_back(entry.param.data, true);
    begins.emplace_back(entry.grad.data, false);
    for (const StackedTensor& state : entry.states) {
      if (state.data != nullptr) begins.emplace_back(state.data, true);
    }
  }
  std::sort(begins.begin(), begins.end());
  for (size_t i = 1; i < begins.size(); ++i) {
    const bool is_shared = begins[i].first == begins[i - 1].first;
    MB_CHECK(!is_shared || !(begins[i].second || begins[i - 1].second),
             "modelbatch::", args.rule->op,
             ": two of the tensors share memory; parameters and states must be distinct tensors");
  }
}

// ---- the checks ---------------------------------------------------------------------------------

// `states` are the operator's state lists and `scalars` its further numbers per model, in the order
// of the rule's, float32 or, if they may be wide, all of them float64.
inline OptimArgs checked_optim_args(
    mb_optim_rule rule_id, const TensorList& params, const TensorList& grads,
    std::initializer_list<const TensorList*> states, const Tensor& step, const Tensor& hyper,
    const std::optional<Tensor>& active, const std::optional<Tensor>& nonfinite,
    const std::optional<Tensor>& inv_scale, const std::optional<Tensor>& clip_factor,
    const std::optional<Tensor>& clip_value, std::initializer_list<const Tensor*> scalars = {},
    bool may_be_wide = false) {
  const OptimRule& rule = kOptimRules[rule_id];
  const char* op = rule.op;
  OptimArgs args;
  args.rule = &rule;
  MB_CHECK(step.dim() == 1 && step.scalar_type() == ScalarType::Float, "modelbatch::", op,
           ": step must be float32 of shape [M], one per model, got shape ", shape_text(step));
  const int64_t num_models = args.num_models = step.size(0);
  const TensorKind kind = kind_of(step);
  args.step_stride = step.stride(0);
  MB_CHECK(num_models <= 1 || args.step_stride != 0, "modelbatch::", op,
           ": step must not be expanded");
  MB_CHECK(hyper.scalar_type() == ScalarType::Double && hyper.dim() == 2 &&
               hyper.size(0) == rule.rows && hyper.size(1) == num_models && hyper.is_contiguous(),
           "modelbatch::", op, ": hyper must be float64, contiguous and of shape [", rule.rows,
           ", ", num_models, "], got shape ", shape_text(hyper));
  MB_CHECK(kind_of(hyper).same_device(kind), "modelbatch::", op,
           ": hyper must be on the device of step");
  args.hyper = static_cast<const double*>(hyper.const_data_ptr());
  args.active = checked_vector<bool>(active, "active", ScalarType::Bool, "bool", kind, args);
  args.nonfinite =
      checked_vector<bool>(nonfinite, "nonfinite", ScalarType::Bool, "bool", kind, args);
  args.inv_scale =
      checked_vector<float>(inv_scale, "inv_scale", ScalarType::Float, "float32", kind, args);
  args.clip_factor =
      checked_vector<double>(clip_factor, "clip_factor", ScalarType::Double, "float64", kind, args);
  args.clip_value =
      checked_vector<double>(clip_value, "clip_value", ScalarType::Double, "float64", kind, args);

  int scalar = 0;
  for (const Tensor* tensor : scalars) {
    const char* name = rule.scalars[scalar];
    MB_CHECK(tensor->is_contiguous(), "modelbatch::", op, ": ", name, " must be contiguous");
    if (may_be_wide && (*scalars.begin())->scalar_type() == ScalarType::Double) {
      args.wide_scalars[scalar++] = const_cast<double*>(checked_vector<double>(
          *tensor, name, ScalarType::Double, "float64 as the first", kind, args));
    } else {
      args.scalars[scalar++] = const_cast<float*>(
          checked_vector<float>(*tensor, name, ScalarType::Float, "float32", kind, args));
    }
  }

  const size_t count = params.size();
  MB_CHECK(grads.size() == count, "modelbatch::", op, ": params has ", count,
           " tensors, but grads has ", grads.size());
  int index = 0;
  for (const TensorList* list : states) {
    const bool may_be_empty = rule.asking_row[index] >= 0;
    args.has_state[index] = !list->empty();
    MB_CHECK(list->size() == count || (may_be_empty && list->empty()), "modelbatch::", op,
             ": params has ", count, " tensors, but ", rule.states[index], " has ", list->size());
    ++index;
  }
  TensorKind param_kind = kind, state_kind = kind;
  if (count > 0) {
    args.dtype = optim_dtype(params[0].scalar_type(), op, "params");
    param_kind.dtype = kind_of(params[0]).dtype;
    if (args.dtype == MB_OPTIM_F64) state_kind.dtype = param_kind.dtype;  // else step's, float32
  }
  args.entries.resize(count);
  for (size_t i = 0; i < count; ++i) {
    OptimEntry& entry = args.entries[i];
    const auto check_tensor = [&](const Tensor& tensor, const char* name, const TensorKind& wanted,
                                  bool is_written) {
      const TensorKind found = kind_of(tensor);
      MB_CHECK(found.same_device(wanted), "modelbatch::", op, ": ", name, "[", i,
               "] must be on the device of step");
      MB_CHECK(found.dtype == wanted.dtype, "modelbatch::", op, ": ", name, "[", i, "] must have ",
               &wanted == &param_kind       ? "the dtype of params[0]"
               : args.dtype == MB_OPTIM_F64 ? "dtype float64, the state of float64 parameters"
                                            : "dtype float32");
      const StackedTensor stacked = read_stacked(tensor, is_written);
      if (&tensor == &params[i]) {
        MB_CHECK(stacked.dims >= 1 && stacked.sizes[0] == num_models, "modelbatch::", op, ": ",
                 name, "[", i, "] must have shape [M, ...] with M = ", num_models,
                 " models as step, got ", shape_text(tensor));
      } else {
        MB_CHECK(same_sizes(stacked, entry.param), "modelbatch::", op, ": ", name, "[", i,
                 "] must have the shape ", shape_text(params[i]), " of params[", i, "], got ",
                 shape_text(tensor));
      }
      MB_CHECK(!is_written || !is_expanded(stacked), "modelbatch::", op, ": ", name, "[", i,
               "] of shape ", shape_text(tensor),
               " is expanded: several of its elements share memory");
      return stacked;
    };
    entry.param = check_tensor(params[i], "params", param_kind, true);
    entry.grad = check_tensor(grads[i], "grads", param_kind, false);
    int state = 0;
    for (const TensorList* list : states) {
      if (!list->empty()) {
        entry.states[state] = check_tensor((*list)[i], rule.states[state], state_kind, true);
      }
      ++state;
    }
    for (int64_t dim = 1; dim < entry.param.dims; ++dim) {
      entry.slice_numel *= entry.param.sizes[dim];
    }
  }
  args.step = static_cast<float*>(step.mutable_data_ptr());
  check_distinct(args);
  return args;
}

// Refuses a model whose options ask for a state that was not given. Reads hyper, so on a device
// other than the CPU a caller has to know it from elsewhere.
inline void check_states_asked_for(const OptimArgs& args) {
  for (int state = 0; state < args.rule->num_states; ++state) {
    const int row = args.rule->asking_row[state];
    if (row < 0 || args.has_state[state] || args.entries.empty()) continue;
    const double* values = args.hyper + row * args.num_models;
    for (int64_t model = 0; model < args.num_models; ++model) {
      MB_CHECK(values[model] == 0.0, "modelbatch::", args.rule->op, ": model ", model, " has ",
               args.rule->asking_name[state], " = ", values[model], ", but ",
               args.rule->states[state], " is empty");
    }
  }
}

// ---- grad_stats ---------------------------------------------------------------------------------

struct GradStatsArgs {
  std::vector<StackedTensor> grads;
  int dtype = MB_OPTIM_F32;
  int64_t num_models = 0;
};

inline GradStatsArgs checked_grad_stats_args(const TensorList& grads) {
  MB_CHECK(!grads.empty(), "modelbatch::grad_stats: grads must hold at least one tensor");
  GradStatsArgs args;
  args.dtype = optim_dtype(grads[0].scalar_type(), "grad_stats", "grads");
  const TensorKind kind = kind_of(grads[0]);
  args.grads.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const TensorKind found = kind_of(grads[i]);
    MB_CHECK(found.same_device(kind) && found.dtype == kind.dtype, "modelbatch::grad_stats: grads[",
             i, "] must have the dtype and the device of grads[0]");
    const StackedTensor& grad = args.grads.emplace_back(read_stacked(grads[i], false));
    if (i == 0 && grad.dims >= 1) args.num_models = grad.sizes[0];
    MB_CHECK(grad.dims >= 1 && grad.sizes[0] == args.num_models, "modelbatch::grad_stats: grads[",
             i, "] must have shape [M, ...] with the M = ", args.num_models,
             " models of grads[0], got ", shape_text(grads[i]));
  }
  return args;
}

}  // namespace modelbatch
