// Stacks of matrices for batched GEMMs: views of tensors [M or 1, rows, columns] with dense slices.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>

#include "rnn/rnn_args.h"
#include "rnn/rnn_cuda.h"

namespace modelbatch {

inline Tensor rnn_view(const Tensor& base, const std::array<int64_t, 3>& sizes,
                       const std::array<int64_t, 3>& strides, int64_t first_element) {
  AtenTensorHandle view = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      base.get(), 3, sizes.data(), strides.data(), first_element, &view));
  return Tensor(view);
}

// [models, rows, columns]: rows from `first` on and the first columns of each slice. A shared
// tensor is expanded, by a stride of 0, which the GEMMs take without a copy.
inline Tensor rnn_matrices(const Tensor& tensor, int64_t models, int64_t first, int64_t rows,
                           int64_t columns) {
  const int64_t width = tensor.size(2);
  return rnn_view(tensor, {models, rows, columns}, {rnn_model_stride(tensor), width, 1},
                  first * width);
}

// The same, each matrix transposed: [models, columns, rows].
inline Tensor rnn_transposed(const Tensor& tensor, int64_t models, int64_t rows, int64_t columns) {
  return rnn_view(tensor, {models, columns, rows}, {rnn_model_stride(tensor), 1, tensor.size(2)},
                  0);
}

// to = a b, without a copy on the way. `to` has the dtype of a and b, or float32 where these are
// halves: then the sums, which are float32 in any case, are not rounded.
inline void rnn_multiply(const Tensor& to, const Tensor& a, const Tensor& b) {
  if (to.scalar_type() == a.scalar_type()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_bmm_out(to.get(), a.get(), b.get()));
    return;
  }
  std::array<StableIValue, 4> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(to.scalar_type()),
                                    torch::stable::detail::from(to)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // Owns a reference.
}

inline void rnn_copy(const Tensor& to, const Tensor& from) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

// ---- arguments of kernels -----------------------------------------------------------------------

// Rows from `first` on of a tensor that is only read; an absent one is NULL.
inline mb_rnn_array rnn_array(const Tensor* tensor, int64_t first = 0) {
  if (tensor == nullptr) return {nullptr, 0};
  const int64_t width = tensor->dim() == 3 ? tensor->size(2) : 1;
  const char* data = static_cast<const char*>(tensor->const_data_ptr());
  const int64_t bytes = first * width * static_cast<int64_t>(tensor->element_size());
  return {const_cast<char*>(data) + bytes, rnn_model_stride(*tensor)};
}

inline mb_rnn_array rnn_array(const std::optional<Tensor>& tensor, int64_t first = 0) {
  return rnn_array(rnn_optional(tensor), first);
}

// The same of one that is written.
inline mb_rnn_array rnn_output(const Tensor& tensor, int64_t first = 0) {
  const int64_t bytes = first * tensor.size(2) * static_cast<int64_t>(tensor.element_size());
  return {static_cast<char*>(tensor.mutable_data_ptr()) + bytes, tensor.stride(0)};
}

inline mb_rnn_array rnn_output(const std::optional<Tensor>& tensor, int64_t first = 0) {
  return tensor.has_value() ? rnn_output(*tensor, first) : mb_rnn_array{nullptr, 0};
}

inline int rnn_cuda_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return MB_RNN_CUDA_F32;
    case ScalarType::Double:
      return MB_RNN_CUDA_F64;
    case ScalarType::BFloat16:
      return MB_RNN_CUDA_BF16;
    default:
      return MB_RNN_CUDA_F16;
  }
}

// ---- steps --------------------------------------------------------------------------------------

// A step's rows, and those of the step that is computed before it: the first prev_rows of the batch
// took part in both.
struct RnnStep {
  int64_t first, rows, prev_first, prev_rows;
};

// In the order of computation; steps without rows are left out.
inline std::vector<RnnStep> rnn_steps(const Ints& batch_sizes, bool reverse) {
  std::vector<RnnStep> steps;
  int64_t first = 0;
  for (int64_t rows : batch_sizes) {
    if (rows > 0) steps.push_back({first, rows, 0, 0});
    first += rows;
  }
  if (reverse) std::reverse(steps.begin(), steps.end());
  for (size_t i = 1; i < steps.size(); ++i) {
    steps[i].prev_first = steps[i - 1].first;
    steps[i].prev_rows = std::min(steps[i].rows, steps[i - 1].rows);
  }
  return steps;
}

// Consecutive steps with equally many rows.
struct RnnRun {
  int64_t first_row, steps, batch;
};

inline std::vector<RnnRun> rnn_runs(const Ints& batch_sizes) {
  std::vector<RnnRun> runs;
  int64_t first = 0;
  for (int64_t batch : batch_sizes) {
    if (batch == 0) break;
    if (runs.empty() || runs.back().batch != batch) runs.push_back({first, 0, batch});
    ++runs.back().steps;
    first += batch;
  }
  return runs;
}

}  // namespace modelbatch
