"""One reverse step of any solver, and the two of the lecture by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

from torch import Tensor

from .. import _kernels as k
from .. import coefficients as formulas
from .._execute import Kernel
from .._registry import Coef, Step, plain_eager, run, run_tuple
from ._arguments import as_coef, as_table, in_float64
from ._noise import Noise, noised

ClipRange = float | tuple[float, float] | None


@overload
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    history: Sequence[Tensor],
) -> tuple[Tensor, Tensor]: ...
def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    t: Step = None,
    noise: Noise | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    history: Sequence[Tensor] = (),
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """One step of any solver, with guidance, conversion, clip, update and noise in one launch.

    With ``m = m_u + w (m_c - m_u)`` under guidance and ``x0 = clip(a_x x + a_m m, clip_min,
    clip_max)``::

        x' = c_x x + c_m m + c_0 x0 + c_1 h_1 + ... + c_z noise
        h' = e_x x + e_m m + e_0 x0

    Differentiable in `x`, the model outputs, `history` and `noise`; outside the clip no gradient
    flows through `x0`.

    Args:
        x: the current samples `[B, ...]`.
        model_output: m, or m_c under guidance, `[B, ...]`.
        coefficients: a table `[T, 8]` read at `t`, or `[B, 8]` or `[8]` without `t`, float64 or
            float32; the columns c_x, c_m, c_0, c_z, a_x, a_m, clip_min, clip_max. With `history`
            six more: c_1, c_2, c_3, e_x, e_m, e_0.
        t: the row: an int, `[B]` or a one-element counter.
        noise: z `[B, ...]`, or a recipe for it; None leaves the last term out.
        model_output_uncond: m_u `[B, ...]`, for classifier-free guidance.
        guidance_scale: w, a number or `[B]`; needed with `model_output_uncond`, and only then.
        history: h_1, h_2, h_3 or the first of them, each `[B, ...]`: what earlier steps left.
        out: where to write x', `x` itself if you like; no gradient may be needed, and no history.

    Returns:
        The samples of the next step `[B, ...]`; with `history`, those and h'.

    Source: docs/architecture.md, "A solver is a table"; guidance: Ho & Salimans 2022.
    """
    earlier = tuple(history)
    if len(earlier) > k.MOST_HISTORY:
        raise ValueError(f"history has {len(earlier)} tensors; wanted at most {k.MOST_HISTORY}")
    if not earlier:
        row: tuple[Coef, ...] = (as_table("coefficients", coefficients, 8),)
        return _step(x, model_output, row, t, noise, model_output_uncond, guidance_scale, out)
    if out is not None:
        raise ValueError("out and history are both given; wanted one")
    table = as_table("coefficients", coefficients, 14)
    tensors, scale = _guided(x, model_output, model_output_uncond, guidance_scale)
    coefs = (table[:, :8], scale, table[:, 8 : 8 + len(earlier)], table[:, 11:])
    kernel = k.REVERSE_STEP[len(tensors) == 3, len(earlier), noise is not None]
    if noise is None:
        x_next, h_next = run_tuple(kernel, (*tensors, *earlier), coefs, t)
    else:
        x_next, h_next = noised(kernel, (*tensors, *earlier), noise, coefs, t)
    return x_next, h_next


def _guided(
    x: Tensor, model_output: Tensor, model_output_uncond: Tensor | None, guidance_scale: Coef | None
) -> tuple[tuple[Tensor, ...], Coef]:
    """The tensors that every step reads, and the guidance scale."""
    guided = model_output_uncond is not None
    if guided != (guidance_scale is not None):
        raise ValueError(
            "model_output_uncond and guidance_scale come together; "
            f"got {'only model_output_uncond' if guided else 'only guidance_scale'}"
        )
    scale = 1.0 if guidance_scale is None else as_coef("guidance_scale", guidance_scale, None)
    if model_output_uncond is None:
        return (x, model_output), scale
    return (x, model_output, model_output_uncond), scale


def _step(
    x: Tensor,
    model_output: Tensor,
    coefficients: tuple[Coef, ...],
    t: Step,
    noise: Noise | None,
    model_output_uncond: Tensor | None,
    guidance_scale: Coef | None,
    out: Tensor | None,
    *,
    kernels: Mapping[tuple[bool, bool], Kernel] = k.PLAIN_STEP,
) -> Tensor:
    tensors, scale = _guided(x, model_output, model_output_uncond, guidance_scale)
    coefs = (*coefficients, scale)
    kernel = kernels[len(tensors) == 3, noise is not None]
    if noise is None:
        return run(kernel, tensors, coefs, t, False, out)
    x_next: Tensor = noised(kernel, tensors, noise, coefs, t, out)
    return x_next


def _row(table: Tensor, like: Tensor) -> tuple[Coef, ...]:
    """Coefficients just computed: as numbers where they are, so that none is sent to a device."""
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
    out: Tensor | None = None,
) -> Tensor:
    """One ancestral step: ``x_{t-1} = A_t x0 + B_t x_t + s_t noise``, x0 the (clipped) prediction.

    With beta = sigma² - (alpha/alpha_prev)² sigma_prev²: A = alpha_prev beta / sigma², B =
    (alpha/alpha_prev) sigma_prev² / sigma², s² = beta sigma_prev² / sigma² ("fixed_small") or
    beta ("fixed_large"). The coefficients are computed in float64. In a loop, compute a table
    once and use :func:`reverse_step`.

    Args:
        model_output: the model's prediction at `x_t`, `[B, ...]`.
        x_t: the current samples `[B, ...]`.
        alpha: signal coefficient now: a number or `[B]`.
        sigma: noise coefficient now.
        alpha_prev: signal coefficient after the step (1 at the end).
        sigma_prev: noise coefficient after the step (0 at the end).
        noise: z `[B, ...]`, or a recipe for it; None for the last step.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        variance_type: "fixed_small" or "fixed_large".
        clip_range: None, c for [-c, c], or (low, high): where x0 is clipped.
        model_output_uncond: the unconditional prediction `[B, ...]`, for classifier-free guidance.
        guidance_scale: w in m_u + w (m_c - m_u).
        out: where to write, `x_t` itself if you like; no gradient may be needed.

    Returns:
        `x_{t-1}` `[B, ...]`.

    Source: Ho et al. 2020, eqs. 6-7 and Algorithm 2.
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
    return _step(
        x_t,
        model_output,
        row,
        None,
        noise,
        model_output_uncond,
        guidance_scale,
        out,
        kernels=k.SOLVER_STEP,
    )


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
    out: Tensor | None = None,
) -> Tensor:
    """One DDIM step: ``x' = alpha_prev x0 + sqrt(sigma_prev² - s²) epsilon + s noise``.

    s is eta times the deviation of :func:`ddpm_step` ("fixed_small").

    Args:
        model_output: the model's prediction at `x_t`, `[B, ...]`.
        x_t: the current samples `[B, ...]`.
        alpha: signal coefficient now: a number or `[B]`.
        sigma: noise coefficient now.
        alpha_prev: signal coefficient after the step (1 at the end).
        sigma_prev: noise coefficient after the step (0 at the end).
        eta: 0 is deterministic, 1 has DDPM's ("fixed_small") variance.
        noise: z `[B, ...]`, or a recipe for it; needed only where eta > 0.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        rederive_epsilon: after the clip, take epsilon from the clipped x0 (guided-diffusion's
            rule) or keep the model's (diffusers' default).
        clip_range: None, c for [-c, c], or (low, high): where x0 is clipped.
        model_output_uncond: the unconditional prediction `[B, ...]`, for classifier-free guidance.
        guidance_scale: w in m_u + w (m_c - m_u).
        out: where to write, `x_t` itself if you like; no gradient may be needed.

    Returns:
        The samples of the next step `[B, ...]`.

    Source: Song et al. 2021, eqs. 12 and 16.
    """
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
    return _step(
        x_t,
        model_output,
        row,
        None,
        noise,
        model_output_uncond,
        guidance_scale,
        out,
        kernels=k.SOLVER_STEP,
    )
