"""KDPM2DiscreteScheduler and KDPM2AncestralDiscreteScheduler: DPM-Solver-2 over sigma."""

from __future__ import annotations

from typing import Any

from diffusers import KDPM2AncestralDiscreteScheduler, KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import (
    KDPM2AncestralDiscreteSchedulerOutput,
)
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput

from diffcore.diffusers.families.sigmas import prediction_among
from diffcore.diffusers.families.two_calls import TwoCalls, doubled_levels
from diffcore.diffusers.rows import float64
from diffcore.diffusers.scheduler import Choice, Place
from diffcore.solvers import NoiseLevels, SolverTable, dpm2_ancestral_table, dpm2_table
from diffcore.solvers.rows import Rows

_PREDICTIONS = ("epsilon", "v_prediction")


class FusedKDPM2(TwoCalls):
    """x' = x + (sigma' - sigma) d at sqrt(sigma sigma'). Lu et al. 2022 (arXiv 2206.00927)."""

    stock = KDPM2DiscreteScheduler
    output_class = KDPM2DiscreteSchedulerOutput

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        levels = doubled_levels(scheduler, choice.start)
        prediction = prediction_among(scheduler, _PREDICTIONS)
        if choice.rules == "exact":
            return dpm2_table(levels, prediction_type=prediction)
        after = levels.sigma[1:].tolist()
        middle = float64(scheduler.sigmas_interpol)[choice.start + 1 :: 2].tolist()
        return _by_held_sigmas(
            "dpm2", scheduler, choice.start, levels, prediction, middle, after, [0.0] * len(after)
        )


class FusedKDPM2Ancestral(TwoCalls):
    """DPM-Solver-2 to sigma_down, then sigma_up z, as k-diffusion has it."""

    stock = KDPM2AncestralDiscreteScheduler
    output_class = KDPM2AncestralDiscreteSchedulerOutput

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        levels = doubled_levels(scheduler, choice.start)
        prediction = prediction_among(scheduler, _PREDICTIONS)
        if choice.rules == "exact":
            return dpm2_ancestral_table(levels, prediction_type=prediction)
        names = ("sigmas_interpol", "sigmas_down", "sigmas_up")
        held = [float64(getattr(scheduler, name))[choice.start :: 2].tolist() for name in names]
        return _by_held_sigmas("dpm2_ancestral", scheduler, choice.start, levels, prediction, *held)

    def _draws(self, place: Place) -> bool:
        return place.row % 2 == 1  # a walk starts at an even row


def _by_held_sigmas(
    name: str,
    scheduler: Any,
    start: int,
    levels: NoiseLevels,
    prediction: str,
    middle: list[float],
    down: list[float],
    up: list[float],
) -> SolverTable:
    """DPM-Solver-2 between the sigmas that diffusers holds in float32, rounded as they are.

    x_m = x + (sigma_m - sigma) d, and x' = x + (sigma_down - sigma) d_m + sigma_up z; the last step
    is Euler's.

    Args:
        name: Name of the solver.
        scheduler: With its timesteps.
        start: The first step of the walk.
        levels: The sigmas of the even steps.
        prediction: What the model predicts.
        middle: sigma_m of each two steps.
        down: sigma_down.
        up: sigma_up.

    Returns:
        The table.
    """
    times = float64(scheduler.timesteps)[start:].tolist()
    rows = Rows(name, levels, prediction, None)
    *points, _ = levels.levels()
    *before, last = range(len(points))
    for i in before:
        here = points[i]
        at = levels.at(middle[i])._replace(timestep=times[2 * i + 1])
        noise = (here.ratio, points[i + 1].ratio)
        # d is the noise that the model predicts: of x - x0 little is left where sigma is small.
        rows.add(i, here, c_x=1.0, c_eps=at.sigma - here.sigma, e_x=1.0)
        rows.add(i, at, noise, c_1=1.0, c_eps=down[i] - here.sigma, c_z=up[i])
    rows.add(last, points[last], c_0=1.0)
    return rows.table(1 if any(up) else 2)
