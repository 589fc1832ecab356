"""Times the terms of the variational bound against the code in common use.

For ``vlb_term``, eager PyTorch computes the two means, the two log-variances and their KL, as
guided-diffusion does. "whole" is all of guided-diffusion's code, which also computes the decoder's
term of every sample and selects with ``torch.where``. No sample is at t = 0 here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcore import ops
from diffcore.coefficients.bound import log_variances, vlb_coefficients
from diffcore.coefficients.step import posterior_coefficients

from .bench_likelihood import approximation
from .bench_ops import jobs_of
from .contest import MODES, OpCase
from .suite import Job, Run

STEPS = 1000
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
LOG_BAR = torch.log1p(-BETAS).cumsum(0)
ALPHA, SIGMA = (0.5 * LOG_BAR).exp(), (-torch.expm1(LOG_BAR)).sqrt()


def _tables() -> dict[str, Tensor]:
    """guided-diffusion's tables, `[T]`."""
    before = [torch.cat([torch.tensor([v]).double(), c[:-1]]) for c, v in ((ALPHA, 1), (SIGMA, 0))]
    c_0, c_x, _, _ = (torch.as_tensor(c) for c in posterior_coefficients(ALPHA, SIGMA, *before))
    small, large = log_variances(ALPHA, SIGMA)
    return {
        "c_0": c_0,
        "c_x": c_x,
        "a_x": 1 / ALPHA,
        "a_m": -SIGMA / ALPHA,
        "log_small": small,
        "log_large": large,
    }


TABLES = _tables()


def _vlb(
    xp: Any,
    x0: Any,
    model_output: Any,
    x_t: Any,
    t: Any,
    variance_output: Any = None,
    *,
    whole: bool,
    **_: Any,
) -> Any:
    """As guided-diffusion computes it, with the tables beside the samples."""
    c = {}
    for name, table in TABLES.items():
        rows = (np.asarray(table) if xp is np else table.to(x0))[t]
        c[name] = rows.reshape(-1, 1, 1, 1)
    predicted = (c["a_x"] * x_t + c["a_m"] * model_output).clip(-1, 1)
    mean, true = (c["c_0"] * x + c["c_x"] * x_t for x in (predicted, x0))
    log_variance = c["log_small"] + 0 * x0
    if variance_output is not None:
        share = (variance_output + 1) / 2
        log_variance = share * c["log_large"] + (1 - share) * c["log_small"]
    d = c["log_small"] - log_variance
    kl = 0.5 * (xp.exp(d) - 1 - d + (true - mean) ** 2 * xp.exp(-log_variance))
    kl = kl.reshape(len(x0), -1).mean(1) / math.log(2)
    if not whole:
        return kl
    decoder = -approximation(xp, x0, mean, 0.5 * log_variance)
    decoder = decoder.reshape(len(x0), -1).mean(1) / math.log(2)
    return xp.where(t == 0, decoder, kl)


def _steps_of(batch: int) -> Tensor:
    return torch.arange(batch) * 37 % (STEPS - 1) + 1


def _case(name: str, *, learned: bool, whole: bool) -> OpCase:
    tensors = ("x0", "model_output", "x_t") + ("variance_output",) * learned
    table = vlb_coefficients(
        ALPHA,
        SIGMA,
        variance_type="learned_range" if learned else "fixed_small",
        clip_range=1.0,
    )

    def options(batch: int) -> dict[str, Any]:
        scale = 1 / (math.prod(SIZE) * math.log(2))
        return {"coefficients": table, "t": _steps_of(batch), "scale": scale}

    outputs = tuple(name for name in tensors if "output" in name)
    return OpCase(
        name,
        ops.vlb_term,
        tensors,
        partial(_vlb, whole=whole),
        options,
        outputs,
        has_exp=learned,
    )


SIZE = (3, 64, 64)
CASES = (
    _case("vlb_term", learned=False, whole=False),
    _case("vlb_term, learned", learned=True, whole=False),
    _case("vlb_term, whole", learned=False, whole=True),
    _case("vlb_term, learned, whole", learned=True, whole=True),
)


def jobs(run: Run) -> Iterator[Job]:
    """The "bound" section; the scale of its terms is that of one shape."""
    shape = (4 if run.quick else 64 if run.device.type == "cpu" else 1024, *SIZE)
    grid = itertools.product(run.dtypes("f32", "bf16"), MODES, CASES)
    return jobs_of(((case, mode, dtype, shape) for dtype, mode, case in grid), run, 2.0)
