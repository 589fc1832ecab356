"""The noise levels of a flow-matching model, for every solver table, and tables in its own x."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from diffcore.flows.convention import Convention
from diffcore.schedules.tensors import as_float64
from diffcore.solvers import NoiseLevels, SolverTable
from diffcore.solvers.levels import Level
from diffcore.solvers.table import COLUMNS


class TimeOfRatio:
    """The timestep input at a value of beta / alpha.

    Args:
        convention: That of the model.
    """

    def __init__(self, convention: Convention) -> None:
        self._convention = convention

    def __call__(self, ratio: float) -> float:
        """``scale * t``."""
        means = self._convention
        signal = 1 / (ratio + 1 - means.sigma_min) if math.isfinite(ratio) else 0.0
        return means.scale * means.turned(1 - signal)


_FLOW = Convention(1, 1.0, 0.0, 1000.0)


@dataclass(frozen=True, eq=False)
class FlowLevels(NoiseLevels):
    """Noise levels that know the direction and the sign of a flow-matching model.

    The path of a rectified flow, alpha + sigma = 1. With sigma_min > 0 the x of the model divided
    by the sum of its two coefficients lies on it, and ``input_scale`` is that sum.

    Args:
        convention: That of the model.
    """

    convention: Convention = _FLOW

    @classmethod
    def of(
        cls, convention: Convention, sigmas: Tensor, timesteps: Tensor | Sequence[float] | None
    ) -> FlowLevels:
        """The levels at some values of sigma.

        Args:
            convention: That of the model.
            sigmas: float64 ``[N + 1]``, in [0, 1], falling or rising.
            timesteps: Other timestep inputs ``[N]``, or ``None``.
        """
        signal, noise = 1 - sigmas, convention.noise(sigmas)
        total = signal + noise if convention.sigma_min else 1
        levels = cls(
            signal / total,
            noise / total,
            convention.scale * convention.turned(sigmas)[:-1],
            "flow",
            TimeOfRatio(convention),
            convention=convention,
        )
        return levels if timesteps is None else cast(FlowLevels, levels.with_timesteps(timesteps))

    def x0(self, level: Level, prediction_type: str) -> tuple[float, float]:
        """(a_x, a_m) with x_0 = a_x x + a_m m, for the model output m at the scaled x."""
        self._check(prediction_type)
        scale = level.input_scale
        a_x, a_m = self.convention.x0(1 - level.alpha * scale)
        return a_x * scale, a_m

    def epsilon(self, level: Level, prediction_type: str) -> tuple[float, float]:
        """(e_x, e_m) with epsilon = e_x x + e_m m, without clipping."""
        self._check(prediction_type)
        scale = level.input_scale
        e_x, e_m = self.convention.epsilon(1 - level.alpha * scale)
        return e_x * scale, e_m

    def x0_columns(self, prediction_type: str) -> tuple[Tensor, Tensor]:
        """``x0`` at all levels but the last, float64 ``[N]`` each."""
        pairs = as_float64([self.x0(level, prediction_type) for level in self.levels()[:-1]])
        return pairs[:, 0], pairs[:, 1]

    def epsilon_columns(self, prediction_type: str) -> tuple[Tensor, Tensor]:
        """``epsilon`` at all levels but the last, float64 ``[N]`` each."""
        pairs = as_float64([self.epsilon(level, prediction_type) for level in self.levels()[:-1]])
        return pairs[:, 0], pairs[:, 1]

    def _scale(self, alpha: float, sigma: float) -> float:
        del sigma
        return 1 / (1 - self.convention.sigma_min * alpha)

    def _check(self, prediction_type: str) -> None:
        if prediction_type != "flow_prediction":
            raise ValueError(
                "prediction_type must be 'flow_prediction' with levels of FlowMatching, whose "
                f"model predicts a velocity, got {prediction_type!r}"
            )


def in_own_units(table: SolverTable, levels: FlowLevels) -> SolverTable:
    """The same steps of the scaled model input itself, so that no row scales it.

    Args:
        table: Made of ``levels``, which fall or rise.
        levels: The levels.

    Returns:
        The table for input_scale * x; what it returns has the coefficients of the model's path.
    """
    here = table.input_scale
    end = levels._scale(table.final_alpha, table.final_sigma)
    after = torch.cat([here[1:], here.new_tensor([end])])
    coefficients = table.coefficients.clone()
    for column, name in enumerate(COLUMNS):
        if name.startswith("c_") and not name.startswith("clip"):
            coefficients[:, column] *= after
        if name in ("c_x", "a_x", "e_x"):
            coefficients[:, column] /= here
    uncond = table.uncond
    if uncond is not None:
        uncond = torch.stack([uncond[:, 0] * after, uncond[:, 1]], dim=1)
    return replace(
        table,
        coefficients=coefficients,
        uncond=uncond,
        alpha=table.alpha * here,
        sigma=table.sigma * here,
        input_scale=torch.ones_like(here),
        final_alpha=table.final_alpha * end,
        final_sigma=table.final_sigma * end,
        rows=(),
    )
