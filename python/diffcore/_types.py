"""The types that several families share, each named once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Tensors: TypeAlias = tuple[Tensor, ...]

Coef: TypeAlias = float | Tensor
"""A number, 0-dim, ``[B]``, or a table ``[T]`` or ``[T, k]`` of which a step selects a row."""

Coefs: TypeAlias = tuple[Coef, ...]

Step: TypeAlias = int | Tensor | None
"""The row of a table: one for all samples, ``[B]``, a one-element counter, or no table."""


class StepColumns(NamedTuple):
    """The coefficients of a step by name: the columns of a solver table, see ``ops.reverse_step``.

    The last six are 0 in a step that neither reads nor returns history.
    """

    c_x: Coef
    c_m: Coef
    c_0: Coef
    c_z: Coef
    a_x: Coef
    a_m: Coef
    clip_min: Coef
    clip_max: Coef
    e_x: Coef = 0.0
    e_m: Coef = 0.0
    e_0: Coef = 0.0
    c_1: Coef = 0.0
    c_2: Coef = 0.0
    c_3: Coef = 0.0


class VlbColumns(NamedTuple):
    """The coefficients of a term of the bound by name, see ``coefficients.bound``.

    The last three are for a learned variance.
    """

    b_0: Coef
    b_g: Coef
    b_m: Coef
    b_0_low: Coef
    b_g_low: Coef
    b_m_low: Coef
    clip_min: Coef
    clip_max: Coef
    decoder: Coef
    factor: Coef
    offset: Coef
    d_0: Coef
    d_low: Coef = 0.0
    d_v: Coef = 0.0
    kl: Coef = 0.0


NoiseParts: TypeAlias = tuple[int | Tensor, int | Tensor, int | Tensor, int]
"""What a kernel generates noise from: seed, sample ids, stream, first element.

For rows of groups (``ops._groups``) the first element is a tensor, one for each row.
"""

Row: TypeAlias = Tensor | tuple[float, ...]
"""The coefficients of a step: a table, or the numbers of one row."""

ClipRange: TypeAlias = float | tuple[float, float] | None
"""Bounds of x_0: ``c`` for [-c, c], ``(low, high)``, or none."""

Model: TypeAlias = Callable[..., Tensor]
"""``model(x, t, **model_kwargs)``."""

Callback: TypeAlias = Callable[[dict[str, Any]], Tensor | None]
"""Called once a step, after it, with a read-only dict of its state; may return another x."""

CondFn: TypeAlias = Callable[..., Tensor]
"""``cond_fn(x, t, **model_kwargs)``: the gradient of log p(y | x) by x."""

BeforeModel: TypeAlias = Callable[[dict[str, Any]], Tensor | None]
"""Called once a step, before its model call, with a read-only dict; may return another x."""
