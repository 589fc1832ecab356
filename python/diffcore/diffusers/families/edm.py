"""EDMEulerScheduler: Euler's method for a network with EDM's preconditioning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import EDMEulerScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput

from diffcore.diffusers.families.euler import Churn, Churned, churned_table, raised_sigmas
from diffcore.diffusers.families.sigmas import ends_of, prediction_among, ve_levels
from diffcore.diffusers.scheduler import Call, Choice
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

    def _input_std(self) -> float:
        return float(self.config.sigma_data)

    def _step(self, call: Call) -> Any:
        options = {name: getattr(call, name) for name in self.options}
        x0, output = call.pred_original_sample, call.model_output
        if x0 is None:
            return self._take(call, {**options, "given_x0": False})
        if (x0.dtype, x0.shape) != (output.dtype, output.shape):  # the result has the output's
            self._count(Unsupported("pred_original_sample of another dtype or shape"))
            return None
        return self._take(call._replace(model_output=x0), {**options, "given_x0": True})
