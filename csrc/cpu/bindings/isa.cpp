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
__attribute__((visibility("default"))) PyObject* GEMMLET_INIT() { return PyInit__cpu(); }
}
