"""The helpers of training scripts, beside diffusers' own and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support.schedulers import LINEAR

diffusers = pytest.importorskip("diffusers")

from diffusers import training_utils as stock  # noqa: E402

from diffcore.diffusers import fuse, training  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

SCHEMES = ("none", "sigma_sqrt", "logit_normal", "mode", "cosmap")
EVERY = torch.arange(1000)


def scheduler(**options: Any) -> Any:
    return diffusers.DDPMScheduler(**{**LINEAR, **options})


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", [(1000,), (10, 100), (1000, 1, 1, 1)])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_snr(fused: bool, shape: tuple[int, ...], zero_snr: bool) -> None:
    noise_scheduler = scheduler(rescale_betas_zero_snr=zero_snr)
    wanted = stock.compute_snr(noise_scheduler, EVERY.view(shape))
    if fused:
        fuse(noise_scheduler)
    found = training.compute_snr(noise_scheduler, EVERY.view(shape))
    assert found.shape == shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    exact = noise_scheduler.alphas_cumprod.double()
    exact = (exact / (1 - exact)).view(shape)
    # Two square roots, their quotient and its square: a few roundings more than the last one.
    assert (found - exact).abs().max() <= (torch.finfo(torch.float32).eps * exact).max()


def test_snr_of_another_schedule_in_the_same_scheduler() -> None:
    noise_scheduler = scheduler()
    before = training.compute_snr(noise_scheduler, EVERY)
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.flip(0)
    assert torch.equal(training.compute_snr(noise_scheduler, EVERY), before.flip(0))


def script_weights(noise_scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """As diffusers' example scripts write them."""
    snr = stock.compute_snr(noise_scheduler, timesteps)
    capped = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
    if noise_scheduler.config.prediction_type == "epsilon":
        return capped / snr
    if noise_scheduler.config.prediction_type == "v_prediction":
        return capped / (snr + 1)
    return capped


@pytest.mark.parametrize("gamma", [1.0, 5.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr(gamma: float, prediction: str) -> None:
    noise_scheduler = fuse(scheduler(prediction_type=prediction))
    found = training.min_snr_weights(noise_scheduler, EVERY, snr_gamma=gamma)
    assert found.dtype == torch.float32
    wanted = script_weights(noise_scheduler, EVERY, gamma)
    assert 0 < int((wanted != wanted[0]).sum()) < 1000  # both sides of the cap
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_min_snr_without_signal_has_its_limit() -> None:
    noise_scheduler = scheduler(rescale_betas_zero_snr=True)
    noise_scheduler.alphas_cumprod = noise_scheduler.alphas_cumprod.clone()
    noise_scheduler.alphas_cumprod[-1] = 0
    last = torch.tensor([999])
    assert script_weights(noise_scheduler, last, 5.0).isnan()
    assert training.min_snr_weights(noise_scheduler, last).item() == 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_density_has_the_same_draws(scheme: str, batch: int) -> None:
    drawn = []
    for module in (stock, training):
        generator = torch.Generator().manual_seed(7)
        options = {"logit_mean": 0.3, "logit_std": 0.8, "mode_scale": 1.29}
        u = module.compute_density_for_timestep_sampling(
            scheme, batch, **options, device="cpu", generator=generator
        )
        drawn.append((u, generator.get_state()))
    (wanted, left), (found, state) = drawn
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert torch.equal(left, state)


def test_density_by_position_and_of_the_default_generator() -> None:
    torch.manual_seed(3)
    wanted = stock.compute_density_for_timestep_sampling("logit_normal", 5, 0.0, 1.0)
    torch.manual_seed(3)
    assert torch.equal(
        training.compute_density_for_timestep_sampling("logit_normal", 5, 0.0, 1.0), wanted
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weighting(scheme: str, dtype: torch.dtype) -> None:
    sigmas = torch.linspace(0.02, 1, 99, dtype=dtype).view(99, 1, 1, 1)
    found = training.compute_loss_weighting_for_sd3(scheme, sigmas)
    wanted = stock.compute_loss_weighting_for_sd3(scheme, sigmas)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    exact = stock.compute_loss_weighting_for_sd3(scheme, sigmas.double()).double()
    unit = torch.finfo(found.dtype).eps
    if scheme == "sigma_sqrt":  # diffusers rounds a float64 weight to float32, too
        unit = torch.finfo(torch.float32).eps
    assert ((found.double() - exact).abs() <= unit * exact).all()
    if dtype == torch.float32:
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


def test_names_are_those_of_diffusers() -> None:
    import inspect

    for name in ("compute_density_for_timestep_sampling", "compute_loss_weighting_for_sd3"):
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (training, stock))
        assert list(ours) == list(theirs)
    assert list(inspect.signature(training.compute_snr).parameters) == list(
        inspect.signature(stock.compute_snr).parameters
    )


def test_errors_name_the_argument() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(TypeError, match=r"noise_scheduler must have alphas_cumprod, got FlowMatch"):
        training.compute_snr(flow, EVERY)
    with pytest.raises(TypeError, match=r"timesteps must be a tensor of integers, got torch.float"):
        training.compute_snr(scheduler(), EVERY.float())
    with pytest.raises(ValueError, match="snr_gamma must be above 0, got 0"):
        training.min_snr_weights(scheduler(), EVERY, snr_gamma=0)
    density = training.compute_density_for_timestep_sampling
    with pytest.raises(ValueError, match=r"weighting_scheme must be one of 'none'.*got 'uniform'"):
        density("uniform", 4)
    with pytest.raises(TypeError, match="logit_mean must be a number, got NoneType"):
        density("logit_normal", 4)
    with pytest.raises(TypeError, match="mode_scale must be a number, got NoneType"):
        density("mode", 4)
    with pytest.raises(ValueError, match="weighting_scheme must be one of"):
        training.compute_loss_weighting_for_sd3("cosine", torch.ones(1))
