// Argument checks that the CPU and CUDA sides of the rnn family share.
//
// Dim 0 of every argument is the number of models M, or 1: shared by all models. M is the largest.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "common/check.h"
#include "conv/slices.h"

namespace modelbatch {

enum : int64_t { kRnnGates = 1, kGruGates = 3, kLstmGates = 4 };

struct RnnSize {
  int64_t models;   // M
  int64_t rows;     // N, of all steps
  int64_t batch;    // B, of the first step
  int64_t steps;    // T
  int64_t inputs;   // I
  int64_t hidden;   // H
  int64_t outputs;  // P; H without projection
};

// The arguments that forward and backward have in common; null where absent.
struct RnnInputs {
  const Tensor* x;
  const Tensor* h0;
  const Tensor* c0;
  const Tensor* w_ih;
  const Tensor* w_hh;
  const Tensor* b_ih;
  const Tensor* b_hh;
  const Tensor* w_hr;
};

inline const Tensor* rnn_optional(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? &*tensor : nullptr;
}

// What the gates and cells of an input are saved in.
inline ScalarType rnn_wide_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An argument, and what it must be: its name, axis letters and sizes after dim 0.
struct RnnExpected {
  const char* name;
  const char* letters;  // "M, B, H"
  const Tensor* tensor;
  Ints sizes;
  bool is_wide = false;  // has rnn_wide_dtype instead of the dtype of x
};

class RnnChecker {
 public:
  // Checks what forward and backward have in common, except dim 0.
  RnnChecker(const char* op, int64_t num_gates, const RnnInputs& in, const Ints& batch_sizes)
      : op_(op), x_(*in.x) {
    const ScalarType dtype = x_.scalar_type();
    MB_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double ||
                 dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
             "modelbatch::", op, ": x must be float32, float64, bfloat16 or float16");
    MB_CHECK(x_.dim() == 3, "modelbatch::", op, ": x must have shape [M, N, I], got ",
             shape_text(x_));
    const Tensor& w_hh = *in.w_hh;
    MB_CHECK(w_hh.dim() == 3 && w_hh.size(1) >= num_gates && w_hh.size(1) % num_gates == 0 &&
                 w_hh.size(2) >= 1,
             "modelbatch::", op, ": w_hh must have shape [M, ", num_gates,
             " H, P] with H and P at least 1, got ", shape_text(w_hh));
    size_.rows = x_.size(1);
    size_.inputs = x_.size(2);
    size_.hidden = w_hh.size(1) / num_gates;
    size_.outputs = w_hh.size(2);
    MB_CHECK(in.w_hr != nullptr || size_.outputs == size_.hidden, "modelbatch::", op,
             ": without projection w_hh must have shape [M, ", num_gates, " H, H], got ",
             shape_text(w_hh));
    check_batch_sizes(batch_sizes);
    const int64_t gates = num_gates * size_.hidden;
    expect({"x", "M, N, I", in.x, {size_.rows, size_.inputs}});
    expect({"h0", "M, B, P", in.h0, {size_.batch, size_.outputs}});
    expect({"c0", "M, B, H", in.c0, {size_.batch, size_.hidden}});
    expect({"w_ih", "M, G H, I", in.w_ih, {gates, size_.inputs}});
    expect({"w_hh", "M, G H, P", in.w_hh, {gates, size_.outputs}});
    expect({"b_ih", "M, G H", in.b_ih, {gates}});
    expect({"b_hh", "M, G H", in.b_hh, {gates}});
    expect({"w_hr", "M, P, H", in.w_hr, {size_.outputs, size_.hidden}});
  }

  // The sizes so far; `models` is not yet known.
  const RnnSize& size() const { return size_; }

  // Checks a further argument, except dim 0; null is an absent one.
  void expect(const RnnExpected& expected) {
    if (expected.tensor == nullptr) return;
    const Tensor& tensor = *expected.tensor;
    bool fits = tensor.dim() == static_cast<int64_t>(expected.sizes.size()) + 1;
    for (size_t i = 0; fits && i < expected.sizes.size(); ++i) {
      fits = tensor.size(static_cast<int64_t>(i) + 1) == expected.sizes[i];
    }
    MB_CHECK(fits, "modelbatch::", op_, ": ", expected.name, " must have shape [", expected.letters,
             "], here ", text("M", expected.sizes), ", got ", shape_text(tensor));
    const ScalarType dtype = expected.is_wide ? rnn_wide_dtype(x_) : x_.scalar_type();
    MB_CHECK(tensor.scalar_type() == dtype, "modelbatch::", op_, ": ", expected.name,
             expected.is_wide ? " must be float64 where x is, and float32 otherwise"
                              : " and x must have the same dtype");
    MB_CHECK(tensor.device() == x_.device(), "modelbatch::", op_, ": ", expected.name,
             " and x must be on the same device");
    seen_.push_back(expected);
    size_.models = std::max(size_.models, tensor.size(0));
  }

  // Checks dim 0 of everything expected, and returns all sizes.
  RnnSize checked() const {
    for (const RnnExpected& expected : seen_) {
      const int64_t models = expected.tensor->size(0);
      MB_CHECK(models == 1 || models == size_.models, "modelbatch::", op_, ": ", expected.name,
               " must have shape ", text(std::to_string(size_.models), expected.sizes),
               ", or 1 as first size where all models share it; got ",
               shape_text(*expected.tensor));
    }
    return size_;
  }

 private:
  void check_batch_sizes(const Ints& batch_sizes) {
    MB_CHECK(!batch_sizes.empty(), "modelbatch::", op_,
             ": Expected sequence length to be larger than 0 in RNN");
    int64_t rows = 0, last = batch_sizes[0];
    for (int64_t batch : batch_sizes) {
      MB_CHECK(batch >= 0 && batch <= last, "modelbatch::", op_,
               ": batch_sizes must not be negative and must not rise");
      rows += batch;
      last = batch;
    }
    MB_CHECK(rows == size_.rows, "modelbatch::", op_, ": batch_sizes must add up to the ",
             size_.rows, " rows of x ", shape_text(x_), ", got ", rows);
    size_.batch = batch_sizes[0];
    size_.steps = static_cast<int64_t>(batch_sizes.size());
  }

  static std::string text(const std::string& models, const Ints& sizes) {
    std::string text = "[" + models;
    for (int64_t size : sizes) text += ", " + std::to_string(size);
    return text + "]";
  }

  const char* op_;
  const Tensor& x_;
  RnnSize size_{0, 0, 0, 0, 0, 0, 0};
  std::vector<RnnExpected> seen_;
};

inline RnnSize checked_rnn(const char* op, int64_t num_gates, const RnnInputs& in,
                           const Ints& batch_sizes) {
  return RnnChecker(op, num_gates, in, batch_sizes).checked();
}

// The arguments that only backward has; null where absent.
struct RnnSaved {
  const Tensor* grad_y;
  const Tensor* grad_h_n;
  const Tensor* grad_c_n;
  const Tensor* y;
  const Tensor* gates;
  const Tensor* cells;
};

inline RnnSize checked_rnn_backward(const char* op, int64_t num_gates, const RnnInputs& in,
                                    const RnnSaved& saved, const Ints& batch_sizes) {
  RnnChecker checker(op, num_gates, in, batch_sizes);
  const RnnSize size = checker.size();
  checker.expect({"grad_y", "M, N, P", saved.grad_y, {size.rows, size.outputs}});
  checker.expect({"grad_h_n", "M, B, P", saved.grad_h_n, {size.batch, size.outputs}});
  checker.expect({"grad_c_n", "M, B, H", saved.grad_c_n, {size.batch, size.hidden}});
  checker.expect({"y", "M, N, P", saved.y, {size.rows, size.outputs}});
  checker.expect({"gates", "M, N, 4 H", saved.gates, {size.rows, 4 * size.hidden}, true});
  checker.expect({"cells", "M, N, H", saved.cells, {size.rows, size.hidden}, true});
  return checker.checked();
}

// The argument with dense slices: itself, or a copy. A shared one that was expanded along dim 0
// is copied once.
inline Tensor rnn_operand(const Tensor& tensor) {
  if (has_contiguous_slices(tensor, 1)) return tensor;
  if (tensor.size(0) > 1 && tensor.stride(0) == 0) {
    Tensor all = tensor;
    return torch::stable::contiguous(torch::stable::narrow(all, 0, 0, 1));
  }
  return torch::stable::contiguous(tensor);
}

// Elements from one model's slice of an operand to the next; 0 where all models share it.
inline int64_t rnn_model_stride(const Tensor& operand) {
  return operand.size(0) == 1 ? 0 : operand.stride(0);
}

}  // namespace modelbatch
