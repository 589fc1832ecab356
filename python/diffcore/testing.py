"""The error bound that diffcore holds itself to, for its own tests and for yours.

A result may be no further from the truth than twice what plain PyTorch is in the same dtype, plus
one unit in the last place (ulp)::

    |actual - truth| <= 2 max |eager - truth| + ulp(truth)

``eager`` is the formula as one would write it in PyTorch, in the dtype under test; ``truth`` is the
same formula on the same input values in float64 (or in numpy's longdouble, which judging float64
results takes). No tolerance is picked by hand, and none hides a formula that is almost right.

Keep inputs of one scale in one call: the largest error of ``eager`` serves all elements, so a few
huge results would excuse errors in small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = [
    "FACTOR",
    "assert_op_within_bound",
    "assert_within_bound",
    "error_bound",
    "gradients_of",
    "ulp",
]

FACTOR = 2.0
"""How many times eager's largest error a result may be off."""

Extended = NDArray[np.longdouble]


def ulp(truth: Tensor | Extended, dtype: torch.dtype) -> Extended:
    """The distance between neighbouring numbers of ``dtype`` at each value of ``truth``.

    ``2^floor(log2 |truth|) · eps``, and the smallest subnormal near zero; nan where ``truth`` is
    not finite.

    Args:
        truth: Values, any shape.
        dtype: A floating-point dtype.

    Returns:
        A longdouble array in the shape of ``truth``.
    """
    values = _extended(truth)
    limits = torch.finfo(dtype)
    smallest = np.longdouble(limits.smallest_normal) * np.longdouble(limits.eps)
    _, exponent = np.frexp(values)
    spacing = np.ldexp(np.longdouble(limits.eps), exponent - 1)
    return np.where(np.isfinite(values), np.maximum(spacing, smallest), np.longdouble(np.nan))


def error_bound(
    eager: Tensor, truth: Tensor | Extended, dtype: torch.dtype | None = None
) -> Extended:
    """How far each element of a result may be from the truth: ``2 max |eager - truth| + ulp``.

    Args:
        eager: What plain PyTorch gives.
        truth: The same in float64 or longdouble, in the same shape.
        dtype: The dtype of the result, whose ulp counts; that of ``eager`` when None.

    Returns:
        A longdouble array in the shape of ``truth``. Elements that are not finite on either side do
        not count as errors of ``eager``.
    """
    exact = _extended(truth)
    error = _distance(_extended(eager), exact)
    finite = error[np.isfinite(error)]
    worst = finite.max() if finite.size else np.longdouble(0)
    return FACTOR * worst + ulp(exact, dtype or eager.dtype)


def assert_within_bound(
    actual: Tensor, eager: Tensor, truth: Tensor | Extended, *, name: str = "result"
) -> None:
    """Fails unless a result is within twice eager's largest error plus one ulp of the truth.

    Where the truth is infinite, nan, or beyond the range of the dtype, the result has to be the
    same infinity or nan, or else what eager gives.

    Args:
        actual: The result to judge.
        eager: What plain PyTorch gives for the same inputs in the same dtype.
        truth: The same in float64, or in longdouble where ``actual`` is float64.
        name: What to call the result in the message.

    Raises:
        AssertionError: Says which element is worst, and by how much.
    """
    exact = _extended(truth)
    if not tuple(actual.shape) == tuple(eager.shape) == exact.shape:
        raise AssertionError(
            f"{name} has shape {tuple(actual.shape)}, "
            f"eager {tuple(eager.shape)}, truth {exact.shape}"
        )
    got, plain = _extended(actual), _extended(eager)
    bound = error_bound(eager, exact, actual.dtype)
    with np.errstate(over="ignore"):
        rounded = torch.from_numpy(np.atleast_1d(exact.astype(np.float64))).to(actual.dtype)
    expected = _extended(rounded).reshape(exact.shape)

    regular = np.isfinite(expected) & np.isfinite(got)
    error = _distance(got, exact)
    same_special = _same(got, expected) | _same(got, plain)
    good = np.where(regular, error <= bound, same_special)
    if good.all():
        return
    excess = np.where(regular, error / bound, np.where(same_special, 0, np.inf))
    excess[good] = 0
    where = np.unravel_index(int(np.argmax(excess)), exact.shape)
    at = f" at {tuple(int(i) for i in where)}" if exact.shape else ""
    raise AssertionError(
        f"{name} ({actual.dtype}): {int((~good).sum())} of {good.size} elements are beyond the "
        f"bound. Worst{at}: got {got[where]:.9g}, truth {exact[where]:.9g}, "
        f"eager {plain[where]:.9g}; off by {error[where]:.3g}, allowed {bound[where]:.3g} "
        f"({FACTOR:g} × eager's largest error + 1 ulp)"
    )


def assert_op_within_bound(
    op: Callable[..., Any], eager: Callable[..., Any], *tensors: Tensor, gradients: bool = True
) -> None:
    """Fails unless an op, and its gradients, are within the bound of a plain-PyTorch formula.

    The truth is ``eager`` on the same values in float64, so the tensors should be of a lower dtype.

    Args:
        op: The op to judge: tensors in, a tensor or a tuple of tensors out.
        eager: The same formula in plain PyTorch.
        *tensors: the inputs, float32, bfloat16 or float16.
        gradients: Whether to compare the gradients in every input too, for a random upstream.

    Raises:
        AssertionError: Which output or gradient is off, where, and by how much.

    Example:
        >>> import torch
        >>> from diffcore import ops, testing
        >>> x0, noise = torch.randn(2, 4, 32)
        >>> testing.assert_op_within_bound(
        ...     lambda x, e: ops.add_noise(x, e, 0.8, 0.6),
        ...     lambda x, e: 0.8 * x + 0.6 * e,
        ...     x0,
        ...     noise,
        ... )
    """
    wide = [x.double() for x in tensors]
    actual, plain, truth = (
        _tuple(f(*x)) for f, x in ((op, tensors), (eager, tensors), (eager, wide))
    )
    for i, (a, e, t) in enumerate(zip(actual, plain, truth, strict=True)):
        assert_within_bound(a, e, t, name=f"output {i}")
    if not gradients:
        return
    upstream = [torch.randn_like(t) for t in truth]
    got = gradients_of(op, tensors, upstream)
    by_eager, exact = gradients_of(eager, tensors, upstream), gradients_of(eager, wide, upstream)
    for i, (a, e, t) in enumerate(zip(got, by_eager, exact, strict=True)):
        assert_within_bound(a, e, t, name=f"gradient of input {i}")


def gradients_of(
    op: Callable[..., Any], tensors: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """The gradients in every tensor, for given gradients of the outputs.

    Args:
        op: Tensors in, a tensor or a tuple of tensors out.
        tensors: The inputs.
        upstream: One gradient an output; cast to its dtype.

    Returns:
        One gradient an input, zeros where an input has no influence.
    """
    leaves = [x.detach().requires_grad_() for x in tensors]
    outputs = _tuple(op(*leaves))
    found = torch.autograd.grad(
        outputs,
        leaves,
        [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)],
        allow_unused=True,
    )
    return tuple(
        torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)
    )


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _extended(x: Tensor | Extended) -> Extended:
    if isinstance(x, Tensor):
        x = x.detach().cpu().double().numpy()
    return np.asarray(x, dtype=np.longdouble)


def _distance(a: Extended, b: Extended) -> Extended:
    with np.errstate(invalid="ignore"):
        distance: Extended = np.abs(a - b)
    return distance


def _same(a: Extended, b: Extended) -> NDArray[np.bool_]:
    same: NDArray[np.bool_] = (a == b) | (np.isnan(a) & np.isnan(b))
    return same
