// The list of ops. Adding a name here gives it CPU kernels, CUDA kernels and a Python binding.
#pragma once

#include "core/op.h"
#include "ops/gaussian.h"
#include "ops/linear.h"
#include "ops/loss.h"
#include "ops/reverse_step.h"

DC_KERNEL_NAMESPACE_BEGIN

template <class... Op>
struct OpList {
  static constexpr int size = sizeof...(Op);
};

template <class... List>
struct Join;
template <class... Op>
struct Join<OpList<Op...>> {
  using type = OpList<Op...>;
};
template <class... A, class... B, class... More>
struct Join<OpList<A...>, OpList<B...>, More...> : Join<OpList<A..., B...>, More...> {};
template <class... List>
using Joined = typename Join<List...>::type;

template <int kHistory>
using Steps =
    OpList<ReverseStep<false, kHistory, false>, ReverseStep<false, kHistory, true>,
           ReverseStep<true, kHistory, false>, ReverseStep<true, kHistory, true>,
           Drawn<ReverseStep<false, kHistory, true>>, Drawn<ReverseStep<true, kHistory, true>>>;

using AllOps = Joined<
    Steps<0>, Steps<1>, Steps<2>, Steps<3>,
    OpList<Scale, ScaleTwice, LinearCombination, LinearPair,                // linear.h
           Drawn<Randn>, Drawn<LinearCombination>, Drawn<LinearPair>,       //
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
           Drawn<MixedTargetLossGradient>>>;

DC_KERNEL_NAMESPACE_END
