"""Exponential integrators: weights of x0 as a polynomial in lambda, integrated exactly.

In lambda = log(alpha / sigma) the probability flow is x' = (sigma' / sigma) x + alpha' integral of
exp(lambda - lambda') x0 from lambda to lambda'. With noise of strength eta the exponent is (1 +
eta) times that. On v = (lambda - lambda_here) / h, h the step, and H = (1 + eta) h, a solver's
weights are the integrals H int_0^1 exp(-H (1 - v)) p(v) dv of the polynomial p through the x0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

# Terms of the series of phi for |z| <= 1; 1 / 20! is below the rounding error.
_TERMS = 20


def phi(k: int, z: float) -> float:
    """phi_k(z) = sum of z^j / (j + k)!: phi_0 = exp, phi_k = (phi_{k-1} - 1 / (k-1)!) / z.

    Args:
        k: >= 0.
        z: Finite.

    Returns:
        The value, without cancellation for small z.
    """
    if k == 0:
        return math.exp(z)
    if abs(z) <= 1:
        total = 0.0
        for j in range(_TERMS, -1, -1):
            total = total * z + 1 / math.factorial(j + k)
        return total
    value = math.expm1(z) / z
    for i in range(1, k):
        value = (value - 1 / math.factorial(i)) / z
    return value


def first_order_weight(big_h: float) -> float:
    """H int_0^1 exp(-H (1 - v)) dv = 1 - exp(-H); 1 for an infinite step.

    Args:
        big_h: H.

    Returns:
        The weight of a constant x0.
    """
    return -math.expm1(-big_h)


def interpolating_weights(nodes: Sequence[float], big_h: float) -> list[float]:
    """Weights of the values at ``nodes`` in the integral of the polynomial through them.

    Args:
        nodes: Distinct v: 0 for the current level, negative for earlier ones, 1 for the end of the
            step.
        big_h: H, finite.

    Returns:
        One weight for each node; they sum to ``first_order_weight``.
    """
    moments = [big_h * math.factorial(k) * phi(k + 1, -big_h) for k in range(len(nodes))]
    weights = []
    for j, own in enumerate(nodes):
        polynomial = [1.0]  # coefficients of the Lagrange polynomial, the constant first
        for k, other in enumerate(nodes):
            if k != j:
                gap = own - other
                raised = [0.0, *polynomial]
                lowered = [*polynomial, 0.0]
                polynomial = [(r - other * p) / gap for r, p in zip(raised, lowered, strict=True)]
        weights.append(math.fsum(c * m for c, m in zip(polynomial, moments, strict=True)))
    return weights


def last_finite(lambdas: Sequence[float], i: int, count: int) -> int:
    """How many of the ``count`` levels i, i-1, ... a polynomial may go through.

    Args:
        lambdas: lambda of all levels.
        i: Index of the current level.
        count: Number of levels asked for, the current one included.

    Returns:
        At most ``count``, at least 1: the levels before one at lambda = -infinity.
    """
    used = 1
    while used < min(count, i + 1) and math.isfinite(lambdas[i - used]):
        used += 1
    return used
