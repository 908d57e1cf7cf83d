// One layer and direction of all models on a device, backward.
#pragma once

#include "rnn/rnn_cuda_layer.h"

namespace modelbatch {

// Not needed: of shape [0]. db_hh is for GRU alone: the others' is db_ih.
struct RnnBackward {
  Tensor dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr;
};

struct RnnNeeds {
  bool x, state, weight;
};

// What backward reads besides the operands, with dense slices, and what all steps write.
struct RnnGradients {
  std::optional<Tensor> grad_y, grad_h_n, grad_c_n, y, gates, cells;
  Tensor input;                                  // [M, N, G H]: of x W_ih^T + b_ih
  Tensor hidden;                                 // of h W_hh^T + b_hh: the same but for GRU
  Tensor grad_h;                                 // [M, B, P] wide, in the end of h0
  std::optional<Tensor> grad_c;                  // LSTM: [M, B, H] wide, in the end of c0
  std::optional<Tensor> projected, unprojected;  // w_hr: the gradient of y, and o tanh(c)

  RnnGradients(const RnnCellKind& kind, const RnnSize& size, const RnnOperands& in,
               const RnnSaved& saved)
      : grad_y(rnn_maybe_operand(saved.grad_y)),
        grad_h_n(rnn_maybe_operand(saved.grad_h_n)),
        grad_c_n(rnn_maybe_operand(saved.grad_c_n)),
        y(rnn_maybe_operand(saved.y)),
        gates(rnn_maybe_operand(saved.gates)),
        cells(rnn_maybe_operand(saved.cells)),
        input(rnn_empty({size.models, size.rows, kind.gates * size.hidden}, in.x.scalar_type(),
                        in.x)),
        hidden(input),
        grad_h(rnn_empty({size.models, size.batch, size.outputs}, rnn_wide_dtype(in.x), in.x)) {
    const ScalarType dtype = in.x.scalar_type();
    if (kind.cell == MB_RNN_CUDA_GRU) hidden = rnn_empty(shape_of(input), dtype, in.x);
    if (kind.cell == MB_RNN_CUDA_LSTM) {
      grad_c = rnn_empty({size.models, size.batch, size.hidden}, rnn_wide_dtype(in.x), in.x);
    }
    if (in.w_hr.has_value()) {
      projected = rnn_empty({size.models, size.rows, size.outputs}, dtype, in.x);
      unprojected = rnn_empty({size.models, size.rows, size.hidden}, dtype, in.x);
    }
  }
};

inline void rnn_backward_persistent(const RnnCellKind& kind, const RnnSize& size,
                                    const RnnOperands& in, const mb_rnn_runs& runs,
                                    const RnnGradients& grads, bool need_state,
                                    cudaStream_t stream) {
  mb_rnn_persistent_backward launch{};
  launch.cell = kind.cell;
  launch.num_models = size.models;
  launch.hidden = size.hidden;
  launch.batch = size.batch;
  launch.runs = runs;
  launch.grad_y = rnn_array(grads.grad_y);
  launch.grad_h_n = rnn_array(grads.grad_h_n);
  launch.grad_c_n = rnn_array(grads.grad_c_n);
  launch.w_hh = rnn_array(&in.w_hh);
  launch.h0 = rnn_array(&in.h0);
  launch.c0 = rnn_array(in.c0);
  launch.y = rnn_array(grads.y);
  launch.gates = rnn_array(grads.gates);
  launch.cells = rnn_array(grads.cells);
  launch.grad_input = rnn_output(grads.input);
  launch.grad_hidden = rnn_output(grads.hidden);
  if (need_state) {
    launch.grad_h0 = rnn_output(grads.grad_h);
    launch.grad_c0 = rnn_output(grads.grad_c);
  }
  launch.stream = stream;
  STD_CUDA_CHECK(mb_rnn_persistent_backward_cuda(launch));
}

inline void rnn_fill(Tensor& to, const std::optional<Tensor>& from) {
  if (from.has_value()) {
    rnn_copy(to, *from);
  } else {
    torch::stable::zero_(to);
  }
}

inline void rnn_backward_steps(const RnnCellKind& kind, const RnnSize& size, const RnnOperands& in,
                               const Ints& batch_sizes, bool reverse, RnnGradients& grads,
                               bool need_state, cudaStream_t stream) {
  const int64_t M = size.models, H = size.hidden, P = size.outputs, columns = kind.gates * H;
  const ScalarType wide = rnn_wide_dtype(in.x);
  check_rnn_step(size);
  const int dtype = rnn_cuda_dtype(in.x.scalar_type());
  rnn_fill(grads.grad_h, grads.grad_h_n);
  if (grads.grad_c.has_value()) rnn_fill(*grads.grad_c, grads.grad_c_n);
  std::optional<Tensor> direct, grad_unprojected;
  if (kind.cell == MB_RNN_CUDA_GRU) {
    direct = rnn_empty({M, size.batch, H}, wide, in.x);
    torch::stable::zero_(*direct);
  }
  if (in.w_hr.has_value()) grad_unprojected = rnn_empty({M, size.batch, H}, wide, in.x);
  mb_rnn_backward_step launch{};
  launch.cell = kind.cell;
  launch.dtype = dtype;
  launch.num_models = M;
  launch.hidden = H;
  launch.grad_h = rnn_output(in.w_hr.has_value() ? *grad_unprojected : grads.grad_h);
  launch.grad_direct = rnn_output(direct);
  launch.grad_c = rnn_output(grads.grad_c);
  launch.c0 = rnn_array(in.c0);
  launch.h0 = rnn_array(&in.h0);
  launch.stream = stream;
  const Tensor weights = rnn_matrices(in.w_hh, M, 0, columns, P);
  std::optional<Tensor> grad_h;  // a view of the rows that take part
  std::vector<RnnStep> steps = rnn_steps(batch_sizes, reverse);
  while (!steps.empty()) {
    const RnnStep step = steps.back();
    steps.pop_back();
    if (step.rows != launch.rows) grad_h = rnn_matrices(grads.grad_h, M, 0, step.rows, P);
    launch.rows = step.rows;
    launch.prev_rows = step.prev_rows;
    launch.grad_y = rnn_array(grads.grad_y, step.first);
    if (in.w_hr.has_value()) {
      STD_CUDA_CHECK(mb_rnn_add_cuda(dtype, M, step.rows * P, rnn_array(&grads.grad_h),
                                     launch.grad_y, rnn_output(grads.projected, step.first),
                                     stream));
      rnn_multiply(rnn_matrices(*grad_unprojected, M, 0, step.rows, H),
                   rnn_matrices(*grads.projected, M, step.first, step.rows, P),
                   rnn_matrices(*in.w_hr, M, 0, P, H));
      launch.grad_y = {nullptr, 0};
    }
    launch.prev_cells = rnn_array(grads.cells, step.prev_first);
    launch.prev_y = rnn_array(grads.y, step.prev_first);
    launch.y = rnn_array(grads.y, step.first);
    launch.gates = rnn_array(grads.gates, step.first);
    launch.cells = rnn_array(grads.cells, step.first);
    launch.grad_input = rnn_output(grads.input, step.first);
    launch.grad_hidden = rnn_output(grads.hidden, step.first);
    launch.unprojected = rnn_output(grads.unprojected, step.first);
    STD_CUDA_CHECK(mb_rnn_backward_step_cuda(launch));
    if (!steps.empty() || need_state) {
      rnn_multiply(*grad_h, rnn_matrices(grads.hidden, M, step.first, step.rows, columns), weights);
    }
  }
  if (direct.has_value() && need_state) {
    STD_CUDA_CHECK(mb_rnn_add_cuda(rnn_cuda_dtype(wide), M, size.batch * H,
                                   rnn_array(&grads.grad_h), rnn_array(direct),
                                   rnn_output(grads.grad_h), stream));
  }
}

// The states that the steps began with, [M, N, P].
inline Tensor rnn_previous(const RnnSize& size, const RnnOperands& in, const Ints& batch_sizes,
                           bool reverse, const Tensor& y, cudaStream_t stream) {
  const Tensor previous = rnn_empty({size.models, size.rows, size.outputs}, y.scalar_type(), y);
  mb_rnn_previous launch{};
  launch.element_size = static_cast<int>(y.element_size());
  launch.reverse = reverse;
  launch.num_models = size.models;
  launch.columns = size.outputs;
  launch.y = rnn_array(&y);
  launch.h0 = rnn_array(&in.h0);
  launch.to = rnn_output(previous);
  launch.stream = stream;
  const std::vector<RnnRun> runs = rnn_runs(batch_sizes);
  for (size_t i = 0; i < runs.size(); ++i) {
    launch.first_row = runs[i].first_row;
    launch.steps = runs[i].steps;
    launch.batch = runs[i].batch;
    launch.neighbour = 0;
    if (!reverse && i > 0) launch.neighbour = runs[i - 1].batch;
    if (reverse && i + 1 < runs.size()) launch.neighbour = runs[i + 1].batch;
    STD_CUDA_CHECK(mb_rnn_previous_cuda(launch));
  }
  return previous;
}

// [M, columns]: the sums of [M, N, columns] over its rows.
inline Tensor rnn_bias_gradient(const Tensor& grads, cudaStream_t stream) {
  Tensor sums = rnn_empty({grads.size(0), grads.size(2)}, grads.scalar_type(), grads);
  STD_CUDA_CHECK(mb_rnn_bias_gradient_cuda(rnn_cuda_dtype(grads.scalar_type()), grads.size(0),
                                           grads.size(1), grads.size(2), grads.const_data_ptr(),
                                           sums.mutable_data_ptr(), stream));
  return sums;
}

// [M, a's columns, b's columns]: a^T b of every model.
inline Tensor rnn_weight_gradient(const Tensor& a, const Tensor& b) {
  const int64_t M = a.size(0), N = a.size(1);
  Tensor result = rnn_empty({M, a.size(2), b.size(2)}, a.scalar_type(), a);
  rnn_multiply(result, rnn_transposed(a, M, N, a.size(2)), rnn_matrices(b, M, 0, N, b.size(2)));
  return result;
}

inline RnnBackward rnn_backward(const RnnCellKind& kind, const RnnSize& size,
                                const RnnInputs& inputs, const RnnSaved& saved,
                                const Ints& batch_sizes, bool reverse, const RnnNeeds& needs,
                                cudaStream_t stream) {
  const int64_t M = size.models, N = size.rows, columns = kind.gates * size.hidden;
  const RnnOperands in(inputs);
  RnnGradients grads(kind, size, in, saved);
  const ScalarType dtype = in.x.scalar_type();
  const auto runs = rnn_persistent_runs(size, inputs, batch_sizes, reverse);
  if (runs.has_value()) {
    rnn_backward_persistent(kind, size, in, *runs, grads, needs.state, stream);
  } else {
    rnn_backward_steps(kind, size, in, batch_sizes, reverse, grads, needs.state, stream);
  }
  // Outputs must not alias, so each missing one is a tensor of its own.
  const auto none = [&] { return rnn_empty({0}, dtype, in.x); };
  RnnBackward result{none(), none(), none(), none(), none(), none(), none(), none()};
  const auto of_state = [&](const Tensor& grad) {
    if (grad.scalar_type() == dtype) return grad;
    Tensor rounded = rnn_empty(shape_of(grad), dtype, grad);
    rnn_copy(rounded, grad);
    return rounded;
  };
  if (needs.state) {
    result.dh0 = of_state(grads.grad_h);
    if (grads.grad_c.has_value()) result.dc0 = of_state(*grads.grad_c);
  }
  if (needs.x) {
    result.dx = rnn_empty({M, N, size.inputs}, dtype, in.x);
    rnn_multiply(result.dx, rnn_matrices(grads.input, M, 0, N, columns),
                 rnn_matrices(in.w_ih, M, 0, columns, size.inputs));
  }
  if (needs.weight) {
    result.dw_ih = rnn_weight_gradient(grads.input, in.x);
    result.dw_hh = rnn_weight_gradient(
        grads.hidden, rnn_previous(size, in, batch_sizes, reverse, *grads.y, stream));
    result.db_ih = rnn_bias_gradient(grads.input, stream);
    if (kind.cell == MB_RNN_CUDA_GRU) result.db_hh = rnn_bias_gradient(grads.hidden, stream);
    if (in.w_hr.has_value()) {
      result.dw_hr = rnn_weight_gradient(*grads.projected, *grads.unprojected);
    }
  }
  return result;
}

}  // namespace modelbatch
