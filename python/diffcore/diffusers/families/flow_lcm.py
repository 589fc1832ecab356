"""FlowMatchLCMScheduler: steps of a distilled flow, x_0 with new noise."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMSchedulerOutput
from torch import Tensor

from diffcore.diffusers.families.flow import NoisingFlow, renoised_flow
from diffcore.diffusers.families.schedule import Stateless
from diffcore.diffusers.scheduler import Call, Choice, Place
from diffcore.diffusers.walk import Unsupported
from diffcore.solvers import SolverTable


class FusedFlowMatchLCM(Stateless, NoisingFlow):
    """x' = (1 - sigma') x0 + sigma' z with x0 = x - sigma m. Luo et al. 2023 (2310.04378)."""

    stock = FlowMatchLCMScheduler
    refuses_integers = True
    output_class = FlowMatchLCMSchedulerOutput

    _scale_factors: Any
    _upscale_mode: Any

    @classmethod
    def make_table(cls, scheduler: Any, choice: Choice) -> SolverTable:  # noqa: ARG003
        """See ``FusedScheduler.make_table``; there are no options, and the two rules agree."""
        _refuse_scales(scheduler)
        return renoised_flow("flow_lcm", scheduler)

    def _draws(self, place: Place) -> bool:
        return True

    def _drawn_in(self, sample: Tensor, output: Tensor) -> torch.dtype:
        return torch.promote_types(torch.float32, output.dtype)

    def _refuse(self, call: Call) -> None:
        _refuse_scales(self)  # which may be set after the table was made


def _refuse_scales(scheduler: Any) -> None:
    if scheduler._scale_factors and scheduler._upscale_mode:
        factors = scheduler._scale_factors
        raise Unsupported(f"scale_factors={factors}, by which the samples change their size")
