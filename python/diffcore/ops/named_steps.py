"""The DDPM and DDIM steps, from the levels before and after them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffcore._devices import beside
from diffcore._engine.dispatch import plain_eager
from diffcore._kernels import step as k
from diffcore._types import ClipRange, Coef, Coefs
from diffcore.coefficients import step as formulas
from diffcore.guidance import Guidance
from diffcore.noise import Noise
from diffcore.ops._arguments import as_table, in_float64
from diffcore.ops._groups import in_groups
from diffcore.ops._guided import guided_by, known_guidance
from diffcore.ops._launch import launch

__all__ = [
    "ddim_step",
    "ddpm_step",
]


_Given = tuple[Tensor, Tensor | None, Coef | None, Guidance | None]
"""m or m_c, m_u, the guidance scale and the rule, as they came."""


def _row(table: Tensor, like: Tensor) -> Coefs:
    """Coefficients just computed, as numbers where possible, so that none is sent to a device."""
    if table.ndim == 1 and table.device.type == "cpu" and not table.requires_grad and plain_eager():
        return tuple(table.tolist())
    if isinstance(like, Tensor) and table.device != like.device:
        table = beside(table, like).to(like.device, non_blocking=True)
    return (as_table("coefficients", table, 8),)


def _launched(
    table: Tensor, x_t: Tensor, noise: Noise | None, given: _Given, out: Tensor | None
) -> Tensor:
    """The step of these coefficients."""
    plan = k.plan(_row(table, x_t), 0, False, noise is not None, k.SOLVER_STEP)
    model_output, guided = guided_by(x_t, *given)
    x_prev: Tensor = launch(plan, x_t, model_output, (), None, noise, guided, None, out)
    return x_prev


def _in_groups(
    op: Callable[..., Tensor],
    group_dim: int,
    x_t: Tensor,
    given: _Given,
    noise: Noise | None,
    levels: tuple[Coef, ...],
    **rest: Any,
) -> Tensor:
    """``in_groups`` for the arguments that both steps have."""
    model_output, uncond, rule = known_guidance(x_t, *given)
    found: Tensor = in_groups(
        op,
        group_dim,
        {
            "x_t": x_t,
            "model_output": model_output,
            "model_output_uncond": uncond,
            "noise": noise,
        },
        {
            **dict(zip(("alpha", "sigma", "alpha_prev", "sigma_prev"), levels, strict=True)),
            "guidance": rule,
        },
        **rest,
    )
    return found


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
    group_dim: int | None = None,
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
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: the levels and guidance_scale may then be ``[B, G]``.
        out: Tensor to write to, such as ``x_t`` itself. Not where a gradient is needed.

    Returns:
        ``x_{t-1}`` ``[B, ...]``.

    Source:
        Ho et al. 2020, eqs. 6-7 and Algorithm 2.
    """
    given = (model_output, model_output_uncond, guidance_scale, guidance)
    if group_dim is not None:
        options = {
            "prediction_type": prediction_type,
            "variance_type": variance_type,
            "clip_range": clip_range,
        }
        return _in_groups(
            ddpm_step,
            group_dim,
            x_t,
            given,
            noise,
            (alpha, sigma, alpha_prev, sigma_prev),
            out=out,
            **options,
        )
    table = formulas.ddpm_coefficients(
        in_float64("alpha", alpha),
        in_float64("sigma", sigma),
        in_float64("alpha_prev", alpha_prev),
        in_float64("sigma_prev", sigma_prev),
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_range=clip_range,
    )
    return _launched(table, x_t, noise, given, out)


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
    group_dim: int | None = None,
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
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: the levels and guidance_scale may then be ``[B, G]``.
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
    given = (model_output, model_output_uncond, guidance_scale, guidance)
    if group_dim is not None:
        options = {
            "prediction_type": prediction_type,
            "eta": eta,
            "rederive_epsilon": rederive_epsilon,
            "clip_range": clip_range,
        }
        return _in_groups(
            ddim_step,
            group_dim,
            x_t,
            given,
            noise,
            (alpha, sigma, alpha_prev, sigma_prev),
            out=out,
            **options,
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
    return _launched(table, x_t, noise, given, out)
