"""Presets of FlowMatching against the numbers of the projects that they are named for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import FlowMatching, PhiloxNoise, flows, solvers

KEY = PhiloxNoise(23, stream=2)
Z = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))


def model(x: Tensor, told: Tensor) -> Tensor:
    return torch.sin(2 * x) + 0.3 * x


def their_sample(scheduler: Any) -> Tensor:
    x = Z
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("n", [1, 4, 28])
def test_sd3(n: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(n)
    flow = FlowMatching.sd3()
    levels = flow.levels(n)
    torch.testing.assert_close(levels.sigma.float(), scheduler.sigmas, rtol=1e-6, atol=0)
    torch.testing.assert_close(levels.timesteps.float(), scheduler.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        flow.sample(model, Z, n), their_sample(scheduler), rtol=1e-5, atol=1e-5
    )


def test_sd3_training() -> None:
    """The times and weights of train_dreambooth_sd3.py, at its thousand levels."""
    diffusers = pytest.importorskip("diffusers")
    training = pytest.importorskip("diffusers.training_utils")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    x0 = torch.randn(1000, 5)
    u = KEY.uniform((1000,), dtype=torch.float64) + 2.0**-54
    density = torch.sigmoid(torch.special.ndtri(u))
    # Its list of levels falls: entry 1000 u has the level of 1 - u.
    t = FlowMatching.sd3().sample_timesteps(1000, KEY)
    index = ((1 - density) * 1000).long()
    torch.testing.assert_close(t, scheduler.sigmas[index], rtol=0, atol=3e-3)  # its grid
    for weighting in ("sigma_sqrt", "cosmap", "none"):
        flow = FlowMatching.sd3(weighting=weighting)
        sigmas = scheduler.sigmas[index]
        eps = KEY.tensor(x0.shape)
        at = sigmas.unsqueeze(1)
        x_t = scheduler.scale_noise(x0, scheduler.timesteps[index], eps)
        torch.testing.assert_close(flow.q_sample(x0, sigmas, KEY), x_t, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(x_t, (1 - at) * x0 + at * eps)
        weight = training.compute_loss_weighting_for_sd3(weighting, sigmas)
        wanted = weight * (model(x_t, sigmas) - (eps - x0)).square().mean(1)
        found = flow.training_losses(model, x0, sigmas, noise=KEY)["loss"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tokens", [256, 1024, 4096])
def test_flux(tokens: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)  # calculate_shift of the pipeline
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12), mu=mu)
    flow = FlowMatching.flux(tokens)
    levels = flow.levels(12)
    torch.testing.assert_close(levels.sigma.float(), scheduler.sigmas, rtol=1e-6, atol=0)
    told = scheduler.timesteps / 1000  # what the pipeline passes to the transformer
    torch.testing.assert_close(levels.timesteps.float(), told, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        flow.sample(model, Z, 12), their_sample(scheduler), rtol=1e-5, atol=1e-5
    )
    side = math.isqrt(tokens) * 2  # rows and columns of the latents
    by_shape = FlowMatching(shift=flows.ResolutionShift(), num_train_timesteps=1.0)
    shaped = by_shape.levels(12, shape=(1, 16, side, side))
    torch.testing.assert_close(shaped.sigma, levels.sigma, rtol=1e-12, atol=0)
    # The density of kohya's flux_shift: a sigmoid of normals, shifted by mu.
    u = KEY.uniform((50,), dtype=torch.float64) + 2.0**-54
    logit_normal = torch.sigmoid(torch.special.ndtri(u))
    wanted = scheduler.time_shift(mu, 1.0, logit_normal)
    torch.testing.assert_close(flow.sample_timesteps(50, KEY), wanted.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shift", [3.0, 5.0])
def test_wan(shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(20)
    flow = FlowMatching.wan(shift)
    levels = flow.levels(20)
    torch.testing.assert_close(levels.sigma.float(), scheduler.sigmas, rtol=1e-6, atol=0)
    assert torch.equal(levels.timesteps.long(), scheduler.timesteps)
    found = flow.sample(model, Z, 20, solver=solvers.unipc_table)
    torch.testing.assert_close(found, their_sample(scheduler), rtol=1e-4, atol=1e-4)
    u = KEY.uniform((50,), dtype=torch.float64) + 2.0**-54
    t = flow.sample_timesteps(50, KEY, dtype=torch.float64)
    torch.testing.assert_close(t, shift * u / (1 + (shift - 1) * u), rtol=1e-12, atol=0)


def test_openpi() -> None:
    """pi0.py: time = 0.999 Beta(1.5, 1) + 0.001, x_t = time noise + (1 - time) actions."""
    flow = FlowMatching.openpi()
    t = flow.sample_timesteps(20_000, KEY, dtype=torch.float64)
    cdf = ((t - 0.001) / 0.999) ** 1.5  # of Beta(1.5, 1)
    n = len(t)
    distance = (cdf.sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert math.sqrt(n) * distance < 1.95
    assert t.min() >= 0.001
    actions, time = torch.randn(6, 4), flow.sample_timesteps(6, KEY)
    noise, at = KEY.tensor((6, 4)), time[:, None]
    x_t = at * noise + (1 - at) * actions
    told = []

    def policy(x: Tensor, time: Tensor) -> Tensor:
        told.append(time)
        return model(x, time)

    found = flow.training_losses(policy, actions, noise=KEY)["loss"]
    wanted = (model(x_t, time) - (noise - actions)).square().mean(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(told.pop(), time)
    # Its sampling loop, from time 1 by steps of -1/10.
    x, dt, now = Z, -1 / 10, 1.0
    times = []
    while now >= -dt / 2:
        times.append(now)
        x = x + dt * model(x, torch.tensor(now))
        now += dt
    torch.testing.assert_close(flow.sample(policy, Z, 10), x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(told)[:, 0], torch.tensor(times), rtol=1e-5, atol=1e-7)


def test_ot_cfm() -> None:
    """Matcha-TTS: y = (1 - (1 - s) t) z + t x_1 and u = x_1 - (1 - s) z; Euler over t."""
    s = 1e-4
    flow = FlowMatching.ot_cfm(s)
    x1 = torch.randn(6, 4, dtype=torch.float64)
    z = KEY.tensor(x1.shape, dtype=x1.dtype)
    t = flow.sample_timesteps(6, KEY, dtype=torch.float64)
    at = t[:, None]
    y, u = (1 - (1 - s) * at) * z + at * x1, x1 - (1 - s) * z
    torch.testing.assert_close(flow.q_sample(x1, t, KEY), y, rtol=1e-12, atol=1e-13)
    found = flow.training_losses(model, x1, noise=KEY)["loss"]
    torch.testing.assert_close(found, (model(y, t) - u).square().mean(1), rtol=1e-12, atol=0)
    uniform = KEY.uniform((6,), dtype=torch.float64)
    torch.testing.assert_close(t, 1 - uniform, rtol=0, atol=1e-15)
    x, n = Z.double(), 7
    for _ in range(n):
        x = x + model(x, t) / n
    torch.testing.assert_close(flow.sample(model, Z.double(), n), x, rtol=1e-12, atol=1e-12)
    assert flow.levels(4).timesteps.tolist() == [0, 0.25, 0.5, 0.75]


def test_presets_take_changes() -> None:
    flow = FlowMatching.sd3(shift=6.0, weighting="cosmap", stratified=True)
    assert (flow.shift, flow.weighting, flow.stratified) == (6.0, "cosmap", True)
    assert flow.timestep_density == "logit_normal"
    with pytest.raises(ValueError, match=r"^image_seq_len must be given for Flux"):
        FlowMatching.flux()
    with pytest.raises(TypeError, match=r"^image_seq_len must be an int"):
        FlowMatching.flux(4.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^shift must be above 0"):
        FlowMatching.wan(0.0)
