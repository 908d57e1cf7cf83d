// The Python module modelbatch._C_cuda: loading it registers the CUDA kernels of the operators
// whose schemas library.cpp defines.
#include <Python.h>

namespace {

PyModuleDef module = {PyModuleDef_HEAD_INIT,
                      "_C_cuda",
                      "Loading this module registers the CUDA kernels of torch.ops.modelbatch.",
                      -1,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr,
                      nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C_cuda(void) { return PyModule_Create(&module); }
