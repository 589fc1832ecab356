// From the views of a call to the arguments of a kernel, or to the reason why there are none.
// Knows nothing of Python: tests/native compiles it alone.
#pragma once

#include "binding/op_table.h"
#include "binding/reason.h"
#include "binding/views.h"

namespace diffcore {

struct Plan {
  LaunchArgs args;
  Dtype dtype = kNoDtype;
  dlpack::DeviceRef device{};
  int64_t elements = 0;
  bool empty = false;  // there is nothing to run
};

// Fills `plan`, which has to be new. Reads no element of any tensor.
Reason plan_call(const OpInfo& op, const CallViews& views, Plan* plan);

}  // namespace diffcore
