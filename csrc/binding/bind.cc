// The Python module `diffcore._C`. Two entries serve every op: `launch`, which allocates and runs
// the kernel if the call is a plain one, and `call`, which is handed everything. Whatever is not
// plain, or not right, goes back to Python, which sees to it or says what was wrong.
#include "binding/call.h"

#ifndef DIFFCORE_BUILD_FLAGS
#define DIFFCORE_BUILD_FLAGS ""
#endif
#ifndef DIFFCORE_VERSION
#define DIFFCORE_VERSION "0"
#endif

namespace diffcore {
namespace {

// What Python lends of torch, by `connect`.
struct Bindings {
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  PyObject* empty_like = nullptr;
  PyObject* requires_grad = nullptr;  // a getter, and a method
  PyObject* is_neg = nullptr;
  PyObject* modes[2] = {};           // functions: how many modes are active
  PyObject* transforms = nullptr;    // a function: None where no transform is
  PyObject* grad_enabled = nullptr;  // a function
} g_bindings;

// What an eager call must know of its arguments before it may go straight to a kernel.
enum Survey : int {
  kNotPlain = 1,
  kNeedsGrad = 2,
  kNegated = 4,
  kCoefNeedsGrad = 8,
  kCoefNegated = 16,
  kMode = 32,
  kTransform = 64
};

bool is(PyObject* expected, PyObject* value) {
  if (!value) throw py::error_already_set();
  Py_DECREF(value);
  return value == expected;
}
bool requires_grad(PyObject* x) {
  PyObject* getter = g_bindings.requires_grad;
  return is(Py_True, Py_TYPE(getter)->tp_descr_get(getter, x, nullptr));
}
bool is_negated(PyObject* x) { return is(Py_True, PyObject_CallOneArg(g_bindings.is_neg, x)); }
bool plain(PyObject* x) {
  return Py_TYPE(x) == g_bindings.tensor || Py_TYPE(x) == g_bindings.parameter;
}

int survey(py::tuple tensors, py::tuple coefs) {
  int found = 0;
  for (PyObject* mode : g_bindings.modes) {
    py::object active = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(mode));
    if (!active) throw py::error_already_set();
    if (PyObject_IsTrue(active.ptr())) found |= kMode;
  }
  if (!is(Py_None, PyObject_CallNoArgs(g_bindings.transforms))) found |= kTransform;
  const bool grad = is(Py_True, PyObject_CallNoArgs(g_bindings.grad_enabled));
  for (py::handle x : tensors) {
    if (!plain(x.ptr())) return found | kNotPlain;
    if (grad && requires_grad(x.ptr())) found |= kNeedsGrad;
    if (is_negated(x.ptr())) found |= kNegated;
  }
  for (py::handle c : coefs) {
    if (PyFloat_CheckExact(c.ptr())) continue;
    if (!PyObject_TypeCheck(c.ptr(), g_bindings.tensor)) continue;
    if (grad && requires_grad(c.ptr())) found |= kCoefNeedsGrad;
    if (is_negated(c.ptr())) found |= kCoefNegated;
  }
  return found;
}

// A call of an elementwise kernel on plain tensors: its output, or a tuple of them. Otherwise what
// `survey` found, 0 if that was nothing but the kernel is of another kind or refuses. With `look`
// alone nothing is run.
py::object launch(int op, py::tuple ins, py::tuple coefs, py::object step, py::object noise,
                  bool look) {
  const int found = survey(ins, coefs);
  const OpInfo* info = op < 0 || op >= AllOps::size ? nullptr : &ops()[op];
  if (found || look || !info || info->n_sum || info->n_in == 0) return py::int_(found);
  py::tuple outs(info->n_out);
  for (int k = 0; k < info->n_out; ++k) {
    PyObject* made = PyObject_CallOneArg(g_bindings.empty_like, ins[0].ptr());
    if (!made) throw py::error_already_set();
    PyTuple_SET_ITEM(outs.ptr(), k, made);
  }
  Call call;
  try {
    if (call.parse(op, outs, ins, coefs, step, false, noise)) return py::int_(0);
  } catch (py::error_already_set&) {  // a tensor without storage of its own
    return py::int_(0);
  }
  if (call.run(op)) return py::int_(0);
  if (info->n_out == 1) return outs[0];
  return outs;
}

void connect(py::capsule exchange_api, py::type tensor, py::type parameter, py::function empty_like,
             py::tuple modes, py::function transforms, py::function grad_enabled) {
  auto* api = static_cast<const dlpack::ExchangeApiHeader*>(exchange_api.get_pointer());
  while (api && api->version.major != 1) api = api->prev_api;
  if (!api) throw std::runtime_error("torch offers no DLPack exchange API of major version 1");
  auto* exchange = reinterpret_cast<const dlpack::ExchangeApi*>(api);
  if (!exchange->borrow || !exchange->current_stream || !exchange->allocate)
    throw std::runtime_error("torch's DLPack exchange API lacks a function that diffcore needs");
  // Kept until the interpreter ends.
  g_bindings.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  g_bindings.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  g_bindings.empty_like = empty_like.inc_ref().ptr();
  g_bindings.requires_grad = py::object(tensor.attr("requires_grad")).inc_ref().ptr();
  g_bindings.is_neg = py::object(tensor.attr("is_neg")).inc_ref().ptr();
  for (int k = 0; k < 2; ++k) g_bindings.modes[k] = py::object(modes[k]).inc_ref().ptr();
  g_bindings.transforms = transforms.inc_ref().ptr();
  g_bindings.grad_enabled = grad_enabled.inc_ref().ptr();
  if (!Py_TYPE(g_bindings.requires_grad)->tp_descr_get)
    throw std::runtime_error("torch.Tensor.requires_grad is no property");
  g_torch = exchange;
}

int call(int op, py::tuple outs, py::tuple ins, py::tuple coefs, py::object step, bool whole,
         py::object noise) {
  if (!g_torch) throw std::runtime_error("diffcore._C: connect() has not been called");
  if (op < 0 || op >= AllOps::size) throw py::index_error("no such op");
  Call call;
  if (Status status = call.parse(op, outs, ins, coefs, step, whole, noise)) return status;
  return call.run(op);
}

py::dict build_info() {
  py::dict info;
  info["version"] = DIFFCORE_VERSION;
  info["build_flags"] = DIFFCORE_BUILD_FLAGS;
  info["instruction_set"] = cpu_isa();
  info["best_instruction_set"] = best_cpu_isa();
  info["threads"] = cpu_threads();
  info["cuda"] = cuda_built();
  info["cuda_architectures"] = cuda_architectures();
  info["cuda_driver"] = cuda_driver_version();
  info["cuda_devices"] = cuda_device_count();
  return info;
}

}  // namespace
}  // namespace diffcore

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  using namespace diffcore;
  m.def("connect", &connect, py::arg("exchange_api"), py::arg("tensor"), py::arg("parameter"),
        py::arg("empty_like"), py::arg("modes"), py::arg("transforms"), py::arg("grad_enabled"));
  m.def("launch", &launch, py::arg("op"), py::arg("ins"), py::arg("coefs"), py::arg("step"),
        py::arg("noise"), py::arg("look"));
  m.def("call", &diffcore::call, py::arg("op"), py::arg("outs"), py::arg("ins"), py::arg("coefs"),
        py::arg("step"), py::arg("whole"), py::arg("noise"));
  m.def("op_table", [] {
    py::list table;
    for (int i = 0; i < AllOps::size; ++i) {
      const OpInfo& op = ops()[i];
      table.append(py::make_tuple(op.name, op.n_in, op.n_out, op.n_sum, op.n_coef, op.draws));
    }
    return table;
  });
  m.def("build_info", &build_info);
  m.def(
      "load_cuda_kernels",
      [](int device) {
        if (const char* error = load_cuda_kernels(device)) throw std::runtime_error(error);
      },
      py::arg("device"));
}
