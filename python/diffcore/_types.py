"""The types that several families share, each named once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

if TYPE_CHECKING:
    from diffcore.noise import PhiloxNoise
    from diffcore.solvers.levels import NoiseLevels

Tensors: TypeAlias = tuple[Tensor, ...]

Coef: TypeAlias = float | Tensor
"""A number, 0-dim, ``[B]``, or a table ``[T]`` or ``[T, k]`` of which a step selects a row."""

Coefs: TypeAlias = tuple[Coef, ...]

Step: TypeAlias = int | Tensor | None
"""The row of a table: one for all samples, ``[B]``, a one-element counter, or no table."""

NoiseParts: TypeAlias = tuple[int | Tensor, int | Tensor, int | Tensor, int]
"""What a kernel generates noise from: seed, sample ids, stream, first element."""

Noise: TypeAlias = "Tensor | PhiloxNoise"
StepNoise: TypeAlias = "Tensor | PhiloxNoise | Callable[[int, Tensor], Tensor | PhiloxNoise]"
"""The noise of each step: ``[S, B, ...]``, a key read at one stream per step, or a function."""

Row: TypeAlias = Tensor | tuple[float, ...]
"""The coefficients of a step: a table, or the numbers of one row."""

ClipRange: TypeAlias = float | tuple[float, float] | None
"""Bounds of x_0: ``c`` for [-c, c], ``(low, high)``, or none."""

Levels: TypeAlias = "NoiseLevels | Tensor | Sequence[float]"
"""Where a solver steps: noise levels, or sigmas of a variance exploding process."""

Model: TypeAlias = Callable[..., Tensor]
"""``model(x, t, **model_kwargs)``."""

Callback: TypeAlias = Callable[[dict[str, Any]], object]
"""Called once a step, before it, with a dict of its state."""
