"""Log-probabilities and KLs of a table's rows, and the trajectories of loops."""

from __future__ import annotations

from typing import Any

from diffcore import sample, solvers
from diffcore.sampling import Trajectory
from diffcore.solvers import SolverTable
from support.routes.case import Case
from support.routes.method_cases import SIGMAS, each_row, levels, model, table_case
from support.routes.op_cases import KEY

SCORED: dict[str, Any] = {"noise": KEY, "return_log_prob": True}


def _ddpm() -> SolverTable:
    return solvers.ddpm_table(levels(), clip_range=1.0)


def _kept(found: Trajectory) -> tuple[Any, ...]:
    return found.samples, found.states, found.log_probs


DENSITY_CASES: list[Case] = [
    table_case(
        "SolverTable.step",
        lambda table, g: table.step(1, g["x"], g["m"], (g["h"],), **SCORED),
        "x m h",
        "x m h",
        lambda: solvers.dpmpp_2m_sde_table(SIGMAS),
        suffix=", history, scored",
    ),
    table_case(
        "SolverTable.log_prob",
        lambda table, g: table.log_prob(g["i"], g["x"], g["m"], g["h"]),
        "x m h",
        "x m h",
        _ddpm,
        others=each_row,
    ),
    table_case(
        "SolverTable.step_kl",
        lambda table, g: table.step_kl(1, g["x"], g["m"], g["h"]),
        "x m h",
        "x m h",
        _ddpm,
    ),
    table_case(
        "sample",
        lambda table, g: _kept(sample(model(g), g["x"], table, **SCORED, return_trajectory=True)),
        "x weight",
        "",
        _ddpm,
        suffix=", trajectory, scored",
    ),
]
