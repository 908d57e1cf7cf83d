// How a model's slice lies in memory. The kernels walk through the parameter's slice as one run of
// memory, in whatever order its dimensions have there; gradients are read in the same order.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "optim/optim_args.h"

namespace modelbatch {

using Ints = std::vector<int64_t>;

// The slice's dimensions longer than 1, outermost in memory first.
inline void memory_order(const StackedTensor& tensor, Ints& order) {
  order.clear();
  for (int64_t dim = 1; dim < tensor.dims; ++dim) {
    if (tensor.sizes[dim] == 1) continue;
    order.push_back(dim);
    for (size_t at = order.size() - 1; at > 0; --at) {
      if (tensor.strides[order[at - 1]] >= tensor.strides[dim]) break;
      std::swap(order[at - 1], order[at]);
    }
  }
}

inline void row_major_order(const StackedTensor& tensor, Ints& order) {
  order.clear();
  for (int64_t dim = 1; dim < tensor.dims; ++dim) {
    if (tensor.sizes[dim] != 1) order.push_back(dim);
  }
}

// Whether the slice is one run of memory in that order of its dimensions.
inline bool is_dense(const StackedTensor& tensor, const Ints& order) {
  int64_t expected = 1;
  for (size_t at = order.size(); at-- > 0;) {
    if (tensor.strides[order[at]] != expected) return false;
    expected *= tensor.sizes[order[at]];
  }
  return true;
}

inline bool same_order(const StackedTensor& a, const StackedTensor& b, const Ints& order) {
  return std::all_of(order.begin(), order.end(),
                     [&](int64_t dim) { return a.strides[dim] == b.strides[dim]; });
}

inline int64_t slice_numel_of(const StackedTensor& tensor) {
  int64_t numel = 1;
  for (int64_t dim = 1; dim < tensor.dims; ++dim) numel *= tensor.sizes[dim];
  return numel;
}

// A slice that is not dense in that order: neighbouring dimensions that are one run are merged.
struct StridedLayout {
  Ints sizes, strides;

  StridedLayout(const StackedTensor& tensor, const Ints& order) {
    for (int64_t dim : order) {
      const int64_t size = tensor.sizes[dim], stride = tensor.strides[dim];
      if (!sizes.empty() && strides.back() == stride * size) {
        sizes.back() *= size;
        strides.back() = stride;
      } else {
        sizes.push_back(size);
        strides.push_back(stride);
      }
    }
  }
};

// Tensors of unusual strides are worked on as contiguous copies: (tensor, copy).
using WorkingCopies = std::vector<std::pair<Tensor, Tensor>>;

inline void write_back(const WorkingCopies& copies) {
  for (const auto& [tensor, copy] : copies) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(tensor.get(), copy.get(), 0));
  }
}

// The tensor, or a contiguous copy that is written back after the step.
inline StackedTensor contiguous_or_copy(const Tensor& tensor, const StackedTensor& stacked,
                                        const Ints& row_major, WorkingCopies& copies) {
  if (is_dense(stacked, row_major)) return stacked;
  copies.emplace_back(tensor, torch::stable::contiguous(tensor));
  return read_stacked(copies.back().second, true);
}

// Finds the order in which the parameter's and the states' slices are dense alike; where there is
// none, replaces the odd ones by contiguous copies.
inline void find_common_order(OptimEntry& entry, const Tensor& param,
                              std::initializer_list<const TensorList*> states, size_t index,
                              Ints& order, WorkingCopies& copies) {
  row_major_order(entry.param, order);
  if (!is_dense(entry.param, order)) memory_order(entry.param, order);
  bool is_usual = is_dense(entry.param, order);
  for (const StackedTensor& state : entry.states) {
    is_usual = is_usual && (state.data == nullptr || same_order(state, entry.param, order));
  }
  if (is_usual) return;
  row_major_order(entry.param, order);
  entry.param = contiguous_or_copy(param, entry.param, order, copies);
  int number = 0;
  for (const TensorList* list : states) {
    StackedTensor& state = entry.states[number++];
    if (state.data != nullptr) state = contiguous_or_copy((*list)[index], state, order, copies);
  }
}

}  // namespace modelbatch
