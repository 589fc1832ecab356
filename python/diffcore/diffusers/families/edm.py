"""EDMEulerScheduler: Euler's method for a network with EDM's preconditioning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from torch import Tensor

from diffcore.diffusers.families.euler import Churn, Churned, churned_table, raised_sigmas
from diffcore.diffusers.families.sigmas import ends_of, prediction_among, ve_levels
from diffcore.diffusers.scheduler import Choice
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable, edm_euler_table


class FusedEDMEuler(Churned):
    """x' = x + (sigma' - sigma) (x - x0) / sigma, x0 = c_skip x + c_out F. As ``FusedEuler``."""

    stock = EDMEulerScheduler
    output_class = EDMEulerSchedulerOutput

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:
        """See ``FusedScheduler.make_table``; options: those of the churn, and ``given_x0``."""
        options = dict(choice.options)
        given = options.pop("given_x0", False)
        churn, std = Churn(**options), float(scheduler.config.sigma_data)
        prediction = prediction_among(scheduler, ("epsilon", "v_prediction"))
        if choice.rules == "exact":
            levels = replace(ve_levels(scheduler, std, choice.start), preconditioned=True)
            return edm_euler_table(
                levels, **churn._asdict(), prediction_type="sample" if given else prediction
            )
        sigma, after = ends_of(scheduler, choice.start)
        raised = raised_sigmas(scheduler, sigma, churn)
        variance = raised**2 + std**2
        c_skip, c_out = std**2 / variance, raised * std * variance.rsqrt()
        if prediction == "v_prediction":
            c_out = -c_out
        if given:
            c_skip, c_out = torch.zeros_like(sigma), torch.ones_like(sigma)
        return churned_table(
            "euler",
            scheduler,
            sigma,
            raised,
            after,
            x0=(c_skip, c_out),
            s_noise=churn.s_noise,
            input_std=std,
        )

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
        pred_original_sample: Tensor | None = None,
    ) -> Any:
        """See ``EDMEulerScheduler.step``."""
        taken = None
        if not (
            self._refuses(timestep)
            or self._refuses_churn(s_churn)
            or self._refuses_x0(pred_original_sample, model_output)
        ):
            given = pred_original_sample is not None
            taken = self._take(
                model_output if pred_original_sample is None else pred_original_sample,
                timestep,
                sample,
                generator=generator,
                return_dict=return_dict,
                s_churn=s_churn,
                s_tmin=s_tmin,
                s_tmax=s_tmax,
                s_noise=s_noise,
                given_x0=given,
            )
        if taken is not None:
            return taken
        churn = s_churn, s_tmin, s_tmax, s_noise
        return super().step(  # type: ignore[misc]
            model_output, timestep, sample, *churn, generator, return_dict, pred_original_sample
        )

    def _input_std(self) -> float:
        return float(self.config.sigma_data)

    def _refuses_x0(self, given: Tensor | None, model_output: Tensor) -> bool:
        """Whether a given x0 is of another kind than the output, whose dtype the result has.

        Args:
            given: x0, or ``None``.
            model_output: As for ``step``.
        """
        if given is None or (given.dtype, given.shape) == (model_output.dtype, model_output.shape):
            return False
        self._count(Unsupported("pred_original_sample of another dtype or shape"))
        return True
