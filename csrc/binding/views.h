// The arguments of a call as plain data, without Python. read_views.cc fills them from Python
// objects, plan.cc checks them.
#pragma once

#include "binding/dlpack_abi.h"
#include "core/launch_args.h"

namespace diffcore {

// A borrowed tensor. `data` already includes byte_offset.
using TensorView = dlpack::Tensor;

// A number or a tensor.
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

// The parts of a noise key, each a number or a tensor.
enum NoisePart : int { kSeedPart, kIdsPart, kStreamPart, kElementPart, kNoiseParts };

// Not initialized: only the first n entries of an array are valid.
struct CallViews {
  int n_in, n_out, n_coef;  // counts of the arrays below; out: elementwise outputs, then sums
  TensorView in[kMaxIn];
  TensorView out[kMaxOut + kMaxSum];
  CoefView coef[kMaxCoef];  // numbers, vectors and tables as they were passed
  bool has_step, has_noise;
  IntView step;
  IntView noise[kNoiseParts];
  bool reduce_all;  // one sum over all elements instead of one for each sample
};

}  // namespace diffcore
