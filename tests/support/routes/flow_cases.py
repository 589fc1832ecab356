"""FlowMatching."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffcore import FlowMatching, solvers
from support.routes.case import Case
from support.routes.method_cases import Given, model
from support.routes.op_cases import KEY

FLOW = partial(
    FlowMatching.ot_cfm, 0.1, timestep_density="logit_normal", weighting="cosmap", shift=2.0
)


def _times(batch: int) -> Given:
    return {"t": torch.linspace(0.1, 0.9, batch, dtype=torch.float64)}


def _drawn(flow: FlowMatching, x: Tensor) -> Tensor:
    return flow.sample_timesteps(len(x), KEY, dtype=x.dtype, device=x.device)


def _case(
    name: str,
    call: Callable[[Any, Given], Any],
    differentiable: str,
    tensors: str = "x weight",
    *,
    suffix: str = "",
    drawn: bool = False,
) -> Case:
    return Case(
        f"FlowMatching.{name}{suffix}",
        f"FlowMatching.{name}",
        "training",
        call,
        tuple(tensors.split()),
        tuple(differentiable.split()),
        (lambda batch: {}) if drawn else _times,
        FLOW,
    )


FLOW_CASES: list[Case] = [
    _case("q_sample", lambda f, g: f.q_sample(g["x"], g["t"], KEY), "x", "x"),
    _case("sample_timesteps", lambda f, g: g["x"] * _drawn(f, g["x"]).sum(), "x", "x", drawn=True),
    _case(
        "training_losses",
        lambda f, g: f.training_losses(model(g), g["x"], g["t"], noise=g["noise"]),
        "x weight",
        "x weight noise",
    ),
    _case(
        "training_losses",
        lambda f, g: f.training_losses(model(g), g["x"], noise=KEY),
        "weight",
        suffix=", all from a key",
        drawn=True,
    ),
    _case(
        "sample",
        lambda f, g: f.sample(
            model(g), g["x"].shape, 2, g["x"], step_noise=KEY, solver=solvers.flow_sde_table
        ),
        "",
        suffix=", key",
        drawn=True,
    ),
]
