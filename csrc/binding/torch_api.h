// Objects of torch that Python passes to `connect`. Kept until the interpreter exits.
#pragma once

#include <Python.h>

#include "binding/dlpack_abi.h"

namespace diffcore {

struct TorchApi {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* requires_grad = nullptr;  // a property
  PyObject* is_neg = nullptr;         // a method
  PyObject* modes[2] = {};            // functions: the number of active modes
  PyObject* transforms = nullptr;     // a function: None without active transforms
  PyObject* grad_enabled = nullptr;   // a function
};
inline TorchApi g_torch;

}  // namespace diffcore
