"""Solvers on Gaussian data: the best model, and the exact moments of what a table makes with it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore import solvers
from diffcore.solvers import NoiseLevels, SolverTable

MEAN, STD = 0.3, 0.7


def gain(alpha: float, sigma: float) -> float:
    """How far the best guess of x0 follows x: x0 = MEAN + gain (x - alpha MEAN)."""
    return alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)


def best_model(table: SolverTable):
    """The optimal denoiser, called once for each row and in their order."""
    rows = iter(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))

    def model(x: Tensor, t: float) -> Tensor:
        alpha, sigma = next(rows)
        return MEAN + gain(alpha, sigma) * (x - alpha * MEAN)

    return model


def moments(table: SolverTable, mean: float, std: float) -> tuple[float, float]:
    """Mean and standard deviation at the end, by the table's own maps of (x, h_1, h_2, h_3, 1)."""
    state = torch.tensor([table.start_scale * mean, 0, 0, 0, 1], dtype=torch.float64)
    spread = torch.zeros(5, 5, dtype=torch.float64)
    spread[0, 0] = (table.start_scale * std) ** 2 + table.start_noise**2
    for row in range(len(table)):
        c = {n: float(table.column(n)[row]) for n in solvers.COLUMNS}
        alpha, sigma = float(table.alpha[row]), float(table.sigma[row])
        slope = gain(alpha, sigma)
        m = torch.tensor([slope, 0, 0, 0, MEAN * (1 - slope * alpha)], dtype=torch.float64)
        x = torch.eye(5, dtype=torch.float64)[0]
        x0 = c["a_x"] * x + c["a_m"] * m
        move = torch.zeros(5, 5, dtype=torch.float64)
        move[0] = c["c_x"] * x + c["c_m"] * m + c["c_0"] * x0
        move[0, 1:4] += torch.tensor([c["c_1"], c["c_2"], c["c_3"]], dtype=torch.float64)
        move[1] = c["e_x"] * x + c["e_m"] * m + c["e_0"] * x0
        move[2, 1] = move[3, 2] = move[4, 4] = 1
        state, spread = move @ state, move @ spread @ move.T
        spread[0, 0] += c["c_z"] ** 2
    return float(state[0]), math.sqrt(float(spread[0, 0]))


def start(levels: NoiseLevels) -> tuple[float, float]:
    alpha, sigma = float(levels.alpha[0]), float(levels.sigma[0])
    return alpha * MEAN, math.hypot(alpha * STD, sigma)
