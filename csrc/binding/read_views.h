// Python objects to the views of a call.
#pragma once

#include <pybind11/pybind11.h>

#include "binding/reason.h"
#include "binding/views.h"

namespace diffcore {
namespace py = pybind11;

// Borrows every tensor: the views are valid while the caller's references are. An argument that is
// no tensor, or cannot be borrowed, is a reason; whatever else goes wrong in Python is thrown.
Reason read_views(const py::tuple& outs, const py::tuple& ins, const py::tuple& coefs,
                  py::handle step, bool reduce_all, py::handle noise, CallViews* views);

}  // namespace diffcore
