// A model's slice of a stacked tensor, and stacked tensors whose slices have a wanted memory
// layout.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace modelbatch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

inline Ints shape_of(const Tensor& tensor) {
  Ints sizes;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) sizes.push_back(tensor.size(dim));
  return sizes;
}

// Whether the slices [B, C, *S] of stacked [M, B, C, *S] are channels_last: dense, with the
// channels innermost. One channel or one position counts as contiguous. `first` is the dimension of
// B.
inline bool has_channels_last_slices(const Tensor& tensor, int64_t first) {
  const int64_t channels = first + 1;
  const int64_t spatial_dims = tensor.dim() - first - 2;
  if (spatial_dims < 2 || spatial_dims > 3 || tensor.size(channels) == 1) return false;
  if (tensor.stride(channels) != 1) return false;
  int64_t expected = tensor.size(channels);
  int64_t positions = 1;
  for (int64_t dim = tensor.dim() - 1; dim > channels; --dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
    positions *= tensor.size(dim);
  }
  return positions > 1 && (tensor.size(first) == 1 || tensor.stride(first) == expected);
}

// Whether the slices are contiguous in the order of their dimensions.
inline bool has_contiguous_slices(const Tensor& tensor, int64_t first) {
  int64_t expected = 1;
  for (int64_t dim = tensor.dim() - 1; dim >= first; --dim) {
    if (tensor.size(dim) != 1 && tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

// Asks for huge pages for fresh memory of a large tensor. First touches of 4 KiB pages cost 0.37 ms
// per MB, a multiple of what the arithmetic on them costs; with 2 MiB pages it is 0.06 ms.
inline void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data_ptr());
  const uintptr_t bytes = static_cast<uintptr_t>(tensor.numel()) * tensor.element_size();
  const uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t last = (begin + bytes) & ~(kHugePage - 1);
  // Advice only: where the kernel has no huge pages the call fails and nothing changes.
  if (bytes >= 2 * kHugePage && last > first) {
    (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#else
  (void)tensor;
#endif
}

// An uninitialised stacked tensor whose model axis is outermost.
inline Tensor empty_stacked(const Ints& sizes, bool channels_last_slices, const Tensor& like) {
  const int64_t dims = static_cast<int64_t>(sizes.size());
  Ints strides(sizes.size());
  int64_t next = 1;
  const auto place = [&](int64_t dim) {
    strides[dim] = next;
    next *= sizes[dim] > 1 ? sizes[dim] : 1;
  };
  if (channels_last_slices) {
    place(2);
    for (int64_t dim = dims - 1; dim > 2; --dim) place(dim);
    place(1);
    place(0);
  } else {
    for (int64_t dim = dims - 1; dim >= 0; --dim) place(dim);
  }
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  advise_huge_pages(result);
  return result;
}

// The sizes and strides of a model's slice, read once, and slices made from them. A slice is a new
// tensor on the same memory: it carries no autograd state into the threads that use it.
class Slicer {
 public:
  explicit Slicer(const Tensor& stacked, bool is_shared = false)
      : data_(static_cast<char*>(stacked.data_ptr())),
        device_(stacked.device()),
        dtype_(stacked.scalar_type()) {
    for (int64_t dim = is_shared ? 0 : 1; dim < stacked.dim(); ++dim) {
      sizes_.push_back(stacked.size(dim));
      strides_.push_back(stacked.stride(dim));
    }
    if (!is_shared) {
      model_stride_ = stacked.stride(0) * static_cast<int64_t>(stacked.element_size());
    }
  }

  Tensor operator[](int64_t model) const {
    return torch::stable::from_blob(data_ + model * model_stride_, sizes_, strides_, device_,
                                    dtype_);
  }

 private:
  char* data_;
  torch::stable::Device device_;
  ScalarType dtype_;
  Ints sizes_, strides_;
  int64_t model_stride_ = 0;
};

}  // namespace modelbatch
