#include "binding/read_views.h"

#include "binding/torch_api.h"

namespace diffcore {
namespace {

bool is_tensor(PyObject* object) {
  return Py_TYPE(object) == g_torch.tensor || PyObject_TypeCheck(object, g_torch.tensor);
}

Reason borrow(PyObject* object, TensorView* view, Argument argument, int index = 0) {
  if (!is_tensor(object)) return {Code::kType, argument, index};
  if (g_torch.exchange->borrow(object, view) != 0) {
    // torch raises an Exception other than MemoryError for a tensor without storage.
    if (!PyErr_Occurred() || PyErr_ExceptionMatches(PyExc_MemoryError) ||
        !PyErr_ExceptionMatches(PyExc_Exception))
      throw py::error_already_set();
    PyErr_Clear();
    return {Code::kUnreadable, argument, index};
  }
  if (view->byte_offset) view->data = static_cast<char*>(view->data) + view->byte_offset;
  return {};
}

Reason read_tensors(const py::tuple& tensors, TensorView* views, int most, int* n,
                    Argument argument) {
  const Py_ssize_t size = PyTuple_GET_SIZE(tensors.ptr());
  if (size > most) return {Code::kCount, argument, 0, int64_t(size)};
  *n = int(size);
  for (int k = 0; k < *n; ++k)
    if (Reason reason = borrow(PyTuple_GET_ITEM(tensors.ptr(), k), &views[k], argument, k))
      return reason;
  return {};
}

Reason read_coefs(const py::tuple& coefs, CallViews* views) {
  const Py_ssize_t size = PyTuple_GET_SIZE(coefs.ptr());
  if (size > kMaxCoef) return {Code::kCoefficients, Argument::kCoef, 0, int64_t(size)};
  views->n_coef = int(size);
  for (int k = 0; k < views->n_coef; ++k) {
    CoefView& view = views->coef[k];
    PyObject* object = PyTuple_GET_ITEM(coefs.ptr(), k);
    view.is_tensor = !PyFloat_CheckExact(object);
    if (!view.is_tensor)
      view.value = PyFloat_AS_DOUBLE(object);
    else if (Reason reason = borrow(object, &view.tensor, Argument::kCoef, k))
      return reason;
  }
  return {};
}

Reason read_step(py::handle step, CallViews* views) {
  views->has_step = !step.is_none();
  if (!views->has_step) return {};
  views->step.is_tensor = !PyLong_CheckExact(step.ptr());
  if (views->step.is_tensor) return borrow(step.ptr(), &views->step.tensor, Argument::kStep);
  views->step.value = PyLong_AsLongLong(step.ptr());
  if (views->step.value == -1 && PyErr_Occurred()) {
    if (!PyErr_ExceptionMatches(PyExc_OverflowError)) throw py::error_already_set();
    PyErr_Clear();  // -1 is out of range for every table, like the step
  }
  return {};
}

// (seed, sample ids, stream, first element): ints modulo 2^64, or tensors.
Reason read_noise(py::handle noise, CallViews* views) {
  views->has_noise = !noise.is_none();
  if (!views->has_noise) return {};
  if (!PyTuple_CheckExact(noise.ptr()) || PyTuple_GET_SIZE(noise.ptr()) != kNoiseParts)
    return {Code::kNoise};
  constexpr Argument kParts[] = {Argument::kSeed, Argument::kSampleIds, Argument::kStream,
                                 Argument::kFirstElement};
  for (int k = 0; k < kNoiseParts; ++k) {
    IntView& view = views->noise[k];
    PyObject* part = PyTuple_GET_ITEM(noise.ptr(), k);
    view.is_tensor = !PyLong_CheckExact(part);
    if (!view.is_tensor)
      view.value = int64_t(PyLong_AsUnsignedLongLongMask(part));
    else if (Reason reason = borrow(part, &view.tensor, kParts[k]))
      return reason;
  }
  return {};
}

}  // namespace

Reason read_views(const py::tuple& outs, const py::tuple& ins, const py::tuple& coefs,
                  py::handle step, bool reduce_all, py::handle noise, CallViews* views) {
  views->reduce_all = reduce_all;
  if (Reason reason = read_tensors(ins, views->in, kMaxIn, &views->n_in, Argument::kInput))
    return reason;
  if (Reason reason =
          read_tensors(outs, views->out, kMaxOut + kMaxSum, &views->n_out, Argument::kOutput))
    return reason;
  if (Reason reason = read_coefs(coefs, views)) return reason;
  if (Reason reason = read_step(step, views)) return reason;
  return read_noise(noise, views);
}

}  // namespace diffcore
