// A program of the engine, read and checked: csrc/engine/engine.h says what its numbers mean.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <vector>

#include "common/check.h"
#include "engine/engine.h"

namespace modelbatch {

inline constexpr const char* kEngine = "modelbatch::train_steps_: ";

struct EngineValue {
  int64_t rows = 0, width = 0;
  int uses = 0;
  bool exists = false, leads_to_output = false, needs_grad = false;
  int64_t features() const { return rows * width; }
};

struct EngineInstruction {
  int64_t opcode, input, input2, output, weight, bias, mean, var, number, extra;
};

struct EngineProgram {
  std::vector<EngineValue> values;
  std::vector<EngineInstruction> instructions;
  int64_t output = 0, loss = 0, num_optimized = 0;
  int64_t loss_parameters[MB_LOSS_PARAMETERS] = {};

  const EngineValue& out() const { return values[output]; }
  bool has_classes() const { return loss == MB_ENGINE_CROSS_ENTROPY || loss == MB_ENGINE_NLL; }
  bool embeds() const { return !instructions.empty() && instructions[0].opcode == MB_OP_EMBEDDING; }
};

// What the program is checked against.
struct EngineTensors {
  const std::vector<torch::stable::Tensor>* params;
  const std::vector<torch::stable::Tensor>* buffers;
  int64_t num_models, number_rows;
  torch::headeronly::ScalarType dtype;
};

// Throws std::runtime_error that says which instruction is wrong.
EngineProgram checked_engine_program(const torch::stable::Tensor& program,
                                     const EngineTensors& tensors);

}  // namespace modelbatch
