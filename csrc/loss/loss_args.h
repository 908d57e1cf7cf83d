// Argument checks that the CPU and CUDA sides of the loss family share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "common/check.h"
#include "loss/loss.h"

namespace modelbatch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Logits [M, B, C] and targets as pointers: model m's targets begin at target + m * target_stride.
struct ClassLoss {
  Tensor logits, target;
  int dtype;
  int64_t num_models, rows, classes, target_stride;
};

inline ClassLoss checked_class_loss(const Tensor& logits, const Tensor& target) {
  const char* op = "modelbatch::cross_entropy: ";
  const ScalarType dtype = logits.scalar_type();
  MB_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, op,
           "logits must be float32 or float64");
  MB_CHECK(logits.dim() == 3 && logits.size(2) > 0, op,
           "logits must have shape [M, B, C] with at least one class, got ", shape_text(logits));
  const int64_t num_models = logits.size(0), rows = logits.size(1);
  const bool shared = target.dim() == 1;
  MB_CHECK(target.scalar_type() == ScalarType::Long, op, "target must be int64");
  MB_CHECK((shared && target.size(0) == rows) ||
               (target.dim() == 2 && target.size(0) == num_models && target.size(1) == rows),
           op, "target must have shape [B] or [M, B] for logits of shape ", shape_text(logits),
           ", got ", shape_text(target));
  MB_CHECK(target.device() == logits.device(), op, "target must be on the device of the logits");
  return {logits.is_contiguous() ? logits : torch::stable::contiguous(logits),
          target.is_contiguous() ? target : torch::stable::contiguous(target),
          dtype == ScalarType::Float ? MB_LOSS_F32 : MB_LOSS_F64,
          num_models,
          rows,
          logits.size(2),
          shared ? 0 : rows};
}

// losses [M] and slope [M, B, C], or [0] where none is wanted.
struct ClassLossResult {
  Tensor losses, slope;
};

inline ClassLossResult class_loss_result(const ClassLoss& loss, bool need_slope) {
  const auto like = [&](std::vector<int64_t> size) {
    return torch::stable::empty(size, loss.logits.scalar_type(), std::nullopt,
                                loss.logits.device());
  };
  return {like({loss.num_models}),
          like(need_slope ? std::vector<int64_t>{loss.num_models, loss.rows, loss.classes}
                          : std::vector<int64_t>{0})};
}

}  // namespace modelbatch
