// modelbatch::train_steps_ on the CPU: check everything, plan, then models in parallel, each of
// them through all steps in a row.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

#include "common/dispatch.h"
#include "engine/engine_batches.h"
#include "optim/coefficients.h"

MB_DECLARE_TABLE(mb_engine_kernels)
MB_DECLARE_TABLE(mb_optim_kernels)
MB_DECLARE_TABLE(mb_random_kernels)

namespace modelbatch {
namespace {

// How many times each thread looks for models to train: the last ones should be ready together.
constexpr int64_t kRounds = 8;
// The fewest weights times samples that are worth a thread.
constexpr int64_t kGrain = 16384;

// ---- the optimizer's coefficients ---------------------------------------------------------------

// The options of one model in one step and what follows from them.
class OptimizerStep {
 public:
  explicit OptimizerStep(const EngineArgs& args) : args_(args) {
    // Models of equal betas are at the same steps more often than not.
    corrections_.resize(std::clamp<int64_t>(args.num_steps, 1, 256));
  }

  // `step` counts this one.
  const void* take(int64_t number, int64_t model, double step) {
    for (int64_t row = 0; row < args_.rule->rows; ++row) {
      hyper_[row] = args_.hyper[row * args_.num_models + model];
    }
    if (args_.lr != nullptr) hyper_[0] = args_.lr[number * args_.num_models + model];
    fill_coefficients(args_.rule->id, hyper_, 1, 0, step, args_.is_double,
                      corrections_[number % corrections_.size()], to_);
    return &to_;
  }

  // After `take`.
  bool counts() const {
    return args_.rule->id != MB_RULE_SGD || mb_sgd_counts_step(hyper_, 1, 0) != 0;
  }

 private:
  const EngineArgs& args_;
  double hyper_[16] = {};
  Coefficients to_{};
  std::vector<mb_adam_correction> corrections_;
};

// ---- the models ---------------------------------------------------------------------------------

struct EngineResults {
  Tensor losses, status, grad_norm;
};

class EngineRun {
 public:
  EngineRun(const EngineArgs& args, EngineResults& results)
      : args_(args),
        table_(MB_SELECT_TABLE(mb_engine_kernels)),
        dtype_(args.is_double ? MB_ENGINE_F64 : MB_ENGINE_F32),
        plan_(args.program, args.numels,
              {args.batch, table_.lanes[dtype_], args.element_bytes(), keeps_grads(args)}),
        losses_(static_cast<char*>(results.losses.mutable_data_ptr())),
        status_(static_cast<uint8_t*>(results.status.mutable_data_ptr())),
        grad_norm_(args.has_flag(MB_ENGINE_GRAD_NORM)
                       ? static_cast<double*>(results.grad_norm.mutable_data_ptr())
                       : nullptr) {
    const mb_optim_kernels& optim = MB_SELECT_TABLE(mb_optim_kernels);
    const mb_random_kernels& random = MB_SELECT_TABLE(mb_random_kernels);
    plan_.plan.update = optim.update[args.rule->id][dtype_];
    plan_.plan.sum_squares = optim.sum_squares[dtype_];
    plan_.plan.dropout = random.dropout[dtype_];
  }

  void run() {
    const int64_t models = args_.num_models;
    const EngineBatches batches(args_, plan_, table_);
    int64_t work = args_.batch;
    for (int64_t numel : args_.numels) work += numel * args_.batch;
    const int64_t most = std::max<int64_t>(1, models * args_.num_steps * work / kGrain);
    const int64_t threads =
        std::min({static_cast<int64_t>(torch::stable::get_num_threads()), models, most});
    std::vector<EngineThread> own(threads);
    for (EngineThread& thread : own) {
      thread.workspace = AlignedBuffer(plan_.workspace * args_.element_bytes());
      thread.source.reserve(args_.batch);
      if (args_.program.embeds()) {
        thread.index.reserve(args_.batch * args_.program.values[0].features());
      }
    }
    // A model's results depend on nothing of another's, so it does not matter who trains it.
    const int64_t some = std::max<int64_t>(1, models / (threads * kRounds));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t thread = first; thread < last; ++thread) {
        OptimizerStep optimizer(args_);
        Pointers pointers(args_);
        for (;;) {
          const int64_t begin = next.fetch_add(some);
          if (begin >= models) break;
          for (int64_t model = begin; model < std::min(begin + some, models); ++model) {
            train(model, batches, own[thread], optimizer, pointers);
          }
        }
      }
    });
  }

 private:
  // A model's slices.
  struct Pointers {
    explicit Pointers(const EngineArgs& args)
        : params(args.params), states(args.states), buffers(args.buffers) {}
    void move_to(const EngineArgs& args, int64_t model) {
      for (size_t p = 0; p < params.size(); ++p) {
        params[p] = args.params[p] + model * args.param_bytes[p];
      }
      for (size_t s = 0; s < states.size(); ++s) {
        if (states[s] == nullptr) continue;
        states[s] = args.states[s] + model * args.param_bytes[s / MB_OPTIM_MAX_STATES];
      }
      for (size_t b = 0; b < buffers.size(); ++b) {
        buffers[b] = args.buffers[b] + model * args.buffer_bytes[b];
      }
    }
    std::vector<char*> params, states, buffers;
  };

  static bool keeps_grads(const EngineArgs& args) {
    return args.clip_norm != nullptr || args.clip_value != nullptr ||
           args.has_flag(MB_ENGINE_GRAD_NORM);
  }

  void train(int64_t model, const EngineBatches& batches, EngineThread& own,
             OptimizerStep& optimizer, Pointers& pointers) {
    pointers.move_to(args_, model);
    constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
    mb_engine_model m{};
    m.params = pointers.params.data();
    m.states = pointers.states.data();
    m.buffers = pointers.buffers.data();
    m.numbers = args_.numbers + model;
    m.number_step = args_.num_models;
    m.seed = args_.seed == nullptr ? 0 : args_.seed[model];
    m.stream_step = args_.stream_step == nullptr ? 0 : args_.stream_step[model];
    m.clip_norm = args_.clip_norm == nullptr ? kNone : args_.clip_norm[model];
    m.clip_value = args_.clip_value == nullptr ? kNone : args_.clip_value[model];
    bool is_active = args_.is_active(model);
    for (int64_t k = 0; k < args_.num_steps; ++k) {
      mb_engine_result result{0.0, 0.0, MB_STATUS_RESTED};
      if (batches.has_samples(k, model)) {
        batches.prepare(k, model, own, m);
        m.trains = is_active;
        if (is_active) {
          m.coefficients = optimizer.take(k, model, static_cast<double>(args_.step[model] + 1.0f));
        }
        table_.step[dtype_](&plan_.plan, &m, own.workspace.data(), &result);
        if (is_active) {
          if (optimizer.counts()) args_.step[model] += 1.0f;
          ++m.stream_step;
          if (args_.has_flag(MB_ENGINE_STOP_NONFINITE) && result.status != 0) is_active = false;
        }
      }
      write(k * args_.num_models + model, result);
    }
  }

  void write(int64_t at, const mb_engine_result& result) {
    if (args_.is_double) {
      reinterpret_cast<double*>(losses_)[at] = result.loss;
    } else {
      reinterpret_cast<float*>(losses_)[at] = static_cast<float>(result.loss);
    }
    status_[at] = static_cast<uint8_t>(result.status);
    if (grad_norm_ != nullptr) grad_norm_[at] = result.grad_norm;
  }

  const EngineArgs& args_;
  const mb_engine_kernels& table_;
  const int dtype_;
  EnginePlan plan_;
  char* losses_;
  uint8_t* status_;
  double* grad_norm_;
};

// A new tensor [rows, columns], by the C shim: torch::stable::empty looks its operator up by name,
// a microsecond each time.
Tensor matrix(int64_t rows, int64_t columns, int32_t dtype) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {columns, 1};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

std::tuple<Tensor, Tensor, Tensor> train_steps_cpu(
    const std::vector<Tensor>& params, const std::vector<Tensor>& buffers,
    const std::vector<Tensor>& states, const Tensor& step, const Tensor& x, const Tensor& target,
    const MaybeTensor& sample_weight, const Tensor& program, const Tensor& numbers,
    const Tensor& hyper, const MaybeTensor& lr, const MaybeTensor& active,
    const MaybeTensor& clip_norm, const MaybeTensor& clip_value, const MaybeTensor& seed,
    const MaybeTensor& stream_step, int64_t rule, int64_t flags) {
  const EngineArgs args = checked_engine_args(
      {params, buffers, states, step, x, target, sample_weight, program, numbers, hyper, lr, active,
       clip_norm, clip_value, seed, stream_step, rule, flags});
  const int64_t steps = args.num_steps, models = args.num_models;
  EngineResults results{
      matrix(steps, models,
             args.is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32()),
      matrix(steps, models, aoti_torch_dtype_uint8()), Tensor()};
  const std::vector<int64_t> nothing{0};
  results.grad_norm =
      args.has_flag(MB_ENGINE_GRAD_NORM)
          ? matrix(steps, models, aoti_torch_dtype_float64())
          : torch::stable::empty(nothing, ScalarType::Double, std::nullopt, step.device());
  if (args.num_models > 0 && args.num_steps > 0) EngineRun(args, results).run();
  return {results.losses, results.status, results.grad_norm};
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("train_steps_", TORCH_BOX(&modelbatch::train_steps_cpu));
}
