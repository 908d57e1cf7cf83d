// Argument checks of the `*_ops.cpp` files: a failed one raises RuntimeError in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

// torch 2.10 has it under another name.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#include <sstream>
#include <stdexcept>
#include <string>

namespace modelbatch {

// "[3, 4]", as torch prints a shape.
inline std::string shape_text(const torch::stable::Tensor& tensor) {
  std::ostringstream text;
  text << '[';
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text << (dim == 0 ? "" : ", ") << tensor.size(dim);
  }
  text << ']';
  return text.str();
}

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream text;
  (text << ... << args);
  throw std::runtime_error(text.str());
}

}  // namespace modelbatch

// MB_CHECK(x.dim() >= 1, "modelbatch::dropout: input must have ..., got shape ", shape_text(x));
#define MB_CHECK(condition, ...)                       \
  do {                                                 \
    if (!(condition)) ::modelbatch::fail(__VA_ARGS__); \
  } while (0)
