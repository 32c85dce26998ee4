// The module _cpu_features: the instruction sets that can run here. In CPython's C API alone, as pybind11 for one function would
// take seconds to compile.
#include "cpu/features.h"

#include <Python.h>

namespace {

PyObject* supported(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (const char* isa : gemmlet::supported_isas()) {
    PyObject* name = PyUnicode_FromString(isa);
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
    {"supported", supported, METH_NOARGS, "Names of the instruction sets that can run here, best first."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef_Slot slots[] = {
#if PY_VERSION_HEX >= 0x030c0000
    {Py_mod_multiple_interpreters, Py_MOD_PER_INTERPRETER_GIL_SUPPORTED},
#endif
#if PY_VERSION_HEX >= 0x030d0000
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    "_cpu_features",
    "Instruction sets that can run here.",
    0,
    methods,
    slots,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__cpu_features() { return PyModuleDef_Init(&module); }
