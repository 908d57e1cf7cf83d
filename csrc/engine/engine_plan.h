// Places in a thread's workspace for everything that a checked program computes.
#pragma once

#include <vector>

#include "engine/engine_kernels.h"
#include "engine/engine_program.h"

namespace modelbatch {

struct EngineSizes {
  int64_t batch, lanes, element_bytes;
  bool keeps_grads;
};

// The kernels' plan and the vectors that it points into; the plan is not to be moved.
struct EnginePlan {
  mb_engine_plan plan{};
  std::vector<mb_engine_op> ops;
  std::vector<mb_engine_parameter> params;
  int64_t workspace = 0;  // elements
  // What a model has of its own where it is not shared: places in the workspace.
  int64_t x_panels = 0, x_rows = 0, target = 0, lane_weight = 0;
  bool reads_panels = false, reads_rows = false;  // of x
  bool has_batch_norm = false, has_dropout = false;

  EnginePlan(const EngineProgram& program, const std::vector<int64_t>& numels,
             const EngineSizes& sizes);
  EnginePlan(const EnginePlan&) = delete;
  EnginePlan& operator=(const EnginePlan&) = delete;
};

}  // namespace modelbatch
