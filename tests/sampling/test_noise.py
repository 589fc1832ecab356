"""Where a sampling loop takes its noise from: what may be given, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffcore import GaussianDiffusion, PhiloxNoise, solvers
from diffcore.sampling import sample
from diffcore.schedules import make_betas
from support.refusals import refused
from support.toys import half

SIGMAS = [5.0, 3.0, 1.0, 0.0]
X = torch.ones(2, 3)


def test_noise_as_a_tensor_has_an_entry_more_where_churn_raises_the_start() -> None:
    table, key = solvers.euler_table(SIGMAS, s_churn=3.0), PhiloxNoise(1)
    rows = len(table)
    noise = torch.stack([key.at(1 + r).tensor(X.shape) for r in range(rows + 1)])
    expected = sample(half, X, table, noise=key)
    assert torch.equal(sample(half, X, table, noise=noise), expected)
    refused(
        ValueError,
        r"noise must have the shape \[S \+ 1, 2, 3\], an entry for each of the S = 3 rows of euler "
        r"and one for the start, which churn raises, got \(3, 2, 3\)",
        *(sample, half, X, table),
        noise=noise[:rows],
    )


DIFFUSION = GaussianDiffusion(make_betas("linear", 6))
LOOPS = {"ddpm": DIFFUSION.p_sample_loop, "ddim": DIFFUSION.ddim_sample_loop}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_generator_that_nothing_would_read_is_refused(loop: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    key, x = PhiloxNoise(3), torch.zeros(2, 3)
    for given in ({"noise": key}, {"noise": key, "step_noise": key}):
        refused(ValueError, "generator must be None where noise is a PhiloxNoise", loop, half,
                (2, 3), generator=generator, **given)  # fmt: skip
    refused(ValueError, "generator must be None where noise and step_noise", loop, half,
            (2, 3), generator=generator, noise=x, step_noise=key)  # fmt: skip
    for given in ({}, {"noise": x}, {"step_noise": key}):  # here it seeds what is not given
        loop(half, (2, 3), generator=generator, **given)
