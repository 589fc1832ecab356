"""Thresholds of plain numbers, and numpy's quantiles to compare them with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcore import ops

SCALE = 2.0**40  # lifts the smallest of many numbers above 1, the least threshold


def row(a_x: float, a_m: float, columns: int = 8) -> Tensor:
    """A row of a table, of which nothing else may be read."""
    table = torch.full((columns,), math.nan, dtype=torch.float64)
    table[4], table[5] = a_x, a_m
    return table


def of_numbers(x: Tensor, ratio: float, scale: float = SCALE, **options: Any) -> Tensor:
    """The threshold where x0 is x, scaled by a power of two."""
    coefficients = row(scale, 0.0).to(x.device)
    return ops.dynamic_threshold(x, torch.zeros_like(x), coefficients, ratio=ratio, **options)


def in_double(x: Tensor) -> np.ndarray[Any, Any]:
    return x.double().cpu().numpy()


def check(found: Tensor, x0: np.ndarray[Any, Any], ratio: float, most: float = math.inf) -> None:
    """`found` is the clipped quantile of the rows of |x0| to one ulp, and exactly at a number."""
    rows = np.abs(x0).reshape(len(x0), -1)
    wanted = np.clip(np.quantile(rows, ratio, axis=1), 1, most)
    ulp = np.spacing(wanted.astype(found.cpu().numpy().dtype)).astype(np.float64)
    off = np.abs(in_double(found) - wanted)
    assert found.shape == (len(x0),)
    assert (off <= (ulp if ratio * (rows.shape[1] - 1) % 1 else 0)).all(), (
        f"{rows.shape}, {ratio}: {found} for {wanted}"
    )
