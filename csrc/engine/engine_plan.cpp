// Planning: which layers merge, where values and gradients lie.
#include "engine/engine_plan.h"

#include <algorithm>

namespace modelbatch {
namespace {

constexpr int64_t kMostBytes = INT64_C(1) << 40;

// Hands out places one after another.
class Places {
 public:
  explicit Places(int64_t element_bytes)
      : align_(MB_ENGINE_ALIGNMENT / element_bytes), most_(kMostBytes / element_bytes) {}

  int64_t take(int64_t rows, int64_t columns) {
    int64_t count = 0;
    const bool fits = !__builtin_mul_overflow(rows, columns, &count) && count <= most_ - end_;
    MB_CHECK(fits, kEngine, "the network is too large");
    const int64_t place = end_;
    end_ += (count + align_ - 1) / align_ * align_;
    return place;
  }
  int64_t end() const { return end_; }

 private:
  int64_t align_, most_, end_ = 0;
};

// ReLU, tanh and sigmoid: their derivative is a function of the result alone.
bool can_merge(int64_t opcode) {
  return opcode == MB_OP_RELU || opcode == MB_OP_TANH || opcode == MB_OP_SIGMOID;
}

}  // namespace

EnginePlan::EnginePlan(const EngineProgram& program, const std::vector<int64_t>& numels,
                       const EngineSizes& sizes) {
  const int64_t batch = sizes.batch, lanes = sizes.lanes;
  MB_CHECK(batch <= INT64_C(1) << 31, kEngine, "the batch is too large");
  const int64_t padded = (batch + lanes - 1) / lanes * lanes;
  const std::vector<EngineValue>& values = program.values;
  const size_t count = program.instructions.size();
  Places places(sizes.element_bytes);

  // Values that share a place: what a reshape or a merged activation makes of another.
  std::vector<int64_t> root(values.size());
  std::vector<int64_t> maker(values.size(), -1);
  std::vector<int64_t> merged(count, -1);  // of a linear layer: its activation's opcode
  std::vector<bool> vanishes(count, false);
  for (size_t v = 0; v < values.size(); ++v) root[v] = static_cast<int64_t>(v);
  for (size_t n = 0; n < count; ++n) {
    const EngineInstruction& i = program.instructions[n];
    maker[i.output] = static_cast<int64_t>(n);
    if (i.opcode == MB_OP_RESHAPE) {
      root[i.output] = root[i.input];
      vanishes[n] = true;
    } else if (can_merge(i.opcode) && values[i.input].uses == 1 && i.input != program.output) {
      const int64_t before = maker[i.input];
      if (before < 0 || program.instructions[before].opcode != MB_OP_LINEAR) continue;
      root[i.output] = root[i.input];
      merged[before] = i.opcode;
      vanishes[n] = true;
    }
  }

  std::vector<int64_t> forward(values.size(), MB_PLACE_NONE), grad(values.size(), MB_PLACE_NONE);
  for (size_t v = 0; v < values.size(); ++v) {
    if (root[v] != static_cast<int64_t>(v)) continue;
    forward[v] = v == 0 ? MB_PLACE_INPUT : places.take(values[v].features(), padded);
    if (values[v].needs_grad) grad[v] = places.take(values[v].features(), padded);
  }
  // A reshape may need no gradient where what it becomes part of does; roots decide alone.
  const auto forward_of = [&](int64_t v) { return forward[root[v]]; };
  const auto grad_of = [&](int64_t v) { return grad[root[v]]; };

  int64_t rows_elements = 0, scratch = 0, chunk = 0;
  const auto at_least = [&](int64_t& size, int64_t rows, int64_t columns) {
    int64_t wanted = 0;
    MB_CHECK(!__builtin_mul_overflow(rows, columns, &wanted), kEngine, "the network is too large");
    size = std::max(size, wanted);
  };
  const auto whole_gradient = [&](int64_t index) {
    if (index >= 0 && index < program.num_optimized) at_least(chunk, numels[index], 1);
  };
  for (size_t n = 0; n < count; ++n) {
    const EngineInstruction& i = program.instructions[n];
    if (vanishes[n]) continue;
    const EngineValue &in = values[i.input], &out = values[i.output];
    mb_engine_op op{};
    op.opcode = static_cast<int32_t>(i.opcode);
    op.activation = static_cast<int32_t>(merged[n]);
    op.rows = in.rows;
    op.in_width = in.width;
    op.width = out.width;
    op.x = forward_of(i.input);
    op.x2 = i.opcode == MB_OP_ADD ? forward_of(i.input2) : MB_PLACE_NONE;
    op.y = forward_of(i.output);
    op.dy = grad_of(i.output);
    op.dx = grad_of(i.input);
    op.dx2 = i.opcode == MB_OP_ADD ? grad_of(i.input2) : MB_PLACE_NONE;
    op.saved = op.x_rows = MB_PLACE_NONE;
    op.weight = static_cast<int32_t>(i.weight);
    op.bias = static_cast<int32_t>(i.bias);
    op.mean = static_cast<int32_t>(i.mean);
    op.var = static_cast<int32_t>(i.var);
    op.number = i.number;
    op.extra = i.extra;
    if (i.opcode != MB_OP_EMBEDDING) {
      reads_panels |= op.x == MB_PLACE_INPUT || op.x2 == MB_PLACE_INPUT;
    }
    switch (i.opcode) {
      case MB_OP_LINEAR:
        op.weight = static_cast<int32_t>(i.weight);
        whole_gradient(i.bias);
        if (i.weight >= program.num_optimized) break;
        if (op.x == MB_PLACE_INPUT) {
          op.x_rows = MB_PLACE_INPUT;
          op.x_step = in.features();
          reads_rows = true;
        } else {
          op.x_step = (in.features() + lanes - 1) / lanes * lanes;
          op.fills_rows = 1;
          at_least(rows_elements, batch, op.x_step);
        }
        break;
      case MB_OP_LAYER_NORM:
        op.saved = places.take(2 * in.rows, padded);
        at_least(scratch, in.features(), padded);
        whole_gradient(i.weight);
        whole_gradient(i.bias);
        break;
      case MB_OP_BATCH_NORM:
        op.saved = places.take(4, in.width);
        at_least(scratch, 2, in.width);
        whole_gradient(i.weight);
        whole_gradient(i.bias);
        has_batch_norm = true;
        break;
      case MB_OP_DROPOUT:
        op.saved = places.take(in.features(), padded);
        at_least(scratch, in.features(), 2 * batch);
        has_dropout = true;
        break;
      case MB_OP_EMBEDDING:
        op.vocabulary = numels[i.weight] / out.width;
        whole_gradient(i.weight);
        break;
      default:
        break;
    }
    if (i.opcode != MB_OP_DROPOUT && i.opcode != MB_OP_BATCH_NORM && i.opcode != MB_OP_LAYER_NORM &&
        i.opcode != MB_OP_LEAKY_RELU && i.opcode != MB_OP_ELU && i.opcode != MB_OP_SOFTPLUS) {
      op.number = -1;
    }
    ops.push_back(op);
  }

  // The first gradient that reaches a place is written there, later ones are added.
  std::vector<bool> written(values.size(), false);
  const auto adds = [&](int64_t place) {
    const auto found = std::find(grad.begin(), grad.end(), place) - grad.begin();
    const bool was_written = written[found];
    written[found] = true;
    return was_written ? 1 : 0;
  };
  if (grad_of(program.output) != MB_PLACE_NONE) adds(grad_of(program.output));
  for (size_t n = ops.size(); n-- > 0;) {
    mb_engine_op& op = ops[n];
    if (op.dy == MB_PLACE_NONE) continue;
    if (op.dx != MB_PLACE_NONE) op.adds_dx = adds(op.dx);
    if (op.dx2 != MB_PLACE_NONE) op.adds_dx2 = adds(op.dx2);
  }

  const int64_t rows = places.take(rows_elements, 1);
  for (mb_engine_op& op : ops) {
    if (op.fills_rows) op.x_rows = rows;
  }
  for (size_t p = 0; p < numels.size(); ++p) {
    mb_engine_parameter parameter{};
    parameter.numel = numels[p];
    parameter.is_optimized = static_cast<int64_t>(p) < program.num_optimized;
    parameter.grad =
        sizes.keeps_grads && parameter.is_optimized ? places.take(numels[p], 1) : MB_PLACE_NONE;
    params.push_back(parameter);
  }
  plan.batch = batch;
  plan.padded = padded;
  plan.num_ops = static_cast<int64_t>(ops.size());
  plan.ops = ops.data();
  plan.num_params = static_cast<int64_t>(params.size());
  plan.num_optimized = program.num_optimized;
  plan.params = params.data();
  plan.loss = static_cast<int32_t>(program.loss);
  std::copy_n(program.loss_parameters, MB_LOSS_PARAMETERS, plan.loss_parameters);
  plan.out_width = program.out().width;
  plan.out_features = program.out().features();
  plan.output = forward_of(program.output);
  plan.output_grad = grad_of(program.output);
  plan.chunk = places.take(std::max<int64_t>(chunk, MB_ENGINE_CHUNK), 1);
  plan.scratch = places.take(scratch, 1);
  plan.loss_scratch = places.take(plan.out_features + 1, padded);
  plan.keeps_grads = sizes.keeps_grads ? 1 : 0;
  const int64_t features = values[0].features();
  x_panels = places.take(features, padded);
  x_rows = places.take(features, batch);
  target = places.take(program.has_classes() ? 1 : plan.out_features, padded);
  lane_weight = places.take(padded, 1);
  workspace = places.end();
}

}  // namespace modelbatch
