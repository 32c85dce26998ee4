// How a function of the C API calls a kernel: without the GIL where that pays, with the kernel's exceptions as Python's.
#pragma once

#include <Python.h>

#include <cstdio>
#include <exception>
#include <new>

#include "cpu/kernels.h"
#include "cpu/tuning.h"

namespace gemmlet {

// Runs `call`, which looks at no Python object, without the GIL if the work is long; false with a Python error set if it
// throws. Where the interpreter is about to end, CPython before 3.14 ends a thread that asks for the GIL by unwinding its
// stack. So no caller of this holds an object whose destructor does more than free memory: references are plain pointers.
template <class Call>
bool run(Index work, Call&& call) {
  char error[200] = "";
  bool out_of_memory = false;
  PyThreadState* state = work < tuning::gil_release_elements ? nullptr : PyEval_SaveThread();
  try {
    call();
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
  } catch (const std::exception& e) {
    std::snprintf(error, sizeof error, "%s", e.what());
  }
  if (state != nullptr) PyEval_RestoreThread(state);
  if (out_of_memory) PyErr_NoMemory();
  if (error[0] != 0) PyErr_SetString(PyExc_RuntimeError, error);
  return !out_of_memory && error[0] == 0;
}

// A new reference to the result of a call that went well; else it is dropped.
inline PyObject* result_if(bool well, PyObject* result) {
  if (!well) Py_CLEAR(result);
  return result;
}

}  // namespace gemmlet
