// Every operator of the `modelbatch` namespace, on one page, and the Python module that loads them.
//
// Implementations register themselves in csrc/<family>/<family>_ops.cpp (CPU) and
// csrc/<family>/<family>_cuda_ops.cpp (CUDA); fakes, autograd and vmap rules in
// modelbatch/ops/<family>.py. M is the number of models and always dim 0.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include <exception>

#include "common/dispatch.h"

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

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS, "The instruction set whose kernels are in use."},
    {"built_isas", built_isas, METH_NOARGS,
     "The instruction sets that this build has kernels for."},
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
