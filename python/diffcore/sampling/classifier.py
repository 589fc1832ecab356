"""The gradient of a classifier in a sampling loop: ``cond_fn``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffcore import ops
from diffcore._types import CondFn
from diffcore.coefficients.step import STEP_COLUMNS
from diffcore.guidance import Guidance, Weighted
from diffcore.sampling.model import Prediction
from diffcore.solvers.table import Row


def check_cond_fn(cond_fn: Any) -> None:
    """Refuse what is not a function."""
    if not callable(cond_fn):
        raise TypeError(f"cond_fn must be a function, got {type(cond_fn).__name__}")


def gradient_of(
    cond_fn: CondFn, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
) -> Tensor:
    """Call ``cond_fn`` and check what it returns.

    Args:
        cond_fn: ``cond_fn(x, t, **model_kwargs)``.
        x: What the model gets, ``[B, ...]``.
        t: Timestep input ``[B]``.
        model_kwargs: More arguments of the model.

    Returns:
        The gradient of log p(y | x) by x, like ``x``, in its dtype.

    Raises:
        TypeError: It returned no floating-point tensor.
        ValueError: It returned another shape, or a tensor on another device.
    """
    found = cond_fn(x, t, **(model_kwargs or {}))
    if not isinstance(found, Tensor):
        raise TypeError(f"cond_fn must return a torch.Tensor, got {type(found).__name__}")
    if not found.is_floating_point():
        raise TypeError(f"cond_fn must return a floating-point tensor, got {found.dtype}")
    if found.shape != x.shape:
        fix = "; return the gradient by x, not log p(y | x)" if found.ndim < x.ndim else ""
        raise ValueError(
            f"cond_fn must return the shape of x, {tuple(x.shape)}, got {tuple(found.shape)}{fix}"
        )
    if found.device != x.device:
        raise ValueError(
            f"cond_fn must return the device of x, {x.device}, got a tensor on {found.device}"
        )
    return found.to(x.dtype)


class Classifier:
    """A ``cond_fn`` that moves every prediction of a model: x_0 by sigma² / alpha times it.

    Args:
        cond_fn: See ``diffcore.sample``.

    Raises:
        TypeError: ``cond_fn`` is not a function.
    """

    def __init__(self, cond_fn: CondFn) -> None:
        check_cond_fn(cond_fn)
        self.cond_fn = cond_fn

    def of_prediction(
        self, row: Row, gradient: Tensor, prediction: Prediction, rule: Guidance | None
    ) -> tuple[Prediction, Guidance | None]:
        """The prediction that a step reads, and its rule.

        Args:
            row: The row of the table.
            gradient: What ``gradient_of`` returned for the scaled model input.
            prediction: What the model returned.
            rule: The rule at this row, or ``None``.

        Returns:
            ``m + k gradient`` for the (guided) prediction m, in one launch; m_u is kept for a table
            that reads it, with the rule m = m_c.
        """
        output, uncond, variance = prediction
        a_m = row.coefficients[_A_M]
        # At alpha = 0, x holds nothing of x_0: the gradient is 0, and k would be infinite.
        k = row.input_scale * row.sigma**2 / (row.alpha * a_m) if row.alpha else 0.0
        if rule is None or uncond is None:
            moved = ops.linear_combination(output, gradient, (1.0, k))
            return (moved, None, variance), None
        moved = ops.reverse_step(
            gradient,
            output,
            (k, 1.0, *_NOTHING),
            model_output_uncond=uncond,
            guidance=Weighted(*rule.numbers(output, uncond)),
        )
        if row.uncond is None:
            return (moved, None, variance), None
        return (moved, uncond, variance), Weighted(1.0, 0.0)

    def of_result(self, i: int, x: Tensor, gradient: Tensor, variance: Tensor | None) -> Tensor:
        """The samples after row i.

        Args:
            i: The row.
            x: What the step returned.
            gradient: As for ``of_prediction``.
            variance: The predicted variance, or ``None``.

        Returns:
            ``x`` itself: the prediction has been moved.
        """
        del i, gradient, variance
        return x


_A_M = STEP_COLUMNS.index("a_m")
# The columns after c_x and c_m of a step that is their sum: x_0 and noise are not read.
_NOTHING = (0.0, 0.0, 0.0, 0.0, -float("inf"), float("inf"))
