// The arguments of modelbatch::train_steps_, checked, as pointers.
#pragma once

#include <optional>
#include <vector>

#include "engine/engine_program.h"
#include "optim/optim_args.h"

namespace modelbatch {

using MaybeTensor = std::optional<Tensor>;

// A tensor with leading axes [K, M] or, shared by all models, [K]: one part for each step and
// model.
struct StepTensor {
  Tensor kept;
  const char* data = nullptr;
  int64_t bytes = 0;  // of a part
  int64_t num_models = 1;
  bool is_shared = true;

  const char* of(int64_t step, int64_t model) const {
    return data + (is_shared ? step : step * num_models + model) * bytes;
  }
};

struct EngineArgs {
  const OptimRule* rule = nullptr;
  int64_t num_models = 0, num_steps = 0, batch = 0, flags = 0;
  bool is_double = false;
  EngineProgram program;
  std::vector<int64_t> numels;                     // of params, per model
  std::vector<char*> params, states, buffers;      // states: [P, MB_OPTIM_MAX_STATES]
  std::vector<int64_t> param_bytes, buffer_bytes;  // of one model
  float* step = nullptr;
  StepTensor x, target;
  StepTensor weight;  // float64 [B]; data is nullptr without weights
  const double* numbers = nullptr;
  const double* hyper = nullptr;
  // nullptr where absent
  const double *lr = nullptr, *clip_norm = nullptr, *clip_value = nullptr;
  const bool* active = nullptr;
  const int64_t *seed = nullptr, *stream_step = nullptr;
  std::vector<Tensor> kept;  // copies that pointers above refer to

  int64_t element_bytes() const { return is_double ? 8 : 4; }
  ScalarType dtype() const { return is_double ? ScalarType::Double : ScalarType::Float; }
  bool has_flag(int64_t flag) const { return (flags & flag) != 0; }
  bool is_active(int64_t model) const { return active == nullptr || active[model]; }
  const double* weights(int64_t step_number, int64_t model) const {
    return weight.data == nullptr ? nullptr
                                  : reinterpret_cast<const double*>(weight.of(step_number, model));
  }
};

// The operator's arguments as they came.
struct EngineInputs {
  const std::vector<Tensor>&params, &buffers, &states;
  const Tensor &step, &x, &target;
  const MaybeTensor& sample_weight;
  const Tensor &program, &numbers, &hyper;
  const MaybeTensor &lr, &active, &clip_norm, &clip_value, &seed, &stream_step;
  int64_t rule, flags;
};

// Throws std::runtime_error with what is wrong; changes nothing.
EngineArgs checked_engine_args(const EngineInputs& inputs);

}  // namespace modelbatch
