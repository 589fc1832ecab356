// Runs a planned call on its device.
#pragma once

#include "binding/plan.h"

namespace diffcore {

// Returns kStepRange, before anything is written, if a step tensor on the CPU is out of range.
// Throws on errors of the CUDA runtime or Python.
Reason run_plan(int op, Plan* plan);

// Fills the one output, int64 [B, 4 n] on the CPU, with the words of n successive Philox blocks of
// each sample, under the seed with the bits of `salt` flipped. Returns why it did not.
Reason fill_words(CallViews* views, uint64_t salt);

}  // namespace diffcore
