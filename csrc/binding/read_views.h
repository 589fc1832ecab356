// Converts Python objects to the views of a call.
#pragma once

#include <pybind11/pybind11.h>

#include "binding/reason.h"
#include "binding/views.h"

namespace diffcore {
namespace py = pybind11;

// Borrows every tensor: the views are valid as long as the caller's references. Returns a reason if
// an argument is not a tensor or cannot be borrowed; throws on other Python errors.
Reason read_views(const py::tuple& outs, const py::tuple& ins, const py::tuple& coefs,
                  py::handle step, bool reduce_all, py::handle noise, CallViews* views);

}  // namespace diffcore
