// modelbatch::lstm, gru, rnn and their backward operators on the CPU: check, allocate, run over
// models in parallel. Every model is computed by one thread, and in the forward every sequence, in
// a fixed order of additions: its results depend neither on the other models nor on the number of
// threads.
//
// bfloat16 and float16 are widened to float32 before the kernels and rounded after them.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "rnn/rnn.h"
#include "rnn/rnn_args.h"

MB_DECLARE_TABLE(mb_rnn_kernels)

namespace modelbatch {
namespace {

const mb_rnn_cell_kernels& kernels(int cell, ScalarType wide) {
  static const mb_rnn_kernels& table = MB_SELECT_TABLE(mb_rnn_kernels);
  return table.cells[cell][wide == ScalarType::Double ? MB_RNN_F64 : MB_RNN_F32];
}

// An argument as the kernels read it: wide, with dense slices. An absent one has no data.
class Operand {
 public:
  Operand(const Tensor* tensor, ScalarType wide) {
    if (tensor == nullptr) return;
    // A slice that all models share stays one: only it is converted.
    const Tensor dense = rnn_operand(*tensor);
    tensor_ = dense.scalar_type() == wide ? dense : torch::stable::to(dense, wide);
    data_ = static_cast<const char*>(tensor_->const_data_ptr());
    step_ = rnn_model_stride(*tensor_) * static_cast<int64_t>(tensor_->element_size());
  }

  const void* operator[](int64_t model) const {
    return data_ == nullptr ? nullptr : data_ + model * step_;
  }

 private:
  std::optional<Tensor> tensor_;
  const char* data_ = nullptr;
  int64_t step_ = 0;
};

// A result [M, ...] in the wide dtype; one that is not wanted is of shape [0].
class Result {
 public:
  Result(bool is_wanted, const Ints& sizes, const Tensor& like, ScalarType wide)
      : is_wanted_(is_wanted), tensor_(empty(is_wanted ? sizes : Ints{0}, like, wide)) {
    data_ = static_cast<char*>(tensor_.mutable_data_ptr());
    const int64_t bytes = tensor_.numel() * static_cast<int64_t>(tensor_.element_size());
    step_ = is_wanted ? bytes / sizes[0] : 0;
  }

  void* operator[](int64_t model) const { return is_wanted_ ? data_ + model * step_ : nullptr; }

  void zero() { torch::stable::zero_(tensor_); }

  const Tensor& wide() const { return tensor_; }

  // Rounded to the dtype of the arguments.
  Tensor as(ScalarType dtype) const {
    return tensor_.scalar_type() == dtype ? tensor_ : torch::stable::to(tensor_, dtype);
  }

 private:
  static Tensor empty(const Ints& sizes, const Tensor& like, ScalarType wide) {
    Tensor result = torch::stable::empty(sizes, wide, std::nullopt, like.device());
    advise_huge_pages(result);
    return result;
  }

  bool is_wanted_;
  Tensor tensor_;
  char* data_;
  int64_t step_;
};

// First rows of all steps, and the end.
std::vector<int64_t> first_rows(const Ints& batch_sizes) {
  std::vector<int64_t> rows{0};
  for (int64_t batch : batch_sizes) rows.push_back(rows.back() + batch);
  return rows;
}

// The memory of all threads' kernels, each one's beginning at a cache line.
class Workspaces {
 public:
  Workspaces(int64_t count, int64_t elements, ScalarType wide)
      : bytes_((elements * (wide == ScalarType::Double ? 8 : 4) + kLine - 1) / kLine * kLine),
        memory_(new char[count * bytes_ + kLine]) {}

  void* operator[](int64_t index) const {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.get());
    return memory_.get() + ((kLine - begin % kLine) % kLine + index * bytes_);
  }

 private:
  static constexpr int64_t kLine = 64;
  int64_t bytes_;
  std::unique_ptr<char[]> memory_;
};

// body(task, workspace) for every task; threads take the next one when they are free.
template <class Body>
void for_each_task(int64_t tasks, int64_t elements, ScalarType wide, const Body& body) {
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t workers = std::min(tasks, threads);
  const Workspaces workspaces(workers, elements, wide);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      while (true) {
        const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
        if (task >= tasks) break;
        body(task, workspaces[worker]);
      }
    }
  });
}

struct ForwardResults {
  Tensor y, h_n, c_n, gates, cells;
};

ForwardResults forward(const char* op, int cell, int64_t num_gates, const RnnInputs& in,
                       const Ints& batch_sizes, bool reverse) {
  const RnnSize size = checked_rnn(op, num_gates, in, batch_sizes);
  const ScalarType dtype = in.x->scalar_type(), wide = rnn_wide_dtype(*in.x);
  const bool is_lstm = cell == MB_RNN_LSTM, has_gates = num_gates > 1;
  const Operand x(in.x, wide), h0(in.h0, wide), c0(in.c0, wide), w_ih(in.w_ih, wide),
      w_hh(in.w_hh, wide), b_ih(in.b_ih, wide), b_hh(in.b_hh, wide), w_hr(in.w_hr, wide);
  const Result y(true, {size.models, size.rows, size.outputs}, *in.x, wide);
  const Result h_n(true, {size.models, size.batch, size.outputs}, *in.x, wide);
  const Result c_n(is_lstm, {size.models, size.batch, size.hidden}, *in.x, wide);
  const Result gates(has_gates, {size.models, size.rows, 4 * size.hidden}, *in.x, wide);
  const Result cells(is_lstm, {size.models, size.rows, size.hidden}, *in.x, wide);
  const std::vector<int64_t> rows = first_rows(batch_sizes);
  const mb_rnn_shape shape{size.batch,   size.steps, size.inputs, size.hidden,
                           size.outputs, reverse,    rows.data()};
  if (size.batch > 0) {
    const mb_rnn_cell_kernels& kernel = kernels(cell, wide);
    // Where models do not keep all threads busy, their sequences are shared out.
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    const bool is_shared_out = size.models % threads != 0 && size.models < 4 * threads;
    const int64_t wanted = is_shared_out ? std::min(threads, (size.batch + 7) / 8) : 1;
    const int64_t part = (size.batch + wanted - 1) / wanted;
    const int64_t parts = (size.batch + part - 1) / part;
    for_each_task(size.models * parts, kernel.forward_workspace(&shape, part), wide,
                  [&](int64_t task, void* workspace) {
                    const int64_t model = task / parts;
                    const int64_t begin = task % parts * part;
                    const mb_rnn_forward args{x[model],    h0[model],   c0[model],   w_ih[model],
                                              w_hh[model], b_ih[model], b_hh[model], w_hr[model],
                                              y[model],    h_n[model],  c_n[model],  gates[model],
                                              cells[model]};
                    kernel.forward(&shape, &args, begin, std::min(begin + part, size.batch),
                                   workspace);
                  });
  }
  return {y.as(dtype), h_n.as(dtype), c_n.as(dtype), gates.wide(), cells.wide()};
}

struct BackwardResults {
  Tensor dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, dw_hr;
};

struct Needs {
  bool x, state, weight;
};

BackwardResults backward(const char* op, int cell, int64_t num_gates, const RnnInputs& in,
                         const RnnSaved& saved, const Ints& batch_sizes, bool reverse,
                         const Needs& need) {
  const RnnSize size = checked_rnn_backward(op, num_gates, in, saved, batch_sizes);
  const ScalarType dtype = in.x->scalar_type(), wide = rnn_wide_dtype(*in.x);
  const bool is_lstm = cell == MB_RNN_LSTM;
  const int64_t M = size.models, H = size.hidden, G = num_gates;
  const Operand x(in.x, wide), h0(in.h0, wide), c0(in.c0, wide), w_ih(in.w_ih, wide),
      w_hh(in.w_hh, wide), w_hr(in.w_hr, wide), y(saved.y, wide), gates(saved.gates, wide),
      cells(saved.cells, wide), grad_y(saved.grad_y, wide), grad_h_n(saved.grad_h_n, wide),
      grad_c_n(saved.grad_c_n, wide);
  Result dx(need.x, {M, size.rows, size.inputs}, *in.x, wide);
  Result dh0(need.state, {M, size.batch, size.outputs}, *in.x, wide);
  Result dc0(need.state && is_lstm, {M, size.batch, H}, *in.x, wide);
  Result dw_ih(need.weight, {M, G * H, size.inputs}, *in.x, wide);
  Result dw_hh(need.weight, {M, G * H, size.outputs}, *in.x, wide);
  Result db_ih(need.weight, {M, G * H}, *in.x, wide);
  Result db_hh(need.weight && cell == MB_RNN_GRU, {M, G * H}, *in.x, wide);
  Result dw_hr(need.weight && in.w_hr != nullptr, {M, size.outputs, H}, *in.x, wide);
  const std::vector<int64_t> rows = first_rows(batch_sizes);
  const mb_rnn_shape shape{size.batch,   size.steps, size.inputs, H,
                           size.outputs, reverse,    rows.data()};
  if (size.batch > 0) {
    const mb_rnn_cell_kernels& kernel = kernels(cell, wide);
    for_each_task(M, kernel.backward_workspace(&shape), wide, [&](int64_t model, void* workspace) {
      const mb_rnn_backward args{grad_y[model], grad_h_n[model], grad_c_n[model], x[model],
                                 h0[model],     c0[model],       w_ih[model],     w_hh[model],
                                 w_hr[model],   y[model],        gates[model],    cells[model],
                                 dx[model],     dh0[model],      dc0[model],      dw_ih[model],
                                 dw_hh[model],  db_ih[model],    db_hh[model],    dw_hr[model]};
      kernel.backward(&shape, &args, workspace);
    });
  } else {
    for (Result* result : {&dw_ih, &dw_hh, &db_ih, &db_hh, &dw_hr}) result->zero();
  }
  return {dx.as(dtype),    dh0.as(dtype),   dc0.as(dtype),   dw_ih.as(dtype),
          dw_hh.as(dtype), db_ih.as(dtype), db_hh.as(dtype), dw_hr.as(dtype)};
}

using Optional = std::optional<Tensor>;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_cpu(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const Optional& b_ih, const Optional& b_hh, const Optional& w_hr, const Ints& batch_sizes,
    bool reverse) {
  const RnnInputs in{
      &x, &h0, &c0, &w_ih, &w_hh, rnn_optional(b_ih), rnn_optional(b_hh), rnn_optional(w_hr)};
  const ForwardResults r = forward("lstm", MB_RNN_LSTM, kLstmGates, in, batch_sizes, reverse);
  return {r.y, r.h_n, r.c_n, r.gates, r.cells};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward_cpu(
    const Optional& grad_y, const Optional& grad_h_n, const Optional& grad_c_n, const Tensor& x,
    const Tensor& h0, const Tensor& c0, const Tensor& w_ih, const Tensor& w_hh,
    const Optional& w_hr, const Tensor& y, const Tensor& gates, const Tensor& cells,
    const Ints& batch_sizes, bool reverse, bool need_x, bool need_state, bool need_weight) {
  const RnnInputs in{&x, &h0, &c0, &w_ih, &w_hh, nullptr, nullptr, rnn_optional(w_hr)};
  const RnnSaved saved{
      rnn_optional(grad_y), rnn_optional(grad_h_n), rnn_optional(grad_c_n), &y, &gates, &cells};
  const BackwardResults r = backward("lstm_backward", MB_RNN_LSTM, kLstmGates, in, saved,
                                     batch_sizes, reverse, {need_x, need_state, need_weight});
  return {r.dx, r.dh0, r.dc0, r.dw_ih, r.dw_hh, r.db_ih, r.dw_hr};
}

std::tuple<Tensor, Tensor, Tensor> gru_cpu(const Tensor& x, const Tensor& h0, const Tensor& w_ih,
                                           const Tensor& w_hh, const Optional& b_ih,
                                           const Optional& b_hh, const Ints& batch_sizes,
                                           bool reverse) {
  const RnnInputs in{&x,     &h0, nullptr, &w_ih, &w_hh, rnn_optional(b_ih), rnn_optional(b_hh),
                     nullptr};
  const ForwardResults r = forward("gru", MB_RNN_GRU, kGruGates, in, batch_sizes, reverse);
  return {r.y, r.h_n, r.gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward_cpu(
    const Optional& grad_y, const Optional& grad_h_n, const Tensor& x, const Tensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const Tensor& gates,
    const Ints& batch_sizes, bool reverse, bool need_x, bool need_state, bool need_weight) {
  const RnnInputs in{&x, &h0, nullptr, &w_ih, &w_hh, nullptr, nullptr, nullptr};
  const RnnSaved saved{rnn_optional(grad_y), rnn_optional(grad_h_n), nullptr, &y, &gates, nullptr};
  const BackwardResults r = backward("gru_backward", MB_RNN_GRU, kGruGates, in, saved, batch_sizes,
                                     reverse, {need_x, need_state, need_weight});
  return {r.dx, r.dh0, r.dw_ih, r.dw_hh, r.db_ih, r.db_hh};
}

std::tuple<Tensor, Tensor> rnn_cpu(const Tensor& x, const Tensor& h0, const Tensor& w_ih,
                                   const Tensor& w_hh, const Optional& b_ih, const Optional& b_hh,
                                   const Ints& batch_sizes, bool reverse, bool relu) {
  const RnnInputs in{&x,     &h0, nullptr, &w_ih, &w_hh, rnn_optional(b_ih), rnn_optional(b_hh),
                     nullptr};
  const ForwardResults r =
      forward("rnn", relu ? MB_RNN_RELU : MB_RNN_TANH, kRnnGates, in, batch_sizes, reverse);
  return {r.y, r.h_n};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rnn_backward_cpu(
    const Optional& grad_y, const Optional& grad_h_n, const Tensor& x, const Tensor& h0,
    const Tensor& w_ih, const Tensor& w_hh, const Tensor& y, const Ints& batch_sizes, bool reverse,
    bool relu, bool need_x, bool need_state, bool need_weight) {
  const RnnInputs in{&x, &h0, nullptr, &w_ih, &w_hh, nullptr, nullptr, nullptr};
  const RnnSaved saved{rnn_optional(grad_y), rnn_optional(grad_h_n), nullptr, &y, nullptr, nullptr};
  const BackwardResults r =
      backward("rnn_backward", relu ? MB_RNN_RELU : MB_RNN_TANH, kRnnGates, in, saved, batch_sizes,
               reverse, {need_x, need_state, need_weight});
  return {r.dx, r.dh0, r.dw_ih, r.dw_hh, r.db_ih};
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("lstm", TORCH_BOX(&modelbatch::lstm_cpu));
  m.impl("lstm_backward", TORCH_BOX(&modelbatch::lstm_backward_cpu));
  m.impl("gru", TORCH_BOX(&modelbatch::gru_cpu));
  m.impl("gru_backward", TORCH_BOX(&modelbatch::gru_backward_cpu));
  m.impl("rnn", TORCH_BOX(&modelbatch::rnn_cpu));
  m.impl("rnn_backward", TORCH_BOX(&modelbatch::rnn_backward_cpu));
}
