// modelbatch::dropout, uniform and normal on the CPU: check, allocate, loop over models and chunks.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "common/dispatch.h"
#include "random/random_args.h"

MB_DECLARE_TABLE(mb_random_kernels)

namespace modelbatch {
namespace {

// A model's elements per task, a multiple of MB_RANDOM_TILE, and the fewest that are worth a
// thread.
constexpr int64_t kChunk = 8192;
constexpr int64_t kGrain = 16384;
static_assert(kChunk % MB_RANDOM_TILE == 0, "chunks begin with whole tiles");

const mb_random_kernels& kernels() {
  static const mb_random_kernels& table = MB_SELECT_TABLE(mb_random_kernels);
  return table;
}

// body(model, begin, end) for ranges that cover every model's slice. The split does not matter to
// the result: an element's number depends on its own index alone.
template <class Body>
void for_each_chunk(int64_t num_models, int64_t slice_numel, const Body& body) {
  if (num_models == 0 || slice_numel == 0) return;
  const int64_t chunks = (slice_numel + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::min(slice_numel, kChunk));
  torch::stable::parallel_for(0, num_models * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % chunks * kChunk;
      body(task / chunks, begin, std::min(begin + kChunk, slice_numel));
    }
  });
}

void check_steps(const int64_t* step, int64_t num_models, const char* op) {
  for (int64_t model = 0; model < num_models; ++model) {
    MB_CHECK(step[model] >= 0 && step[model] < MB_MAX_STEP, "modelbatch::", op,
             ": step must be in [0, 2^44), got ", step[model], " for model ", model);
  }
}

Tensor dropout_cpu(const Tensor& input, const Tensor& p, const Tensor& seed, const Tensor& step,
                   int64_t op_index, int64_t group) {
  const Streams streams = checked_streams(seed, step, op_index, "dropout");
  const int64_t num_models = streams.num_models;
  MB_CHECK(group >= 1, "modelbatch::dropout: group must be at least 1, got ", group);
  MB_CHECK(input.device() == seed.device(),
           "modelbatch::dropout: input must be on the device of the other tensors");
  const int dtype = random_dtype(input.scalar_type(), "dropout");
  const Tensor rates = per_model_vector(p, "dropout", "p", ScalarType::Double, num_models, seed);
  const double* rate = rates.const_data_ptr<double>();
  for (int64_t model = 0; model < num_models; ++model) {
    MB_CHECK(rate[model] >= 0.0 && rate[model] <= 1.0,
             "modelbatch::dropout: p must be in [0, 1], got ", rate[model], " for model ", model);
  }
  const int64_t* seeds = streams.seed.const_data_ptr<int64_t>();
  const int64_t* steps = streams.step.const_data_ptr<int64_t>();
  check_steps(steps, num_models, "dropout");
  const Slices slices = checked_slices(input, num_models, "dropout");
  Tensor output = empty_on_device_of(input, sizes_of(input), input.scalar_type());
  const char* x = static_cast<const char*>(slices.tensor.const_data_ptr());
  char* y = static_cast<char*>(output.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(input.element_size());
  const mb_dropout_fn kernel = kernels().dropout[dtype];
  for_each_chunk(num_models, slices.slice_numel, [&](int64_t model, int64_t begin, int64_t end) {
    kernel(x + model * slices.model_stride * bytes, y + model * slices.slice_numel * bytes, begin,
           end, group, rate[model], mb_philox_open(seeds[model], steps[model], op_index));
  });
  return output;
}

Tensor draw_cpu(const char* op, const mb_draw_fn* kernel_of_dtype, const Tensor& seed,
                const Tensor& step, int64_t op_index, const std::vector<int64_t>& size,
                ScalarType dtype) {
  const Streams streams = checked_streams(seed, step, op_index, op);
  const mb_draw_fn kernel = kernel_of_dtype[random_dtype(dtype, op)];
  const int64_t* seeds = streams.seed.const_data_ptr<int64_t>();
  const int64_t* steps = streams.step.const_data_ptr<int64_t>();
  check_steps(steps, streams.num_models, op);
  int64_t slice_numel = 0;
  const std::vector<int64_t> stacked = stacked_size(streams.num_models, size, op, &slice_numel);
  Tensor output = empty_on_device_of(seed, stacked, dtype);
  char* y = static_cast<char*>(output.mutable_data_ptr());
  const int64_t bytes = static_cast<int64_t>(output.element_size());
  for_each_chunk(streams.num_models, slice_numel, [&](int64_t model, int64_t begin, int64_t end) {
    kernel(y + model * slice_numel * bytes, begin, end,
           mb_philox_open(seeds[model], steps[model], op_index));
  });
  return output;
}

Tensor uniform_cpu(const Tensor& seed, const Tensor& step, int64_t op_index,
                   const std::vector<int64_t>& size, ScalarType dtype) {
  return draw_cpu("uniform", kernels().uniform, seed, step, op_index, size, dtype);
}

Tensor normal_cpu(const Tensor& seed, const Tensor& step, int64_t op_index,
                  const std::vector<int64_t>& size, ScalarType dtype) {
  return draw_cpu("normal", kernels().normal, seed, step, op_index, size, dtype);
}

}  // namespace
}  // namespace modelbatch

STABLE_TORCH_LIBRARY_IMPL(modelbatch, CPU, m) {
  m.impl("dropout", TORCH_BOX(&modelbatch::dropout_cpu));
  m.impl("uniform", TORCH_BOX(&modelbatch::uniform_cpu));
  m.impl("normal", TORCH_BOX(&modelbatch::normal_cpu));
}
