// The list of ops. Adding a name here gives it CPU kernels, CUDA kernels and a Python binding.
#pragma once

#include "core/op_checks.h"
#include "ops/bound.h"
#include "ops/gaussian.h"
#include "ops/guidance.h"
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

// An elementwise term, its sum over each row, and the gradients of both.
template <class Term, class... Gradient>
using Family = OpList<Term, SumOf<Term>, GradientOf<Gradient>..., SumGradientOf<Gradient>...>;

template <bool kGuided, int kHistory, bool kKeeps>
using Step = OpList<ReverseStep<kGuided, kHistory, kKeeps, kStill>,
                    ReverseStep<kGuided, kHistory, kKeeps, kNoisy>,
                    Generated<ReverseStep<kGuided, kHistory, kKeeps, kNoisy>>>;

// Instances exist for one and three history tensors. A step that keeps h' without using history, or
// uses two tensors, runs the next larger instance with coefficient 0 for a tensor that the loop has
// allocated anyway.
template <bool kGuided>
using Steps = Joined<
    Step<kGuided, 0, false>, Step<kGuided, 1, false>, Step<kGuided, 1, true>,
    Step<kGuided, 3, true>,
    OpList<ReverseStep<kGuided, 0, false, kLearnedNoise>,
           Generated<ReverseStep<kGuided, 0, false, kLearnedNoise>>,
           ReverseStepBackward<kGuided, false, false>, ReverseStepBackward<kGuided, false, true>,
           ReverseStepBackward<kGuided, true, false>, StepLogProb<kGuided>,
           StepLogProbBackward<kGuided, false>, StepLogProbBackward<kGuided, true>>>;

// clang-format off
using AllOps = Joined<
    // step.h
    Steps<false>, Steps<true>, OpList<StepKl, StepKlBackward>,
    // linear.h
    OpList<Scale, ScaleTwice, LinearCombination, LinearPair, Blend,
           Generated<Randn>, Generated<LinearCombination>, Generated<LinearPair>>,
    // gaussian.h
    Family<NormalKl, NormalKlGradient<Sides::kBoth>, NormalKlGradient<Sides::kFirst>,
           NormalKlGradient<Sides::kSecond>>,
    Family<StandardNormalKl, StandardNormalKlGradient>,
    Family<GaussianNll, GaussianNllGradient<true>, GaussianNllGradient<false>>,
    // likelihood.h
    Family<DiscretizedGaussianLogLikelihood, DiscretizedGradient<true>, DiscretizedGradient<false>>,
    // gaussian.h
    OpList<Reparameterize, ReparameterizeBackward, ReparameterizeKl, ReparameterizeKlBackward,
           Generated<Reparameterize>, Generated<ReparameterizeBackward>,
           Generated<ReparameterizeKl>, Generated<ReparameterizeKlBackward>>,
    // loss.h
    OpList<TargetLoss, WithGradient<TargetLoss>, MixedTargetLoss, WithGradient<MixedTargetLoss>,
           WithGradient<MaskedLoss>, RobustLossGradient, Rescale,
           Generated<TargetLoss>, Generated<WithGradient<TargetLoss>>,
           Generated<MixedTargetLoss>, Generated<WithGradient<MixedTargetLoss>>>,
    // guidance.h
    OpList<GuidanceWeights>,
    // threshold.h
    OpList<X0Quantile<false>, X0Quantile<true>>,
    // bound.h
    OpList<VlbTerm<false>, VlbTerm<true>, VlbTermBackward<false>, VlbTermBackward<true>,
           Generated<VlbTerm<false>>, Generated<VlbTerm<true>>,
           Generated<VlbTermBackward<false>>, Generated<VlbTermBackward<true>>, PriorKl>>;
// clang-format on

template <class... Op>
constexpr bool check_all(OpList<Op...>) {
  return (check_op<Op>() && ...);
}
static_assert(check_all(AllOps{}));

DC_KERNEL_NAMESPACE_END
