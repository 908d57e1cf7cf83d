// Rules for torch.vmap over torch's own LSTM, GRU and RNN, which torch lacks: a call is broken
// down, layer by layer and direction by direction, into modelbatch::lstm, gru and rnn. Tensors are
// what the user's function sees of them, without the axis of vmap; dim 0 of the operators is of
// size 1.
//
// The rules are registered one by one, at the request of modelbatch/ops/rnn_batching.py, which asks
// torch first whether it has a rule of its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/check.h"

namespace modelbatch {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::unsqueeze;
using torch::stable::detail::StableLibrary;
using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// Calls an operator that returns `results` tensors.
template <size_t results, class... Args>
std::array<Tensor, results> call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, std::max(results, sizeof...(Args))> stack{
      torch::stable::detail::from(args)...};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, results> tensors;
  for (size_t i = 0; i < results; ++i) {
    tensors[i] = torch::stable::detail::to<Tensor>(stack[i]);
  }
  return tensors;
}

Tensor cat(const Tensors& tensors, int64_t dim) {
  return tensors.size() == 1 ? tensors[0] : call<1>("aten::cat", "", tensors, dim)[0];
}

Tensor squeeze(const Tensor& tensor) {
  return call<1>("aten::squeeze", "dim", tensor, int64_t{0})[0];
}

// The dtype that torch's own CPU code keeps for a state while autocast lowers the matrix products.
Tensor in_dtype_of(const Tensor& result, const Tensor& given) {
  if (result.scalar_type() == given.scalar_type() || !result.is_cpu()) return result;
  return call<1>("aten::to", "dtype", result, given.scalar_type(), false, false,
                 std::optional<torch::headeronly::MemoryFormat>())[0];
}

enum class Kind { kLstm, kGru, kTanh, kRelu };

size_t num_states(Kind kind) { return kind == Kind::kLstm ? 2 : 1; }

// The tensors of one layer and direction; absent ones are empty.
struct Weights {
  Tensor w_ih, w_hh;
  OptionalTensor b_ih, b_hh, w_hr;
};

// rows [1, N, I] and states [1, B, *] to rows [1, N, P], followed by the states.
Tensors run_layer(Kind kind, const Tensor& rows, const Tensors& states, const Weights& w,
                  const Ints& batch_sizes, bool reverse) {
  if (kind == Kind::kLstm) {
    const auto out = call<5>("modelbatch::lstm", "", rows, states[0], states[1], w.w_ih, w.w_hh,
                             w.b_ih, w.b_hh, w.w_hr, batch_sizes, reverse);
    return {out[0], out[1], out[2]};
  }
  if (kind == Kind::kGru) {
    const auto out = call<3>("modelbatch::gru", "", rows, states[0], w.w_ih, w.w_hh, w.b_ih, w.b_hh,
                             batch_sizes, reverse);
    return {out[0], out[1]};
  }
  const auto out = call<2>("modelbatch::rnn", "", rows, states[0], w.w_ih, w.w_hh, w.b_ih, w.b_hh,
                           batch_sizes, reverse, kind == Kind::kRelu);
  return {out[0], out[1]};
}

struct Options {
  bool has_biases;
  int64_t num_layers;
  double dropout;
  bool train;
  bool bidirectional;
};

Weights take_weights(const Tensors& params, size_t first, bool has_biases, bool has_projection) {
  Weights w{unsqueeze(params[first], 0), unsqueeze(params[first + 1], 0), {}, {}, {}};
  size_t next = first + 2;
  if (has_biases) {
    w.b_ih = unsqueeze(params[next], 0);
    w.b_hh = unsqueeze(params[next + 1], 0);
    next += 2;
  }
  if (has_projection) w.w_hr = unsqueeze(params[next], 0);
  return w;
}

// x [N, I] to the rows of the last layer [N, D * P], followed by the states [L * D, B, *].
Tensors run_layers(Kind kind, const Tensor& x, const Ints& batch_sizes, const Tensors& hx,
                   const Tensors& params, const Options& options) {
  MB_CHECK(hx.size() == num_states(kind), "lstm expects two hidden states");
  const int64_t directions = options.bidirectional ? 2 : 1;
  const bool has_projection = kind == Kind::kLstm && hx[0].size(2) != hx[1].size(2);
  const size_t per_layer = (options.has_biases ? 4 : 2) + (has_projection ? 1 : 0);
  const auto total = static_cast<size_t>(options.num_layers * directions);
  MB_CHECK(params.size() == per_layer * total,
           "got an incorrect number of RNN parameters: ", params.size(), " instead of ",
           per_layer * total);
  for (const Tensor& state : hx) {
    MB_CHECK(state.dim() == 3 && state.size(0) == static_cast<int64_t>(total),
             "Expected hidden state of size [", total, ", B, H], got ", shape_text(state));
  }
  Tensor rows = unsqueeze(x, 0);
  std::vector<Tensors> last(hx.size());
  for (int64_t layer = 0; layer < options.num_layers; ++layer) {
    Tensors outputs;
    for (int64_t direction = 0; direction < directions; ++direction) {
      const int64_t index = layer * directions + direction;
      Tensors states;
      for (const Tensor& state : hx) {
        states.push_back(call<1>("aten::narrow", "", state, int64_t{0}, index, int64_t{1})[0]);
      }
      const Weights w = take_weights(params, static_cast<size_t>(index) * per_layer,
                                     options.has_biases, has_projection);
      const Tensors found = run_layer(kind, rows, states, w, batch_sizes, direction == 1);
      outputs.push_back(found[0]);
      for (size_t s = 0; s < hx.size(); ++s) last[s].push_back(found[s + 1]);
    }
    rows = cat(outputs, 2);
    if (options.dropout != 0.0 && options.train && layer + 1 < options.num_layers) {
      rows = call<1>("aten::dropout", "", rows, options.dropout, true)[0];
    }
  }
  Tensors results{squeeze(rows)};
  for (const Tensors& states : last) results.push_back(cat(states, 0));
  return results;
}

Tensors run_padded(Kind kind, const Tensor& input, const Tensors& hx, const Tensors& params,
                   const Options& options, bool batch_first) {
  MB_CHECK(input.dim() == 3, "input must have 3 dimensions, got ", input.dim());
  const int64_t steps = input.size(batch_first ? 1 : 0), batch = input.size(batch_first ? 0 : 1);
  MB_CHECK(steps > 0, "Expected sequence length to be larger than 0 in RNN");
  const auto swapped = [](const Tensor& tensor) {
    return call<1>("aten::transpose", "int", tensor, int64_t{0}, int64_t{1})[0];
  };
  const Tensor x = call<1>("aten::flatten", "using_ints", batch_first ? swapped(input) : input,
                           int64_t{0}, int64_t{1})[0];
  const Ints batch_sizes(static_cast<size_t>(steps), batch);
  Tensors results = run_layers(kind, x, batch_sizes, hx, params, options);
  const Ints sizes{steps, batch, results[0].size(1)};
  const Tensor y = call<1>("aten::reshape", "", results[0], sizes)[0];
  results[0] = batch_first ? swapped(y) : y;
  if (kind == Kind::kGru) {
    for (Tensor& result : results) result = in_dtype_of(result, hx[0]);
  } else if (kind == Kind::kLstm && hx[0].size(2) != hx[1].size(2)) {
    results[2] = in_dtype_of(results[2], hx[1]);
  }
  return results;
}

Tensors run_packed(Kind kind, const Tensor& data, const Tensor& batch_sizes, const Tensors& hx,
                   const Tensors& params, const Options& options) {
  MB_CHECK(batch_sizes.is_cpu() && batch_sizes.dim() == 1 &&
               batch_sizes.scalar_type() == ScalarType::Long,
           "batch_sizes must be an int64 tensor on the CPU with one dimension");
  const auto* values = static_cast<const int64_t*>(batch_sizes.data_ptr());
  const int64_t stride = batch_sizes.stride(0);
  Ints sizes;
  for (int64_t t = 0; t < batch_sizes.size(0); ++t) sizes.push_back(values[t * stride]);
  MB_CHECK(!sizes.empty(), "Expected sequence length to be larger than 0 in RNN");
  Tensors results = run_layers(kind, data, sizes, hx, params, options);
  const bool has_projection = kind == Kind::kLstm && hx[0].size(2) != hx[1].size(2);
  for (size_t i = 0; i < results.size(); ++i) {
    const bool lowered = kind == Kind::kTanh || kind == Kind::kRelu || (has_projection && i < 2);
    if (!lowered) results[i] = in_dtype_of(results[i], hx.back());
  }
  return results;
}

// ---- the rules by their schemas -----------------------------------------------------------------

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

Triple lstm_input(const Tensor& input, Tensors hx, Tensors params, bool has_biases,
                  int64_t num_layers, double dropout, bool train, bool bidirectional,
                  bool batch_first) {
  const Options options{has_biases, num_layers, dropout, train, bidirectional};
  const Tensors out = run_padded(Kind::kLstm, input, hx, params, options, batch_first);
  return {out[0], out[1], out[2]};
}

Triple lstm_data(const Tensor& data, const Tensor& batch_sizes, Tensors hx, Tensors params,
                 bool has_biases, int64_t num_layers, double dropout, bool train,
                 bool bidirectional) {
  const Options options{has_biases, num_layers, dropout, train, bidirectional};
  const Tensors out = run_packed(Kind::kLstm, data, batch_sizes, hx, params, options);
  return {out[0], out[1], out[2]};
}

template <Kind kind>
Pair other_input(const Tensor& input, const Tensor& hx, Tensors params, bool has_biases,
                 int64_t num_layers, double dropout, bool train, bool bidirectional,
                 bool batch_first) {
  const Options options{has_biases, num_layers, dropout, train, bidirectional};
  const Tensors out = run_padded(kind, input, {hx}, params, options, batch_first);
  return {out[0], out[1]};
}

template <Kind kind>
Pair other_data(const Tensor& data, const Tensor& batch_sizes, const Tensor& hx, Tensors params,
                bool has_biases, int64_t num_layers, double dropout, bool train,
                bool bidirectional) {
  const Options options{has_biases, num_layers, dropout, train, bidirectional};
  const Tensors out = run_packed(kind, data, batch_sizes, {hx}, params, options);
  return {out[0], out[1]};
}

// A cell is a layer of one step.
Tensors run_cell(Kind kind, const Tensor& input, const Tensors& hx, const Tensor& w_ih,
                 const Tensor& w_hh, const OptionalTensor& b_ih, const OptionalTensor& b_hh) {
  MB_CHECK(input.dim() == 2, "the input of a recurrent cell must have 2 dimensions, got ",
           input.dim());
  const auto raised = [](const OptionalTensor& tensor) {
    return tensor.has_value() ? OptionalTensor(unsqueeze(*tensor, 0)) : OptionalTensor();
  };
  Tensors states;
  for (const Tensor& state : hx) states.push_back(unsqueeze(state, 0));
  const Weights w{unsqueeze(w_ih, 0), unsqueeze(w_hh, 0), raised(b_ih), raised(b_hh), {}};
  Tensors results = run_layer(kind, unsqueeze(input, 0), states, w, {input.size(0)}, false);
  results.erase(results.begin());  // what is left are the states
  for (Tensor& result : results) {
    result = squeeze(result);
    if (num_states(kind) == 2 || kind == Kind::kGru) result = in_dtype_of(result, hx.back());
  }
  return results;
}

Pair lstm_cell(const Tensor& input, Tensors hx, const Tensor& w_ih, const Tensor& w_hh,
               OptionalTensor b_ih, OptionalTensor b_hh) {
  MB_CHECK(hx.size() == 2, "lstm_cell expects two hidden states");
  const Tensors out = run_cell(Kind::kLstm, input, hx, w_ih, w_hh, b_ih, b_hh);
  return {out[0], out[1]};
}

template <Kind kind>
Tensor other_cell(const Tensor& input, const Tensor& hx, const Tensor& w_ih, const Tensor& w_hh,
                  OptionalTensor b_ih, OptionalTensor b_hh) {
  return run_cell(kind, input, {hx}, w_ih, w_hh, b_ih, b_hh)[0];
}

using Boxed = void (*)(StableIValue*, uint64_t, uint64_t);

const std::map<std::string, Boxed>& rules() {
  static const std::map<std::string, Boxed> table{
      {"lstm.input", TORCH_BOX(&lstm_input)},
      {"lstm.data", TORCH_BOX(&lstm_data)},
      {"gru.input", TORCH_BOX(&other_input<Kind::kGru>)},
      {"gru.data", TORCH_BOX(&other_data<Kind::kGru>)},
      {"rnn_tanh.input", TORCH_BOX(&other_input<Kind::kTanh>)},
      {"rnn_tanh.data", TORCH_BOX(&other_data<Kind::kTanh>)},
      {"rnn_relu.input", TORCH_BOX(&other_input<Kind::kRelu>)},
      {"rnn_relu.data", TORCH_BOX(&other_data<Kind::kRelu>)},
      {"lstm_cell", TORCH_BOX(&lstm_cell)},
      {"gru_cell", TORCH_BOX(&other_cell<Kind::kGru>)},
      {"rnn_tanh_cell", TORCH_BOX(&other_cell<Kind::kTanh>)},
      {"rnn_relu_cell", TORCH_BOX(&other_cell<Kind::kRelu>)},
  };
  return table;
}

// Registers the rule of one operator of aten for as long as the process lives.
void add_batching_rule(std::string name) {
  const auto rule = rules().find(name);
  MB_CHECK(rule != rules().end(), "there is no batching rule for aten::", name);
  // never destroyed: torch may be gone by then
  static auto* library = new StableLibrary(StableLibrary::Kind::IMPL, "aten",
                                           "FuncTorchBatchedDecomposition", __FILE__, __LINE__);
  library->impl(rule->first.c_str(), rule->second);
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_FRAGMENT(modelbatch, m) { m.def("add_batching_rule(str name) -> ()"); }

// A call without tensors has no device and reaches the kernel for all of them.
STABLE_TORCH_LIBRARY_IMPL(modelbatch, CompositeExplicitAutograd, m) {
  m.impl("add_batching_rule", TORCH_BOX(&modelbatch::add_batching_rule));
}

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("add_batching_rule", TORCH_BOX(&modelbatch::add_batching_rule));
}
