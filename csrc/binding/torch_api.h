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
  PyObject* requires_grad = nullptr;      // a property
  PyObject* is_neg = nullptr;             // a method
  PyObject* dispatch_modes = nullptr;     // a function: the number of active dispatch modes
  PyObject* function_modes = nullptr;     // the same for function modes
  PyObject* device_module = nullptr;      // the dict of the module with CURRENT_DEVICE
  PyObject* without_functions = nullptr;  // the type of a context without function modes
  PyObject* enter = nullptr;              // its methods
  PyObject* exit = nullptr;
  PyObject* transforms = nullptr;    // a function: None without active transforms
  PyObject* grad_enabled = nullptr;  // a function
};
inline TorchApi g_torch;

}  // namespace diffcore
