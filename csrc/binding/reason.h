// The reason why a call was not run. Python builds the error message from the code and the
// argument, and reads the values from the arguments of the call.
#pragma once

#include <stdint.h>

namespace diffcore {

enum class Code : int {
  kDone,
  kCount,           // wrong number of tensors; `detail`: the number passed
  kType,            // neither a tensor nor a number
  kUnreadable,      // a tensor that cannot be borrowed: sparse, quantized, without storage
  kDeviceKind,      // a device without kernels
  kDtype,           // an unsupported dtype for this argument
  kMemory,          // a tensor without memory
  kShape,           // shape differs from the first tensor
  kOtherDtype,      // dtype differs from the first tensor
  kOtherDevice,     // device differs from the first tensor
  kDimensions,      // too many dimensions
  kLength,          // number of entries is neither 1 nor one per sample
  kTableLength,     // a table without rows, or not as long as the others (`detail`)
  kCoefficients,    // wrong number of coefficients; `detail`: the number passed
  kStepNotUsed,     // a step without a table
  kStepRange,       // a step out of range; `detail`: the step, -1 if it exceeds int64
  kNoise,           // a noise key for an op without one, or a missing noise key
  kNoiseElement,    // a first element that is negative or not a multiple of 4
  kNoiseRange,      // noise beyond element 2^34 of a sample; `detail`: the end
  kReduceAll,       // coefficients per sample in a sum over all elements
  kNoiseLayout,     // a memory layout in which kernels do not generate noise
  kLayout,          // a memory layout that kernels do not read or write
  kOverlap,         // an output overlaps an input partly, or another argument
  kOutputsOverlap,  // two outputs overlap
};
constexpr const char* kCodeNames[] = {
    "done",         "count",  "type",          "unreadable",     "device_kind",
    "dtype",        "memory", "shape",         "other_dtype",    "other_device",
    "dimensions",   "length", "table_length",  "coefficients",   "step_not_used",
    "step_range",   "noise",  "noise_element", "noise_range",    "reduce_all",
    "noise_layout", "layout", "overlap",       "outputs_overlap"};
static_assert(sizeof(kCodeNames) / sizeof(*kCodeNames) == int(Code::kOutputsOverlap) + 1);

// The argument that caused the reason; `index` counts within arguments of one kind.
enum class Argument : int {
  kNone,
  kInput,
  kOutput,
  kSum,
  kCoef,
  kStep,
  kSeed,
  kSampleIds,
  kStream,
  kFirstElement
};
constexpr const char* kArgumentNames[] = {"none", "input", "output",     "sum",    "coef",
                                          "step", "seed",  "sample_ids", "stream", "first_element"};
static_assert(sizeof(kArgumentNames) / sizeof(*kArgumentNames) == int(Argument::kFirstElement) + 1);

struct Reason {
  Code code = Code::kDone;
  Argument argument = Argument::kNone;
  int index = 0;
  int64_t detail = 0;

  explicit operator bool() const { return code != Code::kDone; }
};

}  // namespace diffcore
