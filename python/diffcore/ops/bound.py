"""The terms of the variational bound: KL, decoder, prior; in nats."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diffcore._checks import check_choice, check_float_tensor
from diffcore._engine import messages
from diffcore._engine.dispatch import plain_eager, run
from diffcore._engine.kept import made_plainly
from diffcore._engine.kernel import Kernel
from diffcore._kernels import bound as k
from diffcore._types import Coef, Coefs, Step
from diffcore.coefficients.bound import FIXED, VLB_COLUMNS, prior_coefficients
from diffcore.noise import Noise, PhiloxNoise
from diffcore.ops._arguments import as_coef, as_dof, as_step, as_table, converted, float_of
from diffcore.ops._masks import (
    MASK_REDUCTIONS,
    beside,
    checked_mask,
    coefs_beside,
    counts,
    expanded,
    in_one_dtype,
    noise_like,
)
from diffcore.ops._noise import run_noisy
from diffcore.reference import bound as formulas

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
    mask: Tensor | None = None,
    mask_reduction: str = "mask",
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
        mask: q, what counts: broadcast to the shape of x_0, with values in [0, 1], as in
            :func:`blend_known`. Where it is 0 no other value is used. The term is then computed in
            plain torch, in double.
        mask_reduction: With "all" the term is the sum of q times the terms of the elements; with
            "mask" it is n times their mean over the mask, Σ q L / Σ q (0 where Σ q is 0), so that
            the scale for bits per dimension gives the bits of a dimension that counts.

    Returns:
        ``[B]``, float32 (float64 for float64 samples): nats, the sum over each sample.

    Raises:
        TypeError: Neither ``x_t`` nor ``noise``.
        ValueError: Both; a table of the wrong width; a mask as :func:`blend_known` refuses.

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
    if mask is not None or mask_reduction != "mask":
        check_choice("mask_reduction", mask_reduction, MASK_REDUCTIONS)
    if mask is not None:
        given: Any = x_t if noise is None else noise
        pair = k.VLB_TERM[learned] if noise is None else _OF_NOISE[learned]
        return _masked(pair.reading, (*inputs, given), coefs, t, mask, mask_reduction == "mask")
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


def _masked(
    kernel: Kernel, inputs: tuple[Any, ...], coefs: Coefs, t: Step, mask: Tensor, mean: bool
) -> Tensor:
    """The reference of the kernel, with a mask; the last input is x_t or noise."""
    if isinstance(inputs[-1], PhiloxNoise):
        inputs = (*inputs[:-1], noise_like("noise", inputs[-1], "x0", inputs[0]))
    tensors = in_one_dtype(kernel.inputs, inputs)
    x0, model_output, *rest = tensors
    t = t if t is None or isinstance(t, Tensor) else as_step(t, x0.device)
    messages.explain(messages.Arguments(kernel, tensors, coefs, t))
    q = checked_mask(mask, x0, "x0").to(x0.dtype)
    scale, *columns = coefs_beside(coefs, t, x0)
    if mean:
        scale = scale * (x0.shape[1:].numel() / beside(counts(q, x0), x0))
    variance = rest[0] if len(rest) > 1 else None
    return formulas.vlb_term(
        x0, rest[-1], model_output, columns, scale, variance_output=variance, mask=expanded(q, x0)
    )


def prior_kl(
    x0: Tensor, alpha: float, sigma: float, *, dof: float | Tensor | None = None
) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each sample: ``½ Σ [ alpha² x_0² + expm1(d) - d ]``.

    d = log sigma². On a subspace, such as that of points whose mean is 0, x_0 and the noise lie in
    it, and the terms of d are counted ``dof`` times, its number of dimensions. The result does
    not depend on the model, and is small where little signal is left.

    Args:
        x0: Clean samples ``[B, ...]``.
        alpha: Signal coefficient of the last step, a number.
        sigma: Noise coefficient of the last step, a number above 0.
        dof: Number of dimensions of the subspace, a number or ``[B]``, such as 3 (N - 1) for N
            points without their center of mass; ``None`` for all.

    Returns:
        ``[B]``, float32 (float64 for float64 samples): nats, the sum over each sample.

    Source:
        Ho et al. 2020 (arXiv 2006.11239) eq. 5; on a subspace: Hoogeboom et al. 2022 (arXiv
        2203.17003).
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
    if dof is not None:
        check_float_tensor("x0", x0)
        factor, offset = coefs
        coefs = (factor, as_dof(dof, x0) * (offset / max(1, x0.shape[1:].numel())))
    return run(k.PRIOR_KL, (x0,), coefs)
