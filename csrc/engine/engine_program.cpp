// Reading and checking programs.
#include "engine/engine_program.h"

#include <algorithm>

namespace modelbatch {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostParts = 1 << 16;              // values, instructions
constexpr int64_t kMostFeatures = INT64_C(1) << 31;  // of a value

constexpr const char* kOpcodeNames[MB_OP_COUNT] = {
    "linear",   "relu",       "leaky_relu", "elu",     "gelu", "silu",    "tanh",      "sigmoid",
    "softplus", "layer_norm", "batch_norm", "dropout", "add",  "reshape", "embedding", "mean_rows"};

class Reader {
 public:
  Reader(const int64_t* numbers, int64_t count, const EngineTensors& tensors)
      : numbers_(numbers), count_(count), tensors_(tensors) {
    used_params_.resize(tensors.params->size());
    used_buffers_.resize(tensors.buffers->size());
  }

  EngineProgram read() {
    read_header();
    for (int64_t i = 0; i < num_instructions_; ++i) read_instruction(i);
    check_loss();
    check_all_used();
    return std::move(program_);
  }

 private:
  void read_header() {
    MB_CHECK(count_ >= MB_PROGRAM_HEADER, kEngine, "program must have at least ",
             int64_t{MB_PROGRAM_HEADER}, " numbers, got ", count_);
    MB_CHECK(numbers_[MB_HEADER_VERSION] == MB_PROGRAM_VERSION, kEngine,
             "program must be of version ", int64_t{MB_PROGRAM_VERSION}, ", got ",
             numbers_[MB_HEADER_VERSION]);
    const int64_t values = numbers_[MB_HEADER_VALUES];
    num_instructions_ = numbers_[MB_HEADER_INSTRUCTIONS];
    MB_CHECK(values >= 1 && values <= kMostParts && num_instructions_ >= 1 &&
                 num_instructions_ <= kMostParts,
             kEngine, "program must have 1 to ", kMostParts, " values and instructions, got ",
             values, " and ", num_instructions_);
    const int64_t wanted =
        MB_PROGRAM_HEADER + 2 * values + MB_INSTRUCTION_LENGTH * num_instructions_;
    MB_CHECK(count_ == wanted, kEngine, "program must have ", wanted, " numbers, got ", count_);
    program_.values.resize(values);
    for (int64_t v = 0; v < values; ++v) {
      EngineValue& value = program_.values[v];
      value.rows = numbers_[MB_PROGRAM_HEADER + 2 * v];
      value.width = numbers_[MB_PROGRAM_HEADER + 2 * v + 1];
      const bool fits = value.rows >= 1 && value.width >= 1 && value.rows <= kMostFeatures &&
                        value.width <= kMostFeatures / value.rows;
      MB_CHECK(fits, kEngine, "value ", v, " has the size (", value.rows, ", ", value.width, ")");
    }
    program_.values[0].exists = true;
    program_.output = numbers_[MB_HEADER_OUTPUT];
    MB_CHECK(program_.output >= 1 && program_.output < values, kEngine,
             "the output must be one of the values 1 to ", values - 1, ", got ", program_.output);
    program_.loss = numbers_[MB_HEADER_LOSS];
    std::copy_n(numbers_ + MB_HEADER_LOSS_PARAMETERS, MB_LOSS_PARAMETERS, program_.loss_parameters);
    program_.num_optimized = numbers_[MB_HEADER_OPTIMIZED];
    const int64_t params = static_cast<int64_t>(tensors_.params->size());
    MB_CHECK(program_.num_optimized >= 0 && program_.num_optimized <= params, kEngine,
             "program says that ", program_.num_optimized, " of ", params, " params are optimized");
    MB_CHECK(numbers_[MB_HEADER_BUFFERS] == static_cast<int64_t>(tensors_.buffers->size()), kEngine,
             "program says ", numbers_[MB_HEADER_BUFFERS], " buffers, but there are ",
             tensors_.buffers->size());
  }

  template <class... Args>
  void require(bool condition, const Args&... args) const {
    if (condition) return;
    const int64_t opcode = current_.opcode;
    const bool named = opcode >= 0 && opcode < MB_OP_COUNT;
    fail(kEngine, "instruction ", index_, " (", named ? kOpcodeNames[opcode] : "unknown", ") ",
         args...);
  }

  const EngineValue& input(int64_t value) {
    require(value >= 0 && value < static_cast<int64_t>(program_.values.size()), "reads value ",
            value, ", which is not one");
    require(program_.values[value].exists, "reads value ", value, " before it is computed");
    ++program_.values[value].uses;
    return program_.values[value];
  }

  // Whether a gradient is wanted for the parameter; -1 is none.
  bool parameter(int64_t index, const char* name, bool is_optional,
                 std::initializer_list<int64_t> sizes) {
    if (index == -1 && is_optional) return false;
    require(index >= 0 && index < static_cast<int64_t>(used_params_.size()), "has ", name, " ",
            index, " of ", used_params_.size(), " params");
    require(!used_params_[index], "has ", name, " ", index, ", which another one has");
    used_params_[index] = true;
    check_sizes((*tensors_.params)[index], name, sizes);
    return index < program_.num_optimized;
  }

  void buffer(int64_t index, const char* name, ScalarType dtype,
              std::initializer_list<int64_t> sizes) {
    require(index >= 0 && index < static_cast<int64_t>(used_buffers_.size()), "has ", name, " ",
            index, " of ", used_buffers_.size(), " buffers");
    require(!used_buffers_[index], "has ", name, " ", index, ", which another one has");
    used_buffers_[index] = true;
    require((*tensors_.buffers)[index].scalar_type() == dtype, "has a ", name, " of another dtype");
    check_sizes((*tensors_.buffers)[index], name, sizes);
  }

  void check_sizes(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
    bool fits = tensor.dim() == static_cast<int64_t>(sizes.size()) + 1;
    int64_t dim = 1;
    for (int64_t size : sizes) fits = fits && tensor.size(dim++) == size;
    std::ostringstream wanted;
    for (int64_t size : sizes) wanted << ", " << size;
    require(fits, "needs a ", name, " of shape [", tensors_.num_models, wanted.str(), "], got ",
            shape_text(tensor));
  }

  void numbers(int64_t count) {
    require(current_.number >= 0 && current_.number <= tensors_.number_rows - count,
            "has numbers from row ", current_.number, " on, but there are ", tensors_.number_rows);
  }

  void read_instruction(int64_t index) {
    index_ = index;
    const int64_t* f = numbers_ + MB_PROGRAM_HEADER +
                       2 * static_cast<int64_t>(program_.values.size()) +
                       MB_INSTRUCTION_LENGTH * index;
    EngineInstruction& i = current_;
    i = {f[MB_FIELD_OPCODE], f[MB_FIELD_INPUT], f[MB_FIELD_INPUT2], f[MB_FIELD_OUTPUT],
         f[MB_FIELD_WEIGHT], f[MB_FIELD_BIAS],  f[MB_FIELD_MEAN],   f[MB_FIELD_VAR],
         f[MB_FIELD_NUMBER], f[MB_FIELD_EXTRA]};
    require(i.opcode >= 0 && i.opcode < MB_OP_COUNT, "has opcode ", i.opcode);
    const EngineValue in = input(i.input);
    require(i.output > 0 && i.output < static_cast<int64_t>(program_.values.size()),
            "writes value ", i.output, ", which is not one");
    EngineValue& out = program_.values[i.output];
    require(!out.exists, "writes value ", i.output, ", which exists already");
    bool needs_grad = in.needs_grad;
    bool fits = out.rows == in.rows && out.width == in.width;
    if (i.opcode != MB_OP_EMBEDDING) {
      require(i.input != 0 || !program_.embeds(), "reads value 0, which holds indices");
    }
    switch (i.opcode) {
      case MB_OP_LINEAR:
        fits = out.rows == in.rows;
        needs_grad |= parameter(i.weight, "weight", false, {out.width, in.width});
        needs_grad |= parameter(i.bias, "bias", true, {out.width});
        break;
      case MB_OP_LEAKY_RELU:
      case MB_OP_ELU:
        numbers(1);
        break;
      case MB_OP_DROPOUT:
        numbers(1);
        require(i.extra >= 0 && i.extra < INT64_C(1) << 20, "has op_index ", i.extra);
        break;
      case MB_OP_SOFTPLUS:
        numbers(2);
        break;
      case MB_OP_LAYER_NORM:
        numbers(1);
        needs_grad |= parameter(i.weight, "weight", true, {in.width});
        needs_grad |= parameter(i.bias, "bias", true, {in.width});
        break;
      case MB_OP_BATCH_NORM:
        numbers(2);
        require(in.rows == 1, "needs one row, got ", in.rows);
        needs_grad |= parameter(i.weight, "weight", true, {in.width});
        needs_grad |= parameter(i.bias, "bias", true, {in.width});
        require((i.mean == -1) == (i.var == -1), "has only one of mean and var");
        if (i.mean != -1) {
          buffer(i.mean, "mean", tensors_.dtype, {in.width});
          buffer(i.var, "var", tensors_.dtype, {in.width});
        }
        if (i.extra != -1) buffer(i.extra, "count of batches", ScalarType::Long, {});
        break;
      case MB_OP_ADD: {
        const EngineValue& second = input(i.input2);
        fits = fits && second.rows == in.rows && second.width == in.width;
        require(i.input2 != 0 || !program_.embeds(), "reads value 0, which holds indices");
        needs_grad |= second.needs_grad;
        break;
      }
      case MB_OP_RESHAPE:
        fits = out.features() == in.features();
        break;
      case MB_OP_EMBEDDING: {
        require(index == 0, "must be the first one");
        require(i.input == 0 && in.width == 1, "needs value 0, of width 1");
        fits = out.rows == in.rows;
        require(i.weight >= 0 && i.weight < static_cast<int64_t>(used_params_.size()),
                "has weight ", i.weight, " of ", used_params_.size(), " params");
        const Tensor& weight = (*tensors_.params)[i.weight];
        const int64_t words = weight.dim() == 3 ? weight.size(1) : 0;
        needs_grad |= parameter(i.weight, "weight", false, {words, out.width});
        require(words >= 1 && i.extra >= -1 && i.extra < words, "has padding_idx ", i.extra, " of ",
                words);
        break;
      }
      case MB_OP_MEAN_ROWS:
        fits = out.rows == 1 && out.width == in.width;
        break;
      default:
        break;
    }
    require(fits, "makes a value of size (", out.rows, ", ", out.width, ") of one of size (",
            in.rows, ", ", in.width, ")");
    out.exists = true;
    out.needs_grad = needs_grad;
    program_.instructions.push_back(i);
  }

  void loss_numbers(int64_t which, int64_t count, bool is_optional) const {
    const int64_t row = program_.loss_parameters[which];
    MB_CHECK((row == -1 && is_optional) || (row >= 0 && row <= tensors_.number_rows - count),
             kEngine, "the loss has numbers from row ", row, " on, but there are ",
             tensors_.number_rows);
  }

  void check_loss() const {
    const int64_t loss = program_.loss, *p = program_.loss_parameters;
    MB_CHECK(loss >= 0 && loss < MB_ENGINE_LOSSES, kEngine, "there is no loss ", loss);
    MB_CHECK(p[MB_LOSS_REDUCTION] == 0 || p[MB_LOSS_REDUCTION] == 1, kEngine,
             "the loss has the reduction ", p[MB_LOSS_REDUCTION]);
    MB_CHECK(program_.out().exists, kEngine, "no instruction computes the output");
    MB_CHECK(loss > MB_ENGINE_NLL || program_.out().rows == 1, kEngine,
             "the loss needs an output of one row, got ", program_.out().rows);
    const bool smooths = loss == MB_ENGINE_CROSS_ENTROPY || loss == MB_ENGINE_CROSS_ENTROPY_SOFT;
    const bool weighs = loss <= MB_ENGINE_NLL || loss == MB_ENGINE_BCE_LOGITS;
    const bool has_delta = loss == MB_ENGINE_HUBER || loss == MB_ENGINE_SMOOTH_L1;
    MB_CHECK(smooths || p[MB_LOSS_SMOOTHING] == -1, kEngine, "the loss has no label smoothing");
    MB_CHECK(weighs || p[MB_LOSS_CLASS_WEIGHT] == -1, kEngine, "the loss has no class weights");
    MB_CHECK(has_delta || p[MB_LOSS_DELTA] == -1, kEngine, "the loss has no delta");
    loss_numbers(MB_LOSS_SMOOTHING, 1, true);
    loss_numbers(MB_LOSS_CLASS_WEIGHT, program_.out().width, true);
    loss_numbers(MB_LOSS_DELTA, 1, !has_delta);
  }

  void check_all_used() {
    program_.values[program_.output].leads_to_output = true;
    for (int64_t n = num_instructions_ - 1; n >= 0; --n) {
      current_ = program_.instructions[n];
      index_ = n;
      require(program_.values[current_.output].leads_to_output, "does not lead to the output");
      program_.values[current_.input].leads_to_output = true;
      if (current_.opcode == MB_OP_ADD) {
        program_.values[current_.input2].leads_to_output = true;
      }
    }
    for (size_t v = 0; v < program_.values.size(); ++v) {
      MB_CHECK(program_.values[v].leads_to_output, kEngine, "value ", v,
               " has no part in the output");
    }
    for (size_t p = 0; p < used_params_.size(); ++p) {
      MB_CHECK(used_params_[p], kEngine, "no instruction uses params[", p, "]");
    }
    for (size_t b = 0; b < used_buffers_.size(); ++b) {
      MB_CHECK(used_buffers_[b], kEngine, "no instruction uses buffers[", b, "]");
    }
  }

  const int64_t* numbers_;
  const int64_t count_;
  const EngineTensors& tensors_;
  EngineProgram program_;
  int64_t num_instructions_ = 0;
  std::vector<bool> used_params_, used_buffers_;
  int64_t index_ = 0;
  EngineInstruction current_{};
};

}  // namespace

EngineProgram checked_engine_program(const Tensor& program, const EngineTensors& tensors) {
  MB_CHECK(
      program.scalar_type() == ScalarType::Long && program.dim() == 1 && program.is_contiguous(),
      kEngine, "program must be int64, contiguous and of one dimension, got shape ",
      shape_text(program));
  return Reader(program.const_data_ptr<int64_t>(), program.size(0), tensors).read();
}

}  // namespace modelbatch
