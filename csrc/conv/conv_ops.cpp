// modelbatch::convolution and its backward on the CPU: every model's own convolution in one call.
//
// The arithmetic is torch's own (oneDNN for float32 and bfloat16). Two ways were measured, in ms
// for 8 models, batch 32, float32, 2 threads, contiguous slices, forward and backward with all
// gradients, copies into the stacked result included:
//
//   layer             models in turn, 2 threads each    one thread per model
//   6 -> 16, k5, 14^2          - / 2.8                      0.45 / 2.1
//   3 -> 16, 32^2            1.7 / 5.0                       1.6 / 4.7
//   16 -> 16, 32^2           5.5 / 8.4                       5.3 / 8.1
//   32 -> 32, 16^2           3.3 / 6.7                       3.1 / 6.3
//   64 -> 64, 8^2            2.9 / 6.4                       2.7 / 5.9
//   depthwise 32, 16^2       1.0 / 2.1                       0.8 / 1.7
//
// One thread per model is never slower, because no model waits at a barrier (on a busy machine a
// wait takes milliseconds), and its results do not depend on the number of threads. So it is the
// only way, although fewer models than cores leave cores idle. The layout of the slices stays the
// caller's: channels_last is up to 1.5 times as fast, but user code that calls view() relies on it.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "common/check.h"
#include "conv/slices.h"
#include "conv/threads.h"

namespace modelbatch {
namespace {

struct Options {
  Ints stride, padding, dilation;
  bool transposed;
  Ints output_padding;
  int64_t groups;
};

std::string ints_text(const Ints& ints) {
  std::string text = "[";
  for (size_t i = 0; i < ints.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(ints[i]);
  return text + "]";
}

void check_option(const Ints& values, const char* name, size_t spatial_dims, int64_t least) {
  MB_CHECK(values.size() == spatial_dims, "modelbatch::convolution: ", name, " must have ",
           spatial_dims, " values, one per spatial dimension, got ", ints_text(values));
  for (int64_t value : values) {
    MB_CHECK(value >= least, "modelbatch::convolution: ", name, " must be at least ", least,
             ", got ", ints_text(values));
  }
}

// Checks everything, so that no call inside a thread fails, and returns the output's sizes.
Ints checked_output_sizes(const Tensor& input, const Tensor& weight, const Options& o) {
  const int64_t spatial_dims = weight.dim() - 3;
  MB_CHECK(spatial_dims >= 1 && spatial_dims <= 3,
           "modelbatch::convolution: weight must have shape [M, O, I/groups, *K] with 1 to 3 "
           "kernel dimensions, got ",
           shape_text(weight));
  const bool is_shared = input.dim() == weight.dim() - 1;
  MB_CHECK(is_shared || input.dim() == weight.dim(),
           "modelbatch::convolution: input must have shape [M, B, C, *S] or [B, C, *S] with ",
           spatial_dims, " spatial dimensions for weight ", shape_text(weight), ", got ",
           shape_text(input));
  const int64_t num_models = weight.size(0);
  MB_CHECK(is_shared || input.size(0) == num_models,
           "modelbatch::convolution: input must have one slice for each of the ", num_models,
           " models of weight ", shape_text(weight), ", got ", shape_text(input));
  MB_CHECK(input.scalar_type() == weight.scalar_type(),
           "modelbatch::convolution: input and weight must have the same dtype");
  check_option(o.stride, "stride", spatial_dims, 1);
  check_option(o.padding, "padding", spatial_dims, 0);
  check_option(o.dilation, "dilation", spatial_dims, 1);
  check_option(o.output_padding, "output_padding", spatial_dims, 0);
  const int64_t first = is_shared ? 0 : 1;
  const int64_t channels = input.size(first + 1);
  const int64_t weight_in = o.transposed ? weight.size(1) : weight.size(2) * o.groups;
  MB_CHECK(o.groups >= 1 && weight.size(1) % o.groups == 0 && channels == weight_in,
           "modelbatch::convolution: with groups=", o.groups, " and weight ", shape_text(weight),
           " the input must have ", weight_in, " channels, and groups must divide ", weight.size(1),
           "; got input ", shape_text(input));
  Ints sizes{num_models, input.size(first),
             o.transposed ? weight.size(2) * o.groups : weight.size(1)};
  for (int64_t i = 0; i < spatial_dims; ++i) {
    const int64_t length = input.size(first + 2 + i);
    const int64_t reach = o.dilation[i] * (weight.size(3 + i) - 1) + 1;
    int64_t positions = 0;
    if (o.transposed) {
      MB_CHECK(o.output_padding[i] < std::max(o.stride[i], o.dilation[i]),
               "modelbatch::convolution: output_padding must be smaller than either stride or "
               "dilation, got output_padding ",
               ints_text(o.output_padding), ", stride ", ints_text(o.stride), ", dilation ",
               ints_text(o.dilation));
      positions = (length - 1) * o.stride[i] - 2 * o.padding[i] + reach + o.output_padding[i];
    } else if (length + 2 * o.padding[i] >= reach) {
      positions = (length + 2 * o.padding[i] - reach) / o.stride[i] + 1;
    }
    MB_CHECK(length > 0 && positions > 0,
             "modelbatch::convolution: the output would be empty: input ", shape_text(input),
             ", weight ", shape_text(weight), ", padding ", ints_text(o.padding), ", dilation ",
             ints_text(o.dilation));
    sizes.push_back(positions);
  }
  return sizes;
}

Tensor convolve_one(const Tensor& input, const Tensor& weight, const Tensor* bias,
                    const Options& o) {
  AtenTensorHandle bias_handle = bias == nullptr ? nullptr : bias->get();
  AtenTensorHandle result = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution(
      input.get(), weight.get(), bias == nullptr ? nullptr : &bias_handle, o.stride.data(),
      o.stride.size(), o.padding.data(), o.padding.size(), o.dilation.data(), o.dilation.size(),
      o.transposed, o.output_padding.data(), o.output_padding.size(), o.groups, &result));
  return Tensor(result);
}

void copy_into(const Tensor& target, const Tensor& source) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(target.get(), source.get(), 0));
}

Tensor convolution_cpu(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                       const Ints& stride, const Ints& padding, const Ints& dilation,
                       bool transposed, const Ints& output_padding, int64_t groups) {
  const Options options{stride, padding, dilation, transposed, output_padding, groups};
  const Ints sizes = checked_output_sizes(input, weight, options);
  const bool is_shared = input.dim() < weight.dim();
  if (bias.has_value()) {
    MB_CHECK(bias->dim() == 2 && bias->size(0) == sizes[0] && bias->size(1) == sizes[2],
             "modelbatch::convolution: bias must have shape [", sizes[0], ", ", sizes[2],
             "] for weight ", shape_text(weight), ", got ", shape_text(*bias));
    MB_CHECK(bias->scalar_type() == weight.scalar_type(),
             "modelbatch::convolution: bias and weight must have the same dtype");
  }
  Tensor output = empty_stacked(sizes, has_channels_last_slices(input, is_shared ? 0 : 1), input);
  if (output.numel() == 0) return output;
  const Slicer inputs(input, is_shared), weights(weight), outputs(output);
  std::optional<Slicer> biases;
  if (bias.has_value()) biases.emplace(*bias);
  for_each_model(sizes[0], [&](int64_t model) {
    std::optional<Tensor> own_bias;
    if (biases.has_value()) own_bias = (*biases)[model];
    copy_into(outputs[model], convolve_one(inputs[model], weights[model],
                                           own_bias.has_value() ? &*own_bias : nullptr, options));
  });
  return output;
}

// Gradients that are not needed are empty tensors of shape [0].
std::tuple<Tensor, Tensor, Tensor> convolution_backward_cpu(
    const Tensor& grad_output, const Tensor& input, const Tensor& weight, const Ints& stride,
    const Ints& padding, const Ints& dilation, bool transposed, const Ints& output_padding,
    int64_t groups, bool need_input, bool need_weight, bool need_bias) {
  const Options options{stride, padding, dilation, transposed, output_padding, groups};
  const Ints sizes = checked_output_sizes(input, weight, options);
  MB_CHECK(shape_of(grad_output) == sizes,
           "modelbatch::convolution_backward: grad_output must have shape ", ints_text(sizes),
           ", got ", shape_text(grad_output));
  MB_CHECK(grad_output.scalar_type() == weight.scalar_type(),
           "modelbatch::convolution_backward: grad_output and weight must have the same dtype");
  const int64_t num_models = sizes[0];
  const bool is_shared = input.dim() < weight.dim();
  const bool channels_last = has_channels_last_slices(input, is_shared ? 0 : 1);
  Ints input_sizes = shape_of(input);
  if (is_shared) input_sizes.insert(input_sizes.begin(), num_models);
  Tensor grad_input =
      empty_stacked(need_input ? input_sizes : Ints{0}, need_input && channels_last, input);
  Tensor grad_weight = empty_stacked(need_weight ? shape_of(weight) : Ints{0}, false, weight);
  Tensor grad_bias = empty_stacked(need_bias ? Ints{num_models, sizes[2]} : Ints{0}, false, weight);
  if (grad_output.numel() == 0) {
    torch::stable::zero_(grad_input);
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
  } else {
    const Slicer grads(grad_output), inputs(input, is_shared), weights(weight);
    // One call may make several outputs at once; a slicer exists for each that is needed.
    std::optional<Slicer> targets[3];
    if (need_input) targets[0].emplace(grad_input);
    if (need_weight) targets[1].emplace(grad_weight);
    if (need_bias) targets[2].emplace(grad_bias);
    const int32_t mask[3] = {need_input, need_weight, need_bias};
    const int64_t* bias_sizes = &sizes[2];
    for_each_model(num_models, [&](int64_t model) {
      const Tensor grad = grads[model], own_input = inputs[model], own_weight = weights[model];
      AtenTensorHandle results[3] = {nullptr, nullptr, nullptr};
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_convolution_backward(
          grad.get(), own_input.get(), own_weight.get(), &bias_sizes, 1, stride.data(),
          stride.size(), padding.data(), padding.size(), dilation.data(), dilation.size(),
          transposed, output_padding.data(), output_padding.size(), groups, mask, 3, &results[0],
          &results[1], &results[2]));
      for (int i = 0; i < 3; ++i) {
        if (results[i] == nullptr) continue;
        const Tensor result(results[i]);
        if (targets[i].has_value()) copy_into((*targets[i])[model], result);
      }
    });
  }
  if (need_input && is_shared) {
    const Ints models{0};
    grad_input = torch::stable::sum(grad_input, models);
  }
  return {grad_input, grad_weight, grad_bias};
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("convolution", TORCH_BOX(&modelbatch::convolution_cpu));
  m.impl("convolution_backward", TORCH_BOX(&modelbatch::convolution_backward_cpu));
}
