"""The terms of the variational bound: KL, decoder, prior; in nats."""

from __future__ import annotations

import math

from torch import Tensor

from diffcore._engine.dispatch import plain_eager, run
from diffcore._engine.kept import made_plainly
from diffcore._kernels import bound as k
from diffcore._types import Coef, Coefs, Step
from diffcore.coefficients.bound import FIXED, VLB_COLUMNS, prior_coefficients
from diffcore.noise import Noise
from diffcore.ops._arguments import as_coef, as_table, converted, float_of
from diffcore.ops._noise import run_noisy

__all__ = [
    "prior_kl",
    "vlb_term",
]


_OF_NOISE = {
    learned: pair.renamed((*pair.reading.inputs[:-1], "noise"))
    for learned, pair in k.VLB_TERM.items()
}


def vlb_term(
    x0: Tensor,
    model_output: Tensor,
    coefficients: Tensor,
    *,
    t: Step = None,
    x_t: Tensor | None = None,
    noise: Noise | None = None,
    variance_output: Tensor | None = None,
    scale: Coef = 1.0,
) -> Tensor:
    """A term of the variational bound for each sample: L_t at t > 0, the decoder's L_0 at t = 0.

    With e = x_0 - clip(predicted x_0), formed in double, and d = log beta_tilde_t - log v_t::

        L_t = ½ Σ [ expm1(d) - d + A_t² e² / v_t ] = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
        L_0 = -log p(x_0 | x_1): of N(x_0 - e, v_0), the mass of the pixel's bin, or the density

    The row of the table selects the term. Differentiable in ``model_output`` and
    ``variance_output`` by kernels (values that the clip stops get no gradient), in ``x0``, ``x_t``
    and ``noise`` through plain torch. The term that a sample does not take is not computed. A
    log-variance of inf gives inf (log 2 for a pixel in an open bin); of -inf, which is a point:
    inf, 0 for a pixel in whose bin it lies, and, where the decoder is a density, -inf if the error
    is 0 and nan otherwise. Where a range of variances is one point, as for T = 1, a v of ±inf is
    nan. Pixel values are not validated: the bin is x_0 ± 1/255 for any x_0.

    Args:
        x0: Clean samples ``[B, ...]``.
        model_output: m at x_t, ``[B, ...]``.
        coefficients: A table ``[T, 12]``, or ``[T, 15]`` with ``variance_output``, float64, of
            ``bound_coefficients.vlb_coefficients``: made for x_t if that is given, else for noise.
        t: The row: an int, ``[B]`` or a one-element counter.
        x_t: The model input, ``[B, ...]``. Give this or ``noise``.
        noise: The noise in x_t ``[B, ...]``, or its noise key. More exact: nothing
            cancels where x_t holds little signal.
        variance_output: v ``[B, ...]``, where the model predicts the variance of its step.
        scale: Factor of the result, a number or ``[B]``: 1 / (n ln 2) for bits per dimension.

    Returns:
        ``[B]``, float32 (float64 for float64 samples): nats, the sum over each sample.

    Raises:
        TypeError: Neither ``x_t`` nor ``noise``.
        ValueError: Both; a table of the wrong width.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) eq. 5, 8 and 13; learned variance: Nichol & Dhariwal
        2021 (arXiv 2102.09672) eq. 15.
    """
    if x_t is None and noise is None:
        raise TypeError("x_t must be a torch.Tensor where noise is None, got NoneType")
    if x_t is not None and noise is not None:
        raise ValueError("x_t must be None where noise is given, got both")
    learned = variance_output is not None
    width = len(VLB_COLUMNS) if learned else FIXED
    coefs: Coefs = (as_coef("scale", scale, None), as_table("coefficients", coefficients, width))
    inputs: tuple[Tensor, ...] = (x0, model_output)
    if variance_output is not None:
        inputs = (*inputs, variance_output)
    found: Tensor
    if x_t is not None:
        kernel = k.VLB_TERM[learned].reading
        try:
            return run(kernel, (*inputs, x_t), coefs, t)
        except TypeError as error:
            coefs, t = converted(error, coefs, t, x0)
        found = run(kernel, (*inputs, x_t), coefs, t)
    else:
        assert noise is not None
        found = run_noisy(_OF_NOISE[learned], inputs, noise, coefs, t)
    return found


def prior_kl(x0: Tensor, alpha: float, sigma: float) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each sample: ``½ Σ [ alpha² x_0² + expm1(d) - d ]``.

    d = log sigma². It does not depend on the model, and is small where little signal is left.

    Args:
        x0: Clean samples ``[B, ...]``.
        alpha: Signal coefficient of the last step, a number.
        sigma: Noise coefficient of the last step, a number above 0.

    Returns:
        ``[B]``, float32 (float64 for float64 samples): nats, the sum over each sample.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) eq. 5.
    """
    a, s = float_of("alpha", alpha), float_of("sigma", sigma)
    if not s > 0:
        raise ValueError(f"sigma must be positive, got {s}")
    if a * a == math.inf:
        raise ValueError(f"alpha must have a square in the range of float64, got {a}")
    if plain_eager():
        coefs = prior_coefficients(a, s)
    else:
        coefs = made_plainly(lambda: prior_coefficients(a, s))  # it reads a tensor
    return run(k.PRIOR_KL, (x0,), coefs)
