"""The formulas as a user would write them, for torch tensors and numpy arrays alike.

Naive on purpose: `cases.py` runs them in low precision as the eager baseline and in extended
precision as the truth. They share nothing with the package that they judge.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from support.clipping import clip
from support.gaussian_formulas import (
    discretized_gaussian_log_likelihood as discretized_gaussian_log_likelihood,
)
from support.gaussian_formulas import (
    gaussian_nll as gaussian_nll,
)
from support.gaussian_formulas import (
    normal_kl as normal_kl,
)
from support.gaussian_formulas import (
    per_sample as per_sample,
)
from support.gaussian_formulas import (
    reparameterize as reparameterize,
)
from support.gaussian_formulas import (
    reparameterize_kl as reparameterize_kl,
)
from support.gaussian_formulas import (
    standard_normal_kl as standard_normal_kl,
)


def extended(x: Tensor) -> np.ndarray:
    """The values of a tensor in `longdouble`, exactly."""
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy().astype(np.longdouble)


def _column(c: Any, like: Any) -> Any:
    """A coefficient `[B]` as `[B, 1, ...]` in the dtype of `like`; numbers pass."""
    if not getattr(c, "ndim", 0):
        return c
    c = c.reshape((-1,) + (1,) * (like.ndim - 1))
    return c.to(like.dtype) if isinstance(c, Tensor) else c


def _at(c: Any, t: Any) -> Any:
    return c if t is None or not getattr(c, "ndim", 0) else c[t]


def target(
    xp: Any, kind: str, x0: Any, noise: Any, alpha: Any = None, sigma: Any = None, t: Any = None
) -> Any:
    """What a model of some prediction type is to say."""
    return {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: velocity(xp, x0, noise, alpha, sigma, t),
        "flow_prediction": lambda: noise - x0,
    }[kind]()


def add_noise(
    xp: Any,
    x0: Any,
    noise: Any,
    alpha: Any,
    sigma: Any,
    t: Any = None,
    return_target: str | None = None,
) -> Any:
    x_t = _column(_at(alpha, t), x0) * x0 + _column(_at(sigma, t), x0) * noise
    if return_target is None:
        return x_t
    return x_t, target(xp, return_target, x0, noise, alpha, sigma, t)


def blend_known(
    xp: Any, x: Any, mask: Any, known: Any, known_noise: Any, alpha: Any, sigma: Any
) -> Any:
    noised = add_noise(xp, known, known_noise, alpha, sigma)
    mixed = mask * x + (1 - mask) * noised
    return xp.where(mask == 1, x, xp.where(mask == 0, noised, mixed))


def q_sample(
    xp: Any, x0: Any, noise: Any, t: Any, table: Any, return_target: str | None = None
) -> Any:
    return add_noise(xp, x0, noise, table[t, 0], table[t, 1], None, return_target)


def velocity(xp: Any, x0: Any, noise: Any, alpha: Any, sigma: Any, t: Any = None) -> Any:
    return _column(_at(alpha, t), x0) * noise - _column(_at(sigma, t), x0) * x0


def linear(xp: Any, x: Any, y: Any, coefficients: Any, t: Any = None) -> Any:
    a, b = (coefficients[t, 0], coefficients[t, 1]) if t is not None else coefficients
    return _column(a, x) * x + _column(b, x) * y


def predict_x0(
    xp: Any, model_output: Any, x_t: Any, alpha: Any, sigma: Any, prediction_type: str = "epsilon"
) -> Any:
    a, s, m = _column(alpha, x_t), _column(sigma, x_t), model_output
    return {
        "epsilon": lambda: (x_t - s * m) / a,
        "sample": lambda: m,
        "v_prediction": lambda: a * x_t - s * m,
        "flow_prediction": lambda: x_t - s * m,
    }[prediction_type]()


def classifier_guidance(
    xp: Any,
    model_output: Any,
    gradient: Any,
    alpha: Any,
    sigma: Any,
    prediction_type: str = "epsilon",
    scale: Any = 1.0,
) -> Any:
    # x_0 moves by sigma^2 / alpha, the noise by -sigma; the prediction is a sum of both.
    a, s, g = (
        _column(alpha, gradient),
        _column(sigma, gradient),
        _column(scale, gradient) * gradient,
    )
    of_x0, of_noise = s * s / a * g, -s * g
    return (
        model_output
        + {
            "epsilon": lambda: of_noise,
            "sample": lambda: of_x0,
            "v_prediction": lambda: a * of_noise - s * of_x0,
            "flow_prediction": lambda: of_noise - of_x0,
        }[prediction_type]()
    )


def predict_epsilon(
    xp: Any, model_output: Any, x_t: Any, alpha: Any, sigma: Any, prediction_type: str = "epsilon"
) -> Any:
    a, s, m = _column(alpha, x_t), _column(sigma, x_t), model_output
    return {
        "epsilon": lambda: m,
        "sample": lambda: (x_t - a * m) / s,
        "v_prediction": lambda: s * x_t + a * m,
        "flow_prediction": lambda: x_t + (1 - s) * m,
    }[prediction_type]()


def _guided(m: Any, uncond: Any, scale: Any) -> Any:
    return m if uncond is None else uncond + _column(scale, m) * (m - uncond)


def _clipped(x: Any, clip_range: Any) -> Any:
    if clip_range is None:
        return x
    low, high = clip_range if isinstance(clip_range, tuple) else (-clip_range, clip_range)
    return clip(x, low, high)


def reverse_step(
    xp: Any,
    x: Any,
    model_output: Any,
    coefficients: Any,
    t: Any = None,
    noise: Any = None,
    model_output_uncond: Any = None,
    guidance_scale: Any = None,
    threshold: Any = None,
    history_1: Any = None,
    history_2: Any = None,
    history_3: Any = None,
    return_history: bool = False,
    variance_output: Any = None,
    variance_coefficients: Any = (0.0, 0.0),
) -> Any:
    c, m, x0 = _prediction(
        x, model_output, coefficients, t, model_output_uncond, guidance_scale, threshold
    )
    step = c[0] * x + c[1] * m + c[2] * x0
    for factor, h in zip(c[11:], (history_1, history_2, history_3), strict=False):
        step = step if h is None else step + factor * h
    if noise is not None:
        deviation = c[3]
        if variance_output is not None:
            s_0, s_v = variance_coefficients
            deviation = deviation * xp.exp(s_0 + s_v * variance_output)
        step = step + deviation * noise
    return (step, c[8] * x + c[9] * m + c[10] * x0) if return_history else step


def step_log_prob(
    xp: Any,
    x: Any,
    model_output: Any,
    x_next: Any,
    coefficients: Any,
    t: Any = None,
    model_output_uncond: Any = None,
    guidance_scale: Any = None,
    history_1: Any = None,
    history_2: Any = None,
    variance_output: Any = None,
    variance_coefficients: Any = (0.0, 0.0),
) -> Any:
    c, m, x0 = _prediction(x, model_output, coefficients, t, model_output_uncond, guidance_scale)
    mean = c[0] * x + c[1] * m + c[2] * x0
    for factor, h in zip(c[11:], (history_1, history_2), strict=False):
        mean = mean if h is None else mean + factor * h
    log_deviation = xp.log(c[3])
    if variance_output is not None:
        s_0, s_v = variance_coefficients
        log_deviation = log_deviation + s_0 + s_v * variance_output
    z = (x_next - mean) * xp.exp(-log_deviation)
    terms = -(z * z) / 2 - log_deviation - math.log(2 * math.pi) / 2
    return _over_samples(terms, x)


def _over_samples(terms: Any, x: Any) -> Any:
    return terms.reshape(len(x), math.prod(x.shape[1:])).sum(1) if x.ndim > 1 else terms


def step_kl(
    xp: Any,
    x: Any,
    model_output: Any,
    reference_output: Any,
    coefficients: Any,
    t: Any = None,
    model_output_uncond: Any = None,
    reference_output_uncond: Any = None,
    guidance_scale: Any = None,
) -> Any:
    del xp
    c, m, x0 = _prediction(x, model_output, coefficients, t, model_output_uncond, guidance_scale)
    _, other, other_x0 = _prediction(
        x, reference_output, coefficients, t, reference_output_uncond, guidance_scale
    )
    z = (c[1] * (m - other) + c[2] * (x0 - other_x0)) / c[3]
    return _over_samples(z * z / 2, x)


def vlb_term(
    xp: Any,
    x0: Any,
    model_output: Any,
    coefficients: Any,
    t: Any,
    x_t: Any = None,
    noise: Any = None,
    variance_output: Any = None,
    scale: Any = 1.0,
) -> Any:
    rows = coefficients[t]
    c = [_column(rows[..., k], x0) for k in range(rows.shape[-1])]
    given = noise if x_t is None else x_t
    error = (c[0] + c[3]) * x0 + (c[1] + c[4]) * given + (c[2] + c[5]) * model_output
    error = x0 - clip(x0 - error, c[6], c[7])
    if variance_output is None:
        terms = c[9] * error**2 + c[10]
    else:
        d = c[11] + c[12] - c[13] * variance_output
        spread = xp.where(c[14] != 0, xp.expm1(d) - d, -d) / 2
        terms = spread + c[9] * error**2 * xp.exp(d) + c[10]
    found = per_sample(terms)
    return found * (scale.to(found.dtype) if isinstance(scale, Tensor) else scale)


def prior_kl(xp: Any, x0: Any, alpha: float, sigma: float) -> Any:
    variance = sigma * sigma
    return per_sample((alpha**2 * x0**2 + variance - 1 - math.log(variance)) / 2)


def _prediction(
    x: Any,
    model_output: Any,
    coefficients: Any,
    t: Any,
    model_output_uncond: Any,
    guidance_scale: Any,
    threshold: Any = None,
) -> tuple[list[Any], Any, Any]:
    rows = coefficients if t is None else coefficients[t]
    c = [_column(rows[..., k], x) for k in range(rows.shape[-1])]
    m = _guided(model_output, model_output_uncond, guidance_scale)
    x0 = c[4] * x + c[5] * m
    if threshold is None:
        return c, m, clip(x0, c[6], c[7])
    s = _column(threshold, x)
    return c, m, clip(x0, -s, s) / s


def ddpm_step(
    xp: Any,
    model_output: Any,
    x_t: Any,
    alpha: Any,
    sigma: Any,
    alpha_prev: Any,
    sigma_prev: Any,
    noise: Any = None,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: Any = None,
    model_output_uncond: Any = None,
    guidance_scale: Any = None,
) -> Any:
    m = _guided(model_output, model_output_uncond, guidance_scale)
    x0 = _clipped(predict_x0(xp, m, x_t, alpha, sigma, prediction_type), clip_range)
    ratio = alpha / alpha_prev
    beta = sigma**2 - ratio**2 * sigma_prev**2
    posterior_variance = beta * sigma_prev**2 / sigma**2
    mean = _column(alpha_prev * beta / sigma**2, x_t) * x0
    mean = mean + _column(ratio * sigma_prev**2 / sigma**2, x_t) * x_t
    if noise is None:
        return mean
    variance = posterior_variance if variance_type == "fixed_small" else beta
    return mean + _column(variance**0.5, x_t) * noise


def ddim_step(
    xp: Any,
    model_output: Any,
    x_t: Any,
    alpha: Any,
    sigma: Any,
    alpha_prev: Any,
    sigma_prev: Any,
    eta: float = 0.0,
    noise: Any = None,
    prediction_type: str = "epsilon",
    rederive_epsilon: bool = True,
    clip_range: Any = None,
    model_output_uncond: Any = None,
    guidance_scale: Any = None,
) -> Any:
    m = _guided(model_output, model_output_uncond, guidance_scale)
    x0 = _clipped(predict_x0(xp, m, x_t, alpha, sigma, prediction_type), clip_range)
    if rederive_epsilon:
        epsilon = (x_t - _column(alpha, x_t) * x0) / _column(sigma, x_t)
    else:
        epsilon = predict_epsilon(xp, m, x_t, alpha, sigma, prediction_type)
    beta = sigma**2 - (alpha / alpha_prev) ** 2 * sigma_prev**2
    s = eta * (beta * sigma_prev**2 / sigma**2) ** 0.5
    direction = (sigma_prev**2 - s**2) ** 0.5
    mean = _column(alpha_prev, x_t) * x0 + _column(direction, x_t) * epsilon
    return mean if noise is None else mean + _column(s, x_t) * noise


def error_loss(xp: Any, error: Any, loss: str, delta: Any) -> Any:
    """The naive loss of each error: one root, which cancels and overflows."""
    if loss == "pseudo_huber":
        return 2 * delta * ((error**2 + delta**2) ** 0.5 - delta)
    if loss == "smooth_l1":
        size = abs(error)
        return xp.where(size < delta, 0.5 * error**2 / delta, size - 0.5 * delta)
    return error**2


def denoising_loss(
    xp: Any,
    model_output: Any,
    x0: Any,
    noise: Any,
    prediction_type: str = "epsilon",
    alpha: Any = None,
    sigma: Any = None,
    weight: Any = None,
    t: Any = None,
    mask: Any = None,
    mask_reduction: str = "all",
    loss: str = "mse",
    delta: Any = None,
) -> Any:
    error = model_output - target(xp, prediction_type, x0, noise, alpha, sigma, t)
    terms = error_loss(xp, error, loss, None if delta is None else _column(_at(delta, t), error))
    n = max(math.prod(model_output.shape[1:]), 1)
    if mask is None:
        found = per_sample(terms) / n
    else:
        counted = per_sample(mask + xp.zeros_like(error))
        found = per_sample(xp.where(mask == 0, xp.zeros_like(error), mask * terms))
        found = found / (counted + (counted == 0) if mask_reduction == "mask" else n)
    if weight is None:
        return found
    weight = _at(weight, t)
    return found * (weight.to(found.dtype) if isinstance(weight, Tensor) else weight)
