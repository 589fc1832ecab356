"""ContinuousTimeGaussianDiffusion: closed forms, the discrete class, VDM's sampler, replay."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import (
    PREDICTION_TYPES,
    GaussianDiffusion,
    PhiloxNoise,
    losses,
    make_betas,
    sample,
    schedules,
    solvers,
)
from diffcore import ContinuousTimeGaussianDiffusion as Continuous
from diffcore.likelihood import vdm_bound
from diffcore.noise import perturbation_key
from support.worlds import best_prediction

KEY = PhiloxNoise(21, sample_ids=4, stream=6)
F64 = {"dtype": torch.float64}
TIMES = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], **F64)
SHAPE = (5, 2, 3, 4)
each_prediction = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def levels_at(diffusion: Continuous, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma, from the odds."""
    odds = torch.exp(diffusion.logsnr(t))
    return (odds / (1 + odds)).sqrt(), (1 / (1 + odds)).sqrt()


@each_prediction
@pytest.mark.parametrize("logsnr", schedules.LOGSNR_SCHEDULES)
def test_least_loss_of_gaussian_data(logsnr: str, prediction_type: str) -> None:
    """Four elements that have exactly the moments of the data and of the noise."""
    mean, std = 0.3, 0.7
    diffusion = Continuous(logsnr, prediction_type)
    alpha, sigma = levels_at(diffusion, TIMES)
    total = (alpha * std) ** 2 + sigma**2
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], **F64).T
    x0, noise = (mean + std * signs[0]).expand(5, 4), signs[1].expand(5, 4)
    levels = tuple(v.unsqueeze(1) for v in (alpha, sigma, total))
    move = torch.zeros(5, 1, **F64, requires_grad=True)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return best_prediction(x, levels, prediction_type, mean, std) + move * x

    error = std**2 * sigma**2 / total  # the variance of x_0 given x_t
    on_x0 = {"epsilon": alpha / sigma, "sample": 1, "v_prediction": 1 / sigma}
    on_x0["flow_prediction"] = (alpha + sigma) / sigma
    found = diffusion.training_losses(model, x0, TIMES, noise=noise)["loss"]
    torch.testing.assert_close(found, error * on_x0[prediction_type] ** 2, rtol=1e-11, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), move)
    assert gradient.abs().max() < 1e-12

    def weigh(snr: Tensor, prediction_type: str) -> Tensor:
        return losses.edm_weights(snr, prediction_type=prediction_type)

    weighted = diffusion.training_losses(model, x0, TIMES, noise=noise, weights=weigh)["loss"]
    wanted = error * ((alpha / sigma) ** 2 + 4)  # the same for every prediction
    torch.testing.assert_close(weighted, wanted, rtol=1e-11, atol=0)


@each_prediction
def test_at_its_timesteps_it_is_the_discrete_diffusion(prediction_type: str) -> None:
    discrete = GaussianDiffusion(make_betas("linear", 50, scale_to_1000=True), prediction_type)
    table = discrete.schedule.log_snr
    nodes = torch.cat([table[:1] + 1, table]).numpy()

    def logsnr(t: Tensor) -> Tensor:
        found = np.interp(t.numpy() * 50, np.arange(51), nodes)
        return torch.from_numpy(found)

    diffusion = Continuous(logsnr, prediction_type, timestep_input=lambda t: 50 * t - 1)
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), **F64)
    t = torch.tensor([0, 49, 7, 30, 11])
    net = lambda x, t: torch.sin(x + t.reshape(-1, 1, 1, 1))  # noqa: E731
    snr = discrete.schedule.snr
    weights = losses.min_snr_weights(snr, prediction_type=prediction_type)
    wanted = discrete.training_losses(net, x0, t, noise=KEY, weights=weights)["loss"]
    at = (t + 1) / torch.tensor(50.0, **F64)
    found = diffusion.training_losses(net, x0, at, noise=KEY, weights=losses.min_snr_weights)
    torch.testing.assert_close(found["loss"], wanted, rtol=1e-11, atol=0)
    noised = discrete.q_sample(x0, t, KEY)
    torch.testing.assert_close(diffusion.q_sample(x0, at, KEY), noised, rtol=1e-12, atol=1e-13)


def test_the_loss_is_that_of_the_bound() -> None:
    """1/2 gamma' |noise - prediction|^2, gamma = -logsnr: Kingma et al."""
    diffusion = Continuous("cosine", timestep_input=lambda t: -diffusion.logsnr(t))
    x0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2), **F64)
    net = lambda x, t: torch.cos(x) * t.reshape(-1, 1, 1, 1)  # noqa: E731
    mse = diffusion.training_losses(net, x0, TIMES, noise=KEY)["mse"]
    bound = vdm_bound(
        net, x0, gamma=lambda t: -diffusion.logsnr(t), decoder="gaussian", t=TIMES, noise=KEY
    )
    step = 1e-5
    slope = (diffusion.logsnr(TIMES - step) - diffusion.logsnr(TIMES + step)) / (2 * step)
    torch.testing.assert_close(bound.diffusion_nats, slope / 2 * 24 * mse, rtol=1e-6, atol=0)


def test_times() -> None:
    diffusion = Continuous()
    t = diffusion.sample_timesteps(64, KEY, **F64)
    torch.testing.assert_close(t, KEY.uniform((64,), **F64), rtol=0, atol=1e-15)
    x0 = KEY.tensor((64, 3), **F64)
    net = lambda x, t: x * t.reshape(-1, 1)  # noqa: E731
    whole = diffusion.training_losses(net, x0, noise=KEY)["loss"]
    assert torch.equal(whole, diffusion.training_losses(net, x0, t, noise=KEY)["loss"])
    part = diffusion.training_losses(net, x0[9:], noise=KEY.for_samples(13))["loss"]
    assert torch.equal(part, whole[9:])
    strata = diffusion.sample_timesteps(64, KEY, stratified=True)
    assert (strata * 64).long().tolist() == list(range(64))


@pytest.mark.parametrize("logsnr", schedules.LOGSNR_SCHEDULES)
def test_levels(logsnr: str) -> None:
    diffusion = Continuous(logsnr, "v_prediction")
    levels = diffusion.levels(4)
    t = torch.tensor([1.0, 0.75, 0.5, 0.25], **F64)
    alpha, sigma = levels_at(diffusion, t)
    torch.testing.assert_close(levels.alpha, torch.cat([alpha, torch.ones(1, **F64)]))
    torch.testing.assert_close(levels.sigma, torch.cat([sigma, torch.zeros(1, **F64)]))
    assert torch.equal(levels.timesteps, t)
    # Between two levels a solver calls the model at the time of its noise there.
    for at in (1e-7, 0.03, 0.4, 0.9):
        alpha, sigma = levels_at(diffusion, torch.tensor([at], **F64))
        assert levels.time_of(float(sigma / alpha)) == pytest.approx(at, rel=1e-9)
    assert diffusion.time_of(-math.inf) == 1
    assert diffusion.time_of(math.inf) == 0
    by_logsnr = Continuous(logsnr, timestep_input="logsnr").levels(4)
    assert torch.equal(by_logsnr.timesteps, diffusion.logsnr(t))
    assert by_logsnr.time_of(2.0) == pytest.approx(-2 * math.log(2), rel=1e-9)
    if logsnr != "beta_linear":  # which has no noise at t = 0
        last = diffusion.levels(4, final_sigmas_type="sigma_min")
        assert last.sigma[-1] == float(torch.sigmoid(-diffusion.logsnr(torch.zeros(1))).sqrt())


def toy(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.2 * x + t.reshape(-1, *[1] * (x.ndim - 1)))


def test_a_time_for_each_frame_is_that_of_folded_frames() -> None:
    x0 = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(5), **F64)
    z = KEY.tensor(x0.shape, **F64)
    t = torch.tensor([[0.1, 0.5, 0.9, 0.3], [0.99, 0.2, 0.6, 0.01]], **F64)
    diffusion = Continuous("cosine", "v_prediction")

    def fold(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(x + (t.reshape(-1, 1, 4, 1) if x.ndim == 4 else t.reshape(-1, 1, 1)))

    rest: dict[str, Any] = {"weights": losses.min_snr_weights}
    wanted = diffusion.training_losses(net, fold(x0), t.flatten(), noise=fold(z), **rest)["loss"]
    rest |= {"noise": KEY, "group_dim": 2, "reduction": "group"}
    found = diffusion.training_losses(net, x0, t, **rest)["loss"]
    torch.testing.assert_close(found, wanted.view(2, 4), rtol=1e-12, atol=0)
    noised = diffusion.q_sample(x0, t, KEY, group_dim=2)
    torch.testing.assert_close(fold(noised), diffusion.q_sample(fold(x0), t.flatten(), fold(z)))


def test_ancestral_steps_are_vdms() -> None:
    diffusion, steps = Continuous("linear"), 6
    z = torch.randn(steps + 1, *SHAPE, generator=torch.Generator().manual_seed(3), **F64)
    levels = diffusion.levels(steps, final_sigmas_type="sigma_min")
    table = solvers.ddpm_table(levels)
    found = sample(toy, z[0], table, noise=z[1:])
    x = z[0]
    for i in range(steps):  # Kingma et al. 2021, eq. 34, in gamma
        t, s = (torch.full((5,), 1 - j / steps, **F64) for j in (i, i + 1))
        g_t, g_s = (-13.3 + 18.3 * v.reshape(-1, 1, 1, 1) for v in (t, s))
        c = -torch.expm1(g_s - g_t)
        scale = (torch.sigmoid(-g_s) / torch.sigmoid(-g_t)).sqrt()
        mean = scale * (x - torch.sigmoid(g_t).sqrt() * c * toy(x, t))
        x = mean + (torch.sigmoid(g_s) * c).sqrt() * z[1 + i]
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


@each_prediction
def test_sampling_ends_in_the_gaussian_data(prediction_type: str) -> None:
    """The ODE moves x - alpha mean in proportion to the deviation at its level."""
    mean, std = 0.4, 0.6
    diffusion = Continuous("beta_linear", prediction_type)

    def best(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels_at(diffusion, t)
        levels = (alpha, sigma, (alpha * std) ** 2 + sigma**2)
        return best_prediction(
            x, tuple(v.reshape(-1, 1) for v in levels), prediction_type, mean, std
        )

    z = torch.randn(4, 1, generator=torch.Generator().manual_seed(4), **F64)
    alpha, sigma = levels_at(diffusion, torch.ones(1, **F64))
    start = ((alpha * std) ** 2 + sigma**2).sqrt()
    wanted = mean + std / start * (z - alpha * mean)
    for solver, ratio in ((solvers.ddim_table, 2.0), (solvers.dpmpp_2m_table, 4.0)):
        errors = []
        for steps in (100, 200):
            found = diffusion.sample(best, (4, 1), steps, solver=solver, noise=z)
            errors.append(float((found - wanted).abs().max()))
        assert errors[1] < 0.02
        assert 0.8 * ratio < errors[0] / errors[1] < 1.3 * ratio


def test_sample_is_the_loop_of_its_table() -> None:
    diffusion = Continuous("cosine", "v_prediction")
    table = solvers.ddpm_table(
        diffusion.levels(5), prediction_type="v_prediction", clip_range=(-1.0, 1.0)
    )
    wanted = sample(toy, KEY.tensor(SHAPE), table, noise=KEY)
    options: dict[str, Any] = {"solver": solvers.ddpm_table, "clip_range": 1.0, "noise": KEY}
    assert torch.equal(diffusion.sample(toy, SHAPE, 5, **options), wanted)
    assert wanted.abs().max() <= 1
    other = pickle.loads(pickle.dumps(diffusion))
    assert torch.equal(other.sample(toy, SHAPE, 5, **options), wanted)


def test_compiled() -> None:
    diffusion = Continuous("cosine", "v_prediction")

    def both(x0: Tensor) -> tuple[Tensor, Tensor]:
        loss = diffusion.training_losses(toy, x0, noise=KEY, weights=losses.min_snr_weights)
        return loss["loss"], diffusion.sample(toy, SHAPE, 2, noise=KEY)

    x0 = KEY.tensor(SHAPE)
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for found, wanted in zip(compiled(x0), both(x0), strict=True):
        assert torch.equal(found, wanted)


X = torch.zeros(3, 2)
NET = lambda x, t: x  # noqa: E731
REFUSALS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Continuous("cos"), ValueError, "logsnr must be one of 'cosine', 'linear'"),
    (lambda: Continuous(0.5), TypeError, "logsnr must be a string, got float"),
    (lambda: Continuous(lambda t: t), ValueError, "logsnr must fall from t = 0 to t = 1, got 0"),
    (lambda: Continuous(lambda t: 0.5), TypeError, "logsnr must return a tensor of shape"),
    (
        lambda: Continuous(lambda t: -torch.log(t / (1 - t))),
        ValueError,
        "logsnr must leave some signal at t = 1 with prediction_type='epsilon', got alpha = 0",
    ),
    (lambda: Continuous(timestep_input="T"), ValueError, "timestep_input must be one of 't'"),
    (lambda: Continuous().q_sample(X, 1.5), ValueError, r"t must be in \[0, 1\], got 1.5"),
    (
        lambda: Continuous().training_losses(NET, X, torch.tensor([0.1, -0.1, 0.5])),
        ValueError,
        r"t must be in \[0, 1\], got -0.1",
    ),
    (
        lambda: Continuous().training_losses(NET, X, torch.tensor([1, 2, 3])),
        TypeError,
        "t must be a floating-point tensor, got torch.int64",
    ),
    (lambda: Continuous().sample(NET, (2, 3), 0), ValueError, "num_steps must be at least 1"),
    (lambda: Continuous().levels(3, final_sigmas_type="x"), ValueError, "final_sigmas_type must"),
]


@pytest.mark.parametrize("i", range(len(REFUSALS)))
def test_refusals(i: int) -> None:
    call, kind, message = REFUSALS[i]
    with pytest.raises(kind, match=message):
        call()


def test_zero_terminal_snr() -> None:
    """With v_prediction the first step from pure noise is x_0's own."""
    diffusion = Continuous(lambda t: -torch.log(t / (1 - t)), "v_prediction")
    assert diffusion.levels(3).alpha[0] == 0
    found = diffusion.sample(lambda x, t: -x, SHAPE, 3, noise=KEY)
    assert found.isfinite().all()
    loss = diffusion.training_losses(NET, X, 1.0, noise=torch.ones_like(X))["loss"]
    assert torch.equal(loss, torch.ones(3))  # v is -x_0 = 0, and the output is the noise


def test_robust_loss_and_perturbed_input() -> None:
    diffusion, gamma = Continuous(prediction_type="sample"), 0.1
    x0 = torch.randn(4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)
    key = PhiloxNoise(3)
    z, more = (k.tensor(x0.shape, dtype=x0.dtype) for k in (key, perturbation_key(key)))
    ratio = diffusion.logsnr(t).unsqueeze(1)
    alpha, sigma = torch.sigmoid(ratio).sqrt(), torch.sigmoid(-ratio).sqrt()
    x_t = alpha * x0 + sigma * (z + gamma * more)
    found = diffusion.training_losses(
        lambda x, t: torch.tanh(x),
        x0,
        t,
        noise=key,
        loss="smooth_l1",
        delta=lambda t: 0.1 + t,
        input_perturbation=gamma,
    )["loss"]
    size, delta = (torch.tanh(x_t) - x0).abs(), 0.1 + t.unsqueeze(1)
    each = torch.where(size < delta, size**2 / (2 * delta), size - delta / 2)
    torch.testing.assert_close(found, each.mean(1), rtol=1e-10, atol=1e-12)
