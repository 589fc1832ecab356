"""The public functional ops. Each docstring is the formula; each call is one kernel launch, forward and backward.

Tensors called elementwise (samples, noise, predictions, means, ...) share one shape `[B, ...]`, one dtype (float32,
float64, bfloat16, float16) and one device; any dense memory layout they share is used without a copy. Values are
computed in float32 (float64 for float64) and rounded once at the store.

A coefficient (`alpha`, `sigma`, ...) is a number, or a float32 or float64 tensor: 0-dim, or `[B]`, one per sample.
With `t` it is a table `[T]`, gathered at `t` inside the kernel; `t` is an int, an integer tensor `[B]`, or a
one-element integer tensor on the device (a counter). On the CPU a `t` out of range raises; on CUDA it is clamped,
because a check would wait for the device (`DIFFCORE_DEBUG=1` checks it).

Every op raises TypeError or ValueError, before any memory is touched, for an argument of the wrong type, dtype,
shape or device, and names it. KL and likelihoods are in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore import _kernels as k
from diffcore import _validate, coefficients
from diffcore._registry import Coef, Step, run
from diffcore.coefficients import PREDICTION_TYPES
from diffcore.reference import compute_dtype

ClipRange = float | tuple[float, float] | None


def _coef(name: str, value: Coef, step: Step) -> Coef:
    """A coefficient as the kernels take it: a float, a 0-dim or `[B]` tensor, or a table `[T, 1]` with a step."""
    if type(value) is float:
        return value
    if not isinstance(value, Tensor):
        try:
            return float(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise TypeError(f"{name} is a {kind}; wanted a number or a tensor") from None
    if value.dtype not in (torch.float32, torch.float64):
        if not value.is_floating_point():
            raise TypeError(f"{name} has dtype {value.dtype}; wanted a floating-point tensor")
        value = value.float()
    if value.ndim == 0:
        return float(value) if value.device.type == "cpu" and not value.requires_grad else value
    if value.ndim > 1:
        if value.numel() != len(value):
            raise ValueError(f"{name} has shape {tuple(value.shape)}; wanted one number per sample")
        value = value.reshape(-1)
    return value if step is None else value.unsqueeze(1)


def _table(name: str, table: Tensor, columns: int) -> Tensor:
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} is a {type(table).__name__}; wanted a torch.Tensor")
    if table.ndim == 1 and len(table) == columns:
        return table.unsqueeze(0)
    if table.ndim != 2 or table.shape[1] != columns:
        raise ValueError(f"{name} has shape {tuple(table.shape)}; wanted [T, {columns}]")
    return table


# ---- noising and conversions ------------------------------------------------------------------------------------


def add_noise(
    x0: Tensor,
    noise: Tensor,
    alpha: Coef,
    sigma: Coef,
    *,
    t: Step = None,
    out: Tensor | None = None,
) -> Tensor:
    """Noises clean samples: ``x_t = alpha x_0 + sigma noise``.

    Variance preserving: alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod); variance exploding: alpha = 1;
    rectified flow: alpha = 1 - t, sigma = t.

    Args:
        x0: clean samples `[B, ...]`.
        noise: standard normal noise `[B, ...]`.
        alpha: signal coefficient: a number, `[B]`, or a table `[T]` with `t`.
        sigma: noise coefficient, likewise.
        t: the step that gathers `alpha` and `sigma` from their tables.
        out: where to write; no gradient may be needed.

    Returns:
        `x_t` `[B, ...]`.

    Source: Ho et al. 2020, eq. 4; Song et al. 2021 for the families.
    """
    coefs = (_coef("alpha", alpha, t), _coef("sigma", sigma, t))
    return run(k.LINEAR_COMBINATION, (x0, noise), coefs, t, False, out)


def q_sample(
    x0: Tensor, t: int | Tensor, noise: Tensor, table: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Noises clean samples to step `t` of a schedule: ``x_t = alpha_t x_0 + sigma_t noise``, gathered in the kernel.

    Args:
        x0: clean samples `[B, ...]`.
        t: an int, `[B]` or a one-element counter, with 0 <= t < T.
        noise: standard normal noise `[B, ...]`.
        table: `[T, 2]`, float64 or float32: the columns alpha and sigma.
        out: where to write; no gradient may be needed.

    Returns:
        `x_t` `[B, ...]`.

    Source: Ho et al. 2020, eq. 4.
    """
    return run(k.LINEAR_COMBINATION, (x0, noise), (_table("table", table, 2),), t, False, out)


def linear_combination(
    x: Tensor,
    y: Tensor,
    coefficients: tuple[Coef, Coef] | Tensor,
    *,
    t: Step = None,
    out: Tensor | None = None,
) -> Tensor:
    """``a x + b y``, the map behind noising, targets, posteriors and conversions.

    Args:
        x: `[B, ...]`.
        y: `[B, ...]`.
        coefficients: the pair (a, b), or a table `[T, 2]` read at `t`.
        t: the step, when `coefficients` is a table or holds tables.
        out: where to write; no gradient may be needed.

    Returns:
        `[B, ...]`.
    """
    if isinstance(coefficients, Tensor):
        coefs: tuple[Coef, ...] = (_table("coefficients", coefficients, 2),)
    else:
        a, b = coefficients
        coefs = (_coef("a", a, t), _coef("b", b, t))
    return run(k.LINEAR_COMBINATION, (x, y), coefs, t, False, out)


def velocity(
    x0: Tensor,
    noise: Tensor,
    alpha: Coef,
    sigma: Coef,
    *,
    t: Step = None,
    out: Tensor | None = None,
) -> Tensor:
    """The v target: ``v = alpha noise - sigma x_0``.

    Args:
        x0: clean samples `[B, ...]`.
        noise: the noise that was added `[B, ...]`.
        alpha: signal coefficient: a number, `[B]`, or a table `[T]` with `t`.
        sigma: noise coefficient, likewise.
        t: the step that gathers the tables.
        out: where to write; no gradient may be needed.

    Returns:
        `v` `[B, ...]`.

    Source: Salimans & Ho 2022, appendix D.
    """
    coefs = (_coef("sigma", -_number("sigma", sigma), t), _coef("alpha", alpha, t))
    return run(k.LINEAR_COMBINATION, (x0, noise), coefs, t, False, out)


def _number(name: str, value: Coef) -> Coef:
    if isinstance(value, Tensor):
        return value
    coef = _coef(name, value, None)
    assert not isinstance(coef, Tensor)
    return coef


def _exact(name: str, value: Coef) -> Coef:
    """A coefficient in float64, so that what is derived from it is rounded once only."""
    value = _number(name, value)
    return value.double() if isinstance(value, Tensor) else value


def predict_x0(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    *,
    prediction_type: str = "epsilon",
    out: Tensor | None = None,
) -> Tensor:
    """The clean sample that a prediction implies.

    ``epsilon``: (x_t - sigma m) / alpha; ``sample``: m; ``v_prediction``: alpha x_t - sigma m; ``flow_prediction``
    (m = noise - x_0 and alpha + sigma = 1): x_t - sigma m.

    Args:
        model_output: m, `[B, ...]`.
        x_t: the noisy samples `[B, ...]`.
        alpha: signal coefficient: a number or `[B]`.
        sigma: noise coefficient, likewise.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        out: where to write; no gradient may be needed.

    Returns:
        The estimate of `x_0` `[B, ...]`.

    Source: Ho et al. 2020, eq. 15; Salimans & Ho 2022; Lipman et al. 2023.
    """
    pair = coefficients.x0_coefficients(
        _exact("alpha", alpha), _exact("sigma", sigma), prediction_type
    )
    coefs = (_coef("alpha", pair[0], None), _coef("sigma", pair[1], None))
    return run(k.LINEAR_COMBINATION, (x_t, model_output), coefs, None, False, out)


def predict_epsilon(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    *,
    prediction_type: str = "epsilon",
    out: Tensor | None = None,
) -> Tensor:
    """The noise that a prediction implies.

    ``epsilon``: m; ``sample``: (x_t - alpha m) / sigma; ``v_prediction``: sigma x_t + alpha m; ``flow_prediction``:
    x_t + (1 - sigma) m.

    Args:
        model_output: m, `[B, ...]`.
        x_t: the noisy samples `[B, ...]`.
        alpha: signal coefficient: a number or `[B]`.
        sigma: noise coefficient, likewise.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        out: where to write; no gradient may be needed.

    Returns:
        The estimate of the noise `[B, ...]`.

    Source: Salimans & Ho 2022; Lipman et al. 2023.
    """
    pair = coefficients.epsilon_coefficients(
        _exact("alpha", alpha), _exact("sigma", sigma), prediction_type
    )
    coefs = (_coef("alpha", pair[0], None), _coef("sigma", pair[1], None))
    return run(k.LINEAR_COMBINATION, (x_t, model_output), coefs, None, False, out)


# ---- reverse steps ----------------------------------------------------------------------------------------------


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    t: Step = None,
    noise: Tensor | None = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One step of any solver, with guidance, conversion, clip, update and noise in one launch.

    With ``m = m_u + w (m_c - m_u)`` under guidance and ``x0 = clip(a_x x + a_m m, clip_min, clip_max)``::

        x' = c_x x + c_m m + c_0 x0 + c_z noise

    Differentiable in `x`, the model outputs and `noise`; outside the clip no gradient flows through `x0`.

    Args:
        x: the current samples `[B, ...]`.
        model_output: m, or m_c under guidance, `[B, ...]`.
        coefficients: a table `[T, 8]` read at `t`, or `[B, 8]` or `[8]` without `t`, float64 or float32; the columns
            c_x, c_m, c_0, c_z, a_x, a_m, clip_min, clip_max.
        t: the row: an int, `[B]` or a one-element counter.
        noise: z `[B, ...]`; None leaves the last term out.
        model_output_uncond: m_u `[B, ...]`, for classifier-free guidance.
        guidance_scale: w, a number or `[B]`; needed with `model_output_uncond`, and only then.
        out: where to write, `x` itself if you like; no gradient may be needed.

    Returns:
        The samples of the next step `[B, ...]`.

    Source: docs/architecture.md, "A solver is a table"; guidance: Ho & Salimans 2022.
    """
    guided = model_output_uncond is not None
    if guided != (guidance_scale is not None):
        raise ValueError(
            "model_output_uncond and guidance_scale come together; "
            f"got {'only model_output_uncond' if guided else 'only guidance_scale'}"
        )
    scale = 1.0 if guidance_scale is None else _coef("guidance_scale", guidance_scale, None)
    tensors = (x, model_output) if model_output_uncond is None else (x, model_output, model_output_uncond)
    if noise is not None:
        tensors = (*tensors, noise)
    coefs = (_table("coefficients", coefficients, 8), scale)
    return run(k.REVERSE_STEP[guided, noise is not None], tensors, coefs, t, False, out)


def _row(table: Tensor, like: Tensor) -> Tensor:
    if table.device == like.device or not isinstance(like, Tensor):
        return table
    return table.to(like.device, non_blocking=True)


def ddpm_step(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    alpha_prev: Coef,
    sigma_prev: Coef,
    *,
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: ClipRange = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One ancestral step: ``x_{t-1} = A_t x0 + B_t x_t + s_t noise``, x0 the (clipped) prediction.

    With beta = sigma² - (alpha/alpha_prev)² sigma_prev²: A = alpha_prev beta / sigma², B = (alpha/alpha_prev)
    sigma_prev² / sigma², s² = beta sigma_prev² / sigma² ("fixed_small") or beta ("fixed_large"). The coefficients are
    computed in float64. In a loop, compute a table once and use :func:`reverse_step`.

    Args:
        model_output: the model's prediction at `x_t`, `[B, ...]`.
        x_t: the current samples `[B, ...]`.
        alpha: signal coefficient now: a number or `[B]`.
        sigma: noise coefficient now.
        alpha_prev: signal coefficient after the step (1 at the end).
        sigma_prev: noise coefficient after the step (0 at the end).
        noise: z `[B, ...]`; None for the last step.
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
    table = coefficients.ddpm_coefficients(
        _exact("alpha", alpha),
        _exact("sigma", sigma),
        _exact("alpha_prev", alpha_prev),
        _exact("sigma_prev", sigma_prev),
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_range=clip_range,
    )
    return reverse_step(
        x_t,
        model_output,
        _row(table, x_t),
        noise=noise,
        model_output_uncond=model_output_uncond,
        guidance_scale=guidance_scale,
        out=out,
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
    noise: Tensor | None = None,
    prediction_type: str = "epsilon",
    rederive_epsilon: bool = True,
    clip_range: ClipRange = None,
    model_output_uncond: Tensor | None = None,
    guidance_scale: Coef | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """One DDIM step: ``x' = alpha_prev x0 + sqrt(sigma_prev² - s²) epsilon + s noise``, s = eta · DDPM's deviation.

    Args:
        model_output: the model's prediction at `x_t`, `[B, ...]`.
        x_t: the current samples `[B, ...]`.
        alpha: signal coefficient now: a number or `[B]`.
        sigma: noise coefficient now.
        alpha_prev: signal coefficient after the step (1 at the end).
        sigma_prev: noise coefficient after the step (0 at the end).
        eta: 0 is deterministic, 1 has DDPM's ("fixed_small") variance.
        noise: z `[B, ...]`; needed only where eta > 0.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        rederive_epsilon: after the clip, take epsilon from the clipped x0 (guided-diffusion's rule) or keep the
            model's (diffusers' default).
        clip_range: None, c for [-c, c], or (low, high): where x0 is clipped.
        model_output_uncond: the unconditional prediction `[B, ...]`, for classifier-free guidance.
        guidance_scale: w in m_u + w (m_c - m_u).
        out: where to write, `x_t` itself if you like; no gradient may be needed.

    Returns:
        The samples of the next step `[B, ...]`.

    Source: Song et al. 2021, eqs. 12 and 16.
    """
    table = coefficients.ddim_coefficients(
        _exact("alpha", alpha),
        _exact("sigma", sigma),
        _exact("alpha_prev", alpha_prev),
        _exact("sigma_prev", sigma_prev),
        eta=eta,
        prediction_type=prediction_type,
        rederive_epsilon=rederive_epsilon,
        clip_range=clip_range,
    )
    return reverse_step(
        x_t,
        model_output,
        _row(table, x_t),
        noise=noise,
        model_output_uncond=model_output_uncond,
        guidance_scale=guidance_scale,
        out=out,
    )


# ---- Gaussians --------------------------------------------------------------------------------------------------


def _reduced(term: k.Term, inputs: tuple[Tensor, ...], reduction: str) -> Tensor:
    if reduction == "none":
        return run(term.elementwise, inputs)
    if reduction == "sample":
        return run(term.sum, inputs, (1.0,))
    if reduction == "sum":
        return run(term.sum, inputs, (1.0,), None, True)
    _validate.choice("reduction", reduction, _validate.REDUCTIONS)
    if not isinstance(inputs[0], Tensor):
        _validate.refuse_non_tensor(term.sum.inputs, inputs)
    n = inputs[0].numel() if reduction == "mean" else (inputs[0].shape[0] if inputs[0].ndim else 1)
    return run(term.sum, inputs, (1.0 / n if n else float("nan"),), None, True)


def normal_kl(
    mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor, *, reduction: str = "none"
) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians, in nats.

    ``½ [ expm1(d) - d + (mean1 - mean2)² exp(-logvar2) ]`` with d = logvar1 - logvar2: the textbook formula without
    its cancellation (which goes negative in bfloat16), by its series where d is small.

    Args:
        mean1: `[B, ...]`.
        logvar1: log-variance `[B, ...]`.
        mean2: `[B, ...]`.
        logvar2: log-variance `[B, ...]`.
        reduction: "none" (elementwise), "sample" (sum over each sample, `[B]`), "batchmean" (sum / B), "mean" (over
            every element) or "sum". Sums of 16-bit inputs come in float32.

    Returns:
        `[B, ...]`, `[B]` or a 0-dim tensor, nats.

    Source: Kullback & Leibler 1951; the stable form as in Kingma et al. 2021 (VDM).
    """
    return _reduced(k.NORMAL_KL, (mean1, logvar1, mean2, logvar2), reduction)


def standard_normal_kl(mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """KL(N(mean, e^logvar) || N(0, I)), in nats: ``½ [ mean² + expm1(logvar) - logvar ]``.

    Args:
        mean: `[B, ...]`.
        logvar: log-variance `[B, ...]`.
        reduction: as in :func:`normal_kl`.

    Returns:
        `[B, ...]`, `[B]` or a 0-dim tensor, nats.

    Source: Kingma & Welling 2014, appendix B.
    """
    return _reduced(k.STANDARD_NORMAL_KL, (mean, logvar), reduction)


def gaussian_nll(x: Tensor, mean: Tensor, logvar: Tensor, *, reduction: str = "none") -> Tensor:
    """``-log N(x; mean, e^logvar) = ½ [ log 2π + logvar + (x - mean)² exp(-logvar) ]``, in nats.

    Args:
        x: where the density is wanted `[B, ...]`.
        mean: `[B, ...]`.
        logvar: log-variance `[B, ...]`.
        reduction: as in :func:`normal_kl`.

    Returns:
        `[B, ...]`, `[B]` or a 0-dim tensor, nats.
    """
    return _reduced(k.GAUSSIAN_NLL, (x, mean, logvar), reduction)


def _drawn(mean: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if noise is not None:
        if generator is not None:
            raise ValueError("noise and generator are both given; wanted one")
        return noise
    if not isinstance(mean, Tensor):
        raise TypeError(f"mean is a {type(mean).__name__}; wanted a torch.Tensor")
    if generator is None:
        return torch.randn_like(mean)
    return torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)


def reparameterize(
    mean: Tensor,
    logvar: Tensor,
    noise: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample of N(mean, e^logvar) through which gradients flow: ``z = mean + exp(logvar / 2) noise``.

    Args:
        mean: `[B, ...]`.
        logvar: log-variance `[B, ...]`.
        noise: standard normal noise `[B, ...]`; drawn with torch when None.
        generator: the generator to draw it from.

    Returns:
        `z` `[B, ...]`.

    Source: Kingma & Welling 2014, section 2.4.
    """
    return run(k.REPARAMETERIZE, (mean, logvar, _drawn(mean, noise, generator)))


def reparameterize_kl(
    mean: Tensor,
    logvar: Tensor,
    noise: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """A reparameterised sample and its KL term of the ELBO, in one pass over `mean` and `logvar`.

    ``z = mean + exp(logvar / 2) noise`` and, per sample, ``½ Σ [ mean² + expm1(logvar) - logvar ]``.

    Args:
        mean: `[B, ...]`.
        logvar: log-variance `[B, ...]`.
        noise: standard normal noise `[B, ...]`; drawn with torch when None.
        generator: the generator to draw it from.

    Returns:
        `z` `[B, ...]` and the KL of each sample to the standard normal, `[B]`, nats (float32 for 16-bit inputs).

    Source: Kingma & Welling 2014, section 2.4 and appendix B.
    """
    z, kl = run(k.REPARAMETERIZE_KL, (mean, logvar, _drawn(mean, noise, generator)))
    return z, kl


# ---- losses -----------------------------------------------------------------------------------------------------


def denoising_loss(
    model_output: Tensor,
    x0: Tensor,
    noise: Tensor,
    *,
    prediction_type: str = "epsilon",
    alpha: Coef | None = None,
    sigma: Coef | None = None,
    weight: Coef | None = None,
    t: Step = None,
) -> Tensor:
    """The weighted squared error of a prediction, per sample: ``weight · mean_i (m_i - target_i)²``.

    The target is noise ("epsilon"), x_0 ("sample"), alpha noise - sigma x_0 ("v_prediction") or noise - x_0
    ("flow_prediction"); it is never written to memory.

    Args:
        model_output: m, `[B, ...]`.
        x0: clean samples `[B, ...]`.
        noise: the noise that was added `[B, ...]`.
        prediction_type: what the model predicts.
        alpha: signal coefficient, for "v_prediction" only: a number, `[B]`, or a table `[T]` with `t`.
        sigma: noise coefficient, likewise.
        weight: the weight of each sample (1 when None), likewise.
        t: the step that gathers the tables.

    Returns:
        The loss of each sample, `[B]` (float32 for 16-bit inputs).

    Source: Ho et al. 2020, eq. 14 and Algorithm 1; weights: Hang et al. 2023.
    """
    _validate.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if not isinstance(model_output, Tensor):
        raise TypeError(f"model_output is a {type(model_output).__name__}; wanted a torch.Tensor")
    n = model_output.shape[1:].numel() if model_output.ndim else 1
    w = 1.0 if weight is None else _coef("weight", weight, t)
    common = (w, 1.0 / max(n, 1))
    if prediction_type in ("epsilon", "sample"):
        step = t if isinstance(w, Tensor) and w.ndim == 2 else None
        target = noise if prediction_type == "epsilon" else x0
        return run(k.TARGET_LOSS, (model_output, target), common, step)
    if prediction_type == "flow_prediction":
        step = t if isinstance(w, Tensor) and w.ndim == 2 else None
        return run(k.MIXED_TARGET_LOSS, (model_output, x0, noise), (*common, -1.0, 1.0), step)
    if alpha is None or sigma is None:
        raise ValueError("alpha and sigma are needed for prediction_type='v_prediction'")
    a = _coef("sigma", -_number("sigma", sigma), t)
    coefs = (*common, a, _coef("alpha", alpha, t))
    return run(k.MIXED_TARGET_LOSS, (model_output, x0, noise), coefs, t)


__all__ = [
    "PREDICTION_TYPES",
    "add_noise",
    "compute_dtype",
    "ddim_step",
    "ddpm_step",
    "denoising_loss",
    "gaussian_nll",
    "linear_combination",
    "normal_kl",
    "predict_epsilon",
    "predict_x0",
    "q_sample",
    "reparameterize",
    "reparameterize_kl",
    "reverse_step",
    "standard_normal_kl",
    "velocity",
]
