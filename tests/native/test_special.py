"""The polynomials of csrc/core/special.h: where their coefficients come from, how far they are off.

Each interpolates, in the nodes of Chebyshev, which is next to the best polynomial there is; it is
found in 40 digits and its coefficients are rounded to double.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mpmath = pytest.importorskip("mpmath")

HEADER = Path(__file__).resolve().parents[2] / "csrc" / "core" / "special.h"
Function = Callable[[Any], Any]


def tail(k: float) -> Function:
    """e^{t²/2} P(Z > t) / u of q, with q = 2 u - 1 and u = k / (t + k)."""

    def f(q: Any) -> Any:
        u = (1 + mpmath.mpf(q)) / 2
        t = k / u - k
        if u < mpmath.mpf(10) ** -4:  # t > 30,000: Mills' ratio, u (k + t) being k
            mills = (1 - 1 / t**2 + 3 / t**4 - 15 / t**6) / mpmath.sqrt(2 * mpmath.pi)
            return mills * (1 + k / t) / k
        return mpmath.exp(t * t / 2) * mpmath.erfc(t / mpmath.sqrt(2)) / 2 / u

    return f


def log(z: Any) -> Any:
    """(2 atanh s - 2 s) / s³, with z = s²."""
    s = mpmath.sqrt(z)
    return 2 * (mpmath.atanh(s) - s) / s**3


def exp(r: Any) -> Any:
    """(e^r - 1 - r) / r²."""
    return mpmath.mpf(1) / 2 if r == 0 else (mpmath.expm1(r) - r) / r**2


def nodes(ends: tuple[Any, Any], count: int) -> list[Any]:
    a, b = (mpmath.mpf(end) for end in ends)
    turns = (mpmath.pi * (2 * k + 1) / (2 * count) for k in range(count))
    return [(a + b) / 2 + (b - a) / 2 * mpmath.cos(turn) for turn in turns]


def interpolating(f: Function, ends: tuple[Any, Any], degree: int) -> list[float]:
    at = nodes(ends, degree + 1)
    powers = mpmath.matrix([[x**k for k in range(degree + 1)] for x in at])
    return [float(c) for c in mpmath.lu_solve(powers, mpmath.matrix([f(x) for x in at]))]


def written(name: str, dtype: str = "double") -> list[float]:
    """The array of that name in the header."""
    text = HEADER.read_text(encoding="utf-8")
    found = re.search(rf"{dtype} {name}\[\] = \{{(.*?)\}}", text, re.DOTALL)
    assert found is not None
    return [float.fromhex(c.strip().removesuffix("f")) for c in found.group(1).split(",")]


def to_float(coefficients: list[float]) -> list[float]:
    return [float(np.float32(c)) for c in coefficients]


@pytest.fixture(autouse=True)
def _forty_digits() -> Any:
    with mpmath.workdps(40):
        yield


@pytest.mark.parametrize(
    ("name", "dtype", "k", "error"),
    [("kTail32", "float", 3.5, 3.2e-8), ("kTail64", "double", 5.0, 1.4e-16)],
)
def test_tail(name: str, dtype: str, k: float, error: float) -> None:
    coefficients, f = written(name, dtype), tail(k)
    wanted = interpolating(f, (-1, 1), len(coefficients) - 1)
    assert coefficients == (to_float(wanted) if dtype == "float" else wanted)
    found = [
        mpmath.polyval(coefficients[::-1], q) / f(q) - 1 for q in [*nodes((-1, 1), 500), 1, -0.9999]
    ]
    assert 0.5 * error < max(map(abs, found)) < error


# 2 s + s³ p(s²) is to be log m to the last place: of 2 s, the part of z p / 2.
@pytest.mark.parametrize(
    ("name", "dtype", "error"), [("kLog32", "float", 2.8e-9), ("kLog64", "double", 5e-18)]
)
def test_log(name: str, dtype: str, error: float) -> None:
    s = (mpmath.sqrt(2) - 1) / (mpmath.sqrt(2) + 1)
    ends = (0, s * s)
    coefficients = written(name, dtype)
    wanted = interpolating(log, ends, len(coefficients) - 1)
    assert coefficients == (to_float(wanted) if dtype == "float" else wanted)
    found = [z / 2 * (mpmath.polyval(coefficients[::-1], z) - log(z)) for z in nodes(ends, 500)]
    assert max(map(abs, found)) < error


def test_exp() -> None:
    half = mpmath.log(2) / 2
    coefficients = written("kExp32")
    assert coefficients == interpolating(exp, (-half, half), len(coefficients) - 1)
    at = nodes((-half, half), 500)
    found = [r * r * (mpmath.polyval(coefficients[::-1], r) - exp(r)) for r in at]
    assert max(map(abs, found)) < 6e-14
