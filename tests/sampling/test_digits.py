"""A world of 1797 images: with the exact denoiser of this data, samplers end on its images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, solvers
from diffcore.sampling import sample
from diffcore.schedules import NoiseSchedule, make_betas, respaced_timesteps
from diffcore.solvers import NoiseLevels

PROMISE = 2e-6
SCHEDULE = NoiseSchedule.from_betas(make_betas("linear", 1000))
SOLVERS = {
    "ddpm": solvers.ddpm_table,
    "ddim": solvers.ddim_table,
    "dpmpp-2m": solvers.dpmpp_2m_table,
}


@pytest.fixture(scope="module")
def images() -> Tensor:
    datasets = pytest.importorskip("sklearn.datasets")
    return torch.tensor(datasets.load_digits().data, dtype=torch.float32) / 8 - 1


def distances(images: Tensor, name: str, wrong: float) -> Tensor:
    """Of eight samples, made in float32 with 50 steps, to the nearest image: root mean square."""
    alpha, sigma = SCHEDULE.alpha.float(), SCHEDULE.sigma.float()

    def model(x: Tensor, t: Tensor) -> Tensor:
        a, s = alpha[t, None], sigma[t, None]
        squares = (x[:, None] - a[:, None] * images).square().sum(-1)
        x0 = torch.softmax(-squares / (2 * s**2), dim=1) @ images
        return (1 + wrong) * (x - a * x0) / s

    table = SOLVERS[name](
        NoiseLevels.from_schedule(SCHEDULE, torch.tensor(respaced_timesteps(1000, 50, "trailing")))
    )
    noise = PhiloxNoise(0)
    out = sample(model, noise.tensor((8, 64)), table, noise=noise)
    gaps = torch.cdist(out.double(), images.double())
    assert len(gaps.argmin(1).unique()) > 4  # not all on one
    return gaps.min(1).values / 8


@pytest.mark.parametrize("name", SOLVERS)
def test_samplers_end_on_training_images(images: Tensor, name: str) -> None:
    assert distances(images, name, 0.0).max() <= PROMISE


@pytest.mark.parametrize("name", SOLVERS)
def test_and_do_not_with_an_error_in_epsilon(images: Tensor, name: str) -> None:
    assert distances(images, name, 0.05).min() > 10 * PROMISE
