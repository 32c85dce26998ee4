// The part of the bindings that depends on the instruction set; the rest is compiled once, for the baseline, and linked into
// each extension module.
#include <Python.h>

namespace gemmlet {
extern const int vector_bytes;
const int vector_bytes = GEMMLET_VECTOR_BYTES;
}  // namespace gemmlet

extern "C" {
PyObject* PyInit__cpu();  // module.cpp

// GEMMLET_INIT is PyInit_ and the module's name.
__attribute__((visibility("default"))) PyObject* GEMMLET_INIT() {
  // pybind11 takes the GIL by PyGILState_Ensure, which knows the main interpreter alone: in another it waits for ever.
  if (PyInterpreterState_Get() != PyInterpreterState_Main()) {
    PyErr_SetString(PyExc_ImportError, "the compiled kernels cannot be used in a sub-interpreter");
    return nullptr;
  }
  return PyInit__cpu();
}
}
