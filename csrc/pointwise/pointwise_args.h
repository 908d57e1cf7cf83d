// Argument checks that the CPU and CUDA sides of the pointwise family share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <vector>

#include "common/check.h"

namespace modelbatch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Tensor checked_pointwise_input(const Tensor& input, const char* op) {
  MB_CHECK(input.scalar_type() == ScalarType::Float, "modelbatch::", op, ": input must be float32");
  return input.is_contiguous() ? input : torch::stable::contiguous(input);
}

inline Tensor pointwise_output(const Tensor& input) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < input.dim(); ++dim) sizes.push_back(input.size(dim));
  return torch::stable::empty(sizes, ScalarType::Float, std::nullopt, input.device());
}

}  // namespace modelbatch
