// Included before the `*_cuda_ops.cpp` files and library.cpp: makes of the CUDA operators a library
// of its own, torch.ops.modelbatch_emulated, whose kernels take CPU tensors.
#pragma once

#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

extern "C" const char* mb_emulation_error();

// There is one stream and no device to choose.
[[maybe_unused]] static AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

namespace torch::stable::accelerator {
struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int32_t) {}
  ~EmulatedDeviceGuard() {}  // Not trivial: the variable counts as used.
};
}  // namespace torch::stable::accelerator

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(launch)                                                      \
  do {                                                                              \
    if ((launch) != cudaSuccess) {                                                  \
      throw std::runtime_error("CUDA error: " + std::string(mb_emulation_error())); \
    }                                                                               \
  } while (0)

// torch 2.10 has it under another name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// Batched products. The CPU has none of halves with a float32 result: it gets the same numbers, and
// every product of two halves is exact in float32.
#define aoti_torch_cuda_bmm_out aoti_torch_cpu_bmm_out

[[maybe_unused]] static AOTITorchError mb_emulated_call(const char* name, const char* overload,
                                                        StableIValue* stack, uint64_t version) {
  if (std::string(name) != "aten::bmm" || std::string(overload) != "dtype_out") {
    return torch_call_dispatcher(name, overload, stack, version);
  }
  using torch::headeronly::ScalarType;
  using torch::stable::Tensor;
  const Tensor a = torch::stable::detail::to<Tensor>(stack[0]);
  const Tensor b = torch::stable::detail::to<Tensor>(stack[1]);
  const Tensor out = torch::stable::detail::to<Tensor>(stack[3]);
  const Tensor wide_a = torch::stable::to(a, ScalarType::Float);
  const Tensor wide_b = torch::stable::to(b, ScalarType::Float);
  stack[0] = torch::stable::detail::from(out);
  return aoti_torch_cpu_bmm_out(out.get(), wide_a.get(), wide_b.get());
}
#define torch_call_dispatcher mb_emulated_call

// A fragment's macro expands the name that is redefined below, a library's need not.
#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m) STABLE_TORCH_LIBRARY_FRAGMENT(ns, m)

// From here on, the words mean something else.
#define DeviceGuard EmulatedDeviceGuard
#define modelbatch modelbatch_emulated
#define CUDA CPU
