"""Times a step with a known part, masked and robust losses, against eager and ``torch.compile``.

The step is a row of DDIM's table; the plain one stands beside it. A mask is 0 or 1.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcore import ops, solvers

from .bench_ops import jobs_of_cases
from .contest import OpCase

SHAPES = ((8, 4, 64, 64), (64, 3, 128, 128))
TABLE = solvers.euler_table([9.0, 3.0, 1.0, 0.3, 0.0])
C_X, C_0 = (TABLE.rows[1].coefficients[i] for i in (0, 2))
A_X, A_M = TABLE.rows[1].coefficients[4:6]
DELTA = 0.1
ALPHA, SIGMA = TABLE.rows[1].next_alpha, TABLE.rows[1].next_sigma


def _mask(x: Any) -> Any:
    """1 in the right half of the last dimension, of the shape of one row."""
    n = x.shape[-1]
    if isinstance(x, Tensor):
        return (torch.arange(n, device=x.device) >= n // 2).to(x.dtype)
    return (np.arange(n) >= n // 2).astype(x.dtype)


def _plain(x: Any, model_output: Any) -> Any:
    return TABLE.step(1, x, model_output)[0]


def _masked(x: Any, model_output: Any, known: Any, known_noise: Any) -> Any:
    given = {"mask": _mask(x), "known": known, "known_noise": known_noise}
    return TABLE.step(1, x, model_output, **given)[0]


def _loss(model_output: Any, x0: Any, noise: Any) -> Any:
    return ops.denoising_loss(model_output, x0, noise, mask=_mask(x0))


def _huber(model_output: Any, x0: Any, noise: Any) -> Any:
    return ops.denoising_loss(model_output, x0, noise, loss="pseudo_huber", delta=DELTA)


def _plain_formula(xp: Any, x: Any, model_output: Any) -> Any:
    return C_X * x + C_0 * (A_X * x + A_M * model_output)


def _masked_formula(xp: Any, x: Any, model_output: Any, known: Any, known_noise: Any) -> Any:
    q = _mask(x)
    stepped = _plain_formula(xp, x, model_output)
    return q * stepped + (1 - q) * (ALPHA * known + SIGMA * known_noise)


def _loss_formula(xp: Any, model_output: Any, x0: Any, noise: Any) -> Any:
    q = _mask(x0) + 0 * x0
    terms = (q * (model_output - noise) ** 2).reshape(len(x0), -1)
    return terms.sum(1) / q.reshape(len(x0), -1).sum(1)


def _huber_formula(xp: Any, model_output: Any, x0: Any, noise: Any) -> Any:
    error = model_output - noise
    terms = 2 * DELTA * ((error**2 + DELTA**2) ** 0.5 - DELTA)
    return terms.reshape(len(x0), -1).mean(1)


def cases() -> list[OpCase]:
    """The plain step, the step with a known part, a masked loss, and pseudo-Huber."""
    of_loss = ("model_output", "x0", "noise")
    of_step = ("x", "model_output")
    rows: list[tuple[str, Any, tuple[str, ...], Any]] = [
        ("step", _plain, of_step, _plain_formula),
        ("step, known part", _masked, (*of_step, "known", "known_noise"), _masked_formula),
        ("masked loss", _loss, of_loss, _loss_formula),
        ("pseudo-Huber loss", _huber, of_loss, _huber_formula),
    ]
    trained = {"pseudo-Huber loss": ("model_output",)}  # forward and backward
    return [
        OpCase(name, op, named, formula, lambda _: {}, trained.get(name, ()))
        for name, op, named, formula in rows
    ]


jobs = partial(jobs_of_cases, cases, SHAPES)
