"""One reverse step of any solver, its log-probability, and the KL of two models' steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from diffcore._checks import as_flag, check_choice
from diffcore._kernels import step as k
from diffcore._types import Coef, Row, Step, Tensors
from diffcore.guidance import Guidance
from diffcore.noise import Noise
from diffcore.ops._arguments import run_converted
from diffcore.ops._density import (
    REDUCTIONS,
    Scored,
    by_sums,
    check_memory_of,
    check_unconds,
    in_widest,
    kl,
    log_prob,
    reduced,
    wants_log_prob,
)
from diffcore.ops._groups import in_groups
from diffcore.ops._guided import guided_by, known_guidance, predictions
from diffcore.ops._launch import (
    LearnedVariance,
    history_of,
    launch,
    step_columns,
    variance_columns,
    variance_of,
)

__all__ = [
    "reverse_step",
    "step_kl",
    "step_log_prob",
]


@overload
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    threshold: Coef | None = None,
    group_dim: int | None = None,
    history: Sequence[Tensor] = (),
    return_history: Literal[False] = False,
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    return_log_prob: Literal[False] = False,
    reduction: str = "sum",
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    threshold: Coef | None = None,
    group_dim: int | None = None,
    history: Sequence[Tensor] = (),
    return_history: Literal[True],
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    return_log_prob: Literal[False] = False,
    reduction: str = "sum",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    threshold: Coef | None = None,
    group_dim: int | None = None,
    history: Sequence[Tensor] = (),
    return_history: Literal[False] = False,
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    return_log_prob: Literal[True],
    reduction: str = "sum",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    threshold: Coef | None = None,
    group_dim: int | None = None,
    history: Sequence[Tensor] = (),
    return_history: Literal[True],
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    return_log_prob: Literal[True],
    reduction: str = "sum",
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    threshold: Coef | None = None,
    history: Sequence[Tensor] = (),
    return_history: bool = False,
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    return_log_prob: bool = False,
    reduction: str = "sum",
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]: ...
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    threshold: Coef | None = None,
    group_dim: int | None = None,
    history: Sequence[Tensor] = (),
    return_history: bool = False,
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    return_log_prob: bool = False,
    reduction: str = "sum",
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """One step of any solver, with guidance, conversion, clip, update and noise in one launch.

    With ``m = m_u + w (m_c - m_u)`` under classifier-free guidance (``diffcore.guidance`` has other
    rules) and ``x0 = clip(a_x x + a_m m, clip_min, clip_max)``::

        x' = c_x x + c_m m + c_0 x0 + c_1 h_1 + c_2 h_2 + c_3 h_3 + c_z noise
        h' = e_x x + e_m m + e_0 x0

    Differentiable in ``x``, the model outputs, ``history`` and ``noise``; outside the clip no
    gradient flows through ``x0``. ``SolverTable.step`` calls this for a step of a solver.

    Args:
        x: The current samples ``[B, ...]``.
        model_output: m, ``[B, ...]``. Under guidance m_c, or, without ``model_output_uncond``, both
            in one tensor ``[2 B, ...]``, m_u first.
        coefficients: A table ``[T, 8]`` or ``[T, 14]`` read at ``t``, or ``[B, 8 or 14]`` or a row
            of numbers without ``t``; float64 or float32. The columns are c_x, c_m, c_0, c_z, a_x,
            a_m, clip_min, clip_max, and, where history is read or returned, e_x, e_m, e_0, c_1,
            c_2, c_3 (``solvers.COLUMNS``).
        t: The row: an int, ``[B]`` or a one-element counter.
        noise: z ``[B, ...]``, or a noise key; ``None`` omits the last term.
        model_output_uncond: m_u ``[B, ...]``, for guidance.
        guidance_scale: w of classifier-free guidance, a number or ``[B]``.
        guidance: Another rule of ``diffcore.guidance``, instead of ``guidance_scale``.
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: t, guidance_scale and threshold may then be ``[B, G]``,
            coefficients without ``t`` ``[B, G, 8 or 14]``, and the log-probability is ``[B, G]``.
        threshold: s, a number or ``[B]``: x0 is clipped to [-s, s] instead, and divided by s
            (:func:`dynamic_threshold`); 0 for the row's own clip_min and clip_max.
        history: h_1, h_2, h_3 or the first of them, ``[B, ...]``: the h' that earlier steps
            returned.
        return_history: Return h' as well.
        variance_output: v ``[B, ...]``, where the model predicts the variance of its step: the
            noise is then ``c_z exp(s_0 + s_v v) noise``. Needs ``noise``; not with history.
        variance_coefficients: (s_0, s_v), like ``coefficients``.
        return_log_prob: Return log p(x' | x) as well (:func:`step_log_prob`), of x' as it is
            stored, which takes a second launch; x' counts as a constant. Not with ``out``.
        reduction: Of the log-probability, "sum" or "mean" over the elements of a sample.
        out: Tensor to write x' to, such as ``x`` itself. Not where a gradient is needed.

    Returns:
        The samples of the next step ``[B, ...]``; or a tuple of them and what was asked for: h'
        ``[B, ...]``, the log-probability ``[B]``, in this order.

    Source:
        docs/architecture.md, "A solver is a table"; guidance: Ho & Salimans 2022 (arXiv
        2207.12598); threshold: Saharia et al. 2022 (arXiv 2205.11487).
    """
    earlier = history_of(history)
    if group_dim is not None:
        given = (model_output, model_output_uncond, guidance_scale, guidance)
        model_output, uncond, rule = known_guidance(x, *given)
        return in_groups(  # type: ignore[no-any-return]
            reverse_step,
            group_dim,
            {
                "x": x,
                "model_output": model_output,
                "model_output_uncond": uncond,
                "noise": noise,
                "history": earlier,
                "variance_output": variance_output,
            },
            {"t": t, "guidance": rule, "threshold": threshold},
            **_tables(
                t,
                {"coefficients": coefficients, "variance_coefficients": variance_coefficients},
            ),
            return_history=return_history,
            return_log_prob=return_log_prob,
            reduction=reduction,
            mean=reduction == "mean",
            out=out,
        )
    if return_history is not False or return_log_prob is not False or reduction != "sum":
        return_history = as_flag("return_history", return_history)
        return_log_prob = wants_log_prob(return_log_prob, reduction)
    keeps = return_history or len(earlier) > 1
    if len(earlier) > k.MOST_HISTORY:
        raise ValueError(f"history must hold at most {k.MOST_HISTORY} tensors, got {len(earlier)}")
    if out is not None and keeps:
        raise ValueError("out must be None with return_history or more than one h, got a tensor")
    if out is not None and return_log_prob:
        raise ValueError("out must be None with return_log_prob, got a tensor; it may be x itself")
    if variance_output is None and variance_coefficients is None:
        row = step_columns(coefficients, k.columns_read(len(earlier), keeps))
        plan = k.plan(row, len(earlier), keeps, noise is not None)
        if plan.padding:
            earlier += (x,) * plan.padding
    else:
        variance = variance_of(variance_output, variance_coefficients)
        if noise is None or earlier or keeps:
            raise ValueError(
                "variance_output must be None without noise or with history, got a tensor"
            )
        plan, earlier = _learned(coefficients, variance)
    model_output, guided = guided_by(x, model_output, model_output_uncond, guidance_scale, guidance)
    found: Any = launch(plan, x, model_output, earlier, t, noise, guided, threshold, out)
    if not return_log_prob:
        return found[0] if keeps and not return_history else found  # type: ignore[no-any-return]
    x_next, *left = found if keeps else (found,)
    step = Scored(plan, earlier, t)
    scored = log_prob(step, x, model_output, x_next.detach(), guided, threshold, reduction)
    return (x_next, *left, scored) if return_history else (x_next, scored)


def _learned(coefficients: Row, variance: LearnedVariance) -> tuple[k.Plan, Tensors]:
    """The plan of a step of learned variance, and what it reads beside the predictions."""
    row = step_columns(coefficients, k.PLAIN) + variance_columns(variance.coefficients)
    return k.learned_plan(row), (variance.output,)


def step_log_prob(
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    threshold: Coef | None = None,
    history: Sequence[Tensor] = (),
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    reduction: str = "sum",
    group_dim: int | None = None,
) -> Tensor:
    """The log p(x' | x) of a step: a Gaussian around the noise-free :func:`reverse_step`.

    With n elements in a sample and mean = c_x x + c_m m + c_0 x0::

        -1/2 sum((x' - mean)²) / c_z² - n log c_z - n/2 log(2 pi)

    A step without noise (c_z = 0: the last step of most sampling loops) has no density; it gives 0
    and gradient 0. Differentiable; in m alone with one launch, as policy gradients need it.

    History adds its terms to the mean, and a learned variance multiplies c_z by exp(s_0 + s_v v)
    in each element. Both take two or three launches, and float32 copies of 16-bit tensors.

    Args:
        x: The samples before the step ``[B, ...]``.
        model_output: As for :func:`reverse_step`.
        x_next: x', the samples after it ``[B, ...]``.
        coefficients: As for :func:`reverse_step`.
        t: As for :func:`reverse_step`.
        model_output_uncond: As for :func:`reverse_step`.
        guidance_scale: As for :func:`reverse_step`.
        guidance: As for :func:`reverse_step`; not a rule with momentum.
        threshold: As for :func:`reverse_step`.
        history: As for :func:`reverse_step`: what the step read.
        variance_output: As for :func:`reverse_step`: v, which gets a gradient too.
        variance_coefficients: As for :func:`reverse_step`: (s_0, s_v).
        reduction: "sum" over the elements of a sample, or "mean", the sum / n (Flow-GRPO).
        group_dim: As for :func:`reverse_step`.

    Returns:
        ``[B]``, float32 (float64 for float64 samples), in nats (per element for "mean"); with
        ``group_dim`` ``[B, G]``.

    Raises:
        ValueError: One of ``variance_output`` and ``variance_coefficients`` without the other, or
            as :func:`reverse_step`.

    Source:
        Black et al. 2023 (arXiv 2305.13301), section 4.
    """
    if reduction != "sum":
        check_choice("reduction", reduction, REDUCTIONS)
    if guidance is not None:
        check_memory_of(guidance)
    earlier = history_of(history)
    if group_dim is not None:
        given = (model_output, model_output_uncond, guidance_scale, guidance)
        model_output, uncond, rule = known_guidance(x, *given)
        return in_groups(  # type: ignore[no-any-return]
            step_log_prob,
            group_dim,
            {
                "x": x,
                "model_output": model_output,
                "x_next": x_next,
                "model_output_uncond": uncond,
                "history": earlier,
                "variance_output": variance_output,
            },
            {"t": t, "guidance": rule, "threshold": threshold},
            **_tables(
                t,
                {"coefficients": coefficients, "variance_coefficients": variance_coefficients},
            ),
            reduction=reduction,
            mean=reduction == "mean",
        )
    if earlier or variance_output is not None or variance_coefficients is not None:
        step = _scored(coefficients, earlier, variance_output, variance_coefficients, t)
    else:
        step = None
    model_output, guided = guided_by(x, model_output, model_output_uncond, guidance_scale, guidance)
    row = step_columns(coefficients, k.PLAIN) if step is None else ()
    if guided is not None and step is None and by_sums(guided):
        step = Scored(k.plan(row, 0, False, False), (), t)
    if step is not None:
        return log_prob(step, x, model_output, x_next, guided, threshold, reduction)
    tensors, leading = predictions(x, model_output, guided, threshold)
    kernel, inputs = k.STEP_LOG_PROB[len(tensors) == 3], (*tensors, x_next)
    found = run_converted(kernel, inputs, (*leading, *row), t)
    return found if reduction == "sum" else reduced(found, x, reduction)


def _tables(t: Step, coefficients: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``in_groups``: a row for each group, or with a step tables as they are."""
    return {"tables": coefficients} if t is None else coefficients


def _scored(
    coefficients: Row,
    history: Tensors,
    variance_output: Tensor | None,
    variance_coefficients: Row | None,
    t: Step,
) -> Scored:
    """A step with history or of learned variance, whose density is computed."""
    reads = len(history)
    if reads > k.MOST_HISTORY:
        raise ValueError(f"history must hold at most {k.MOST_HISTORY} tensors, got {reads}")
    if variance_output is None and variance_coefficients is None:
        row = step_columns(coefficients, k.columns_read(reads, reads > 1))
        return Scored(k.plan(row, reads, reads > 1, False), history, t)
    variance = variance_of(variance_output, variance_coefficients)
    if history:
        raise ValueError("variance_output must be None with history, got a tensor")
    return Scored(*_learned(coefficients, variance), t)


def step_kl(
    x: Tensor,
    model_output: Tensor,
    reference_output: Tensor,
    coefficients: Row,
    *,
    t: Step = None,
    model_output_uncond: Tensor | None = None,
    reference_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    threshold: Coef | None = None,
    reduction: str = "sum",
) -> Tensor:
    """KL(p || p_ref) of two models' steps from the same x, as a penalty in policy gradients.

    Both steps are Gaussians of deviation c_z, so with mean = c_x x + c_m m + c_0 x0 of each::

        1/2 sum((mean - mean_ref)²) / c_z²

    In one launch. The difference of the means is computed from that of the predictions: the terms
    that both means share, such as c_x x and history, are not rounded into it. Under guidance both
    guided means are computed first, in float32 or float64.

    A step without noise (c_z = 0) gives 0 and gradient 0, as :func:`step_log_prob` does.
    Differentiable; each prediction's gradient takes one launch. The KL of equal deviations is
    symmetric.

    Args:
        x: The samples before the step ``[B, ...]``.
        model_output: m, ``[B, ...]``; see :func:`reverse_step`.
        reference_output: m of the other model at the same x, ``[B, ...]``.
        coefficients: As for :func:`reverse_step`.
        t: As for :func:`reverse_step`.
        model_output_uncond: m_u beside ``model_output``, for guidance.
        reference_output_uncond: m_u beside ``reference_output``, for guidance.
        guidance_scale: w of classifier-free guidance, for both models.
        guidance: Another rule of ``diffcore.guidance``, for both; not one with momentum.
        threshold: As for :func:`reverse_step`.
        reduction: "sum" over the elements of a sample, or "mean", the sum / n.

    Returns:
        ``[B]``, float32 (float64 for float64 samples), in nats (per element for "mean").

    Source:
        Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_memory_of(guidance)
    check_unconds(model_output_uncond, reference_output_uncond)
    plan = k.plan(step_columns(coefficients, k.PLAIN), 0, False, False)
    if guidance is not None:
        unconds = (model_output_uncond, reference_output_uncond)
        x = in_widest(x, model_output, reference_output, *unconds)
    model_output, guided = guided_by(x, model_output, model_output_uncond, guidance_scale, guidance)
    reference_output, of_reference = guided_by(
        x, reference_output, reference_output_uncond, guidance_scale, guidance
    )
    outputs = (model_output, reference_output)
    return kl(Scored(plan, (), t), x, outputs, (guided, of_reference), threshold, reduction)
