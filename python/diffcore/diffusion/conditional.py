"""Steps of GaussianDiffusion that a classifier guides: ``cond_fn``, as in guided-diffusion."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffcore import ops
from diffcore._types import CondFn
from diffcore.diffusion.tables import DeviceCopies, DiffusionTables
from diffcore.guidance import Guidance
from diffcore.sampling.classifier import Classifier, check_cond_fn, gradient_of
from diffcore.sampling.model import Prediction
from diffcore.solvers.table import Row

# ``ops.reverse_step`` as x + exp(s_0 + s_v v) noise, with the gradient for the noise.
_SUM = (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, -math.inf, math.inf)


def gradient(
    tables: DiffusionTables,
    cond_fn: CondFn,
    x: Tensor,
    t: Tensor,
    model_kwargs: Mapping[str, Any] | None,
) -> Tensor:
    """What ``cond_fn`` returns for x_t and the timestep input of the model, checked."""
    check_cond_fn(cond_fn)
    return gradient_of(cond_fn, x, tables.model_timesteps(t), model_kwargs)


def added(x: Tensor, gradient: Tensor, shift: DeviceCopies, t: Tensor | int) -> Tensor:
    """``x`` plus a multiple of the gradient, in one launch.

    Args:
        x: ``[B, ...]``.
        gradient: Like ``x``.
        shift: A table ``[T, 2]`` of the factors of both.
        t: Timesteps, integer ``[B]`` or an int: rows of the table.

    Returns:
        Like ``x``.
    """
    found: Tensor = ops.linear_combination(x, gradient, shift[x.device], t=t)
    return found


def p_sample(
    tables: DiffusionTables, x: Tensor, gradient: Tensor, variance: Tensor | None, t: Tensor | int
) -> Tensor:
    """The result of an ancestral step, moved by variance_t times the gradient.

    Args:
        tables: The diffusion.
        x: x_{t-1} without guidance, ``[B, ...]``.
        gradient: Of log p(y | x_t), like ``x``.
        variance: The variance output, where the variance is learned, else not read.
        t: Timesteps, integer ``[B]`` or an int.

    Returns:
        Like ``x``.
    """
    shift = tables.p_shift()
    if tables.fixed_variance is not None:
        return added(x, gradient, shift, t)
    found: Tensor = ops.reverse_step(
        x,
        x,
        _SUM,
        noise=gradient,
        variance_output=variance,
        variance_coefficients=shift[x.device],
        t=t,
    )
    return found


class OfSteps(Classifier):
    """A ``cond_fn`` that moves the results of the steps of a loop, as guided-diffusion does.

    Args:
        cond_fn: See ``GaussianDiffusion.p_sample``.
        tables: The diffusion at the timesteps of the loop.
        eta: Of DDIM; ``None`` for ancestral sampling.
    """

    def __init__(self, cond_fn: CondFn, tables: DiffusionTables, eta: float | None) -> None:
        super().__init__(cond_fn)
        self.tables, self.eta = tables, eta

    def of_prediction(
        self, row: Row, gradient: Tensor, prediction: Prediction, rule: Guidance | None
    ) -> tuple[Prediction, Guidance | None]:
        """The prediction itself: x_0 is clipped before the gradient is added."""
        del row, gradient
        return prediction, rule

    def of_result(self, i: int, x: Tensor, gradient: Tensor, variance: Tensor | None) -> Tensor:
        """The result of row i, moved; see ``Classifier``."""
        t = len(self.tables) - 1 - i
        if self.eta is None:
            return p_sample(self.tables, x, gradient, variance, t)
        return added(x, gradient, self.tables.ddim_shift(self.eta), t)


def in_loop(
    cond_fn: CondFn | None,
    tables: DiffusionTables,
    rows: tuple[int, ...] | None,
    eta: float | None,
) -> dict[str, Classifier]:
    """The argument of ``run_table`` for a ``cond_fn``, if there is one.

    Args:
        cond_fn: See ``GaussianDiffusion.p_sample``, or ``None``.
        tables: The diffusion.
        rows: The timesteps of the loop; ``None`` for all.
        eta: Of DDIM; ``None`` for ancestral sampling.

    Returns:
        ``classifier``, or nothing.
    """
    if cond_fn is None:
        return {}
    return {"classifier": OfSteps(cond_fn, tables.spaced(rows), eta)}
