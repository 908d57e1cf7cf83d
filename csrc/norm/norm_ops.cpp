// modelbatch::batch_norm_train and its backward on the CPU: check, allocate, loop over models and
// ranges of channels. Every channel is normalised by one thread in a fixed order of additions, so a
// model's result depends neither on the other models nor on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/dispatch.h"
#include "conv/slices.h"
#include "norm/norm.h"

MB_DECLARE_TABLE(mb_norm_kernels)

namespace modelbatch {
namespace {

// The fewest elements that are worth a thread.
constexpr int64_t kGrain = 16384;

const mb_norm_kernels& kernels() {
  static const mb_norm_kernels& table = MB_SELECT_TABLE(mb_norm_kernels);
  return table;
}

int norm_dtype(const Tensor& input, const char* op) {
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return MB_NORM_F32;
    case ScalarType::Double:
      return MB_NORM_F64;
    case ScalarType::BFloat16:
      return MB_NORM_BF16;
    case ScalarType::Half:
      return MB_NORM_F16;
    default:
      fail("modelbatch::", op, ": input must be float32, float64, bfloat16 or float16");
  }
}

mb_norm_size checked_size(const Tensor& input, const char* op) {
  MB_CHECK(input.dim() >= 3, "modelbatch::", op, ": input must have shape [M, B, C, *S], got ",
           shape_text(input));
  mb_norm_size size{input.size(1), input.size(2), 1};
  for (int64_t dim = 3; dim < input.dim(); ++dim) size.positions *= input.size(dim);
  return size;
}

// A contiguous float64 copy of a small tensor of any floating dtype, as the kernels read it.
Tensor checked_doubles(const Tensor& tensor, const char* op, const char* name, const Ints& sizes) {
  bool fits = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t dim = 0; fits && dim < sizes.size(); ++dim) fits = tensor.size(dim) == sizes[dim];
  MB_CHECK(fits, "modelbatch::", op, ": ", name, " must have shape [", sizes[0],
           sizes.size() > 1 ? ", " : "", sizes.size() > 1 ? std::to_string(sizes[1]) : "",
           "], got ", shape_text(tensor));
  return torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Double));
}

const double* data_or_null(const std::optional<Tensor>& tensor, int64_t offset) {
  return tensor.has_value() ? tensor->const_data_ptr<double>() + offset : nullptr;
}

// The weights of all models' samples as the kernels read them. No weights: all ones.
class SampleWeights {
 public:
  // `per_row`: a row of the kernel is one position of a sample, not a whole sample.
  SampleWeights(const std::optional<Tensor>& weight, const char* op, int64_t num_models,
                const mb_norm_size& size, bool per_row)
      : equal_{nullptr, static_cast<double>(size.batch * size.positions)} {
    if (!weight.has_value()) return;
    const Tensor given = checked_doubles(*weight, op, "sample_weight", {num_models, size.batch});
    const double* from = given.const_data_ptr<double>();
    rows_ = size.batch * (per_row ? size.positions : 1);
    weights_.resize(num_models * rows_);
    counts_.assign(num_models, 0.0);
    for (int64_t model = 0; model < num_models; ++model) {
      for (int64_t row = 0; row < rows_; ++row) {
        const int64_t sample = per_row ? row / size.positions : row;
        weights_[model * rows_ + row] = from[model * size.batch + sample];
      }
      for (int64_t sample = 0; sample < size.batch; ++sample) {
        counts_[model] += from[model * size.batch + sample];
      }
      counts_[model] *= static_cast<double>(size.positions);
      if (counts_[model] == 0.0) counts_[model] = 1.0;
    }
  }

  mb_norm_samples of(int64_t model) const {
    if (weights_.empty()) return equal_;
    return {weights_.data() + model * rows_, counts_[model]};
  }

 private:
  mb_norm_samples equal_;
  int64_t rows_ = 0;
  std::vector<double> weights_, counts_;
};

// What the kernels read as [B, C, S] or [B S, C]: a copy where the slices are neither.
struct Layout {
  Tensor tensor;
  bool channels_last;
};

Layout with_dense_slices(const Tensor& input) {
  if (has_channels_last_slices(input, 1)) return {input, true};
  return {has_contiguous_slices(input, 1) ? input : torch::stable::contiguous(input), false};
}

// `tensor` with slices of the given layout and the model axis anywhere.
Tensor with_layout(const Tensor& tensor, bool channels_last) {
  const bool fits =
      channels_last ? has_channels_last_slices(tensor, 1) : has_contiguous_slices(tensor, 1);
  if (fits) return tensor;
  Tensor copy = empty_stacked(shape_of(tensor), channels_last, tensor);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), tensor.get(), 0));
  return copy;
}

// body(model, begin, end) over ranges of channels. A slice [B, C] is read as rows of channels.
template <class Body>
void for_each_channel_range(int64_t num_models, const mb_norm_size& size, bool rows_of_channels,
                            const Body& body) {
  const int64_t block = rows_of_channels ? MB_NORM_CHANNEL_BLOCK : 1;
  const int64_t blocks = (size.channels + block - 1) / block;
  const int64_t threads = torch::stable::get_num_threads();
  // Whole models where there are enough of them: their rows are then read once, not once per block.
  const int64_t per_task = rows_of_channels && num_models >= threads ? blocks : 1;
  const int64_t tasks = (blocks + per_task - 1) / per_task;
  const int64_t task_numel = per_task * block * size.batch * size.positions;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, task_numel));
  torch::stable::parallel_for(0, num_models * tasks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % tasks * per_task * block;
      body(task / tasks, begin, std::min(begin + per_task * block, size.channels));
    }
  });
}

// Doubles as a tensor of the accumulation dtype or of `dtype`, shape [M, C].
Tensor rounded(const std::vector<double>& values, const Ints& sizes, const Tensor& like,
               ScalarType dtype) {
  Tensor result = torch::stable::empty(sizes, ScalarType::Double, std::nullopt, like.device());
  std::copy(values.begin(), values.end(), result.mutable_data_ptr<double>());
  return dtype == ScalarType::Double ? result : torch::stable::to(result, dtype);
}

ScalarType accumulation_dtype(const Tensor& input) {
  return input.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_train_cpu(const Tensor& input,
                                                        const std::optional<Tensor>& weight,
                                                        const std::optional<Tensor>& bias,
                                                        const Tensor& eps,
                                                        const std::optional<Tensor>& samples) {
  const char* op = "batch_norm_train";
  const mb_norm_size size = checked_size(input, op);
  const int dtype = norm_dtype(input, op);
  const int64_t num_models = input.size(0);
  const Ints per_channel{num_models, size.channels};
  std::optional<Tensor> weights, biases;
  if (weight.has_value()) weights = checked_doubles(*weight, op, "weight", per_channel);
  if (bias.has_value()) biases = checked_doubles(*bias, op, "bias", per_channel);
  const Tensor epsilons = checked_doubles(eps, op, "eps", {num_models});
  const Layout layout = with_dense_slices(input);
  const Tensor& x = layout.tensor;
  Tensor output = empty_stacked(shape_of(input), layout.channels_last, input);
  std::vector<double> mean(num_models * size.channels), var(num_models * size.channels);
  const bool rows_of_channels = layout.channels_last || size.positions == 1;
  const SampleWeights sample_weights(samples, op, num_models, size, rows_of_channels);
  const mb_norm_forward_fn kernel = kernels().forward[rows_of_channels][dtype];
  const int64_t bytes = static_cast<int64_t>(input.element_size());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(output.mutable_data_ptr());
  const int64_t from_step = x.stride(0) * bytes, to_step = output.stride(0) * bytes;
  for_each_channel_range(
      num_models, size, rows_of_channels, [&](int64_t model, int64_t begin, int64_t end) {
        const int64_t at = model * size.channels;
        kernel(from + model * from_step, data_or_null(weights, at), data_or_null(biases, at),
               epsilons.const_data_ptr<double>()[model], size, sample_weights.of(model), begin, end,
               mean.data() + at, var.data() + at, to + model * to_step);
      });
  const ScalarType wide = accumulation_dtype(input);
  return {output, rounded(mean, per_channel, input, wide), rounded(var, per_channel, input, wide)};
}

// Gradients that are not needed are empty tensors of shape [0].
std::tuple<Tensor, Tensor, Tensor> batch_norm_train_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const std::optional<Tensor>& weight,
    const Tensor& mean, const Tensor& var, const Tensor& eps, bool need_input, bool need_weight,
    bool need_bias, const std::optional<Tensor>& samples) {
  const char* op = "batch_norm_train_backward";
  const mb_norm_size size = checked_size(input, op);
  const int dtype = norm_dtype(input, op);
  const int64_t num_models = input.size(0);
  const Ints per_channel{num_models, size.channels};
  MB_CHECK(shape_of(grad_output) == shape_of(input), "modelbatch::", op,
           ": grad_output must have the input's shape ", shape_text(input), ", got ",
           shape_text(grad_output));
  MB_CHECK(grad_output.scalar_type() == input.scalar_type(), "modelbatch::", op,
           ": grad_output must have the input's dtype");
  std::optional<Tensor> weights;
  if (weight.has_value()) weights = checked_doubles(*weight, op, "weight", per_channel);
  const Tensor means = checked_doubles(mean, op, "mean", per_channel);
  const Tensor vars = checked_doubles(var, op, "var", per_channel);
  const Tensor epsilons = checked_doubles(eps, op, "eps", {num_models});
  const Layout layout = with_dense_slices(input);
  const Tensor& x = layout.tensor;
  const Tensor grads = with_layout(grad_output, layout.channels_last);
  Tensor grad_input = empty_stacked(need_input ? shape_of(input) : Ints{0},
                                    need_input && layout.channels_last, input);
  std::vector<double> grad_weight(num_models * size.channels), grad_bias(grad_weight.size());
  const bool rows_of_channels = layout.channels_last || size.positions == 1;
  const SampleWeights sample_weights(samples, op, num_models, size, rows_of_channels);
  const mb_norm_backward_fn kernel = kernels().backward[rows_of_channels][dtype];
  const int64_t bytes = static_cast<int64_t>(input.element_size());
  const char* from = static_cast<const char*>(x.const_data_ptr());
  const char* grad_from = static_cast<const char*>(grads.const_data_ptr());
  char* to = static_cast<char*>(grad_input.mutable_data_ptr());
  const int64_t from_step = x.stride(0) * bytes, grad_step = grads.stride(0) * bytes;
  const int64_t to_step = grad_input.stride(0) * bytes;
  for_each_channel_range(
      num_models, size, rows_of_channels, [&](int64_t model, int64_t begin, int64_t end) {
        const int64_t at = model * size.channels;
        kernel(grad_from + model * grad_step, from + model * from_step, data_or_null(weights, at),
               means.const_data_ptr<double>() + at, vars.const_data_ptr<double>() + at,
               epsilons.const_data_ptr<double>()[model], size, sample_weights.of(model), begin, end,
               grad_weight.data() + at, grad_bias.data() + at,
               need_input ? to + model * to_step : nullptr);
      });
  const ScalarType wide = weight.has_value() ? weight->scalar_type() : accumulation_dtype(input);
  // Outputs must not alias, so each missing one is a tensor of its own.
  const auto rounded_if = [&](bool need, const std::vector<double>& values) {
    return need ? rounded(values, per_channel, input, wide) : empty_stacked({0}, false, input);
  };
  return {grad_input, rounded_if(need_weight, grad_weight), rounded_if(need_bias, grad_bias)};
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("batch_norm_train", TORCH_BOX(&modelbatch::batch_norm_train_cpu));
  m.impl("batch_norm_train_backward", TORCH_BOX(&modelbatch::batch_norm_train_backward_cpu));
}
