// Translates the views of a call into the arguments of a kernel, or into the reason why it cannot
// run. Does not use Python, so tests/native compiles it separately.
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
  bool empty = false;  // no element: nothing to run
};

// Fills `plan`, which must be newly constructed. Reads no element of any tensor.
Reason plan_call(const OpInfo& op, const CallViews& views, Plan* plan);

}  // namespace diffcore
