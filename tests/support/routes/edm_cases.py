"""EDM and the diffusion in continuous time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffcore import EDM, ContinuousTimeGaussianDiffusion, losses, solvers
from support.routes.case import Case
from support.routes.method_cases import Given, model
from support.routes.op_cases import KEY

CONTINUOUS = "ContinuousTimeGaussianDiffusion"


def _levels(batch: int) -> Given:
    return {"t": torch.linspace(0.1, 0.9, batch, dtype=torch.float64)}


def _drawn(edm: EDM, x: Tensor) -> Tensor:
    return edm.sample_sigmas(len(x), KEY, dtype=x.dtype, device=x.device)


def _case(
    name: str,
    call: Callable[[Any, Given], Any],
    differentiable: str,
    tensors: str = "x weight",
    *,
    suffix: str = "",
    drawn: bool = False,
) -> Case:
    kind = EDM if name.startswith("EDM") else partial(ContinuousTimeGaussianDiffusion, "cosine")
    return Case(
        f"{name}{suffix}",
        name,
        "training",
        call,
        tuple(tensors.split()),
        tuple(differentiable.split()),
        (lambda batch: {}) if drawn else _levels,
        kind,
    )


def _logvar(c_noise: Tensor) -> Tensor:
    return 0.3 * c_noise


EDM_CASES: list[Case] = [
    _case("EDM.q_sample", lambda d, g: d.q_sample(g["x"], g["t"], KEY), "x", "x"),
    _case(
        "EDM.sample_sigmas",
        lambda d, g: g["x"] * _drawn(d, g["x"]).sum(),
        "x",
        "x",
        drawn=True,
    ),
    _case("EDM.preconditioning", lambda d, g: (g["x"] * 1, *d.preconditioning(g["t"])), "x", "x"),
    _case("EDM.denoise", lambda d, g: d.denoise(model(g), g["x"], g["t"]), "x weight"),
    _case(
        "EDM.training_losses",
        lambda d, g: d.training_losses(model(g), g["x"], g["t"], noise=KEY, logvar=_logvar),
        "weight",
        suffix=", logvar, key",
    ),
    _case(
        "EDM.training_losses",
        lambda d, g: d.training_losses(model(g), g["x"], noise=KEY),
        "weight",
        suffix=", all from a key",
        drawn=True,
    ),
    _case(
        "EDM.sample",
        lambda d, g: d.sample(model(g), g["x"].shape, 3, noise=g["x"], step_noise=KEY, s_churn=1.0),
        "",
        suffix=", churn, key",
        drawn=True,
    ),
    _case(f"{CONTINUOUS}.q_sample", lambda d, g: d.q_sample(g["x"], g["t"], KEY), "x", "x"),
    _case(
        f"{CONTINUOUS}.training_losses",
        lambda d, g: d.training_losses(
            model(g), g["x"], g["t"], noise=g["noise"], weights=losses.min_snr_weights
        ),
        "x weight",
        "x weight noise",
    ),
    _case(
        f"{CONTINUOUS}.sample",
        lambda d, g: d.sample(
            model(g), g["x"].shape, 2, noise=g["x"], step_noise=KEY, solver=solvers.ddpm_table
        ),
        "",
        suffix=", key",
        drawn=True,
    ),
]
