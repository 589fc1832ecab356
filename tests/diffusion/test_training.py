"""GaussianDiffusion.training_losses: Algorithm 1."""

from __future__ import annotations

import pytest
import torch

from diffcore.diffusion import GaussianDiffusion
from diffcore.losses import min_snr_weights
from diffcore.noise import PhiloxNoise
from support.toys import BETAS, EPS, half

# ---- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"]
)
def test_training_losses_are_algorithm_1(prediction_type):
    d = GaussianDiffusion(BETAS, prediction_type)
    x, noise = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    t = torch.tensor([0, 4, 9, 14, 19])
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    loss = d.training_losses(lambda x, t: scale * x, x, t, noise=noise)["loss"]
    alpha, sigma = (v[t].view(5, 1, 1) for v in (d.schedule.alpha, d.schedule.sigma))
    x_t = alpha * x + sigma * noise
    target = {
        "epsilon": noise,
        "sample": x,
        "v_prediction": alpha * noise - sigma * x,
        "flow_prediction": noise - x,
    }[prediction_type]
    expected = (scale * x_t - target).square().mean((1, 2))
    assert loss.shape == (5,)
    # Twelve squares and their sum, in one order or another.
    torch.testing.assert_close(loss, expected, rtol=32 * EPS, atol=0)
    (slope,) = torch.autograd.grad(loss.sum(), scale)
    (wanted,) = torch.autograd.grad(expected.sum(), scale)
    torch.testing.assert_close(slope, wanted, rtol=512 * EPS, atol=0)

    weights = min_snr_weights(d.schedule.snr, prediction_type=prediction_type)
    weighted = d.training_losses(lambda x, t: scale * x, x, t, noise=noise, weights=weights)
    torch.testing.assert_close(weighted["loss"], weights[t] * loss, rtol=4 * EPS, atol=0)


def test_torchs_generator_seeds_the_noise_of_training():
    d = GaussianDiffusion(BETAS)
    x, t = torch.randn(2, 3), torch.tensor([3, 9])
    for call in (
        lambda **noise: d.training_losses(half, x, t, **noise)["loss"],
        lambda **noise: d.q_sample(x, t, **noise),
    ):
        torch.manual_seed(3)
        drawn = call()
        assert not torch.equal(drawn, call())
        torch.manual_seed(3)
        assert torch.equal(drawn, call())
        torch.manual_seed(3)
        noise = PhiloxNoise.from_generator()
        assert torch.equal(drawn, call(noise=noise))
        assert torch.equal(drawn, call(noise=noise.tensor((2, 3))))


def test_one_int_means_the_same_time_for_all():
    d = GaussianDiffusion(BETAS)
    x, noise = torch.randn(2, 4, 3)
    t = torch.full((4,), 7)
    assert torch.equal(d.q_sample(x, 7, noise=noise), d.q_sample(x, t, noise=noise))
    assert torch.equal(d.q_sample(x, t.int(), noise=noise), d.q_sample(x, t, noise=noise))
    assert torch.equal(d.p_mean_variance(half, x, 7)["mean"], d.p_mean_variance(half, x, t)["mean"])


def test_an_empty_batch_passes():
    d = GaussianDiffusion(BETAS)
    x, t = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
    assert d.q_sample(x, t).shape == (0, 3)
    assert d.training_losses(half, x, t)["loss"].shape == (0,)
    assert d.p_sample_loop(half, (0, 3)).shape == (0, 3)
