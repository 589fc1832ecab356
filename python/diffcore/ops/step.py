"""One reverse step of any solver and its log-probability, and the DDPM and DDIM steps by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from diffcore._checks import as_flag
from diffcore._engine.dispatch import plain_eager, run
from diffcore._kernels import step as k
from diffcore._types import ClipRange, Coef, Coefs, Row, Step
from diffcore.coefficients import step as formulas
from diffcore.guidance import Guidance
from diffcore.noise import Noise
from diffcore.ops._arguments import as_table, converted, in_float64
from diffcore.ops._groups import in_groups
from diffcore.ops._guided import Guided, guided_by, known_guidance, predictions
from diffcore.ops._launch import (
    history_of,
    launch,
    step_columns,
    variance_columns,
    variance_of,
)

__all__ = [
    "ddim_step",
    "ddpm_step",
    "reverse_step",
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
    return_history: bool = False,
    variance_output: Tensor | None = None,
    variance_coefficients: Row | None = None,
    return_log_prob: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
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
            stored, which takes a second launch; x' counts as a constant. Not with history.
        out: Tensor to write x' to, such as ``x`` itself. Not where a gradient is needed.

    Returns:
        The samples of the next step ``[B, ...]``; or a tuple of them and what was asked for: h'
        ``[B, ...]``, the log-probability ``[B]``.

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
            out=out,
        )
    if return_history is not False or return_log_prob is not False:
        return_history = as_flag("return_history", return_history)
        return_log_prob = as_flag("return_log_prob", return_log_prob)
    keeps = return_history or len(earlier) > 1
    variance = None
    if variance_output is not None or variance_coefficients is not None:
        variance = variance_of(variance_output, variance_coefficients)
    if len(earlier) > k.MOST_HISTORY:
        raise ValueError(f"history must hold at most {k.MOST_HISTORY} tensors, got {len(earlier)}")
    if return_log_prob and (out is not None or earlier or keeps or variance is not None):
        raise ValueError(
            "return_log_prob must be False with out, history or variance_output, got True"
        )
    if out is not None and keeps:
        raise ValueError("out must be None with return_history or more than one h, got a tensor")
    model_output, guided = guided_by(x, model_output, model_output_uncond, guidance_scale, guidance)
    if variance is None:
        row = step_columns(coefficients, k.columns_read(len(earlier), keeps))
        plan = k.plan(row, len(earlier), keeps, noise is not None)
        if plan.padding:
            earlier += (x,) * plan.padding
    else:
        if noise is None or earlier or keeps:
            raise ValueError(
                "variance_output must be None without noise or with history, got a tensor"
            )
        row = step_columns(coefficients, k.PLAIN) + variance_columns(variance.coefficients)
        plan, earlier = k.learned_plan(row), (variance.output,)
    found: Any = launch(plan, x, model_output, earlier, t, noise, guided, threshold, out)
    if keeps and not return_history:
        found = found[0]
    if return_log_prob:
        return found, _log_prob(x, model_output, found.detach(), coefficients, t, guided, threshold)
    return found  # type: ignore[no-any-return]


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
    group_dim: int | None = None,
) -> Tensor:
    """The log p(x' | x) of a step: a Gaussian around the noise-free :func:`reverse_step`.

    With n elements in a sample and mean = c_x x + c_m m + c_0 x0::

        -1/2 sum((x' - mean)²) / c_z² - n log c_z - n/2 log(2 pi)

    A step without noise (c_z = 0: the last step of most sampling loops) has no density; it gives 0
    and gradient 0. Differentiable; in m alone with one launch, as policy gradients need it.

    Args:
        x: The samples before the step ``[B, ...]``.
        model_output: As for :func:`reverse_step`.
        x_next: x', the samples after it ``[B, ...]``.
        coefficients: As for :func:`reverse_step`; a step that reads history has no such form.
        t: As for :func:`reverse_step`.
        model_output_uncond: As for :func:`reverse_step`.
        guidance_scale: As for :func:`reverse_step`.
        guidance: As for :func:`reverse_step`.
        threshold: As for :func:`reverse_step`.
        group_dim: As for :func:`reverse_step`.

    Returns:
        ``[B]``, float32 (float64 for float64 samples): the sum over each sample, in nats. With
        ``group_dim`` ``[B, G]``, the sum over each group.

    Source:
        Black et al. 2023 (arXiv 2305.13301), section 4.
    """
    if isinstance(guidance, Guidance) and guidance.remembers:
        raise ValueError(
            f"guidance must not remember earlier rows here, got {type(guidance).__name__}, which a "
            "step moves on; keep the log-probability of the step: return_log_prob=True"
        )
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
            },
            {"t": t, "guidance": rule, "threshold": threshold},
            **_tables(t, {"coefficients": coefficients}),
        )
    model_output, guided = guided_by(x, model_output, model_output_uncond, guidance_scale, guidance)
    return _log_prob(x, model_output, x_next, coefficients, t, guided, threshold)


def _tables(t: Step, coefficients: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``in_groups``: a row for each group, or with a step tables as they are."""
    return {"tables": coefficients} if t is None else coefficients


def _log_prob(
    x: Tensor,
    model_output: Tensor,
    x_next: Tensor,
    coefficients: Row,
    t: Step,
    guided: Guided | None,
    threshold: Coef | None,
) -> Tensor:
    row = step_columns(coefficients, k.PLAIN)
    tensors, leading = predictions(x, model_output, guided, threshold)
    kernel = k.STEP_LOG_PROB[len(tensors) == 3]
    inputs, coefs = (*tensors, x_next), (*leading, *row)
    try:
        return run(kernel, inputs, coefs, t)
    except TypeError as error:
        coefs, t = converted(error, coefs, t, x)
    return run(kernel, inputs, coefs, t)


# ---- the DDPM and DDIM steps ---------------------------------------------------------------------


def _row(table: Tensor, like: Tensor) -> Coefs:
    """Coefficients just computed, as numbers where possible, so that none is sent to a device."""
    if table.ndim == 1 and table.device.type == "cpu" and not table.requires_grad and plain_eager():
        return tuple(table.tolist())
    if isinstance(like, Tensor) and table.device != like.device:
        table = table.to(like.device, non_blocking=True)
    return (as_table("coefficients", table, 8),)


def ddpm_step(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    alpha_prev: Coef,
    sigma_prev: Coef,
    *,
    noise: Noise | None = None,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: ClipRange = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One ancestral step: ``x_{t-1} = A_t x0 + B_t x_t + s_t noise``, x0 the (clipped) prediction.

    With beta = sigma² - (alpha/alpha_prev)² sigma_prev²: A = alpha_prev beta / sigma², B =
    (alpha/alpha_prev) sigma_prev² / sigma², s² = beta sigma_prev² / sigma² ("fixed_small") or
    beta ("fixed_large"). The coefficients are computed in float64. In a loop, compute a table
    once and use :func:`reverse_step`.

    Args:
        model_output: The model's prediction at ``x_t``, ``[B, ...]``.
        x_t: The current samples ``[B, ...]``.
        alpha: Signal coefficient before the step. A number, 0-dim or ``[B]``.
        sigma: Noise coefficient before the step. A number, 0-dim or ``[B]``.
        alpha_prev: Signal coefficient after the step (1 at the end). A number, 0-dim or ``[B]``.
        sigma_prev: Noise coefficient after the step (0 at the end). A number, 0-dim or ``[B]``.
        noise: z ``[B, ...]``, or a noise key; ``None`` for the last step.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        variance_type: "fixed_small" or "fixed_large".
        clip_range: None, c for [-c, c], or (low, high): where x0 is clipped.
        model_output_uncond: The unconditional prediction ``[B, ...]``, for classifier-free
            guidance.
        guidance_scale: w in m_u + w (m_c - m_u).
        guidance: Another rule of ``diffcore.guidance``, instead of ``guidance_scale``.
        out: Tensor to write to, such as ``x_t`` itself. Not where a gradient is needed.

    Returns:
        ``x_{t-1}`` ``[B, ...]``.

    Source:
        Ho et al. 2020, eqs. 6-7 and Algorithm 2.
    """
    table = formulas.ddpm_coefficients(
        in_float64("alpha", alpha),
        in_float64("sigma", sigma),
        in_float64("alpha_prev", alpha_prev),
        in_float64("sigma_prev", sigma_prev),
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_range=clip_range,
    )
    row = _row(table, x_t)
    plan = k.plan(row, 0, False, noise is not None, k.SOLVER_STEP)
    model_output, guided = guided_by(
        x_t, model_output, model_output_uncond, guidance_scale, guidance
    )
    x_prev: Tensor = launch(plan, x_t, model_output, (), None, noise, guided, None, out)
    return x_prev


def ddim_step(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    alpha_prev: Coef,
    sigma_prev: Coef,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    prediction_type: str = "epsilon",
    rederive_epsilon: bool = True,
    clip_range: ClipRange = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    guidance: Guidance | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One DDIM step: ``x' = alpha_prev x0 + sqrt(sigma_prev² - s²) epsilon + s noise``.

    s is eta times the deviation of :func:`ddpm_step` ("fixed_small").

    Args:
        model_output: The model's prediction at ``x_t``, ``[B, ...]``.
        x_t: The current samples ``[B, ...]``.
        alpha: Signal coefficient before the step. A number, 0-dim or ``[B]``.
        sigma: Noise coefficient before the step. A number, 0-dim or ``[B]``.
        alpha_prev: Signal coefficient after the step (1 at the end). A number, 0-dim or ``[B]``.
        sigma_prev: Noise coefficient after the step (0 at the end). A number, 0-dim or ``[B]``.
        eta: 0 is deterministic, 1 has DDPM's ("fixed_small") variance.
        noise: z ``[B, ...]``, or a noise key; required where eta > 0.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        rederive_epsilon: After the clip, take epsilon from the clipped x0 (guided-diffusion's
            rule) or keep the model's (diffusers' default).
        clip_range: None, c for [-c, c], or (low, high): where x0 is clipped.
        model_output_uncond: The unconditional prediction ``[B, ...]``, for classifier-free
            guidance.
        guidance_scale: w in m_u + w (m_c - m_u).
        guidance: Another rule of ``diffcore.guidance``, instead of ``guidance_scale``.
        out: Tensor to write to, such as ``x_t`` itself. Not where a gradient is needed.

    Returns:
        The samples of the next step ``[B, ...]``.

    Raises:
        ValueError: ``eta`` is above 0 and ``noise`` is ``None``.

    Source:
        Song et al. 2021, eqs. 12 and 16.
    """
    if noise is None and isinstance(eta, (int, float)) and eta != 0:
        raise ValueError(
            f"noise must be given where eta is not 0, got None with eta={eta}; pass a tensor or a "
            "PhiloxNoise"
        )
    table = formulas.ddim_coefficients(
        in_float64("alpha", alpha),
        in_float64("sigma", sigma),
        in_float64("alpha_prev", alpha_prev),
        in_float64("sigma_prev", sigma_prev),
        eta=eta,
        prediction_type=prediction_type,
        rederive_epsilon=rederive_epsilon,
        clip_range=clip_range,
    )
    row = _row(table, x_t)
    plan = k.plan(row, 0, False, noise is not None, k.SOLVER_STEP)
    model_output, guided = guided_by(
        x_t, model_output, model_output_uncond, guidance_scale, guidance
    )
    x_prev: Tensor = launch(plan, x_t, model_output, (), None, noise, guided, None, out)
    return x_prev
