// modelbatch::lstm, gru and rnn and their backwards on CUDA: check, allocate, launch on the current
// stream. Sizes of batches are numbers on the host and nothing reads a tensor's values there, so a
// CUDA graph can capture all of it.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "common/cuda_stream.h"
#include "rnn/rnn_args.h"
#include "rnn/rnn_cuda.h"
#include "rnn/rnn_cuda_backward.h"
#include "rnn/rnn_cuda_forward.h"

namespace modelbatch {
namespace {

using Maybe = std::optional<Tensor>;
using torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cuda(const Tensor& x, const Tensor& h0,
                                                             const Tensor& c0, const Tensor& w_ih,
                                                             const Tensor& w_hh, const Maybe& b_ih,
                                                             const Maybe& b_hh, const Maybe& w_hr,
                                                             const Ints& batch_sizes,
                                                             bool reverse) {
  const DeviceGuard guard(x.get_device_index());
  const RnnInputs in{
      &x, &h0, &c0, &w_ih, &w_hh, rnn_optional(b_ih), rnn_optional(b_hh), rnn_optional(w_hr)};
  const RnnSize size = checked_rnn("lstm", kLstmGates, in, batch_sizes);
  RnnForward result = rnn_forward({MB_RNN_CUDA_LSTM, kLstmGates}, size, in, batch_sizes, reverse,
                                  current_cuda_stream(x.get_device_index()));
  return {result.y, result.h_n, *result.c_n, *result.gates, *result.cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward_cuda(
    const Maybe& grad_y, const Maybe& grad_h_n, const Maybe& grad_c_n, const Tensor& x,
    const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh, const Maybe& w_hr,
    const Tensor& y, const Tensor& gates, const Tensor& cells, const Ints& batch_sizes,
    bool reverse, bool need_x, bool need_state, bool need_weight) {
  const DeviceGuard guard(x.get_device_index());
  const RnnInputs in{&x, &h0, &c0, &w_ih, &w_hh, nullptr, nullptr, rnn_optional(w_hr)};
  const RnnSaved saved{
      rnn_optional(grad_y), rnn_optional(grad_h_n), rnn_optional(grad_c_n), &y, &gates, &cells};
  const RnnSize size = checked_rnn_backward("lstm_backward", kLstmGates, in, saved, batch_sizes);
  RnnBackward result =
      rnn_backward({MB_RNN_CUDA_LSTM, kLstmGates}, size, in, saved, batch_sizes, reverse,
                   {need_x, need_state, need_weight}, current_cuda_stream(x.get_device_index()));
  return {result.dx,    result.dh0,   result.dc0,  result.dw_ih,
          result.dw_hh, result.db_ih, result.dw_hr};
}

std::tuple<Tensor, Tensor, Tensor> gru_cuda(const Tensor& x, const Tensor& h0, const Tensor& w_ih,
                                            const Tensor& w_hh, const Maybe& b_ih,
                                            const Maybe& b_hh, const Ints& batch_sizes,
                                            bool reverse) {
  const DeviceGuard guard(x.get_device_index());
  const RnnInputs in{&x,     &h0, nullptr, &w_ih, &w_hh, rnn_optional(b_ih), rnn_optional(b_hh),
                     nullptr};
  const RnnSize size = checked_rnn("gru", kGruGates, in, batch_sizes);
  RnnForward result = rnn_forward({MB_RNN_CUDA_GRU, kGruGates}, size, in, batch_sizes, reverse,
                                  current_cuda_stream(x.get_device_index()));
  return {result.y, result.h_n, *result.gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward_cuda(
    const Maybe& grad_y, const Maybe& grad_h_n, const Tensor& x, const Tensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const Tensor& gates,
    const Ints& batch_sizes, bool reverse, bool need_x, bool need_state, bool need_weight) {
  const DeviceGuard guard(x.get_device_index());
  const RnnInputs in{&x, &h0, nullptr, &w_ih, &w_hh, nullptr, nullptr, nullptr};
  const RnnSaved saved{rnn_optional(grad_y), rnn_optional(grad_h_n), nullptr, &y, &gates, nullptr};
  const RnnSize size = checked_rnn_backward("gru_backward", kGruGates, in, saved, batch_sizes);
  RnnBackward result =
      rnn_backward({MB_RNN_CUDA_GRU, kGruGates}, size, in, saved, batch_sizes, reverse,
                   {need_x, need_state, need_weight}, current_cuda_stream(x.get_device_index()));
  return {result.dx, result.dh0, result.dw_ih, result.dw_hh, result.db_ih, result.db_hh};
}

std::tuple<Tensor, Tensor> rnn_cuda(const Tensor& x, const Tensor& h0, const Tensor& w_ih,
                                    const Tensor& w_hh, const Maybe& b_ih, const Maybe& b_hh,
                                    const Ints& batch_sizes, bool reverse, bool relu) {
  const DeviceGuard guard(x.get_device_index());
  const RnnInputs in{&x,     &h0, nullptr, &w_ih, &w_hh, rnn_optional(b_ih), rnn_optional(b_hh),
                     nullptr};
  const RnnSize size = checked_rnn("rnn", kRnnGates, in, batch_sizes);
  const RnnCellKind cell{relu ? MB_RNN_CUDA_RELU : MB_RNN_CUDA_TANH, kRnnGates};
  RnnForward result =
      rnn_forward(cell, size, in, batch_sizes, reverse, current_cuda_stream(x.get_device_index()));
  return {result.y, result.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward_cuda(
    const Maybe& grad_y, const Maybe& grad_h_n, const Tensor& x, const Tensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const Ints& batch_sizes, bool reverse,
    bool relu, bool need_x, bool need_state, bool need_weight) {
  const DeviceGuard guard(x.get_device_index());
  const RnnInputs in{&x, &h0, nullptr, &w_ih, &w_hh, nullptr, nullptr, nullptr};
  const RnnSaved saved{rnn_optional(grad_y), rnn_optional(grad_h_n), nullptr, &y, nullptr, nullptr};
  const RnnSize size = checked_rnn_backward("rnn_backward", kRnnGates, in, saved, batch_sizes);
  const RnnCellKind cell{relu ? MB_RNN_CUDA_RELU : MB_RNN_CUDA_TANH, kRnnGates};
  RnnBackward result =
      rnn_backward(cell, size, in, saved, batch_sizes, reverse, {need_x, need_state, need_weight},
                   current_cuda_stream(x.get_device_index()));
  return {result.dx, result.dh0, result.dw_ih, result.dw_hh, result.db_ih};
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CUDA, m) {
  m.impl("lstm", TORCH_BOX(&modelbatch::lstm_cuda));
  m.impl("lstm_backward", TORCH_BOX(&modelbatch::lstm_backward_cuda));
  m.impl("gru", TORCH_BOX(&modelbatch::gru_cuda));
  m.impl("gru_backward", TORCH_BOX(&modelbatch::gru_backward_cuda));
  m.impl("rnn", TORCH_BOX(&modelbatch::rnn_cuda));
  m.impl("rnn_backward", TORCH_BOX(&modelbatch::rnn_backward_cuda));
}
