// The Python module `diffcore._C`. Two functions serve every op: `launch` allocates the outputs and
// runs the kernel if all arguments are plain tensors and numbers; `call` takes the outputs as
// arguments. Calls that cannot run are returned to Python with the reason, from which Python builds
// the error message. `fill_words` makes the random words of uniform numbers and timesteps.
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "binding/call.h"
#include "binding/read_views.h"
#include "binding/torch_api.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

#ifndef DIFFCORE_BUILD_FLAGS
#define DIFFCORE_BUILD_FLAGS ""
#endif
#ifndef DIFFCORE_VERSION
#define DIFFCORE_VERSION "0"
#endif

namespace diffcore {
namespace {

// Properties of the arguments that prevent an eager call from running the kernel directly.
enum Found : int {
  kNotPlain = 1,
  kNeedsGrad = 2,
  kNegated = 4,
  kCoefNeedsGrad = 8,
  kCoefNegated = 16,
  kMode = 32,
  kTransform = 64,
  kDefaultDevice = 128
};
struct FoundName {
  const char* name;
  Found bit;
};
constexpr FoundName kFoundNames[] = {
    {"not_plain", kNotPlain},       {"needs_grad", kNeedsGrad},
    {"negated", kNegated},          {"coef_needs_grad", kCoefNeedsGrad},
    {"coef_negated", kCoefNegated}, {"mode", kMode},
    {"transform", kTransform},      {"default_device", kDefaultDevice}};

bool is(PyObject* expected, PyObject* value) {
  if (!value) throw py::error_already_set();
  Py_DECREF(value);
  return value == expected;
}
bool requires_grad(PyObject* x) {
  PyObject* getter = g_torch.requires_grad;
  return is(Py_True, Py_TYPE(getter)->tp_descr_get(getter, x, nullptr));
}

// A call without arguments. Functions and methods written in C are called directly, since there are
// up to a dozen queries in each call of an op.
PyObject* query(PyObject* function) {
  if (PyCFunction_Check(function) && PyCFunction_GET_FLAGS(function) == METH_NOARGS)
    return PyCFunction_GET_FUNCTION(function)(PyCFunction_GET_SELF(function), nullptr);
  return PyObject_CallNoArgs(function);
}
PyObject* query_of(PyObject* x, PyObject* method) {
  if (Py_IS_TYPE(method, &PyMethodDescr_Type)) {
    const PyMethodDef* def = reinterpret_cast<PyMethodDescrObject*>(method)->d_method;
    if (def->ml_flags == METH_NOARGS) return def->ml_meth(x, nullptr);
  }
  return PyObject_CallOneArg(method, x);
}
bool is_negated(PyObject* x) { return is(Py_True, query_of(x, g_torch.is_neg)); }
bool plain(PyObject* x) { return Py_TYPE(x) == g_torch.tensor || Py_TYPE(x) == g_torch.parameter; }

py::object checked(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}
Py_ssize_t number(PyObject* function) {
  const py::object result = checked(query(function));
  const Py_ssize_t value = PyNumber_AsSsize_t(result.ptr(), nullptr);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// kMode; or kDefaultDevice where the one mode is that of torch.set_default_device or of a
// `with torch.device(...)`, which changes only the constructors of tensors; or 0 without modes.
int find_modes() {
  if (number(g_torch.dispatch_modes)) return kMode;
  const Py_ssize_t modes = number(g_torch.function_modes);
  if (!modes) return 0;
  // torch keeps one mode for the default device at most, and this variable in step with it.
  PyObject* device = PyDict_GetItemString(g_torch.device_module, "CURRENT_DEVICE");
  return modes == 1 && device && device != Py_None ? kDefaultDevice : kMode;
}

// While this exists function modes get no calls of torch, each of which would cost microseconds.
class WithoutFunctionModes {
 public:
  explicit WithoutFunctionModes(bool needed) {
    if (!needed) return;
    context_ = checked(PyObject_CallNoArgs(g_torch.without_functions));
    checked(PyObject_CallOneArg(g_torch.enter, context_.ptr()));
  }
  ~WithoutFunctionModes() {
    if (!context_) return;
    PyObject* args[] = {context_.ptr(), Py_None, Py_None, Py_None};
    PyObject* done = PyObject_Vectorcall(g_torch.exit, args, 4, nullptr);
    if (!done) PyErr_WriteUnraisable(context_.ptr());
    Py_XDECREF(done);
  }
  WithoutFunctionModes(const WithoutFunctionModes&) = delete;
  WithoutFunctionModes& operator=(const WithoutFunctionModes&) = delete;

 private:
  py::object context_;
};

int inspect(const py::tuple& tensors, const py::tuple& coefs, int found) {
  if (!is(Py_None, query(g_torch.transforms))) found |= kTransform;
  const bool grad = is(Py_True, query(g_torch.grad_enabled));
  for (py::handle x : tensors) {
    if (!plain(x.ptr())) return found | kNotPlain;
    if (grad && requires_grad(x.ptr())) found |= kNeedsGrad;
    if (is_negated(x.ptr())) found |= kNegated;
  }
  for (py::handle c : coefs) {
    if (PyFloat_CheckExact(c.ptr())) continue;
    if (!PyObject_TypeCheck(c.ptr(), g_torch.tensor)) continue;
    if (!plain(c.ptr())) return found | kNotPlain;
    if (grad && requires_grad(c.ptr())) found |= kCoefNeedsGrad;
    if (is_negated(c.ptr())) found |= kCoefNegated;
  }
  return found;
}

// Reads, plans and runs a call. Returns the reason if nothing was run.
Reason try_call(int op, const OpInfo& info, const py::tuple& outs, const py::tuple& ins,
                const py::tuple& coefs, py::handle step, bool reduce_all, py::handle noise) {
  CallViews views;
  if (Reason reason = read_views(outs, ins, coefs, step, reduce_all, noise, &views)) return reason;
  Plan plan;
  if (Reason reason = plan_call(info, views, &plan)) return reason;
  return run_plan(op, &plan);
}

void require_connection() {
  if (!g_torch.exchange) throw std::runtime_error("diffcore._C.connect() must be called first");
}

// Runs an elementwise kernel on plain tensors and returns its output, or a tuple of outputs.
// Otherwise returns the bits of `inspect`; 0 if there are none, but the op is not elementwise or
// the call cannot run. With `inspect_only` nothing is run.
py::object launch(int op, const py::tuple& ins, const py::tuple& coefs, py::handle step,
                  py::handle noise, bool inspect_only) {
  require_connection();
  const int modes = find_modes();
  const WithoutFunctionModes guard(modes & kDefaultDevice);
  const int found = inspect(ins, coefs, modes);
  const OpInfo* info = op_table().find(op);
  if ((found & ~kDefaultDevice) || inspect_only || !info || info->n_sum || info->n_in == 0 ||
      ins.empty())
    return py::int_(found);
  py::tuple outs(info->n_out);
  for (int k = 0; k < info->n_out; ++k) {
    PyObject* made = PyObject_CallOneArg(g_torch.empty_like, ins[0].ptr());
    if (!made) {  // a tensor that torch makes nothing like: Python names it
      if (!PyErr_ExceptionMatches(PyExc_RuntimeError)) throw py::error_already_set();
      PyErr_Clear();
      return py::int_(0);
    }
    PyTuple_SET_ITEM(outs.ptr(), k, made);
  }
  if (try_call(op, *info, outs, ins, coefs, step, false, noise)) return py::int_(found);
  if (info->n_out == 1) return outs[0];
  return std::move(outs);
}

// None, or (code, argument, index, detail) of binding/reason.h.
py::object answer(const Reason& reason) {
  if (!reason) return py::none();
  return py::make_tuple(int(reason.code), int(reason.argument), reason.index, reason.detail);
}

// Runs any kernel, with the outputs as arguments. Returns None if it was run, else why not.
py::object call(int op, const py::tuple& outs, const py::tuple& ins, const py::tuple& coefs,
                py::handle step, bool reduce_all, py::handle noise) {
  require_connection();
  const OpInfo* info = op_table().find(op);
  if (!info)
    throw py::index_error("op must be in the range of op_table(), got " + std::to_string(op));
  return answer(try_call(op, *info, outs, ins, coefs, step, reduce_all, noise));
}

// Fills an int64 tensor [B, 4 n] on the CPU with random words. Returns None, or why it did not.
py::object words(py::handle out, py::handle noise, uint64_t salt) {
  require_connection();
  CallViews views;
  const py::tuple none(0);
  if (Reason reason = read_views(py::make_tuple(out), none, none, py::none(), false, noise, &views))
    return answer(reason);
  return answer(fill_words(&views, salt));
}

// The exchange API of a tensor type, in a version with the functions that are used.
const dlpack::ExchangeApi* exchange_api_of(const py::capsule& capsule, const py::type& tensor) {
  const char* name = capsule.name();
  if (!name || std::strcmp(name, "dlpack_exchange_api"))
    throw py::type_error("exchange_api must be a capsule named dlpack_exchange_api, got " +
                         std::string(name ? name : "one without a name"));
  if (!py::getattr(tensor, "__dlpack_c_exchange_api__", py::none()).is(capsule))
    throw py::value_error("exchange_api must be tensor.__dlpack_c_exchange_api__");
  auto* api = static_cast<const dlpack::ExchangeApiHeader*>(capsule.get_pointer());
  while (api && api->version.major != 1) api = api->prev_api;
  if (!api)
    throw std::runtime_error("torch must have a DLPack exchange API of major version 1, got none");
  auto* exchange = reinterpret_cast<const dlpack::ExchangeApi*>(api);
  if (!exchange->borrow || !exchange->current_stream || !exchange->allocate)
    throw std::runtime_error(
        "torch's DLPack exchange API must have borrow, current_stream and allocate");
  return exchange;
}

// Sets nothing unless all arguments are right.
void connect(const py::capsule& exchange_api, const py::type& tensor, const py::type& parameter,
             const py::function& empty_like, const py::function& dispatch_modes,
             const py::function& function_modes, const py::dict& device_module,
             const py::type& without_functions, const py::function& transforms,
             const py::function& grad_enabled) {
  const dlpack::ExchangeApi* exchange = exchange_api_of(exchange_api, tensor);
  const py::object requires_grad = tensor.attr("requires_grad"), is_neg = tensor.attr("is_neg");
  if (!Py_TYPE(requires_grad.ptr())->tp_descr_get)
    throw py::type_error("tensor.requires_grad must be a property");
  if (PyObject_IsSubclass(parameter.ptr(), tensor.ptr()) != 1)
    throw py::type_error("parameter must be a subclass of tensor");
  const py::object enter = without_functions.attr("__enter__");
  const py::object exit = without_functions.attr("__exit__");
  g_torch.tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  g_torch.parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  g_torch.empty_like = empty_like.inc_ref().ptr();
  g_torch.requires_grad = requires_grad.inc_ref().ptr();
  g_torch.is_neg = is_neg.inc_ref().ptr();
  g_torch.dispatch_modes = dispatch_modes.inc_ref().ptr();
  g_torch.function_modes = function_modes.inc_ref().ptr();
  g_torch.device_module = device_module.inc_ref().ptr();
  g_torch.without_functions = without_functions.inc_ref().ptr();
  g_torch.enter = enter.inc_ref().ptr();
  g_torch.exit = exit.inc_ref().ptr();
  g_torch.transforms = transforms.inc_ref().ptr();
  g_torch.grad_enabled = grad_enabled.inc_ref().ptr();
  g_torch.exchange = exchange;
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
  info["cuda_min_driver"] = kMinCudaDriver;
  info["cuda_devices"] = cuda_device_count();
  return info;
}

py::list op_rows() {
  py::list rows;
  const OpTable table = op_table();
  for (int i = 0; i < table.size; ++i) {
    const OpInfo& op = table.ops[i];
    rows.append(
        py::make_tuple(op.name, op.n_in, op.n_out, op.n_sum, op.n_coef, op.generates_noise));
  }
  return rows;
}

py::tuple names(const char* const* first, int size) {
  py::tuple result(size);
  for (int k = 0; k < size; ++k) result[k] = py::str(first[k]);
  return result;
}
py::tuple names(Names columns) { return names(columns.first, columns.size); }
template <int kCount>
py::tuple names(const char* const (&array)[kCount]) {
  return names(array, kCount);
}

// The names and codes that Python shares, so that they are defined only in C++.
void export_names(py::module_& m) {
  m.attr("STEP_COLUMNS") = names(step_columns());
  m.attr("VLB_COLUMNS") = names(vlb_columns());
  m.attr("GUIDANCE_KINDS") = names(guidance_kinds());
  m.attr("CODES") = names(kCodeNames);          // Reason::code, by number
  m.attr("ARGUMENTS") = names(kArgumentNames);  // Reason::argument, by number
  py::dict found;
  for (const FoundName& item : kFoundNames) found[item.name] = int(item.bit);
  m.attr("FOUND") = found;  // the bits that `launch` returns
}

}  // namespace
}  // namespace diffcore

PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  using namespace diffcore;
  m.def("connect", &connect, py::arg("exchange_api"), py::arg("tensor"), py::arg("parameter"),
        py::arg("empty_like"), py::arg("dispatch_modes"), py::arg("function_modes"),
        py::arg("device_module"), py::arg("without_functions"), py::arg("transforms"),
        py::arg("grad_enabled"));
  m.def("launch", &launch, py::arg("op"), py::arg("ins"), py::arg("coefs"), py::arg("step"),
        py::arg("noise"), py::arg("inspect_only"));
  m.def("call", &diffcore::call, py::arg("op"), py::arg("outs"), py::arg("ins"), py::arg("coefs"),
        py::arg("step"), py::arg("reduce_all"), py::arg("noise"));
  m.def("fill_words", &words, py::arg("out"), py::arg("noise"), py::arg("salt"));
  m.def("op_table", &op_rows);
  m.def("build_info", &build_info);
  m.def(
      "load_cuda_kernels",
      [](int device) {
        if (const char* error = load_cuda_kernels(device)) throw std::runtime_error(error);
      },
      py::arg("device"));
  export_names(m);
}
