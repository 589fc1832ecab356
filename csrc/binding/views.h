// The arguments of a call as plain data, without Python: what views.cc reads from Python objects,
// and plan.cc checks.
#pragma once

#include "binding/dlpack_abi.h"
#include "core/launch_args.h"

namespace diffcore {

// A borrowed tensor; its data begins at `data`, whatever byte_offset is.
using TensorView = dlpack::Tensor;

// A number, or a tensor of them.
struct CoefView {
  bool is_tensor;
  double value;
  TensorView tensor;
};
struct IntView {
  bool is_tensor;
  int64_t value;
  TensorView tensor;
};

// The three parts of a noise key that tensors may hold.
enum NoisePart : int { kSeedPart, kIdsPart, kStreamPart, kNoiseParts };

// Not initialized: an array is filled up to its count.
struct CallViews {
  int n_in, n_out, n_coef;  // of the arrays below; n_out: elementwise outputs, then sums
  TensorView in[kMaxIn];
  TensorView out[kMaxOut + kMaxSum];
  CoefView coef[kMaxCoef];  // numbers, vectors and tables as they were passed
  bool has_step, has_noise;
  IntView step;
  IntView noise[kNoiseParts];
  int64_t first_element;  // of each sample's noise
  bool reduce_all;        // one sum over all elements instead of one for each sample
};

}  // namespace diffcore
