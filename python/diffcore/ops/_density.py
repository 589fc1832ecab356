"""The density of a planned step: the log-probability of a result, the KL between two models' steps.

A step is a Gaussian around its noise-free result. One kernel scores a step without history and of
fixed variance. For the others the mean is computed first, by the kernel of the noise-free step, in
float32 where the samples have 16 bits: rounded like them it would be wrong by as much as the
deviation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore._checks import as_flag, as_real, check_choice, check_dense
from diffcore._devices import wide_dtype
from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager
from diffcore._engine.dtensor import is_dtensor
from diffcore._engine.execute import split_coefs
from diffcore._kernels import step as k
from diffcore._kernels.gaussian import GAUSSIAN_NLL
from diffcore._kernels.linear import LINEAR_COMBINATION, step_for
from diffcore._types import Coef, Coefs, Step, Tensors
from diffcore.guidance import Guidance, Weighted
from diffcore.noise import Noise
from diffcore.ops._arguments import run_converted
from diffcore.ops._guided import Guided, alike, predictions
from diffcore.ops._launch import GivenGuidance, RowLauncher, launch

REDUCTIONS = ("sum", "mean")
_FIRST = len(k.LEADING)
_C_Z = 3  # among the columns
_UNCLIPPED = (-math.inf, math.inf)


class Scored(NamedTuple):
    """A step whose density is computed: what ``launch`` takes beside the predictions."""

    plan: k.Plan
    others: Tensors  # history, or a predicted variance
    t: Step
    named: str = "t"  # what errors call t


def _learned(step: Scored) -> bool:
    """Whether the variance is predicted: what a step reads beside and is no history."""
    return len(step.others) > 0 and step.plan.reads + step.plan.padding == 0


def wants_log_prob(return_log_prob: bool, reduction: str) -> bool:
    """The two arguments of a step, checked."""
    check_choice("reduction", reduction, REDUCTIONS)
    return as_flag("return_log_prob", return_log_prob)


def check_memory_of(guidance: Guidance | None) -> None:
    """Refuses a rule that a step has moved on since the step that is scored."""
    if isinstance(guidance, Guidance) and guidance.remembers:
        raise ValueError(
            f"guidance must not remember earlier rows here, got {type(guidance).__name__}, which a "
            "step moves on; keep the log-probability of the step: return_log_prob=True"
        )


def in_widest(x: Tensor, *predictions: Tensor | None) -> Tensor:
    """The samples in the widest dtype of a call, for rules that read one model at a time."""
    given = [y for y in (x, *predictions) if isinstance(y, Tensor)]
    if len({y.dtype for y in given}) == 1 or any(y.dtype not in messages.DTYPES for y in given):
        return x
    return x.to(functools.reduce(torch.promote_types, [y.dtype for y in given]))


def check_unconds(first: Tensor | None, second: Tensor | None) -> None:
    """Refuses the unconditional prediction of one model alone."""
    for name, other, given, missing in (
        ("model_output_uncond", "reference_output_uncond", second, first),
        ("reference_output_uncond", "model_output_uncond", first, second),
    ):
        if missing is None and given is not None:
            raise TypeError(f"{name} must be given with {other}, got NoneType")


def log_prob(
    step: Scored,
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    guided: Guided | None,
    threshold: Coef | None,
    reduction: str,
) -> Tensor:
    """Log p(x' | x) ``[B]``; see ``ops.step_log_prob``."""
    given = (step, x, model_output, x_next, guided, threshold)
    found = _log_prob(*given)
    if by_sums(guided) and type(found) is Tensor and plain_eager():
        with torch.no_grad():
            value = _log_prob(*given)
        found = _Valued.apply(value, found)  # type: ignore[no-untyped-call]
    return reduced(found, x, reduction)


def by_sums(guided: Guided | None) -> bool:
    """Whether the numbers of guidance need gradients: the formula in plain torch runs then.

    It rounds otherwise than the kernel, so the ratio of a policy to itself would not be 1: the
    value is that of the kernel, and the formula gives the gradient.
    """
    return guided is not None and any(isinstance(c, Tensor) and c.requires_grad for c in guided[1:])


class _Valued(torch.autograd.Function):
    """A value, and the gradient of another computation of it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, computed: Tensor) -> Tensor:
        del ctx, computed
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        del ctx
        return None, grad


def _log_prob(
    step: Scored,
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    guided: Guided | None,
    threshold: Coef | None,
) -> Tensor:
    """The sum over the elements."""
    if step.plan.reads or _learned(step):
        return _composed(step, x, model_output, x_next, guided, threshold)
    kernels = k.STEP_LOG_PROB if step.named == "t" else k.TABLE_LOG_PROB
    tensors, leading = predictions(x, model_output, guided, threshold)
    columns, of_uncond = _columns(step.plan, k.PLAIN), step.plan.coefs[2:4]
    coefs = (*leading[:2], *of_uncond, leading[4], *columns)
    kernel = kernels[guided is not None]
    return run_converted(kernel, (*tensors, x_next), coefs, step.t)


def kl(
    step: Scored,
    x: Tensor,
    model_outputs: tuple[Tensor, Tensor],
    guided: tuple[Guided | None, Guided | None],
    threshold: Coef | None,
    reduction: str,
) -> Tensor:
    """KL of the first model's step to the second's, ``[B]``; see ``ops.step_kl``."""
    kernel = k.STEP_KL if step.named == "t" else k.TABLE_KL
    t = step.t
    if guided[0] is None and guided[1] is None:
        _, leading = predictions(x, model_outputs[0], None, threshold)
        inputs: Tensors = (x, *model_outputs)
        coefs = (*leading, *_columns(step.plan, k.PLAIN))
    else:
        means = _means(step, x, model_outputs, guided, threshold)
        inputs = (means[0].detach(), *means)
        coefs = _around(step)
        t = step_for(t, *coefs)
    return reduced(run_converted(kernel, inputs, coefs, t), x, reduction)


# ---- rows of a solver's table --------------------------------------------------------------------


def step_of_row(
    rows: RowLauncher,
    i: int | Tensor,
    x: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    noise: Noise | None,
    given: GivenGuidance,
    threshold: Coef | None,
    variance_output: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensors, Tensor]:
    """Row i and the log-probability of its x'; see ``SolverTable.step``."""
    model_output, guided = rows.guided_or_refused(i, x, model_output, given, True)
    uncond, rule = (None, None) if guided is None else (guided.uncond, Weighted(*guided[1:]))
    x_next, left = rows.step(
        i, x, model_output, history, noise, uncond, None, threshold, variance_output, rule
    )
    step = Scored(*rows.planned(i, x, history, variance_output), "i")
    scored = log_prob(step, x, model_output, x_next.detach(), guided, threshold, reduction)
    return x_next, left, scored


def log_prob_of_row(
    rows: RowLauncher,
    i: int | Tensor,
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    history: Sequence[Tensor],
    given: GivenGuidance,
    threshold: Coef | None,
    variance_output: Tensor | None,
    reduction: str,
) -> Tensor:
    """The log-probability of row i; see ``SolverTable.log_prob``."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_memory_of(given[2])
    step = Scored(*rows.planned(i, x, history, variance_output), "i")
    model_output, guided = rows.guided_or_refused(i, x, model_output, given, False)
    return log_prob(step, x, model_output, x_next, guided, threshold, reduction)


def kl_of_row(
    rows: RowLauncher,
    i: int | Tensor,
    x: Tensor,
    model_outputs: tuple[Tensor, Tensor],
    unconds: tuple[Tensor | None, Tensor | None],
    guidance_scale: Coef | None,
    guidance: Guidance | None,
    threshold: Coef | None,
    reduction: str,
) -> Tensor:
    """The KL of two models' steps at row i; see ``SolverTable.step_kl``."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_memory_of(guidance)
    check_unconds(*unconds)
    plan, t = rows.plan_at(i, x)
    rows.check_fixed_variance("step_kl")
    if guidance is not None:
        x = in_widest(x, *model_outputs, *unconds)
    step = Scored(plan, (), t, "i")
    first, second = [
        rows.guided_or_refused(i, x, m, (u, guidance_scale, guidance), False)
        for m, u in zip(model_outputs, unconds, strict=True)
    ]
    outputs, guided = (first[0], second[0]), (first[1], second[1])
    return kl(step, x, outputs, guided, threshold, reduction)


# ---- the parts -----------------------------------------------------------------------------------


def _composed(
    step: Scored,
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    guided: Guided | None,
    threshold: Coef | None,
) -> Tensor:
    """The sum over the elements where history or a predicted variance is read."""
    named = {"x": x, "model_output": model_output, "x_next": x_next}
    if guided is not None:
        named["model_output_uncond"] = guided.uncond
    if _learned(step):
        named["variance_output"] = step.others[0]
    else:
        named |= {f"history_{j}": h for j, h in enumerate(step.others[: step.plan.reads], 1)}
    x, model_output, x_next, *rest = _widened(named)
    if guided is not None:
        guided = guided._replace(uncond=rest.pop(0))
    others = tuple(rest)
    mean = _mean(step, x, model_output, () if _learned(step) else others, guided, threshold)
    if _learned(step):
        return _of_learned(step, mean, x_next, others[0])
    coefs, inputs = _around(step), (mean.detach(), mean, x_next)
    return run_converted(k.STEP_LOG_PROB[False], inputs, coefs, step_for(step.t, *coefs))


def _of_learned(step: Scored, mean: Tensor, x_next: Tensor, variance_output: Tensor) -> Tensor:
    """The same where the deviation is ``c_z exp(s_0 + s_v v)``; 0 where c_z is 0."""
    c_z, s_0, s_v = _numbers(step, _C_Z, -2, -1)
    lengths = {len(c) for c in (c_z, s_0, s_v) if isinstance(c, Tensor) and c.ndim and len(c) != 1}
    if len(lengths) > 1:
        raise ValueError(
            "variance_coefficients must have as many rows as coefficients, got lengths "
            f"{sorted(lengths)}"
        )
    noisy: Coef
    if isinstance(c_z, Tensor):
        still, wide = c_z == 0, wide_dtype(c_z.device)
        log_c_z: Coef = torch.where(still, torch.ones_like(c_z), c_z).to(wide).log()
        noisy = torch.where(still, 0.0, 1.0).to(wide)
    else:
        log_c_z, noisy = (math.log(c_z), 1.0) if c_z != 0 else (0.0, 0.0)
    parts, one = (2.0 * (log_c_z + s_0), 2.0 * s_v), torch.ones_like(variance_output)
    log_variance = run_converted(
        LINEAR_COMBINATION.reading, (one, variance_output), parts, step_for(step.t, *parts)
    )
    inputs = (x_next, mean, log_variance)
    nll = run_converted(GAUSSIAN_NLL.sum, inputs, (noisy,), step_for(step.t, noisy))
    # Of nothing 0, not -0; a sum that crosses ranks stays one.
    return -nll if is_dtensor(nll) else 0.0 - nll


def _mean(
    step: Scored,
    x: Tensor,
    model_output: Tensor,
    history: Tensors,
    guided: Guided | None,
    threshold: Coef | None,
) -> Tensor:
    """The noise-free step."""
    reads = len(history)
    keeps = reads > 1  # no kernel reads several h and keeps none
    columns, of_uncond = _columns(step.plan, k.columns_read(reads, keeps)), step.plan.coefs[2:4]
    kernels = k.REVERSE_STEP if step.named == "t" else k.TABLE_STEP
    still = k.plan(columns, reads, keeps, False, kernels, of_uncond)
    history = (*history, *(x,) * still.padding)
    found = launch(still, x, model_output, history, step.t, None, guided, threshold)
    mean: Tensor = found[0] if keeps else found
    return mean


def _means(
    step: Scored,
    x: Tensor,
    model_outputs: tuple[Tensor, Tensor],
    guided: tuple[Guided | None, Guided | None],
    threshold: Coef | None,
) -> list[Tensor]:
    """The noise-free steps of two guided models, without history, which is a term of both."""
    first, second = guided
    assert first is not None
    assert second is not None
    named = dict(zip(("x", "model_output", "reference_output"), (x, *model_outputs), strict=True))
    named |= {"model_output_uncond": first.uncond, "reference_output_uncond": second.uncond}
    x, *tensors = _widened(named)
    both = zip(tensors[:2], tensors[2:], (first, second), strict=True)
    return [_mean(step, x, m, (), rule._replace(uncond=u), threshold) for m, u, rule in both]


def _widened(named: dict[str, Tensor]) -> Tensors:
    """The tensors of a call, checked, in float32 or float64."""
    return tuple([y.float() if y.dtype.itemsize == 2 else y for y in alike(named)])


def _around(step: Scored) -> Coefs:
    """The coefficients of a step whose m is its mean: c_m = 1, and the deviation."""
    (c_z,) = _numbers(step, _C_Z)
    return (*k.UNGUIDED, 0.0, 1.0, 0.0, c_z, 0.0, 0.0, *_UNCLIPPED)


def _columns(plan: k.Plan, count: int) -> Coefs:
    """The first columns of a plan."""
    columns = plan.coefs[_FIRST:]
    first = columns[0]
    if isinstance(first, Tensor) and first.ndim == 2:
        return (first if first.shape[1] == count else first[:, :count],)
    return columns[:count]


def _split(columns: Coefs) -> Coefs:
    """One item a column, numbers as floats."""
    return tuple(
        c if type(c) is float or isinstance(c, Tensor) else as_real("coefficients", c)
        for c in split_coefs(columns)
    )


def _numbers(step: Scored, *which: int) -> Coefs:
    """Some columns, s_0 and s_v being the last two of a learned variance."""
    columns = _split(step.plan.coefs[_FIRST:])
    found = tuple(columns[i] for i in which)
    for c in found:  # torch computes with them
        if isinstance(c, Tensor):
            check_dense("coefficients" if step.named == "t" else "table", c)
    return found


def reduced(found: Tensor, x: Tensor, reduction: str) -> Tensor:
    """The sums over the elements, or their means."""
    return found if reduction == "sum" else found / x.shape[1:].numel()
