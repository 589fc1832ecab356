// Why a call was not run. Python builds its messages from the code and the argument, and reads the
// values from the arguments themselves.
#pragma once

#include <stdint.h>

namespace diffcore {

enum class Code : int {
  kDone,
  kCount,           // another number of tensors than the op has
  kType,            // neither a tensor nor a number where one of them has to be
  kUnreadable,      // a tensor that cannot be borrowed: sparse, quantized, without storage
  kDeviceKind,      // a device without kernels
  kDtype,           // a dtype that the kernels do not read there
  kMemory,          // no memory behind the tensor
  kShape,           // another shape than the first tensor
  kOtherDtype,      // another dtype than the first tensor
  kOtherDevice,     // another device than the first tensor
  kDimensions,      // too many dimensions
  kLength,          // entries are neither 1 nor one per sample
  kTableLength,     // a table without rows, or with another number of them (`detail`)
  kCoefficients,    // `detail` coefficients came
  kStepNotUsed,     // a step, but no table
  kStepRange,       // a step outside the tables; `detail`: the step, if it fits
  kNoise,           // noise for an op without, or none for an op with it
  kNoiseElement,    // a first element that is negative or no multiple of 4
  kNoiseRange,      // noise beyond element 2^34 of a sample; `detail`: where it would end
  kReduceAll,       // coefficients differ by sample where one sum over all is wanted
  kNoiseLayout,     // an order in memory in which kernels generate no noise
  kLayout,          // an order in memory that kernels do not read or write as it is
  kOverlap,         // an output partly over an input
  kOutputsOverlap,  // an output over another
};
constexpr const char* kCodeNames[] = {
    "done",         "count",  "type",          "unreadable",     "device_kind",
    "dtype",        "memory", "shape",         "other_dtype",    "other_device",
    "dimensions",   "length", "table_length",  "coefficients",   "step_not_used",
    "step_range",   "noise",  "noise_element", "noise_range",    "reduce_all",
    "noise_layout", "layout", "overlap",       "outputs_overlap"};
static_assert(sizeof(kCodeNames) / sizeof(*kCodeNames) == int(Code::kOutputsOverlap) + 1);

// What the reason is about; `index` counts within the arguments of a kind.
enum class Argument : int {
  kNone,
  kInput,
  kOutput,
  kSum,
  kCoef,
  kStep,
  kSeed,
  kSampleIds,
  kStream
};
constexpr const char* kArgumentNames[] = {"none", "input", "output",     "sum",   "coef",
                                          "step", "seed",  "sample_ids", "stream"};
static_assert(sizeof(kArgumentNames) / sizeof(*kArgumentNames) == int(Argument::kStream) + 1);

struct Reason {
  Code code = Code::kDone;
  Argument argument = Argument::kNone;
  int index = 0;
  int64_t detail = 0;

  explicit operator bool() const { return code != Code::kDone; }
};

}  // namespace diffcore
