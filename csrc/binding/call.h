// Runs a planned call on its device.
#pragma once

#include "binding/plan.h"

namespace diffcore {

// A step that the CPU finds out of range is a reason, before anything is written. Throws what the
// CUDA runtime or Python reports.
Reason run_plan(int op, Plan* plan);

}  // namespace diffcore
