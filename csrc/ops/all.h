// The list of ops. Adding a name here gives it CPU kernels, CUDA kernels and a Python binding.
#pragma once

#include "core/op_checks.h"
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

// A term of each element, its sum over each row, and the gradients of both.
template <class Term, class... Gradient>
using Family = OpList<Term, SumOf<Term>, GradientOf<Gradient>..., SumGradientOf<Gradient>...>;

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

// clang-format off
using AllOps = Joined<
    // step.h
    Steps<false>, Steps<true>,
    // linear.h
    OpList<Scale, ScaleTwice, LinearCombination, LinearPair,
           Drawn<Randn>, Drawn<LinearCombination>, Drawn<LinearPair>>,
    // gaussian.h
    Family<NormalKl, NormalKlGradient<Sides::kBoth>, NormalKlGradient<Sides::kFirst>,
           NormalKlGradient<Sides::kSecond>>,
    Family<StandardNormalKl, StandardNormalKlGradient>,
    Family<GaussianNll, GaussianNllGradient<true>, GaussianNllGradient<false>>,
    // likelihood.h
    Family<DiscretizedGaussianLogLikelihood, DiscretizedGradient<true>, DiscretizedGradient<false>>,
    // gaussian.h
    OpList<Reparameterize, ReparameterizeBackward, ReparameterizeKl, ReparameterizeKlBackward,
           Drawn<Reparameterize>, Drawn<ReparameterizeBackward>,
           Drawn<ReparameterizeKl>, Drawn<ReparameterizeKlBackward>>,
    // loss.h
    OpList<TargetLoss, WithGradient<TargetLoss>, MixedTargetLoss, WithGradient<MixedTargetLoss>,
           Rescale,
           Drawn<TargetLoss>, Drawn<WithGradient<TargetLoss>>,
           Drawn<MixedTargetLoss>, Drawn<WithGradient<MixedTargetLoss>>>,
    // threshold.h
    OpList<X0Quantile<false>, X0Quantile<true>>,
    // bound.h
    OpList<VlbTerm<false>, VlbTerm<true>, VlbTermBackward<false>, VlbTermBackward<true>,
           Drawn<VlbTerm<false>>, Drawn<VlbTerm<true>>,
           Drawn<VlbTermBackward<false>>, Drawn<VlbTermBackward<true>>, PriorKl>>;
// clang-format on

template <class... Op>
constexpr bool check_all(OpList<Op...>) {
  return (check_op<Op>() && ...);
}
static_assert(check_all(AllOps{}));

DC_KERNEL_NAMESPACE_END
