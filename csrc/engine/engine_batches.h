// What the models of a call read besides their own numbers, in the lanes of the kernels. What all
// models share is made once for each step, the rest by the thread that trains the model.
#pragma once

#include <memory>
#include <vector>

#include "engine/engine_args.h"
#include "engine/engine_plan.h"

namespace modelbatch {

// Memory for numbers in vectors.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t bytes)
      : memory_(new char[static_cast<size_t>(bytes) + MB_ENGINE_ALIGNMENT]) {}
  char* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + (MB_ENGINE_ALIGNMENT - address % MB_ENGINE_ALIGNMENT);
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Memory of one thread.
struct EngineThread {
  AlignedBuffer workspace;
  std::vector<int64_t> source;  // [B]
  std::vector<int64_t> index;   // [B, T]
};

class EngineBatches {
 public:
  EngineBatches(const EngineArgs& args, const EnginePlan& plan, const mb_engine_kernels& kernels);

  // Whether the model has a sample in the step.
  bool has_samples(int64_t step, int64_t model) const;

  // Fills in what `to` reads of the batch.
  void prepare(int64_t step, int64_t model, EngineThread& own, mb_engine_model& to) const;

 private:
  void prepare_shared();
  bool sources(const double* weights, std::vector<int64_t>& source) const;
  void lane_weights(const double* weights, char* to) const;
  void target_panels(int64_t step, int64_t model, char* to) const;
  char* part(const AlignedBuffer& shared, int64_t step, int64_t elements) const {
    return shared.data() + step * elements * bytes_;
  }

  const EngineArgs& args_;
  const EnginePlan& plan_;
  const mb_engine_kernels& kernels_;
  const int dtype_;
  const int64_t bytes_;
  const int64_t features_, target_features_;
  bool shares_x_ = false, shares_target_ = false, shares_weight_ = false;
  std::vector<bool> has_nonfinite_;  // x of each step, where it is shared
  std::vector<double> weight_sums_;  // as the weights: [K] or [K, M]
  AlignedBuffer x_, target_, weight_;
};

}  // namespace modelbatch
