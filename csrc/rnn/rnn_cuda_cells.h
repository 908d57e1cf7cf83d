// One element's gates, for the step kernels and the persistent ones.
//
// exp and tanh are the CUDA library's accurate ones (two units in the last place), not those of
// common/elementary.h: the GEMMs around them add in an order of their own, so equal bits on all
// devices are out of reach, and the library's take fewer instructions and exist for float64.
#pragma once

#include "common/cuda_launch.h"
#include "common/half.h"
#include "rnn/rnn_cuda.h"

namespace modelbatch {

// ---- element types ------------------------------------------------------------------------------

struct RnnF32 {
  using type = float;
  using real = float;  // of gates, cells and arithmetic
  __device__ static float widen(float value) { return value; }
  __device__ static float narrow(float value) { return value; }
};

struct RnnF64 {
  using type = double;
  using real = double;
  __device__ static double widen(double value) { return value; }
  __device__ static double narrow(double value) { return value; }
};

struct RnnBF16 {
  using type = uint16_t;
  using real = float;
  __device__ static float widen(uint16_t value) { return mb_bf16_to_f32(value); }
  __device__ static uint16_t narrow(float value) { return mb_f32_to_bf16(value); }
};

struct RnnF16 {
  using type = uint16_t;
  using real = float;
  __device__ static float widen(uint16_t value) { return mb_f16_to_f32(value); }
  __device__ static uint16_t narrow(float value) { return mb_f32_to_f16(value); }
};

template <class T>
__device__ inline T* slice_of(const mb_rnn_array& array, int64_t model) {
  return static_cast<T*>(array.data) + model * array.model_stride;
}

// ---- functions ----------------------------------------------------------------------------------

__device__ inline float rnn_exp(float x) { return expf(x); }
__device__ inline double rnn_exp(double x) { return exp(x); }
__device__ inline float rnn_tanh(float x) { return tanhf(x); }
__device__ inline double rnn_tanh(double x) { return tanh(x); }

template <class R>
__device__ inline R rnn_sigmoid(R x) {
  return (R)1 / ((R)1 + rnn_exp(-x));
}

// ---- cells --------------------------------------------------------------------------------------
//
// kGates gates; `forward` turns what the GEMMs made into what is saved, `backward` what is saved
// and the gradients of the new state into those of what the GEMMs made.

struct LstmCell {
  static constexpr int kGates = 4;

  // pre: i, f, g, o before their activations, after it saved; c becomes the new cell; yields h.
  template <class R>
  __device__ static R forward(R* pre, R& c) {
    pre[0] = rnn_sigmoid(pre[0]);
    pre[1] = rnn_sigmoid(pre[1]);
    pre[2] = rnn_tanh(pre[2]);
    pre[3] = rnn_sigmoid(pre[3]);
    c = pre[1] * c + pre[0] * pre[2];
    return pre[3] * rnn_tanh(c);
  }

  // grad_c becomes the gradient of the previous cell; grad: of i, f, g, o before activation.
  // Yields o tanh(c), the new state.
  template <class R>
  __device__ static R backward(const R* gates, R c, R prev_c, R grad_h, R& grad_c, R* grad) {
    const R i = gates[0], f = gates[1], g = gates[2], o = gates[3];
    const R t = rnn_tanh(c);
    const R total = grad_c + grad_h * o * ((R)1 - t * t);
    grad[0] = total * g * i * ((R)1 - i);
    grad[1] = total * prev_c * f * ((R)1 - f);
    grad[2] = total * i * ((R)1 - g * g);
    grad[3] = grad_h * t * o * ((R)1 - o);
    grad_c = total * f;
    return o * t;
  }
};

struct GruCell {
  static constexpr int kGates = 3;

  // input: r, z, n of x W_ih^T + b_ih; hidden: of h W_hh^T + b_hh. Saves r, z, n and hidden n.
  template <class R>
  __device__ static R forward(const R* input, const R* hidden, R h, R* saved) {
    const R r = rnn_sigmoid(input[0] + hidden[0]);
    const R z = rnn_sigmoid(input[1] + hidden[1]);
    const R n = rnn_tanh(input[2] + r * hidden[2]);
    saved[0] = r;
    saved[1] = z;
    saved[2] = n;
    saved[3] = hidden[2];
    return n + z * (h - n);
  }

  // grad: of r, z, n in x W_ih^T + b_ih; grad_hidden_n: of n in h W_hh^T + b_hh, whose r and z are
  // the same. Yields the gradient of the previous state that goes past the GEMM.
  template <class R>
  __device__ static R backward(const R* saved, R prev_h, R grad_h, R* grad, R& grad_hidden_n) {
    const R r = saved[0], z = saved[1], n = saved[2];
    grad[2] = grad_h * ((R)1 - z) * ((R)1 - n * n);
    grad[1] = grad_h * (prev_h - n) * z * ((R)1 - z);
    grad[0] = grad[2] * saved[3] * r * ((R)1 - r);
    grad_hidden_n = grad[2] * r;
    return grad_h * z;
  }
};

template <bool relu>
struct RnnCell {
  static constexpr int kGates = 1;

  template <class R>
  __device__ static R forward(R pre) {
    if (!relu) return rnn_tanh(pre);
    return pre < (R)0 ? (R)0 : pre;  // NaN stays NaN
  }

  template <class R>
  __device__ static R backward(R y, R grad_h) {
    if (!relu) return grad_h * ((R)1 - y * y);
    return y > (R)0 ? grad_h : (R)0;
  }
};

// launch(T{}) with the element type of `dtype`.
template <class Launch>
cudaError_t with_rnn_dtype(int dtype, const Launch& launch) {
  switch (dtype) {
    case MB_RNN_CUDA_F32:
      return launch(RnnF32{});
    case MB_RNN_CUDA_F64:
      return launch(RnnF64{});
    case MB_RNN_CUDA_BF16:
      return launch(RnnBF16{});
    case MB_RNN_CUDA_F16:
      return launch(RnnF16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace modelbatch
