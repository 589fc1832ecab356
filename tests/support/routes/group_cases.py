"""Calls with a level for each group of a sample: for each entry of dimension 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore import ops, sample, solvers
from diffcore.sampling import pyramid_schedule
from diffcore.solvers import SolverTable
from support.routes.case import Case
from support.routes.method_cases import Given, levels, table_case
from support.routes.op_cases import KEY


def _rows(given: Given) -> dict[str, Any]:
    """``group_dim``, and the rows of the groups."""
    x = given["x"]
    return {"group_dim": 1, "i": given["i"].unsqueeze(1).expand(-1, x.shape[1])}


def _numbers(given: Given, *names: str) -> list[Tensor]:
    return [given[name].unsqueeze(1).expand(-1, given["x"].shape[1]) for name in names]


def _each_row(batch: int) -> Given:
    return {"i": torch.arange(batch) % 3}


def _each_level(batch: int) -> Given:
    alpha = torch.linspace(0.2, 0.9, batch, dtype=torch.float64)
    return {"alpha": alpha, "sigma": (1 - alpha**2).sqrt()}


def _ddpm() -> SolverTable:
    return solvers.ddpm_table(levels(), clip_range=1.0)


def _euler() -> SolverTable:
    return solvers.euler_table([3.0, 1.0, 0.4, 0.0])


def _scheduled(table: SolverTable, given: Given) -> Tensor:
    x, weight = given["x"], given["weight"]
    schedule = pyramid_schedule(len(table), x.shape[1])
    return sample(lambda x, t: torch.tanh(x * weight), x, table, schedule=schedule, group_dim=1)


GROUP_CASES: list[Case] = [
    *(
        Case(
            f"add_noise{suffix}, groups",
            "ops.add_noise",
            "linear",
            lambda noise, g, key=key: ops.add_noise(
                g["x"], noise if key else g["y"], *_numbers(g, "alpha", "sigma"), group_dim=1
            ),
            ("x",) if key else ("x", "y"),
            ("x",) if key else ("x", "y"),
            _each_level,
            (lambda: KEY) if key else (lambda: None),
        )
        for suffix, key in (("", False), (", key", True))
    ),
    Case(
        "denoising_loss, groups",
        "ops.denoising_loss",
        "loss",
        lambda _, g: ops.denoising_loss(
            g["x"], g["y"], g["z"], weight=_numbers(g, "alpha")[0], group_dim=1, reduction="group"
        ),
        ("x", "y", "z"),
        ("x",),
        _each_level,
    ),
    table_case(
        "SolverTable.step",
        lambda table, g: table.step(x=g["x"], model_output=g["m"], noise=KEY, **_rows(g)),
        "x m",
        "x m",
        _ddpm,
        others=_each_row,
        suffix=", groups, key",
    ),
    table_case("sample", _scheduled, "x weight", "", _euler, suffix=", schedule"),
]
