// Argument checks and allocation that the CPU and CUDA sides of the random family share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <string>
#include <vector>

#include "common/check.h"
#include "random/random.h"

namespace modelbatch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The column of a kernel table, or an error that names the operator.
inline int random_dtype(ScalarType dtype, const char* op) {
  switch (dtype) {
    case ScalarType::Float:
      return MB_F32;
    case ScalarType::Double:
      return MB_F64;
    case ScalarType::BFloat16:
      return MB_BF16;
    case ScalarType::Half:
      return MB_F16;
    default:
      fail("modelbatch::", op, ": dtype must be float32, float64, bfloat16 or float16");
  }
}

inline Tensor contiguous_or_same(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// A vector with one number per model, contiguous.
inline Tensor per_model_vector(const Tensor& tensor, const char* op, const char* name,
                               ScalarType dtype, int64_t num_models, const Tensor& reference) {
  MB_CHECK(tensor.scalar_type() == dtype, "modelbatch::", op, ": ", name, " must be ",
           dtype == ScalarType::Long ? "int64" : "float64");
  MB_CHECK(tensor.dim() == 1 && tensor.size(0) == num_models, "modelbatch::", op, ": ", name,
           " must have shape [", num_models, "], one per model, got ", shape_text(tensor));
  MB_CHECK(tensor.device() == reference.device(), "modelbatch::", op, ": ", name,
           " must be on the device of the other tensors");
  return contiguous_or_same(tensor);
}

// The streams of all models: seed and step, both int64 [M] and contiguous.
struct Streams {
  Tensor seed, step;
  int64_t num_models;
};

inline Streams checked_streams(const Tensor& seed, const Tensor& step, int64_t op_index,
                               const char* op) {
  MB_CHECK(seed.dim() == 1, "modelbatch::", op, ": seed must have shape [M], one per model, got ",
           shape_text(seed));
  MB_CHECK(op_index >= 0 && op_index < MB_MAX_OP_INDEX, "modelbatch::", op,
           ": op_index must be in [0, 2^20), got ", op_index);
  const int64_t num_models = seed.size(0);
  return {per_model_vector(seed, op, "seed", ScalarType::Long, num_models, seed),
          per_model_vector(step, op, "step", ScalarType::Long, num_models, seed), num_models};
}

// The input of dropout as one pointer: model m's slice begins at data + m * model_stride.
struct Slices {
  Tensor tensor;
  int64_t model_stride;  // 0 where all models share one slice
  int64_t slice_numel;
};

// Whether every model's slice of input [M, ...] is contiguous by itself, whatever the model axis
// does.
inline bool has_contiguous_slices(const Tensor& input) {
  int64_t expected = 1;
  for (int64_t dim = input.dim() - 1; dim > 0; --dim) {
    if (input.size(dim) != 1 && input.stride(dim) != expected) return false;
    expected *= input.size(dim);
  }
  return true;
}

inline Slices checked_slices(const Tensor& input, int64_t num_models, const char* op) {
  MB_CHECK(input.dim() >= 1 && input.size(0) == num_models, "modelbatch::", op,
           ": input must have shape [M, ...] with M = ", num_models, " models as seed, got ",
           shape_text(input));
  int64_t slice_numel = 1;
  for (int64_t dim = 1; dim < input.dim(); ++dim) slice_numel *= input.size(dim);
  if (num_models == 0 || slice_numel == 0 || has_contiguous_slices(input)) {
    return {input, input.stride(0), slice_numel};
  }
  if (input.stride(0) == 0) {  // Shared by all models: one copy is enough.
    return {torch::stable::contiguous(torch::stable::select(input, 0, 0)), 0, slice_numel};
  }
  return {torch::stable::contiguous(input), slice_numel, slice_numel};
}

inline Tensor empty_on_device_of(const Tensor& reference, const std::vector<int64_t>& size,
                                 ScalarType dtype) {
  return torch::stable::empty(size, dtype, std::nullopt, reference.device());
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) sizes.push_back(tensor.size(dim));
  return sizes;
}

// [M, *size], and the number of elements of one model.
inline std::vector<int64_t> stacked_size(int64_t num_models, const std::vector<int64_t>& size,
                                         const char* op, int64_t* slice_numel) {
  std::vector<int64_t> stacked{num_models};
  *slice_numel = 1;
  for (int64_t length : size) {
    MB_CHECK(length >= 0, "modelbatch::", op, ": size must not be negative, got ", length);
    stacked.push_back(length);
    *slice_numel *= length;
  }
  return stacked;
}

}  // namespace modelbatch
