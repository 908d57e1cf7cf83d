// One step of all models after its GEMM: a thread takes an element of the state at a time. Nothing
// is added across threads, so the order of the additions is fixed.
#include "common/cuda_launch.h"
#include "rnn/rnn_cuda.h"
#include "rnn/rnn_cuda_cells.h"

namespace modelbatch {
namespace {

constexpr int kThreads = 128;

// body(model, row, column) for every element of [M, rows, columns].
template <class Body>
__device__ inline void for_each_element(int64_t num_models, int64_t rows, int64_t columns,
                                        const Body& body) {
  const uint32_t width = (uint32_t)columns, count = (uint32_t)rows * width;
  for (int64_t model = blockIdx.y; model < num_models; model += gridDim.y) {
    for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += gridDim.x * kThreads) {
      body(model, (int64_t)(i / width), (int64_t)(i % width));
    }
  }
}

template <class Step, class Kernel>
cudaError_t launch_step(const Step& step, const Kernel& kernel) {
  const int64_t count = step.rows * step.hidden;
  if (count == 0 || step.num_models == 0) return cudaSuccess;
  if (count > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t models = step.num_models < MB_MAX_GRID_Y ? step.num_models : MB_MAX_GRID_Y;
  const dim3 grid((unsigned)((count + kThreads - 1) / kThreads), (unsigned)models);
  return MB_CUDA_LAUNCH(kernel, grid, dim3(kThreads), step.stream, step);
}

template <class T>
__device__ inline typename T::real bias_at(const mb_rnn_array& bias, int64_t model, int64_t at) {
  using type = const typename T::type;
  if (bias.data == nullptr) return 0;
  return T::widen(slice_of<type>(bias, model)[at]);
}

// ---- forward ------------------------------------------------------------------------------------

// The element's gates: in the input's part, x W_ih^T + b_ih, and in the hidden state's.
template <class T, int gates>
struct Preactivations {
  typename T::real input[gates], hidden[gates];

  __device__ Preactivations(const mb_rnn_forward_step& step, int64_t model, int64_t row,
                            int64_t h) {
    using real = const typename T::real;
    real* projected = slice_of<real>(step.projected, model) + row * step.projected_stride;
    real* recurrent = slice_of<real>(step.recurrent, model) + row * gates * step.hidden;
    for (int gate = 0; gate < gates; ++gate) {
      const int64_t at = gate * step.hidden + h;
      input[gate] = projected[at] + bias_at<T>(step.b_ih, model, at);
      hidden[gate] = recurrent[at] + bias_at<T>(step.b_hh, model, at);
    }
  }
};

template <class T>
__global__ void lstm_forward_kernel(mb_rnn_forward_step step) {
  using type = typename T::type;
  using real = typename T::real;
  const int64_t H = step.hidden;
  for_each_element(step.num_models, step.rows, H, [&](int64_t model, int64_t row, int64_t h) {
    const int64_t at = row * H + h;
    const Preactivations<T, 4> given(step, model, row, h);
    real pre[4];
    for (int gate = 0; gate < 4; ++gate) pre[gate] = given.input[gate] + given.hidden[gate];
    real c = row < step.prev_rows ? slice_of<const real>(step.prev_cells, model)[at]
                                  : T::widen(slice_of<const type>(step.c0, model)[at]);
    const real state = LstmCell::forward(pre, c);
    real* gates = slice_of<real>(step.gates, model) + row * 4 * H;
    for (int gate = 0; gate < 4; ++gate) gates[gate * H + h] = pre[gate];
    slice_of<real>(step.cells, model)[at] = c;
    slice_of<type>(step.c_n, model)[at] = T::narrow(c);
    slice_of<type>(step.state, model)[at] = T::narrow(state);
    if (step.y.data != nullptr) slice_of<type>(step.y, model)[at] = T::narrow(state);
  });
}

template <class T>
__global__ void gru_forward_kernel(mb_rnn_forward_step step) {
  using type = typename T::type;
  using real = typename T::real;
  const int64_t H = step.hidden;
  for_each_element(step.num_models, step.rows, H, [&](int64_t model, int64_t row, int64_t h) {
    const int64_t at = row * H + h;
    const Preactivations<T, 3> given(step, model, row, h);
    type* state = slice_of<type>(step.state, model) + at;
    real saved[4];
    *state = T::narrow(GruCell::forward(given.input, given.hidden, T::widen(*state), saved));
    real* gates = slice_of<real>(step.gates, model) + row * 4 * H;
    for (int gate = 0; gate < 4; ++gate) gates[gate * H + h] = saved[gate];
    slice_of<type>(step.y, model)[at] = *state;
  });
}

template <class T, bool relu>
__global__ void rnn_forward_kernel(mb_rnn_forward_step step) {
  using type = typename T::type;
  const int64_t H = step.hidden;
  for_each_element(step.num_models, step.rows, H, [&](int64_t model, int64_t row, int64_t h) {
    const Preactivations<T, 1> given(step, model, row, h);
    const type state = T::narrow(RnnCell<relu>::forward(given.input[0] + given.hidden[0]));
    slice_of<type>(step.state, model)[row * H + h] = state;
    slice_of<type>(step.y, model)[row * H + h] = state;
  });
}

// ---- backward -----------------------------------------------------------------------------------

template <class T>
__device__ inline typename T::real grad_of_state(const mb_rnn_backward_step& step, int64_t model,
                                                 int64_t at) {
  using type = const typename T::type;
  const typename T::real later = slice_of<const typename T::real>(step.grad_h, model)[at];
  if (step.grad_y.data == nullptr) return later;
  return later + T::widen(slice_of<type>(step.grad_y, model)[at]);
}

template <class T>
__global__ void lstm_backward_kernel(mb_rnn_backward_step step) {
  using type = typename T::type;
  using real = typename T::real;
  const int64_t H = step.hidden;
  for_each_element(step.num_models, step.rows, H, [&](int64_t model, int64_t row, int64_t h) {
    const int64_t at = row * H + h;
    const real* saved = slice_of<const real>(step.gates, model) + row * 4 * H + h;
    const real gates[4] = {saved[0], saved[H], saved[2 * H], saved[3 * H]};
    const real prev_c = row < step.prev_rows ? slice_of<const real>(step.prev_cells, model)[at]
                                             : T::widen(slice_of<const type>(step.c0, model)[at]);
    const real c = slice_of<const real>(step.cells, model)[at];
    real* grad_c = slice_of<real>(step.grad_c, model) + at;
    real grad[4];
    const real grad_h = grad_of_state<T>(step, model, at);
    const real state = LstmCell::backward(gates, c, prev_c, grad_h, *grad_c, grad);
    type* to = slice_of<type>(step.grad_input, model) + row * 4 * H + h;
    for (int gate = 0; gate < 4; ++gate) to[gate * H] = T::narrow(grad[gate]);
    if (step.unprojected.data != nullptr) {
      slice_of<type>(step.unprojected, model)[at] = T::narrow(state);
    }
  });
}

template <class T>
__global__ void gru_backward_kernel(mb_rnn_backward_step step) {
  using type = typename T::type;
  using real = typename T::real;
  const int64_t H = step.hidden;
  for_each_element(step.num_models, step.rows, H, [&](int64_t model, int64_t row, int64_t h) {
    const int64_t at = row * H + h;
    const real* gates = slice_of<const real>(step.gates, model) + row * 4 * H + h;
    const real saved[4] = {gates[0], gates[H], gates[2 * H], gates[3 * H]};
    const mb_rnn_array& previous = row < step.prev_rows ? step.prev_y : step.h0;
    const real prev_h = T::widen(slice_of<const type>(previous, model)[at]);
    real* direct = slice_of<real>(step.grad_direct, model) + at;
    const real grad_h = grad_of_state<T>(step, model, at) + *direct;
    real grad[3], grad_hidden_n;
    *direct = GruCell::backward(saved, prev_h, grad_h, grad, grad_hidden_n);
    type* input = slice_of<type>(step.grad_input, model) + row * 3 * H + h;
    type* hidden = slice_of<type>(step.grad_hidden, model) + row * 3 * H + h;
    for (int gate = 0; gate < 2; ++gate) {
      input[gate * H] = hidden[gate * H] = T::narrow(grad[gate]);
    }
    input[2 * H] = T::narrow(grad[2]);
    hidden[2 * H] = T::narrow(grad_hidden_n);
  });
}

template <class T, bool relu>
__global__ void rnn_backward_kernel(mb_rnn_backward_step step) {
  using type = typename T::type;
  using real = typename T::real;
  const int64_t H = step.hidden;
  for_each_element(step.num_models, step.rows, H, [&](int64_t model, int64_t row, int64_t h) {
    const int64_t at = row * H + h;
    const real y = T::widen(slice_of<const type>(step.y, model)[at]);
    const real grad = RnnCell<relu>::backward(y, grad_of_state<T>(step, model, at));
    slice_of<type>(step.grad_input, model)[at] = T::narrow(grad);
  });
}

}  // namespace
}  // namespace modelbatch

extern "C" cudaError_t mb_rnn_forward_step_cuda(mb_rnn_forward_step step) {
  using namespace modelbatch;
  return with_rnn_dtype(step.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    switch (step.cell) {
      case MB_RNN_CUDA_LSTM:
        return launch_step(step, lstm_forward_kernel<T>);
      case MB_RNN_CUDA_GRU:
        return launch_step(step, gru_forward_kernel<T>);
      case MB_RNN_CUDA_TANH:
        return launch_step(step, rnn_forward_kernel<T, false>);
      case MB_RNN_CUDA_RELU:
        return launch_step(step, rnn_forward_kernel<T, true>);
      default:
        return cudaErrorInvalidValue;
    }
  });
}

extern "C" cudaError_t mb_rnn_backward_step_cuda(mb_rnn_backward_step step) {
  using namespace modelbatch;
  return with_rnn_dtype(step.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    switch (step.cell) {
      case MB_RNN_CUDA_LSTM:
        return launch_step(step, lstm_backward_kernel<T>);
      case MB_RNN_CUDA_GRU:
        return launch_step(step, gru_backward_kernel<T>);
      case MB_RNN_CUDA_TANH:
        return launch_step(step, rnn_backward_kernel<T, false>);
      case MB_RNN_CUDA_RELU:
        return launch_step(step, rnn_backward_kernel<T, true>);
      default:
        return cudaErrorInvalidValue;
    }
  });
}
