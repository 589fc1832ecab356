// The list of ops. Adding a name here gives it CPU kernels, CUDA kernels and a Python binding.
#pragma once

#include "core/op.h"
#include "ops/bound.h"
#include "ops/gaussian.h"
#include "ops/likelihood.h"
#include "ops/linear.h"
#include "ops/loss.h"
#include "ops/step.h"
#include "ops/threshold.h"

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

template <bool kGuided, int kHistory, bool kKeeps>
using Step = OpList<ReverseStep<kGuided, kHistory, kKeeps, kStill>,
                    ReverseStep<kGuided, kHistory, kKeeps, kNoisy>,
                    Drawn<ReverseStep<kGuided, kHistory, kKeeps, kNoisy>>>;

// One history and three are instances; none that is kept, and two, are the next larger one with a
// factor of 0 for a tensor that is there anyway.
template <bool kGuided>
using Steps = Joined<Step<kGuided, 0, false>, Step<kGuided, 1, false>, Step<kGuided, 1, true>,
                     Step<kGuided, 3, true>,
                     OpList<ReverseStep<kGuided, 0, false, kLearnedNoise>,
                            Drawn<ReverseStep<kGuided, 0, false, kLearnedNoise>>,
                            ReverseStepBackward<kGuided, false>, ReverseStepBackward<kGuided, true>,
                            StepLogProb<kGuided>, StepLogProbBackward<kGuided, false>,
                            StepLogProbBackward<kGuided, true>>>;

using AllOps = Joined<
    Steps<false>, Steps<true>,                                              // step.h
    OpList<Scale, ScaleTwice, LinearCombination, LinearPair,                // linear.h
           Drawn<Randn>, Drawn<LinearCombination>, Drawn<LinearPair>,       //
           NormalKl, NormalKlSum, NormalKlBackward, NormalKlBackwardFirst,  // gaussian.h
           NormalKlBackwardSecond, NormalKlSumBackward, NormalKlSumBackwardFirst,
           NormalKlSumBackwardSecond,                                        //
           StandardNormalKl, StandardNormalKlSum, StandardNormalKlBackward,  //
           StandardNormalKlSumBackward,                                      //
           GaussianNll, GaussianNllSum, GaussianNllBackward, GaussianNllBackwardParameters,
           GaussianNllSumBackward, GaussianNllSumBackwardParameters,               //
           DiscretizedGaussianLogLikelihood, DiscretizedGaussianLogLikelihoodSum,  // likelihood.h
           DiscretizedBackward, DiscretizedBackwardParameters, DiscretizedSumBackward,
           DiscretizedSumBackwardParameters,  //
           Reparameterize, ReparameterizeBackward, ReparameterizeKl, ReparameterizeKlBackward,
           Drawn<Reparameterize>, Drawn<ReparameterizeBackward>, Drawn<ReparameterizeKl>,
           Drawn<ReparameterizeKlBackward>,  //
           TargetLoss, TargetLossGradient, MixedTargetLoss, MixedTargetLossGradient,
           Rescale,  // loss.h
           Drawn<TargetLoss>, Drawn<TargetLossGradient>, Drawn<MixedTargetLoss>,
           Drawn<MixedTargetLossGradient>,        //
           X0Quantile<false>, X0Quantile<true>>,  // threshold.h
    OpList<VlbTerm<false>, VlbTerm<true>, VlbTermBackward<false>, VlbTermBackward<true>,  // bound.h
           Drawn<VlbTerm<false>>, Drawn<VlbTerm<true>>, Drawn<VlbTermBackward<false>>,
           Drawn<VlbTermBackward<true>>, PriorKl>>;

DC_KERNEL_NAMESPACE_END
