"""SASolverScheduler: stochastic Adams, a predictor and a corrector that share a model call."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import SASolverScheduler
from torch import Tensor

from diffcore import ops
from diffcore.diffusers.families.multistep import (
    Multistep,
    as_diffusers_predicts,
    learns_variance,
    levels_from,
)
from diffcore.diffusers.families.schedule import prediction_of
from diffcore.diffusers.rows import float64, without_x0
from diffcore.diffusers.scheduler import Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable, sa_solver_table


class FusedSASolver(Multistep):
    """Adams-Bashforth and -Moulton with noise of strength tau. Xue et al. 2023 (arXiv 2309.05019).

    ``tau_func`` is called with every timestep when the table is made, and not in ``step``.
    """

    stock = SASolverScheduler

    alphas_cumprod: Tensor

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; there are no options."""
        config, of_noise = scheduler.config, not scheduler.predict_x0
        exact = choice.rules == "exact"
        if not exact:
            _refuse_undefined(config, of_noise)
        levels = levels_from(scheduler, choice.start)
        times = scheduler.timesteps.detach().to("cpu")[choice.start :]
        table = sa_solver_table(
            levels,
            predictor_order=config.predictor_order,
            corrector_order=config.corrector_order,
            tau=[float(scheduler.tau_func(t)) for t in times],
            predict_x0=not of_noise,
            simple_order_2=True,
            lower_order_final=config.lower_order_final,
            prediction_type=prediction_of(config),
        )
        if exact:
            return table
        table = as_diffusers_predicts(scheduler, table, levels, of_noise=of_noise)
        return without_x0(table) if of_noise else table

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) noise, in one launch.

        diffusers looks t up in the schedule here, and not in the held sigmas.
        """
        signal = float64(self.alphas_cumprod)[timesteps.to("cpu").flatten()]
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        device, shape = original_samples.device, original_samples.shape[:1]
        return ops.add_noise(
            original_samples, noise, *(x.to(device).expand(shape) for x in (alpha, sigma))
        )

    def _draws(self, place: Place) -> bool:
        return True  # also where tau is 0

    def _dtype(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return sample.dtype


def _refuse_undefined(config: Any, of_noise: bool) -> None:
    """Refuse what diffusers raises for.

    Args:
        config: The configuration.
        of_noise: Whether the solver's polynomial is that of epsilon.

    Raises:
        Unsupported: By name.
    """
    if config.corrector_order < 1:
        raise Unsupported(
            f"corrector_order={config.corrector_order}, which diffusers does not have"
        )
    if learns_variance(config):
        raise Unsupported(
            f"variance_type={config.variance_type!r}: diffusers draws noise for the variance's "
            "channels too, and cannot add it"
        )
    for name, value in (("thresholding", True), ("prediction_type", "flow_prediction")):
        if of_noise and config[name] == value:
            raise Unsupported(
                f"{name}={value!r} with algorithm_type='noise_prediction', which diffusers does "
                "not have"
            )
