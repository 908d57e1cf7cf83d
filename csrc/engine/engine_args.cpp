// Checks of the arguments of modelbatch::train_steps_.
#include "engine/engine_args.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

namespace modelbatch {
namespace {

constexpr int64_t kMostSteps = INT64_C(1) << 31;

class Checker {
 public:
  explicit Checker(const EngineInputs& inputs) : in_(inputs) {}

  EngineArgs check() {
    check_models();
    check_hyper();
    check_stacked();
    check_program();
    check_states();
    check_distinct();
    check_batch();
    check_weights();
    check_labels();
    check_indices();
    check_enough_samples();
    return std::move(args_);
  }

 private:
  void on_cpu(const Tensor& tensor, const char* name) const {
    MB_CHECK(kind_of(tensor).device_type == kind_of(in_.step).device_type, kEngine, name,
             " must be on the CPU");
  }

  // A contiguous tensor as a pointer, of a copy where needed.
  template <class T>
  const T* vector(const MaybeTensor& tensor, const char* name, ScalarType dtype,
                  const char* dtype_name, std::initializer_list<int64_t> sizes) {
    if (!tensor.has_value()) return nullptr;
    bool fits =
        tensor->scalar_type() == dtype && tensor->dim() == static_cast<int64_t>(sizes.size());
    int64_t dim = 0;
    for (int64_t size : sizes) fits = fits && tensor->size(dim++) == size;
    std::ostringstream wanted;
    for (int64_t size : sizes) wanted << (wanted.tellp() == 0 ? "" : ", ") << size;
    MB_CHECK(fits, kEngine, name, " must be ", dtype_name, " of shape [", wanted.str(),
             "], got shape ", shape_text(*tensor));
    on_cpu(*tensor, name);
    const Tensor& dense = tensor->is_contiguous()
                              ? *tensor
                              : args_.kept.emplace_back(torch::stable::contiguous(*tensor));
    return static_cast<const T*>(dense.const_data_ptr());
  }

  void check_models() {
    MB_CHECK(in_.step.dim() == 1 && in_.step.scalar_type() == ScalarType::Float &&
                 in_.step.is_contiguous(),
             kEngine, "step must be float32, contiguous and of shape [M], got shape ",
             shape_text(in_.step));
    const int64_t models = args_.num_models = in_.step.size(0);
    MB_CHECK(in_.rule >= 0 && in_.rule < MB_RULE_COUNT && in_.rule != MB_RULE_NADAM &&
                 in_.rule != MB_RULE_ASGD,
             kEngine, "there is no rule ", in_.rule, " here");
    args_.rule = &kOptimRules[in_.rule];
    MB_CHECK(in_.flags >= 0 && in_.flags <= MB_ENGINE_ALL_FLAGS, kEngine, "flags must be 0 to ",
             int64_t{MB_ENGINE_ALL_FLAGS}, ", got ", in_.flags);
    args_.flags = in_.flags;
    MB_CHECK(!in_.params.empty(), kEngine, "params must hold at least one tensor");
    const ScalarType dtype = in_.params[0].scalar_type();
    MB_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, kEngine,
             "params must be float32 or float64");
    args_.is_double = dtype == ScalarType::Double;
    args_.active = vector<bool>(in_.active, "active", ScalarType::Bool, "bool", {models});
    args_.clip_norm =
        vector<double>(in_.clip_norm, "clip_norm", ScalarType::Double, "float64", {models});
    args_.clip_value =
        vector<double>(in_.clip_value, "clip_value", ScalarType::Double, "float64", {models});
    args_.seed = vector<int64_t>(in_.seed, "seed", ScalarType::Long, "int64", {models});
    args_.stream_step =
        vector<int64_t>(in_.stream_step, "stream_step", ScalarType::Long, "int64", {models});
    MB_CHECK(in_.x.dim() >= 2, kEngine, "x must have shape [K, B, ...] or [K, M, B, ...], got ",
             shape_text(in_.x));
    args_.num_steps = in_.x.size(0);
    MB_CHECK(args_.num_steps <= kMostSteps, kEngine, "there are too many steps");
    args_.lr =
        vector<double>(in_.lr, "lr", ScalarType::Double, "float64", {args_.num_steps, models});
  }

  void check_hyper() {
    args_.hyper = vector<double>(in_.hyper, "hyper", ScalarType::Double, "float64",
                                 {args_.rule->rows, args_.num_models});
    MB_CHECK(in_.numbers.dim() == 2, kEngine, "numbers must be float64 of shape [A, M], got shape ",
             shape_text(in_.numbers));
    args_.numbers = vector<double>(in_.numbers, "numbers", ScalarType::Double, "float64",
                                   {in_.numbers.size(0), args_.num_models});
  }

  void check_stacked() {
    const auto check = [&](const Tensor& tensor, const char* name, size_t i, bool any_dtype) {
      on_cpu(tensor, name);
      MB_CHECK(any_dtype || tensor.scalar_type() == args_.dtype(), kEngine, name, "[", i,
               "] must have the dtype of params[0]");
      MB_CHECK(tensor.dim() >= 1 && tensor.size(0) == args_.num_models && tensor.is_contiguous(),
               kEngine, name, "[", i,
               "] must be contiguous and of shape [M, ...] with M = ", args_.num_models, ", got ",
               shape_text(tensor));
      int64_t numel = 1;
      for (int64_t dim = 1; dim < tensor.dim(); ++dim) numel *= tensor.size(dim);
      return numel;
    };
    for (size_t i = 0; i < in_.params.size(); ++i) {
      args_.numels.push_back(check(in_.params[i], "params", i, false));
      args_.param_bytes.push_back(args_.numels.back() * args_.element_bytes());
      args_.params.push_back(static_cast<char*>(in_.params[i].mutable_data_ptr()));
    }
    for (size_t i = 0; i < in_.buffers.size(); ++i) {
      const Tensor& buffer = in_.buffers[i];
      const int64_t bytes = buffer.scalar_type() == ScalarType::Long ? 8 : args_.element_bytes();
      args_.buffer_bytes.push_back(check(buffer, "buffers", i, bytes == 8) * bytes);
      args_.buffers.push_back(static_cast<char*>(buffer.mutable_data_ptr()));
    }
  }

  void check_program() {
    on_cpu(in_.program, "program");
    const EngineTensors tensors{&in_.params, &in_.buffers, args_.num_models, in_.numbers.size(0),
                                args_.dtype()};
    args_.program = checked_engine_program(in_.program, tensors);
    bool draws = false;
    for (const EngineInstruction& i : args_.program.instructions) {
      if (i.opcode != MB_OP_DROPOUT) continue;
      draws = true;
      for (int64_t model = 0; model < args_.num_models; ++model) {
        const double p = args_.numbers[i.number * args_.num_models + model];
        MB_CHECK(p >= 0 && p <= 1, kEngine, "model ", model, " has the dropout probability ", p);
      }
    }
    MB_CHECK(!draws || (in_.seed.has_value() && in_.stream_step.has_value()), kEngine,
             "dropout needs seed and stream_step");
  }

  // A kind of states is there if it is needed always or by a model's options.
  void check_states() {
    const int64_t optimized = args_.program.num_optimized, models = args_.num_models;
    args_.states.assign(optimized * MB_OPTIM_MAX_STATES, nullptr);
    size_t next = 0;
    for (int kind = 0; kind < args_.rule->num_states; ++kind) {
      const int row = args_.rule->asking_row[kind];
      const auto asks = [&](int64_t model) { return args_.hyper[row * models + model] != 0; };
      bool is_there = row < 0;
      for (int64_t model = 0; !is_there && model < models; ++model) is_there = asks(model);
      if (!is_there) continue;
      MB_CHECK(in_.states.size() >= next + optimized, kEngine, "states lacks ",
               args_.rule->states[kind]);
      for (int64_t p = 0; p < optimized; ++p, ++next) {
        const Tensor& state = in_.states[next];
        on_cpu(state, "states");
        bool fits = state.scalar_type() == args_.dtype() && state.is_contiguous() &&
                    state.dim() == in_.params[p].dim();
        for (int64_t dim = 0; fits && dim < state.dim(); ++dim) {
          fits = state.size(dim) == in_.params[p].size(dim);
        }
        MB_CHECK(fits, kEngine, "states[", next, "] must be contiguous and have the dtype and the ",
                 "shape ", shape_text(in_.params[p]), " of params[", p, "], got shape ",
                 shape_text(state));
        args_.states[p * MB_OPTIM_MAX_STATES + kind] = static_cast<char*>(state.mutable_data_ptr());
      }
    }
    MB_CHECK(in_.states.size() == next, kEngine, "states must hold ", next, " tensors, got ",
             in_.states.size());
    args_.step = static_cast<float*>(in_.step.mutable_data_ptr());
  }

  void check_distinct() const {
    std::vector<std::pair<const char*, const char*>> ranges;
    const auto add = [&](const Tensor& tensor, int64_t bytes) {
      const char* begin = static_cast<const char*>(tensor.const_data_ptr());
      if (bytes > 0) ranges.emplace_back(begin, begin + bytes * args_.num_models);
    };
    for (size_t i = 0; i < in_.params.size(); ++i) add(in_.params[i], args_.param_bytes[i]);
    for (size_t i = 0; i < in_.buffers.size(); ++i) add(in_.buffers[i], args_.buffer_bytes[i]);
    for (size_t i = 0; i < in_.states.size(); ++i) {
      add(in_.states[i], args_.param_bytes[i % args_.program.num_optimized]);
    }
    add(in_.step, 4);
    std::sort(ranges.begin(), ranges.end());
    for (size_t i = 1; i < ranges.size(); ++i) {
      MB_CHECK(ranges[i].first >= ranges[i - 1].second, kEngine,
               "two of params, buffers, states and step share memory");
    }
  }

  StepTensor step_tensor(const Tensor& tensor, const char* name, bool own, ScalarType dtype,
                         const char* dtype_name, int64_t features, bool may_be_flat) {
    MB_CHECK(tensor.scalar_type() == dtype, kEngine, name, " must be ", dtype_name);
    on_cpu(tensor, name);
    const int64_t lead = own ? 3 : 2;
    bool fits = tensor.dim() >= lead && tensor.size(0) == args_.num_steps &&
                (!own || tensor.size(1) == args_.num_models) &&
                tensor.size(lead - 1) == args_.batch && (may_be_flat || tensor.dim() > lead);
    int64_t each = 1;
    for (int64_t dim = lead; fits && dim < tensor.dim(); ++dim) {
      fits = !__builtin_mul_overflow(each, tensor.size(dim), &each);
    }
    MB_CHECK(fits && each == features, kEngine, name, " must have shape [", args_.num_steps, ", ",
             own ? std::to_string(args_.num_models) + ", " : "", args_.batch, ", ...] with ",
             features, " numbers for each sample, got ", shape_text(tensor));
    StepTensor result;
    result.kept = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    result.data = static_cast<const char*>(result.kept.const_data_ptr());
    result.bytes = args_.batch * features * static_cast<int64_t>(tensor.element_size());
    result.num_models = args_.num_models;
    result.is_shared = !own;
    return result;
  }

  void check_batch() {
    const EngineProgram& program = args_.program;
    const bool own = args_.has_flag(MB_ENGINE_OWN_INPUT);
    MB_CHECK(in_.x.dim() >= (own ? 3 : 2), kEngine, "x must have shape [K, M, B, ...], got ",
             shape_text(in_.x));
    args_.batch = in_.x.size(own ? 2 : 1);
    MB_CHECK(args_.batch >= 1, kEngine, "the batch must have at least one sample");
    const bool embeds = program.embeds();
    const char* name = args_.is_double ? "float64" : "float32";
    args_.x = step_tensor(in_.x, "x", own, embeds ? ScalarType::Long : args_.dtype(),
                          embeds ? "int64" : name, program.values[0].features(), true);
    const bool classes = program.has_classes();
    args_.target = step_tensor(in_.target, "target", args_.has_flag(MB_ENGINE_OWN_TARGET),
                               classes ? ScalarType::Long : args_.dtype(), classes ? "int64" : name,
                               classes ? 1 : program.out().features(), true);
  }

  void check_weights() {
    const bool own = args_.has_flag(MB_ENGINE_OWN_WEIGHT);
    if (!in_.sample_weight.has_value()) return;
    const Tensor& given = *in_.sample_weight;
    MB_CHECK(given.scalar_type() == ScalarType::Float || given.scalar_type() == ScalarType::Double,
             kEngine, "sample_weight must be float32 or float64");
    MB_CHECK(given.dim() == (own ? 3 : 2), kEngine, "sample_weight must have shape ",
             own ? "[K, M, B]" : "[K, B]", ", got ", shape_text(given));
    on_cpu(given, "sample_weight");
    MB_CHECK(args_.program.loss_parameters[MB_LOSS_REDUCTION] == 0, kEngine,
             "sample_weight needs the reduction mean");
    const Tensor wide = torch::stable::to(given, ScalarType::Double);
    args_.weight = step_tensor(wide, "sample_weight", own, ScalarType::Double, "float64", 1, true);
    const int64_t count = args_.num_steps * (own ? args_.num_models : 1) * args_.batch;
    const double* w = reinterpret_cast<const double*>(args_.weight.data);
    for (int64_t i = 0; i < count; ++i) {
      MB_CHECK(w[i] >= 0 && std::isfinite(w[i]), kEngine,
               "sample_weight must be finite and not negative, got ", w[i]);
    }
  }

  // body(steps, models, batch numbers): every part of a tensor with the weights that go with it.
  template <class Body>
  void each_part(const StepTensor& tensor, const Body& body) const {
    const bool shared =
        tensor.is_shared && (args_.weight.data == nullptr || args_.weight.is_shared);
    for (int64_t k = 0; k < args_.num_steps; ++k) {
      for (int64_t m = 0; m < (shared ? 1 : args_.num_models); ++m) {
        body(k, m, reinterpret_cast<const int64_t*>(tensor.of(k, m)), args_.weights(k, m));
      }
    }
  }

  void check_labels() const {
    if (!args_.program.has_classes() || args_.num_models == 0) return;
    const int64_t classes = args_.program.out().width;
    const int64_t ignored = args_.program.loss_parameters[MB_LOSS_IGNORE_INDEX];
    each_part(args_.target, [&](int64_t k, int64_t m, const int64_t* labels, const double* w) {
      for (int64_t b = 0; b < args_.batch; ++b) {
        const int64_t label = labels[b];
        if ((label >= 0 && label < classes) || label == ignored) continue;
        MB_CHECK(w != nullptr && w[b] == 0, kEngine, "target ", label, " of sample ", b,
                 " of step ", k, " of model ", m, " is not one of the ", classes, " classes");
      }
    });
  }

  void check_indices() const {
    if (!args_.program.embeds() || args_.num_models == 0) return;
    const EngineInstruction& embedding = args_.program.instructions[0];
    const int64_t words = in_.params[embedding.weight].size(1);
    const int64_t length = args_.program.values[0].rows;
    each_part(args_.x, [&](int64_t k, int64_t m, const int64_t* index, const double* w) {
      for (int64_t i = 0; i < args_.batch * length; ++i) {
        if (index[i] >= 0 && index[i] < words) continue;
        MB_CHECK(w != nullptr && w[i / length] == 0, kEngine, "index ", index[i], " of sample ",
                 i / length, " of step ", k, " of model ", m, " is not one of the ", words,
                 " rows of the embedding");
      }
    });
  }

  // One value has no variance.
  void check_enough_samples() const {
    const auto& all = args_.program.instructions;
    const bool normalises = std::any_of(all.begin(), all.end(), [](const EngineInstruction& i) {
      return i.opcode == MB_OP_BATCH_NORM;
    });
    if (!normalises) return;
    if (args_.weight.data == nullptr) {
      MB_CHECK(args_.batch > 1, kEngine, "batch_norm needs more than one sample");
      return;
    }
    for (int64_t k = 0; k < args_.num_steps; ++k) {
      for (int64_t m = 0; m < args_.num_models; ++m) {
        const double* w = args_.weights(k, m);
        const int64_t used = args_.batch - std::count(w, w + args_.batch, 0.0);
        double total = 0;
        for (int64_t b = 0; b < args_.batch; ++b) total += w[b];
        MB_CHECK(used != 1 || total > 1 || !args_.is_active(m), kEngine,
                 "batch_norm needs more than one sample, but model ", m, " has one in step ", k);
      }
    }
  }

  const EngineInputs& in_;
  EngineArgs args_;
};

}  // namespace

EngineArgs checked_engine_args(const EngineInputs& inputs) { return Checker(inputs).check(); }

}  // namespace modelbatch
