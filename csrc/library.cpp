// Every operator of the `modelbatch` namespace, on one page, and the Python module that loads them.
//
// Implementations register themselves in csrc/<family>/<family>_ops.cpp (CPU) and
// csrc/<family>/<family>_cuda_ops.cpp (CUDA); fakes, autograd and vmap rules in
// modelbatch/ops/<family>.py. M is the number of models and always dim 0.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <exception>

#include "common/dispatch.h"
#include "text/decimal.h"

STABLE_TORCH_LIBRARY(modelbatch, m) {
  // random: counter-based streams, one per model (csrc/random/philox.h).
  // seed and step are int64 [M]; the results are [M, ...].
  m.def(
      "dropout(Tensor input, Tensor p, Tensor seed, Tensor step, int op_index, int group) -> "
      "Tensor");
  m.def("uniform(Tensor seed, Tensor step, int op_index, int[] size, ScalarType dtype) -> Tensor");
  m.def("normal(Tensor seed, Tensor step, int op_index, int[] size, ScalarType dtype) -> Tensor");

  // conv: every model's own convolution. weight [M, O, I/groups, *K] (transposed: [M, I, O/groups,
  // *K]), input [M, B, C, *S] or, shared by all models, [B, C, *S]; the result is [M, B, O, *S'].
  m.def(
      "convolution(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, bool transposed, int[] output_padding, int groups) -> Tensor");
  m.def(
      "convolution_backward(Tensor grad_output, Tensor input, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation, bool transposed, int[] output_padding, int groups, "
      "bool need_input, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)");

  // rnn: one layer and direction of every model's LSTM, GRU or RNN. Dim 0 of every argument is M,
  // or 1: shared by all models. The rows of all T steps lie one after another, batch_sizes[t] of
  // them (not rising) for step t, N together, B = batch_sizes[0]; reverse runs from the last step
  // to the first. x [M, N, I], w_ih [M, GH, I], w_hh [M, GH, P], biases [M, GH], w_hr [M, P, H], h0
  // [M, B, P], c0 [M, B, H]; y [M, N, P]. G = 4 (gates i, f, g, o), 3 (r, z, n) or 1; P = H without
  // w_hr. gates [M, N, 4H] and cells [M, N, H] are what the backward wants to know. Gradients that
  // nobody needs are of shape [0].
  m.def(
      "lstm(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "Tensor? w_hr, int[] batch_sizes, bool reverse) "
      "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)");
  m.def(
      "lstm_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor h0, "
      "Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? w_hr, Tensor y, Tensor gates, Tensor cells, "
      "int[] batch_sizes, bool reverse, bool need_x, bool need_state, bool need_weight) "
      "-> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db, Tensor "
      "dw_hr)");
  m.def(
      "gru(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "int[] batch_sizes, bool reverse) -> (Tensor y, Tensor h_n, Tensor gates)");
  m.def(
      "gru_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor x, Tensor h0, Tensor w_ih, "
      "Tensor w_hh, Tensor y, Tensor gates, int[] batch_sizes, bool reverse, bool need_x, "
      "bool need_state, bool need_weight) "
      "-> (Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db_ih, Tensor db_hh)");
  m.def(
      "rnn(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
      "int[] batch_sizes, bool reverse, bool relu) -> (Tensor y, Tensor h_n)");
  m.def(
      "rnn_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor x, Tensor h0, Tensor w_ih, "
      "Tensor w_hh, Tensor y, int[] batch_sizes, bool reverse, bool relu, bool need_x, "
      "bool need_state, bool need_weight) "
      "-> (Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db)");

  // loss: logits [M, B, C], target [B] or [M, B]; the losses [M] and, if wanted, their derivative
  // with respect to the logits.
  m.def(
      "cross_entropy(Tensor logits, Tensor target, int ignore_index, bool need_slope) "
      "-> (Tensor, Tensor)");

  // pointwise: float32 of any shape; the result is contiguous.
  m.def("tanh(Tensor input) -> Tensor");

  // norm: batch normalisation with every model's own batch statistics. input [M, B, C, *S], weight
  // and bias [M, C], eps float64 [M], sample_weight [M, B]: what each sample counts for in the
  // statistics; mean and (biased) var are [M, C] in the accumulation dtype.
  m.def(
      "batch_norm_train(Tensor input, Tensor? weight, Tensor? bias, Tensor eps, "
      "Tensor? sample_weight=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "batch_norm_train_backward(Tensor grad_output, Tensor input, Tensor? weight, Tensor mean, "
      "Tensor var, Tensor eps, bool need_input, bool need_weight, bool need_bias, "
      "Tensor? sample_weight=None) -> (Tensor, Tensor, Tensor)");

  // optim: one step of every model's own optimizer, in place. Parameters, gradients and states are
  // lists of [M, ...]; a list of states that no model needs is empty. step is float32 [M]; hyper
  // float64 [K, M], its rows as in csrc/optim/optim.h. Models that are not active or nonfinite
  // (bool [M]) are left alone. The gradient is used times inv_scale (float32 [M]) times
  // clip_factor, then clamped to +-clip_value (both float64 [M]).
#define MB_OPTIM_COMMON                                                                 \
  "Tensor hyper, Tensor? active=None, Tensor? nonfinite=None, Tensor? inv_scale=None, " \
  "Tensor? clip_factor=None, Tensor? clip_value=None) -> ()"
  m.def(
      "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
      "Tensor(c!) step, " MB_OPTIM_COMMON);
  m.def(
      "adam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!) step, " MB_OPTIM_COMMON);
  m.def(
      "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!) step, " MB_OPTIM_COMMON);
  m.def(
      "rmsprop_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, "
      "Tensor(c!)[] grad_avgs, Tensor(d!)[] momentum_buffers, Tensor(e!) step, " MB_OPTIM_COMMON);
  m.def(
      "adagrad_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] sums, "
      "Tensor(c!) step, " MB_OPTIM_COMMON);
  m.def(
      "adadelta_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, "
      "Tensor(c!)[] acc_deltas, Tensor(d!) step, " MB_OPTIM_COMMON);
  m.def(
      "adamax_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_infs, Tensor(d!) step, " MB_OPTIM_COMMON);
  m.def(
      "radam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!) step, " MB_OPTIM_COMMON);
  m.def(
      "rprop_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] prevs, "
      "Tensor(c!)[] step_sizes, Tensor(d!) step, " MB_OPTIM_COMMON);
  // mu_product, eta and mu are float32 [M] (on the CPU also float64) and contiguous; a model's
  // first step does not read them.
  m.def(
      "nadam_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!) mu_product, Tensor(e!) step, " MB_OPTIM_COMMON);
  m.def(
      "asgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] axs, Tensor(c!) eta, "
      "Tensor(d!) mu, Tensor(e!) step, " MB_OPTIM_COMMON);
#undef MB_OPTIM_COMMON
  m.def("grad_stats(Tensor[] grads) -> (Tensor sq_norm, Tensor nonfinite)");
  m.def("nonfinite(Tensor[] tensors) -> Tensor");

  // engine: K whole training steps of every model in one call, for small networks. program,
  // numbers, flags and the results are described in csrc/engine/engine.h.
  m.def(
      "train_steps_(Tensor(a!)[] params, Tensor(b!)[] buffers, Tensor(c!)[] states, "
      "Tensor(d!) step, Tensor x, Tensor target, Tensor? sample_weight, Tensor program, "
      "Tensor numbers, Tensor hyper, Tensor? lr, Tensor? active, Tensor? clip_norm, "
      "Tensor? clip_value, Tensor? seed, Tensor? stream_step, int rule, int flags) "
      "-> (Tensor losses, Tensor status, Tensor grad_norm)");
}

namespace {

PyObject* isa(PyObject*, PyObject*) {
  return PyUnicode_FromString(mb_isa_name(modelbatch::active_isa()));
}

PyObject* built_isas(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (mb_isa isa : {MB_ISA_BASELINE, MB_ISA_AVX2, MB_ISA_AVX512}) {
    if (!mb_isa_is_built(isa)) continue;
    PyObject* name = PyUnicode_FromString(mb_isa_name(isa));
    if (name == nullptr || PyList_Append(names, name) != 0) {
      Py_XDECREF(name);
      Py_DECREF(names);
      return nullptr;
    }
    Py_DECREF(name);
  }
  return names;
}

// The rows of a float32 matrix as lines of text with commas.
PyObject* format_rows(PyObject*, PyObject* args) {
  unsigned long long address = 0;
  Py_ssize_t rows = 0, columns = 0;
  if (!PyArg_ParseTuple(args, "Knn", &address, &rows, &columns)) return nullptr;
  if (rows < 0 || columns < 0 || columns > PY_SSIZE_T_MAX / (MB_MAX_F32_TEXT + 1)) {
    return PyErr_Format(PyExc_ValueError, "bad number of rows or columns");
  }
  const float* value = reinterpret_cast<const float*>(static_cast<uintptr_t>(address));
  char* buffer = static_cast<char*>(PyMem_Malloc(columns * (MB_MAX_F32_TEXT + 1) + 1));
  if (buffer == nullptr) return PyErr_NoMemory();
  PyObject* lines = PyList_New(rows);
  for (Py_ssize_t row = 0; lines != nullptr && row < rows; ++row) {
    char* end = buffer;
    for (Py_ssize_t column = 0; column < columns; ++column) {
      if (column > 0) *end++ = ',';
      end = mb_write_f32(end, *value++);
    }
    PyObject* line = PyUnicode_FromStringAndSize(buffer, end - buffer);
    if (line == nullptr || PyList_SetItem(lines, row, line) != 0) {
      Py_DECREF(lines);
      lines = nullptr;
    }
  }
  PyMem_Free(buffer);
  return lines;
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set whose kernels are in use."},
    {"built_isas", built_isas, METH_NOARGS,
     "The instruction sets that this build has kernels for."},
    {"format_rows", format_rows, METH_VARARGS,
     "format_rows(address, rows, columns): the rows of a contiguous float32 matrix in the memory "
     "of "
     "this process, as lines of text with commas. Each number reads back as the same bits."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C",
                      "Loading this module registers the operators of torch.ops.modelbatch.",
                      -1,
                      methods,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  try {
    modelbatch::active_isa();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_ImportError, error.what());
    return nullptr;
  }
  return PyModule_Create(&module);
}
