// One layer and direction of all models on a device, forward.
#pragma once

#include "rnn/rnn_cuda_layer.h"

namespace modelbatch {

// Absent: what the cell does not have.
struct RnnForward {
  Tensor y, h_n;
  std::optional<Tensor> c_n, gates, cells;
};

// x W_ih^T of all steps: [M, N, *] in gates or y where there is room, or in a tensor of its own;
// [1, N, *] where both are shared.
inline Tensor rnn_projected(const RnnCellKind& kind, const RnnSize& size, const RnnOperands& in,
                            const RnnForward& result) {
  const int64_t columns = kind.gates * size.hidden;
  const ScalarType wide = rnn_wide_dtype(in.x);
  const bool is_shared = in.x.size(0) == 1 && in.w_ih.size(0) == 1 && size.models > 1;
  const int64_t models = is_shared ? 1 : size.models;
  Tensor projected = is_shared                  ? rnn_empty({1, size.rows, columns}, wide, in.x)
                     : result.gates.has_value() ? *result.gates
                     : result.y.scalar_type() == wide
                         ? result.y
                         : rnn_empty({models, size.rows, columns}, wide, in.x);
  rnn_multiply(rnn_matrices(projected, models, 0, size.rows, columns),
               rnn_matrices(in.x, models, 0, size.rows, size.inputs),
               rnn_transposed(in.w_ih, models, columns, size.inputs));
  return projected;
}

inline void rnn_forward_persistent(const RnnCellKind& kind, const RnnSize& size,
                                   const RnnOperands& in, const mb_rnn_runs& runs,
                                   const Tensor& projected, const RnnForward& result,
                                   cudaStream_t stream) {
  mb_rnn_persistent_forward launch{};
  launch.cell = kind.cell;
  launch.num_models = size.models;
  launch.hidden = size.hidden;
  launch.batch = size.batch;
  launch.runs = runs;
  launch.projected = rnn_array(&projected);
  launch.projected_stride = projected.size(2);
  launch.w_hh = rnn_array(&in.w_hh);
  launch.b_ih = rnn_array(in.b_ih);
  launch.b_hh = rnn_array(in.b_hh);
  launch.h0 = rnn_array(&in.h0);
  launch.c0 = rnn_array(in.c0);
  launch.y = rnn_output(result.y);
  launch.h_n = rnn_output(result.h_n);
  launch.c_n = rnn_output(result.c_n);
  launch.gates = rnn_output(result.gates);
  launch.cells = rnn_output(result.cells);
  launch.stream = stream;
  STD_CUDA_CHECK(mb_rnn_persistent_forward_cuda(launch));
}

inline void rnn_forward_steps(const RnnCellKind& kind, const RnnSize& size, const RnnOperands& in,
                              const Ints& batch_sizes, bool reverse, const Tensor& projected,
                              const RnnForward& result, cudaStream_t stream) {
  const int64_t M = size.models, H = size.hidden, P = size.outputs, columns = kind.gates * H;
  check_rnn_step(size);
  rnn_copy(result.h_n, in.h0);
  const Tensor recurrent = rnn_empty({M, size.batch, columns}, rnn_wide_dtype(in.x), in.x);
  std::optional<Tensor> unprojected;
  if (in.w_hr.has_value()) {
    unprojected = rnn_empty({M, size.batch, H}, in.x.scalar_type(), in.x);
  }
  mb_rnn_forward_step launch{};
  launch.cell = kind.cell;
  launch.dtype = rnn_cuda_dtype(in.x.scalar_type());
  launch.num_models = M;
  launch.hidden = H;
  launch.projected_stride = projected.size(2);
  launch.recurrent = rnn_output(recurrent);
  launch.b_ih = rnn_array(in.b_ih);
  launch.b_hh = rnn_array(in.b_hh);
  launch.c0 = rnn_array(in.c0);
  launch.state = rnn_output(unprojected.has_value() ? *unprojected : result.h_n);
  launch.c_n = rnn_output(result.c_n);
  launch.stream = stream;
  const Tensor weights = rnn_transposed(in.w_hh, M, columns, P);
  std::optional<Tensor> state, products, projection;  // views of the rows that take part
  int64_t rows = 0;
  for (const RnnStep& step : rnn_steps(batch_sizes, reverse)) {
    if (step.rows != rows) {
      rows = step.rows;
      state = rnn_matrices(result.h_n, M, 0, rows, P);
      products = rnn_matrices(recurrent, M, 0, rows, columns);
    }
    rnn_multiply(*products, *state, weights);
    launch.rows = rows;
    launch.prev_rows = step.prev_rows;
    launch.projected = rnn_array(&projected, step.first);
    launch.prev_cells = rnn_array(result.cells, step.prev_first);
    if (!unprojected.has_value()) launch.y = rnn_output(result.y, step.first);
    launch.gates = rnn_output(result.gates, step.first);
    launch.cells = rnn_output(result.cells, step.first);
    STD_CUDA_CHECK(mb_rnn_forward_step_cuda(launch));
    if (unprojected.has_value()) {
      const Tensor y = rnn_matrices(result.y, M, step.first, rows, P);
      rnn_multiply(y, rnn_matrices(*unprojected, M, 0, rows, H), rnn_transposed(*in.w_hr, M, P, H));
      rnn_copy(*state, y);
    }
  }
}

inline RnnForward rnn_forward(const RnnCellKind& kind, const RnnSize& size, const RnnInputs& inputs,
                              const Ints& batch_sizes, bool reverse, cudaStream_t stream) {
  const int64_t M = size.models, N = size.rows, H = size.hidden;
  const RnnOperands in(inputs);
  const ScalarType dtype = in.x.scalar_type(), wide = rnn_wide_dtype(in.x);
  RnnForward result{rnn_empty({M, N, size.outputs}, dtype, in.x),
                    rnn_empty({M, size.batch, size.outputs}, dtype, in.x), std::nullopt,
                    std::nullopt, std::nullopt};
  if (kind.gates > 1) result.gates = rnn_empty({M, N, 4 * H}, wide, in.x);
  if (kind.cell == MB_RNN_CUDA_LSTM) {
    result.c_n = rnn_empty({M, size.batch, H}, dtype, in.x);
    result.cells = rnn_empty({M, N, H}, wide, in.x);
  }
  if (M == 0 || N == 0) return result;
  const Tensor projected = rnn_projected(kind, size, in, result);
  const auto runs = rnn_persistent_runs(size, inputs, batch_sizes, reverse);
  if (runs.has_value()) {
    rnn_forward_persistent(kind, size, in, *runs, projected, result, stream);
  } else {
    rnn_forward_steps(kind, size, in, batch_sizes, reverse, projected, result, stream);
  }
  return result;
}

}  // namespace modelbatch
