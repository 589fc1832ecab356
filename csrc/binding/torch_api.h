// What Python lends of torch, by `connect`; kept until the interpreter ends.
#pragma once

#include <Python.h>

#include "binding/dlpack_abi.h"

namespace diffcore {

struct TorchApi {
  const dlpack::ExchangeApi* exchange = nullptr;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* requires_grad = nullptr;  // a getter, and a method
  PyObject* is_neg = nullptr;
  PyObject* modes[2] = {};           // functions: how many modes are active
  PyObject* transforms = nullptr;    // a function: None where no transform is
  PyObject* grad_enabled = nullptr;  // a function
};
inline TorchApi g_torch;

}  // namespace diffcore
