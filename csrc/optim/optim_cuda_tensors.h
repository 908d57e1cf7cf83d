// How the kernels of the optimizer family walk through a list of tensors.
//
// A model's tensors are laid end to end, each padded to whole packs (the elements that one thread
// takes at once), and cut into slices: block (x, y) takes slice x of model y. So a small model is
// one block however many tensors it has, and a large one is many. Padding exists in this numbering
// alone, not in memory. The table of tensors is a kernel argument; a long list takes several
// launches.
#pragma once

#include "common/cuda_launch.h"
#include "common/half.h"
#include "optim/optim_cuda.h"

namespace modelbatch {

constexpr int kThreads = 256;
constexpr int kPacksPerThread = 4;
constexpr int64_t kSlicePacks = kThreads * kPacksPerThread;  // 4096 elements, or 8192 halves
constexpr int kMaxTensors = 32;                              // Kernel arguments end at 4 KB.
constexpr int kMaxLayouts = 6;

// ---- element types ------------------------------------------------------------------------------

struct F32 {
  using type = float;
  using real = float;  // of states and arithmetic
  static constexpr int kPack = 4;
  __device__ static float widen(float value) { return value; }
  __device__ static float narrow(float value) { return value; }
};

struct F64 {
  using type = double;
  using real = double;
  static constexpr int kPack = 4;
  __device__ static double widen(double value) { return value; }
  __device__ static double narrow(double value) { return value; }
};

struct BF16 {
  using type = uint16_t;
  using real = float;
  static constexpr int kPack = 8;
  __device__ static float widen(uint16_t value) { return mb_bf16_to_f32(value); }
  __device__ static uint16_t narrow(float value) { return mb_f32_to_bf16(value); }
};

struct F16 {
  using type = uint16_t;
  using real = float;
  static constexpr int kPack = 8;
  __device__ static float widen(uint16_t value) { return mb_f16_to_f32(value); }
  __device__ static uint16_t narrow(float value) { return mb_f32_to_f16(value); }
};

// ---- packs --------------------------------------------------------------------------------------

// Read and written in accesses of 16 bytes.
template <class T, int count>
struct alignas(16) Pack {
  T values[count];
};

__device__ inline bool is_aligned(const void* address) { return ((uintptr_t)address & 15u) == 0; }

// `count` elements from `address` on, of which `valid` exist.
template <class T, int count>
__device__ inline Pack<T, count> load(const T* address, int64_t valid) {
  if (valid >= count && is_aligned(address)) {
    return *reinterpret_cast<const Pack<T, count>*>(address);
  }
  Pack<T, count> pack{};
  for (int i = 0; i < count; ++i) {
    if (i < valid) pack.values[i] = address[i];
  }
  return pack;
}

template <class T, int count>
__device__ inline void store(T* address, const Pack<T, count>& pack, int64_t valid) {
  if (valid >= count && is_aligned(address)) {
    *reinterpret_cast<Pack<T, count>*>(address) = pack;
    return;
  }
  for (int i = 0; i < count; ++i) {
    if (i < valid) address[i] = pack.values[i];
  }
}

// ---- the table of tensors -----------------------------------------------------------------------

// A gradient that is no dense run; sizes[0] is not needed.
struct Layout {
  int dims;
  uint32_t sizes[MB_OPTIM_CUDA_MAX_DIMS];
  int64_t strides[MB_OPTIM_CUDA_MAX_DIMS];
};

struct Entry {
  void* param;
  const void* grad;
  void* states[MB_OPTIM_MAX_STATES];
  int64_t numel;
  int64_t param_stride, grad_stride;
  int64_t state_strides[MB_OPTIM_MAX_STATES];
  int64_t end;     // in packs, from the launch's first tensor on
  int64_t layout;  // -1: dense
};

struct Table {
  int64_t num_packs;
  int num_tensors;
  int num_layouts;
  Entry entries[kMaxTensors];
  Layout layouts[kMaxLayouts];
};

__device__ inline int64_t offset_in(const Layout& layout, uint32_t element) {
  int64_t offset = 0;
  for (int dim = layout.dims - 1; dim > 0; --dim) {
    const uint32_t rest = element / layout.sizes[dim];
    offset += (int64_t)(element - rest * layout.sizes[dim]) * layout.strides[dim];
    element = rest;
  }
  return offset + (int64_t)element * layout.strides[0];
}

// Elements `first` and following of a model's gradient.
template <class T>
__device__ inline Pack<typename T::type, T::kPack> load_grad(const Table& table, const Entry& entry,
                                                             int64_t model, int64_t first) {
  using type = typename T::type;
  const type* slice = static_cast<const type*>(entry.grad) + model * entry.grad_stride;
  const int64_t valid = entry.numel - first;
  if (entry.layout < 0) return load<type, T::kPack>(slice + first, valid);
  const Layout& layout = table.layouts[entry.layout];
  Pack<type, T::kPack> pack{};
  for (int i = 0; i < T::kPack; ++i) {
    if (i < valid) pack.values[i] = slice[offset_in(layout, (uint32_t)(first + i))];
  }
  return pack;
}

// body(entry, first element) for every pack of this block's slice that falls to this thread.
template <int pack, class Body>
__device__ inline void for_each_pack(const Table& table, const Body& body) {
  const int64_t begin = (int64_t)blockIdx.x * kSlicePacks;
  const int64_t end = begin + kSlicePacks < table.num_packs ? begin + kSlicePacks : table.num_packs;
  int tensor = 0;
  int64_t tensor_begin = 0;  // in packs
  for (int64_t q = begin + threadIdx.x; q < end; q += kThreads) {
    while (q >= table.entries[tensor].end) tensor_begin = table.entries[tensor++].end;
    body(table.entries[tensor], (q - tensor_begin) * pack);
  }
}

// ---- launches ----------------------------------------------------------------------------------

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 grid_of(int64_t num_slices, int64_t num_models) {
  return dim3((unsigned)num_slices,
              (unsigned)(num_models < MB_MAX_GRID_Y ? num_models : MB_MAX_GRID_Y));
}

// launch(table, number of slices) for tables that hold all tensors, in order.
template <class Launch>
cudaError_t for_each_table(const mb_optim_cuda_tensor* tensors, int64_t num_tensors, int pack,
                           const Launch& launch) {
  Table table{};
  const auto flush = [&]() {
    if (table.num_packs == 0) return cudaSuccess;
    const cudaError_t error = launch(table, divide_up(table.num_packs, kSlicePacks));
    table = Table{};
    return error;
  };
  for (int64_t i = 0; i < num_tensors; ++i) {
    const mb_optim_cuda_tensor& tensor = tensors[i];
    if (tensor.numel == 0) continue;
    const bool is_full = table.num_tensors == kMaxTensors ||
                         (tensor.grad_dims != 0 && table.num_layouts == kMaxLayouts);
    if (is_full) {
      const cudaError_t error = flush();
      if (error != cudaSuccess) return error;
    }
    Entry& entry = table.entries[table.num_tensors++];
    entry.param = tensor.param;
    entry.grad = tensor.grad;
    entry.numel = tensor.numel;
    entry.param_stride = tensor.param_stride;
    entry.grad_stride = tensor.grad_stride;
    for (int s = 0; s < MB_OPTIM_MAX_STATES; ++s) {
      entry.states[s] = tensor.states[s];
      entry.state_strides[s] = tensor.state_strides[s];
    }
    table.num_packs += divide_up(tensor.numel, pack);
    entry.end = table.num_packs;
    entry.layout = -1;
    if (tensor.grad_dims == 0) continue;
    entry.layout = table.num_layouts;
    Layout& layout = table.layouts[table.num_layouts++];
    layout.dims = (int)tensor.grad_dims;
    for (int dim = 0; dim < layout.dims; ++dim) {
      layout.sizes[dim] = (uint32_t)tensor.grad_sizes[dim];
      layout.strides[dim] = tensor.grad_strides[dim];
    }
  }
  return flush();
}

}  // namespace modelbatch
