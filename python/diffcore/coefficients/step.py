"""The scalars of every diffusion formula, computed in float64 here and nowhere else.

One family covers all schedules: x_t = alpha_t * x_0 + sigma_t * noise. These are the factors of x_t
and of the model output that give x_0, the noise, or the next sample, as functions of (alpha,
sigma). The functions take Python floats or tensors of any shape, compute in float64, and leave
rounding to the code that launches a kernel.

Floats in, floats out; if one argument is a tensor, the results are float64 tensors on its device.
Values that a formula does not allow (alpha = 0 for epsilon prediction, sigma = 0 in a posterior)
raise ValueError for floats and CPU tensors. On other devices a check would wait for the device, so
there they give inf or nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._checks import (
    as_flag,
    as_real,
    as_tensor,
    check_choice,
    check_dense,
    check_memory,
)
from diffcore._devices import in_float64
from diffcore._types import Coef

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")
FIXED_VARIANCE_TYPES, LEARNED = VARIANCE_TYPES[:2], VARIANCE_TYPES[2:]

STEP_COLUMNS = (
    "c_x", "c_m", "c_0", "c_z", "a_x", "a_m", "clip_min", "clip_max",
    "e_x", "e_m", "e_0", "c_1", "c_2", "c_3",
)  # fmt: skip
"""The columns of a solver table: see ``ops.reverse_step``."""
HISTORY_WRITTEN, HISTORY_READ = slice(8, 11), slice(11, 14)
"""Where the columns e_x, e_m, e_0 and c_1, c_2, c_3 are."""

# Inputs may have been rounded to float32 before; a beta that is negative by more is an error.
_FLOAT32_ROUNDING = 4 * torch.finfo(torch.float32).eps
# A divisor below it is as good as 0: the quotient overflows where kernels compute in float32.
_LEAST = torch.finfo(torch.float32).tiny


def parse_clip_range(clip_range: float | tuple[float, float] | None) -> tuple[float, float]:
    """Turn ``None``, a half width or a pair into (lowest, highest) allowed value of x_0.

    Args:
        clip_range: ``None`` (no clipping), ``c`` (meaning [-c, c]), or ``(lowest, highest)``.

    Returns:
        The two bounds, infinite where there is no clipping.

    Raises:
        TypeError: Neither a number nor a pair of numbers.
        ValueError: The interval is empty or a bound is nan.
    """
    if clip_range is None:
        return -math.inf, math.inf
    try:
        if type(clip_range) is float:
            low, high = -clip_range, clip_range
        elif isinstance(clip_range, (tuple, list)):
            low, high = (as_real("clip_range", bound) for bound in clip_range)
        else:
            high = as_real("clip_range", clip_range)
            low = -high
    except (TypeError, ValueError):
        plain = isinstance(clip_range, (str, tuple, list))
        came = repr(clip_range) if plain else type(clip_range).__name__
        raise TypeError(
            f"clip_range must be None, a number or a pair of numbers, got {came}"
        ) from None
    if not low < high:
        raise ValueError(f"clip_range must have lowest < highest, got ({low}, {high})")
    return low, high


def x0_coefficients(alpha: Coef, sigma: Coef, prediction_type: str) -> tuple[Coef, Coef]:
    """Coefficients of the clean sample: x0 = a_x * x_t + a_m * model_output.

    epsilon: (x - sigma m) / alpha; sample: m; v_prediction: (alpha x - sigma m) / (alpha^2 +
    sigma^2); flow_prediction (m = noise - x0): (x - sigma m) / (alpha + sigma). The denominators of
    the last two are 1 for a variance preserving schedule and for rectified flow respectively, and
    make the formulas hold for every other schedule.

    Args:
        alpha: Signal coefficient, float or tensor.
        sigma: Noise coefficient, float or tensor.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        (a_x, a_m).

    Raises:
        ValueError: Unknown ``prediction_type``, or alpha = 0 with "epsilon", where what is below
            float32's smallest normal number counts as 0.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) eq. 15; Salimans and Ho 2022 (arXiv 2202.00512) app. D.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    alpha, sigma = _float64(_TWO, alpha, sigma)
    if prediction_type == "epsilon":
        if _vanishes(alpha):
            raise ValueError(
                "alpha must not be 0 with prediction_type 'epsilon' (zero terminal SNR: epsilon "
                f"does not determine x0), got {_least(alpha)}; use 'v_prediction', 'sample' or "
                "'flow_prediction'"
            )
        return 1 / alpha, -sigma / alpha
    if prediction_type == "sample":
        return _constant(0.0, alpha), _constant(1.0, alpha)
    scale = alpha * alpha + sigma * sigma if prediction_type == "v_prediction" else alpha + sigma
    if _any(scale == 0):
        raise ValueError(f"alpha and sigma must not both be 0, got alpha={alpha}, sigma={sigma}")
    return (alpha if prediction_type == "v_prediction" else 1) / scale, -sigma / scale


def epsilon_coefficients(alpha: Coef, sigma: Coef, prediction_type: str) -> tuple[Coef, Coef]:
    """Coefficients of the noise: epsilon = e_x * x_t + e_m * model_output.

    epsilon: m; sample: (x - alpha m) / sigma; v_prediction: (sigma x + alpha m) / (alpha^2 +
    sigma^2); flow_prediction: (x + alpha m) / (alpha + sigma).

    Args:
        alpha: Signal coefficient, float or tensor.
        sigma: Noise coefficient, float or tensor.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        (e_x, e_m).

    Raises:
        ValueError: Unknown ``prediction_type``, or sigma = 0 with "sample", where what is below
            float32's smallest normal number counts as 0.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    alpha, sigma = _float64(_TWO, alpha, sigma)
    if prediction_type == "epsilon":
        return _constant(0.0, alpha), _constant(1.0, alpha)
    if prediction_type == "sample":
        if _vanishes(sigma):
            raise ValueError(
                "sigma must not be 0 with prediction_type 'sample' (x0 does not determine epsilon "
                f"there), got {_least(sigma)}"
            )
        return 1 / sigma, -alpha / sigma
    scale = alpha * alpha + sigma * sigma if prediction_type == "v_prediction" else alpha + sigma
    if _any(scale == 0):
        raise ValueError(f"alpha and sigma must not both be 0, got alpha={alpha}, sigma={sigma}")
    return (sigma if prediction_type == "v_prediction" else 1) / scale, alpha / scale


def target_coefficients(alpha: Coef, sigma: Coef, prediction_type: str) -> tuple[Coef, Coef]:
    """Coefficients of the training target: target = k_x0 * x_0 + k_noise * noise.

    epsilon: noise; sample: x_0; v_prediction: alpha noise - sigma x_0; flow_prediction: noise -
    x_0.

    Args:
        alpha: Signal coefficient, float or tensor.
        sigma: Noise coefficient, float or tensor.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.

    Returns:
        (k_x0, k_noise).
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    alpha, sigma = _float64(_TWO, alpha, sigma)
    if prediction_type == "v_prediction":
        return -sigma, alpha
    k_x0 = {"epsilon": 0.0, "sample": 1.0, "flow_prediction": -1.0}[prediction_type]
    k_noise = {"epsilon": 1.0, "sample": 0.0, "flow_prediction": 1.0}[prediction_type]
    return _constant(k_x0, alpha), _constant(k_noise, alpha)


def classifier_coefficient(
    alpha: Coef, sigma: Coef, prediction_type: str, scale: Coef = 1.0
) -> Coef:
    """The factor k of classifier guidance: model_output + k * gradient.

    The gradient of log p(y | x_t) moves the predicted x_0 by sigma^2 / alpha times itself, and the
    noise by -sigma times. epsilon: -sigma; sample: sigma^2 / alpha; v_prediction: -sigma (alpha^2 +
    sigma^2) / alpha; flow_prediction: -sigma (alpha + sigma) / alpha; each times scale. Where alpha
    = 0, x_t holds nothing of x_0: the gradient is 0, and k is 0 there.

    Args:
        alpha: Signal coefficient, float or tensor.
        sigma: Noise coefficient, float or tensor.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        scale: Strength of the guidance, float or tensor.

    Returns:
        k.

    Source:
        Dhariwal and Nichol 2021 (arXiv 2105.05233) section 4.2, for epsilon.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    alpha, sigma, scale = _float64((*_TWO, "scale"), alpha, sigma, scale)
    if prediction_type == "sample":
        k = sigma * sigma
    elif prediction_type == "epsilon":
        k = -sigma * alpha
    elif prediction_type == "v_prediction":
        k = -sigma * (alpha * alpha + sigma * sigma)
    else:
        k = -sigma * (alpha + sigma)
    if isinstance(alpha, Tensor):
        gone = alpha.abs() < _LEAST
        return torch.where(gone, 0.0, scale * k / torch.where(gone, 1.0, alpha))
    return 0.0 if _vanishes(alpha) else scale * k / alpha


def posterior_coefficients(
    alpha: Coef, sigma: Coef, alpha_prev: Coef, sigma_prev: Coef
) -> tuple[Coef, Coef, Coef, Coef]:
    """Coefficients of q(x_prev | x_t, x_0) = N(A x_0 + B x_t, beta_tilde I).

    With r = alpha / alpha_prev and beta = sigma^2 - r^2 sigma_prev^2, the variance of the step from
    x_prev to x_t: A = alpha_prev beta / sigma^2, B = r sigma_prev^2 / sigma^2, beta_tilde = beta
    sigma_prev^2 / sigma^2. The previous time is an argument, so respaced sequences use the same
    formula.

    Args:
        alpha: Signal coefficient at t.
        sigma: Noise coefficient at t.
        alpha_prev: Signal coefficient at the earlier (cleaner) time.
        sigma_prev: Noise coefficient at the earlier time; 0 for the clean sample itself.

    Returns:
        (A, B, beta_tilde, beta).

    Raises:
        ValueError: sigma = 0, alpha_prev = 0, or the earlier time is the noisier one.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) eq. 6-7; Kingma et al. 2021 (arXiv 2107.00630) appendix A.
    """
    alpha, sigma, alpha_prev, sigma_prev = _float64(_FOUR, alpha, sigma, alpha_prev, sigma_prev)
    if _any(sigma == 0):
        raise ValueError("sigma must not be 0, because no reverse step starts without noise, got 0")
    if _any(alpha_prev == 0):
        raise ValueError(
            "alpha_prev must not be 0, because only the last time of a schedule may have no "
            "signal, got 0"
        )
    ratio = alpha / alpha_prev
    kept = (ratio * sigma_prev / sigma) ** 2  # the share of sigma^2 that x_prev already has
    if _any(kept > 1 + _FLOAT32_ROUNDING):
        raise ValueError(
            "alpha_prev, sigma_prev must belong to the less noisy of the two times, "
            f"got alpha={alpha}, sigma={sigma}, alpha_prev={alpha_prev}, sigma_prev={sigma_prev}"
        )
    fresh = _at_least_zero(1 - kept)
    return (
        alpha_prev * fresh,
        ratio * (sigma_prev / sigma) ** 2,
        fresh * sigma_prev**2,
        fresh * sigma**2,
    )


def ddpm_coefficients(
    alpha: Coef,
    sigma: Coef,
    alpha_prev: Coef,
    sigma_prev: Coef,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: float | tuple[float, float] | None = None,
) -> Tensor:
    """Row(s) of ``reverse_step`` coefficients for an ancestral (DDPM) step.

    x_prev = A clip(x0) + B x_t + c_z z, with c_z^2 = beta_tilde ("fixed_small") or beta
    ("fixed_large"). Where sigma_prev = 0 the step ends at the clean sample and c_z = 0 for both.

    Args:
        alpha: Signal coefficient at t.
        sigma: Noise coefficient at t.
        alpha_prev: Signal coefficient at the time stepped to.
        sigma_prev: Noise coefficient at the time stepped to.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        variance_type: One of ``FIXED_VARIANCE_TYPES``.
        clip_range: ``None``, ``c`` for [-c, c], or (lowest, highest), applied to x0.

    Returns:
        float64 ``[..., 8]``: (c_x, c_m, c_0, c_z, a_x, a_m, clip_min, clip_max).

    Raises:
        ValueError: As ``x0_coefficients`` and ``posterior_coefficients``; unknown
            ``variance_type``; empty clip range.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) algorithm 2 and section 3.2.
    """
    check_choice("variance_type", variance_type, FIXED_VARIANCE_TYPES)
    low, high = parse_clip_range(clip_range)
    a_x, a_m = x0_coefficients(alpha, sigma, prediction_type)
    c_0, c_x, beta_tilde, beta = posterior_coefficients(alpha, sigma, alpha_prev, sigma_prev)
    variance = beta_tilde if variance_type == "fixed_small" else beta * (sigma_prev != 0)
    return _row(c_x, 0.0, c_0, _sqrt(variance), a_x, a_m, low, high)


def ddim_coefficients(
    alpha: Coef,
    sigma: Coef,
    alpha_prev: Coef,
    sigma_prev: Coef,
    *,
    eta: float = 0.0,
    prediction_type: str = "epsilon",
    rederive_epsilon: bool = True,
    clip_range: float | tuple[float, float] | None = None,
) -> Tensor:
    """Row(s) of ``reverse_step`` coefficients for a DDIM step.

    x_prev = alpha_prev clip(x0) + d epsilon + c_z z, with c_z = eta sqrt(beta_tilde) and
    d^2 = sigma_prev^2 - c_z^2. ``epsilon`` comes either from the clipped x0
    (``rederive_epsilon=True``, OpenAI's rule: (x_t - alpha clip(x0)) / sigma) or from the unclipped
    model output (``False``, the default of diffusers). Without clipping the two are the same. With
    eta = 0 the time stepped to may also be the noisier one (DDIM inversion).

    Args:
        alpha: Signal coefficient at t.
        sigma: Noise coefficient at t.
        alpha_prev: Signal coefficient at the time stepped to.
        sigma_prev: Noise coefficient at the time stepped to.
        eta: In [0, 1]: 0 for the deterministic sampler, 1 for ancestral noise.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        rederive_epsilon: Whether epsilon follows the clipped x0.
        clip_range: ``None``, ``c`` for [-c, c], or (lowest, highest), applied to x0.

    Returns:
        float64 ``[..., 8]``: (c_x, c_m, c_0, c_z, a_x, a_m, clip_min, clip_max).

    Raises:
        TypeError: eta is not a number.
        ValueError: eta outside [0, 1], sigma = 0 where epsilon must be derived, or as
            ``x0_coefficients``.

    Source:
        Song, Meng and Ermon 2021 (arXiv 2010.02502) eq. 12 and 16.
    """
    eta = as_real("eta", eta)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}")
    low, high = parse_clip_range(clip_range)
    a_x, a_m = x0_coefficients(alpha, sigma, prediction_type)
    alpha, sigma, alpha_prev, sigma_prev = _float64(_FOUR, alpha, sigma, alpha_prev, sigma_prev)

    direction, c_z = sigma_prev, _constant(0.0, sigma_prev)
    if eta > 0:
        _, _, beta_tilde, _ = posterior_coefficients(alpha, sigma, alpha_prev, sigma_prev)
        c_z = eta * _sqrt(beta_tilde)
        # sigma_prev^2 - eta^2 beta_tilde, written as a sum so that nothing cancels at eta = 1.
        kept = (alpha / alpha_prev * sigma_prev / sigma) ** 2
        direction = sigma_prev * _sqrt((1 - eta * eta) + eta * eta * kept)

    if as_flag("rederive_epsilon", rederive_epsilon):
        if _vanishes(sigma):
            raise ValueError(
                "sigma must not be 0 with rederive_epsilon=True, because x0 does not determine "
                f"epsilon there, got {_least(sigma)}; pass rederive_epsilon=False"
            )
        c_x = direction / sigma
        return _row(c_x, 0.0, alpha_prev - c_x * alpha, c_z, a_x, a_m, low, high)
    e_x, e_m = epsilon_coefficients(alpha, sigma, prediction_type)
    return _row(direction * e_x, direction * e_m, alpha_prev, c_z, a_x, a_m, low, high)


def tensors(values: Sequence[Coef]) -> tuple[Tensor, ...]:
    """Coefficients that were computed from tensors, and so are tensors, for a type checker.

    Args:
        values: What a function of this module returned.

    Returns:
        The same tensors.
    """
    assert all(isinstance(value, Tensor) for value in values)
    return tuple(values)  # type: ignore[arg-type]


# ---- floats or tensors --------------------------------------------------------------------------

_TWO = ("alpha", "sigma")
_FOUR = ("alpha", "sigma", "alpha_prev", "sigma_prev")


def _float64(names: tuple[str, ...], *values: Coef) -> Sequence[Coef]:
    """All values as floats, or, if one is a tensor, all as float64 tensors of one shape."""
    for value in values:
        if type(value) is not float:
            break
    else:
        return values
    numbers = [_number(name, value) for name, value in zip(names, values, strict=True)]
    if any(isinstance(value, Tensor) for value in numbers):
        return _broadcast(numbers, names)
    return numbers


def _number(name: str, value: Coef) -> Coef:
    """A float or a tensor of real numbers; a NumPy array is a tensor on the CPU."""
    if not isinstance(value, Tensor):
        # The types first: Dynamo has no getattr for a symbolic number.
        if isinstance(value, (int, float)) or not getattr(value, "ndim", 0):
            return as_real(name, value)
        value = as_tensor(name, value)
    check_dense(name, value)
    check_memory(name, value)
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be real, got a tensor of {value.dtype}")
    return value


def _broadcast(values: Sequence[Coef], names: tuple[str, ...] = ()) -> Sequence[Tensor]:
    """Float64 tensors of one shape, of the device and the type of the first tensor.

    On the CPU where that device has no float64.
    """
    first = in_float64(next(value for value in values if isinstance(value, Tensor)))
    tensors = [
        in_float64(value) if isinstance(value, Tensor) else first.new_full((), value)
        for value in values
    ]
    at = next((x.device for x in tensors if x.ndim), first.device)
    for name, x in zip(names, tensors, strict=False):
        if x.ndim and x.device != at:
            other = next(n for n, y in zip(names, tensors, strict=False) if y.ndim)
            raise ValueError(f"{name} must be on {at}, the device of {other}, got {x.device}")
    try:
        broadcast: Sequence[Tensor] = torch.broadcast_tensors(*tensors)
    except RuntimeError:
        _refuse_shapes(tensors, names)
        raise
    return broadcast


def _refuse_shapes(tensors: Sequence[Tensor], names: tuple[str, ...]) -> None:
    """Raises for the first tensor that does not broadcast with those before it."""
    shape, first = torch.Size(()), ""
    for name, tensor in zip(names, tensors, strict=False):
        try:
            shape = torch.broadcast_shapes(shape, tensor.shape)
        except RuntimeError:
            raise ValueError(
                f"{name} must have the shape of {first}, {tuple(shape)}, or be one number, got "
                f"{tuple(tensor.shape)}"
            ) from None
        first = name if tensor.ndim and not first else first


def _row(*columns: Coef) -> Tensor:
    """The columns as a float64 tensor ``[..., k]``; the first is a tensor if any is."""
    if isinstance(columns[0], Tensor):
        tensors = _broadcast(columns)
        return torch.stack(tuple(tensors), dim=tensors[0].ndim)
    return torch.tensor(columns, dtype=torch.float64, device="cpu")


def _constant(value: float, like: Coef) -> Coef:
    return torch.full_like(like, value) if isinstance(like, Tensor) else value


def _sqrt(value: Coef) -> Coef:
    return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


def _vanishes(value: Coef) -> bool:
    """Whether a divisor is 0, or would be in float32, anywhere."""
    return _any(value.abs() < _LEAST) if isinstance(value, Tensor) else abs(value) < _LEAST


def _least(value: Coef) -> str:
    """The number of least magnitude, for an error."""
    found = float(value.abs().min() if isinstance(value, Tensor) else abs(value))
    return f"{found:g}, which is 0 in float32" if found else "0"


def _at_least_zero(value: Coef) -> Coef:
    return value.clamp_min(0.0) if isinstance(value, Tensor) else max(value, 0.0)


def _any(condition: bool | Tensor) -> bool:
    """Whether a condition holds anywhere, where its value is known without waiting for a device."""
    if isinstance(condition, bool):
        return condition
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        return False
    try:
        return bool(condition.any())
    except RuntimeError:  # fake tensors, and tensors under vmap, have no value here
        return False
