"""What the solvers share whose steps read the ones before: DPM-Solver, UniPC, DEIS, SA-Solver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from diffcore.diffusers.families.schedule import prediction_of
from diffcore.diffusers.families.sigmas import BySigma
from diffcore.diffusers.rows import float64, with_column
from diffcore.diffusers.walk import Unsupported, Walk
from diffcore.solvers import NoiseLevels, SolverTable
from diffcore.solvers.paths import TimeOf

MANY_STEPS = 15
"""With at least this many steps, ``lower_order_final`` lowers no order in diffusers."""

_LEARNED = ("learned", "learned_range")
_LEARNED_CHANNELS = 3  # of RGB images, which is what diffusers takes before a learned variance
# Two levels that diffusers computes in two ways, and that are one level.
_SAME = 4 * torch.finfo(torch.float32).eps
_ALMOST = 1e-12


class Multistep(BySigma):
    """A solver with history, on the levels of ``sigmas``: a variance preserving path, or a flow."""

    output_class = SchedulerOutput
    casts_to_model = False

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma noise at the held sigmas, in one launch, not rounded before.

        The held sigmas are sigma / alpha; those of ``use_flow_sigmas`` are sigma = 1 - alpha.
        """
        try:
            return self._noised(
                original_samples,
                noise,
                timesteps,
                lambda held: self._level(held)[0],
                lambda held: self._level(held)[1],
            )
        except Unsupported as reason:  # a timestep that diffusers takes for the last one
            self._fusion.fallbacks[f"add_noise: {reason}"] += 1
            noised: Tensor = super(BySigma, self).add_noise(  # type: ignore[misc]
                original_samples, noise, timesteps
            )
            return noised

    def _level(self, held: float) -> tuple[float, float]:
        """(alpha, sigma) of a held sigma."""
        if self.config.get("use_flow_sigmas"):
            return 1 - held, held
        size = math.hypot(held, 1)
        return 1 / size, held / size

    def _table(self, walk: Walk, start: int, options: Mapping[str, Any]) -> SolverTable:
        if walk.left is not None:
            raise Unsupported(walk.left)
        return super()._table(walk, start, options)

    def _count(self, reason: Exception) -> None:
        """A walk that has begun with stock steps goes on with them: they keep the history."""
        super()._count(reason)
        self._walk().left = str(reason)

    def _is_prediction(self, table: SolverTable) -> bool:
        return super()._is_prediction(table) and not learns_variance(self.config)

    def _split(
        self,
        table: SolverTable,
        model_output: Tensor,
        sample: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """The prediction alone: no solver of this family reads a learned variance."""
        if learns_variance(self.config):
            return model_output[:, :_LEARNED_CHANNELS], None
        return super()._split(table, model_output, sample)


def learns_variance(config: Any) -> bool:
    """Whether diffusers takes the first three channels of the model's output."""
    return config.get("variance_type") in _LEARNED and config.prediction_type == "epsilon"


def held_from(scheduler: Any, start: int) -> tuple[Tensor, Tensor]:
    """The timesteps of a scheduler from a row on, and its sigmas there and at the end.

    Args:
        scheduler: With ``sigmas`` and ``timesteps`` set.
        start: The first row; the order of a multistep solver grows from there.

    Returns:
        Timesteps ``[N]`` and sigmas ``[N + 1]``, float64, on the CPU.

    Raises:
        Unsupported: No timesteps are set, or no such row.
    """
    if scheduler.num_inference_steps is None:
        raise Unsupported("a step before set_timesteps")
    if not 0 <= start < len(scheduler.timesteps):
        raise Unsupported(f"step {start} of {len(scheduler.timesteps)}")
    times = scheduler.timesteps.detach().to("cpu")[start:]
    held = float64(scheduler.sigmas)[start : start + len(times) + 1].clone()
    if abs(held[-1] - held[-2]) <= _SAME * held[-2]:
        # The step to it moves nothing. Levels that rise must do so in each step, so it does, a bit.
        held[-1] = held[-2] * (1 + _ALMOST if held[0] < held[-2] else 1)
    return times, held


def levels_from(scheduler: Any, start: int) -> NoiseLevels:
    """The levels of a scheduler from a row on: variance preserving, or of ``use_flow_sigmas``.

    Args:
        scheduler: With ``sigmas`` and ``timesteps`` set.
        start: The first row.

    Returns:
        The levels, as many as there are timesteps left, and one more.

    Raises:
        Unsupported: No timesteps are set, or no such row.
    """
    times, held = held_from(scheduler, start)
    flow = bool(scheduler.config.get("use_flow_sigmas"))
    if flow:
        alpha, sigma = 1 - held, held
    else:
        alpha = (held * held + 1).rsqrt()
        sigma = held * alpha
    ratios, known = (sigma / alpha)[:-1], times
    if held[0] > held[-1]:
        ratios, known = ratios.flip(0), known.flip(0)
    return NoiseLevels(alpha, sigma, times, "flow" if flow else "vp", TimeOf(ratios, known))


def as_diffusers_predicts(
    scheduler: Any, table: SolverTable, levels: NoiseLevels, *, of_noise: bool = False
) -> SolverTable:
    """The table with diffusers' x_0, where it takes a prediction of another path as it is.

    A velocity v in a flow has x_0 = alpha x - sigma v in diffusers, although alpha^2 + sigma^2 is
    not 1 there, and that of a flow on a variance preserving path x_0 = x - (sigma / alpha) v.

    Args:
        scheduler: The scheduler.
        table: Its table by our rules, which reads the model's output through x_0 alone.
        levels: Those of the table.
        of_noise: Whether diffusers takes epsilon = alpha v + sigma x first.

    Returns:
        The table.

    Raises:
        Unsupported: Levels that rise, where our rows read the model's output itself.
    """
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    prediction, flow = prediction_of(scheduler.config), levels.path == "flow"
    if prediction == "v_prediction" and flow:
        a_x, a_m = (1 - sigma * sigma) / alpha if of_noise else alpha, -sigma
    elif prediction == "flow_prediction" and not flow:
        a_x, a_m = torch.ones_like(alpha), -sigma / alpha
    else:
        return table
    if levels.rising:
        raise Unsupported(f"prediction_type={prediction!r} with levels that rise")
    return with_column(with_column(table, "a_x", a_x), "a_m", a_m)
