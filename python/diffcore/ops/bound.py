"""The terms of the variational bound: KL, decoder, prior. Nats."""

from __future__ import annotations

from torch import Tensor

from .. import _bound as k
from .. import _native  # noqa: F401
from .._execute import Kernel, run_reference
from .._registry import Coef, Step
from ..bound_coefficients import FIXED, VLB_COLUMNS
from ..noise import PhiloxNoise
from ..reference.bound import prior_kl as _prior_kl
from ._arguments import as_coef, as_table
from ._noise import Noise


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
    """A term of the variational bound: the KL L_t of each sample at t > 0, the decoder's at t = 0.

    (to be written)
    """
    if (x_t is None) == (noise is None):
        raise ValueError("vlb_term wants x_t or noise, and not both")
    learned = variance_output is not None
    table = as_table("coefficients", coefficients, len(VLB_COLUMNS) if learned else FIXED)
    inputs: tuple[Tensor, ...] = (x0, model_output)
    if variance_output is not None:
        inputs = (*inputs, variance_output)
    kernel: Kernel = k.VLB_TERM[learned]
    recipe = None
    given = x_t if noise is None else noise
    if isinstance(given, PhiloxNoise):
        assert kernel.drawn is not None
        kernel, recipe = kernel.drawn, given._parts
    else:
        assert given is not None
        inputs = (*inputs, given)
    coefs = (as_coef("scale", scale, None), table)
    found: Tensor = run_reference(kernel, inputs, coefs, t, False, None, recipe)
    return found


def prior_kl(x0: Tensor, alpha: Coef, sigma: Coef) -> Tensor:
    """L_T of each sample."""
    from ..bound_coefficients import prior_coefficients

    factor, offset = prior_coefficients(float(alpha), float(sigma))
    n = x0[0].numel()
    return _prior_kl(x0, factor, offset * n)
