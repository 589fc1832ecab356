// Runs a planned call on its device.
#pragma once

#include "binding/plan.h"

namespace diffcore {

// Returns kStepRange, before anything is written, if a step tensor on the CPU is out of range.
// Throws on errors of the CUDA runtime or Python.
Reason run_plan(int op, Plan* plan);

}  // namespace diffcore
