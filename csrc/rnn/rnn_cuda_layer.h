// What forward and backward of one layer and direction of all models have in common, for LSTM, GRU
// and RNN on a device.
//
// The input's part of all steps is one batched GEMM before the steps, the gradients of x and of the
// weights are one each after them. A step is one batched GEMM for all models and one kernel, or all
// steps are one kernel (rnn_cuda.h).
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <optional>

#include "rnn/rnn_args.h"
#include "rnn/rnn_cuda.h"
#include "rnn/rnn_cuda_matrices.h"

namespace modelbatch {

// MODELBATCH_PERSISTENT_RNN=1, read when the library is loaded with the package, turns the
// persistent kernels on. They are off because nobody has yet measured on a GPU where they are the
// faster way.
inline const bool kRnnPersists = [] {
  const char* value = std::getenv("MODELBATCH_PERSISTENT_RNN");
  return value != nullptr && std::strcmp(value, "1") == 0;
}();

struct RnnCellKind {
  int cell;
  int64_t gates;  // G
};

inline Tensor rnn_empty(const Ints& sizes, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device());
}

inline std::optional<Tensor> rnn_maybe_operand(const Tensor* tensor) {
  return tensor == nullptr ? std::nullopt : std::optional<Tensor>(rnn_operand(*tensor));
}

// The arguments with dense slices.
struct RnnOperands {
  Tensor x, h0, w_ih, w_hh;
  std::optional<Tensor> c0, b_ih, b_hh, w_hr;

  explicit RnnOperands(const RnnInputs& in)
      : x(rnn_operand(*in.x)),
        h0(rnn_operand(*in.h0)),
        w_ih(rnn_operand(*in.w_ih)),
        w_hh(rnn_operand(*in.w_hh)),
        c0(rnn_maybe_operand(in.c0)),
        b_ih(rnn_maybe_operand(in.b_ih)),
        b_hh(rnn_maybe_operand(in.b_hh)),
        w_hr(rnn_maybe_operand(in.w_hr)) {}
};

// The runs as the persistent kernels take them, if they can take the layer.
inline std::optional<mb_rnn_runs> rnn_persistent_runs(const RnnSize& size, const RnnInputs& in,
                                                      const Ints& batch_sizes, bool reverse) {
  if (!kRnnPersists || in.x->scalar_type() != ScalarType::Float || in.w_hr != nullptr ||
      size.hidden > MB_RNN_PERSISTENT_HIDDEN || size.rows == 0 ||
      size.rows > INT32_MAX / (4 * MB_RNN_PERSISTENT_HIDDEN)) {
    return std::nullopt;
  }
  const std::vector<RnnRun> runs = rnn_runs(batch_sizes);
  if (runs.size() > MB_RNN_MAX_RUNS) return std::nullopt;
  mb_rnn_runs result{};
  result.count = static_cast<int32_t>(runs.size());
  result.reverse = reverse;
  result.rows = size.rows;
  for (size_t i = 0; i < runs.size(); ++i) {
    result.steps[i] = static_cast<int32_t>(runs[i].steps);
    result.batch[i] = static_cast<int32_t>(runs[i].batch);
  }
  return result;
}

// A step's kernel counts its elements with 32 bits.
inline void check_rnn_step(const RnnSize& size) {
  MB_CHECK(size.batch * size.hidden <= INT32_MAX,
           "modelbatch: a step of one model's RNN must have less than 2^31 elements, got B = ",
           size.batch, " and H = ", size.hidden);
}

}  // namespace modelbatch
