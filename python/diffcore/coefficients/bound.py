"""The float64 scalars of the variational bound: a row of numbers for each of its terms."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from diffcore._checks import check_choice
from diffcore._devices import in_float64
from diffcore._types import Coef, VlbColumns
from diffcore.coefficients.step import LEARNED as LEARNED
from diffcore.coefficients.step import VARIANCE_TYPES as VARIANCE_TYPES
from diffcore.coefficients.step import (
    parse_clip_range,
    posterior_coefficients,
    target_coefficients,
    tensors,
    x0_coefficients,
)

DECODERS = ("discretized", "gaussian")
GIVEN = ("x_t", "noise")

VLB_COLUMNS = VlbColumns._fields
"""The columns of a table of ``ops.vlb_term``; the last three where the variance is learned."""
FIXED = 12

_NEAR = 0.1  # below it expm1(d) - d cancels

Number = TypeVar("Number", float, Tensor)


def log_variances(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(log beta_tilde, log beta) of each step, float64 ``[T]``.

    beta_tilde is 0 at the first step, where its logarithm is that of the second step, or of beta if
    there is only one step.

    Args:
        alpha: Signal coefficients ``[T]``, from the least noisy time on; x_0 precedes the first.
        sigma: Noise coefficients ``[T]``, from the least noisy time on.

    Returns:
        Two float64 tensors ``[T]``.

    Source:
        Nichol and Dhariwal 2021 (arXiv 2102.09672) section 3.1.
    """
    _, _, beta_tilde, beta = _posterior(alpha, sigma)
    first = beta_tilde[1:2] if len(beta) > 1 else beta
    return torch.cat([first, beta_tilde[1:]]).log(), beta.log()


def vlb_coefficients(
    alpha: Tensor,
    sigma: Tensor,
    *,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: float | tuple[float, float] | None = None,
    decoder: str = "discretized",
    given: str = "x_t",
) -> Tensor:
    """The table of ``ops.vlb_term``: row t is L_t for t > 0, and the decoder's term L_0 for t = 0.

    L_t = 1/2 sum [expm1(d) - d + A_t² (x_0 - x0_hat)² / v_t], d = log beta_tilde_t - log v_t, where
    v_t is the variance of p: the means of q and p share B_t x_t, so their difference is A_t times
    the error of the predicted x_0.

    Args:
        alpha: Signal coefficients ``[T]``, from the least noisy time on; x_0 precedes the first.
        sigma: Noise coefficients ``[T]``, from the least noisy time on.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        variance_type: One of ``VARIANCE_TYPES``. "learned": the model predicts log v;
            "learned_range": it predicts a number from -1 (log beta_tilde) to 1 (log beta).
        clip_range: ``None``, ``c`` for [-c, c], or (lowest, highest), applied to the predicted x0.
        decoder: L_0 for pixels k/127.5 - 1 ("discretized": the mass of their bin) or for any data
            ("gaussian": the density).
        given: What the term is computed from in addition to x_0: "x_t", or the "noise" in it.

    Returns:
        float64 ``[T, 12]``, or ``[T, 15]`` with a learned variance: ``VLB_COLUMNS``.

    Raises:
        ValueError: Unknown strings, or as ``posterior_coefficients`` and ``x0_coefficients``.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) eq. 5, 8 and 13; Nichol and Dhariwal 2021 (arXiv
        2102.09672) eq. 15.
    """
    for name, value, choices in (
        ("variance_type", variance_type, VARIANCE_TYPES),
        ("decoder", decoder, DECODERS),
        ("given", given, GIVEN),
    ):
        check_choice(name, value, choices)
    low, high = parse_clip_range(clip_range)
    alpha, sigma = in_float64(alpha), in_float64(sigma)
    shift, _, _, _ = _posterior(alpha, sigma)
    log_small, log_large = log_variances(alpha, sigma)
    errors = _errors(alpha, sigma, prediction_type, given)
    high_parts = [b.float().double() for b in errors]
    low_parts = [b - h for b, h in zip(errors, high_parts, strict=True)]

    first = torch.zeros_like(alpha)
    first[0] = 1
    is_first = first == 1
    zero, gaussian = torch.zeros_like(alpha), decoder == "gaussian"
    normalizer = first * (0.5 * math.log(2 * math.pi) if gaussian else 0.0)
    columns = [
        *high_parts,
        *low_parts,
        zero + low,
        zero + high,
        zero if gaussian else first,
    ]
    if variance_type in LEARNED:
        if variance_type == "learned":  # d = log beta_tilde - v
            d_0, d_v = log_small, zero + 1
        else:  # log v = log_small + (v + 1) / 2 (log_large - log_small)
            d_v = 0.5 * (log_large - log_small)
            d_0 = -d_v
        # The first step has no beta_tilde to compare with: d is minus the log-variance.
        d_0 = torch.where(is_first, d_0 - log_small, d_0)
        factor = 0.5 * shift**2 * torch.exp(-torch.where(is_first, zero, log_small))
        rounded = d_0.float().double()
        columns += [factor, normalizer, rounded, d_0 - rounded, d_v, 1 - first]
    else:
        log_variance = log_small
        if variance_type == "fixed_large":
            log_variance = torch.where(is_first, log_small, log_large)
        d = log_small - log_variance
        factor = 0.5 * shift**2 * torch.exp(-log_variance)
        offset = torch.where(is_first, normalizer + 0.5 * log_variance, _half_expm1_minus(d))
        columns += [factor, offset, -log_variance]
    table = torch.stack(columns, dim=1)
    if not gaussian:
        # Row 0 is the sum of the decoder's terms, neither scaled nor shifted.
        table[0, VLB_COLUMNS.index("factor")], table[0, VLB_COLUMNS.index("offset")] = 1.0, 0.0
    return table


def prior_coefficients(alpha: Coef, sigma: Coef) -> tuple[Coef, Coef]:
    """(factor, offset) of L_T = factor sum x_0² + n offset, the KL of q(x_T | x_0) to N(0, I).

    Args:
        alpha: Signal coefficient at the last time, a number or a float64 tensor.
        sigma: Noise coefficient there, like alpha.

    Returns:
        1/2 alpha², and 1/2 [sigma² - 1 - log sigma²], like alpha.
    """
    factor = 0.5 * alpha**2
    if isinstance(sigma, Tensor):
        return factor, _half_expm1_minus(2 * sigma.log())
    d = 2 * math.log(sigma)
    if torch.compiler.is_compiling():  # no tensor can be read
        return factor, 0.5 * (d * d * _series(d) if abs(d) < _NEAR else math.expm1(d) - d)
    return factor, float(_half_expm1_minus(torch.tensor(d, dtype=torch.float64, device="cpu")))


def _posterior(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
    """Coefficients of q(x_{t-1} | x_t, x_0) for all t, x_0 itself before the first."""
    before = [
        torch.cat([torch.full_like(c[:1], v), c[:-1]]) for c, v in ((alpha, 1.0), (sigma, 0.0))
    ]
    return tensors(posterior_coefficients(alpha, sigma, *before))


def _errors(
    alpha: Tensor, sigma: Tensor, prediction_type: str, given: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(b_0, b_g, b_m) of x_0 - x0_hat = b_0 x_0 + b_g given + b_m m."""
    a_x, a_m = tensors(x0_coefficients(alpha, sigma, prediction_type))
    if given == "x_t":
        return torch.ones_like(alpha), -a_x, -a_m
    # The error of x_0 is -a_m (m - target), with the target as a sum of x_0 and the noise.
    k_x0, k_noise = target_coefficients(alpha, sigma, prediction_type)
    return a_m * k_x0, a_m * k_noise, -a_m


def _half_expm1_minus(d: Tensor) -> Tensor:
    """1/2 (expm1(d) - d), by its series where d is small."""
    near = torch.where(d.abs() < _NEAR, d, torch.zeros_like(d))
    return 0.5 * torch.where(d.abs() < _NEAR, near * near * _series(near), torch.expm1(d) - d)


def _series(d: Number) -> Number:
    """(expm1(d) - d) / d² where d is small."""
    series = 0.0 * d
    for k in range(14, 1, -1):
        series = series * d + 1 / math.factorial(k)
    return series
