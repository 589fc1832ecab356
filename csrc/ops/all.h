// The list of ops. Adding a name here gives it CPU kernels, CUDA kernels and a Python binding.
#pragma once

#include "core/op.h"
#include "ops/gaussian.h"
#include "ops/linear.h"
#include "ops/loss.h"
#include "ops/reverse_step.h"
#include "ops/threshold.h"

DC_KERNEL_NAMESPACE_BEGIN

template <class... Op>
struct OpList {
  static constexpr int size = sizeof...(Op);
};

using AllOps =
    OpList<Scale, ScaleTwice, LinearCombination, LinearPair,  // linear.h
           Drawn<Randn>, Drawn<LinearCombination>, Drawn<LinearPair>, ReverseStep, ReverseStepNoise,
           ReverseStepGuided,
           ReverseStepGuidedNoise,                                          // reverse_step.h
           Drawn<ReverseStepNoise>, Drawn<ReverseStepGuidedNoise>,          //
           ReverseStepBackward, ReverseStepGuidedBackward,                  //
           NormalKl, NormalKlSum, NormalKlBackward, NormalKlBackwardFirst,  // gaussian.h
           NormalKlBackwardSecond, NormalKlSumBackward, NormalKlSumBackwardFirst,
           NormalKlSumBackwardSecond,                                        //
           StandardNormalKl, StandardNormalKlSum, StandardNormalKlBackward,  //
           StandardNormalKlSumBackward,                                      //
           GaussianNll, GaussianNllSum, GaussianNllBackward, GaussianNllBackwardParameters,
           GaussianNllSumBackward, GaussianNllSumBackwardParameters,  //
           Reparameterize, ReparameterizeBackward, ReparameterizeKl, ReparameterizeKlBackward,
           Drawn<Reparameterize>, Drawn<ReparameterizeBackward>, Drawn<ReparameterizeKl>,
           Drawn<ReparameterizeKlBackward>,  //
           TargetLoss, TargetLossGradient, MixedTargetLoss, MixedTargetLossGradient,
           Rescale,  // loss.h
           Drawn<TargetLoss>, Drawn<TargetLossGradient>, Drawn<MixedTargetLoss>,
           Drawn<MixedTargetLossGradient>,        //
           X0Quantile<false>, X0Quantile<true>>;  // threshold.h

DC_KERNEL_NAMESPACE_END
