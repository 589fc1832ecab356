"""Consistency training: the loss, and a model without any."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import diffcore
from diffcore import PhiloxNoise, consistency, solvers
from diffcore.consistency import ConsistencyModel
from diffcore.sigmas import get_sigmas_karras

KEY = PhiloxNoise(7, stream=3)
MEAN, STD = 0.3, 0.7
DATA, LOW = 0.6, 0.01
EVERY = [
    ConsistencyModel(sigma_data=DATA, sigma_min=LOW, loss=loss, delta=delta)
    for loss, delta in (
        ("mse", None),
        ("pseudo_huber", None),
        ("pseudo_huber", 0.2),
        ("pseudo_huber_norm", None),
        ("pseudo_huber_norm", 0.2),
    )
]
each_loss = pytest.mark.parametrize("settings", EVERY, ids=lambda m: f"{m.loss}-{m.delta}")


# ---- the loss ----------------------------------------------------------------------------------


def as_published(
    settings: ConsistencyModel, output: Tensor, x: Tensor, sigma: Tensor, target: Tensor
) -> Tensor:
    """The loss in eager torch, from the unscaled x."""
    data, low = settings.sigma_data, settings.sigma_min
    s = sigma.reshape(-1, 1, 1).to(output.dtype)
    skip = data**2 / ((s - low) ** 2 + data**2)
    out = data * (s - low) / (s**2 + data**2).sqrt()
    e = skip * x + out * output - target
    if settings.loss == "mse":
        return (e**2).flatten(1).mean(1)
    if settings.loss == "pseudo_huber":
        d = settings.delta or 0.001
        return (2 * d * ((e**2 + d**2).sqrt() - d)).flatten(1).mean(1)
    d = settings.delta or 0.00054 * math.sqrt(output[0].numel())
    return ((e**2).flatten(1).sum(1) + d**2).sqrt() - d


SIGMA = torch.tensor([0.05, 0.7, 9.0, 40.0], dtype=torch.float64)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_loss_and_its_gradient(settings: ConsistencyModel, dtype: torch.dtype) -> None:
    generator = torch.manual_seed(0)
    output, noise, target = torch.randn(3, 4, 5, 6, dtype=torch.float64, generator=generator)
    x = SIGMA.reshape(-1, 1, 1) * noise
    scaled = x / torch.hypot(SIGMA, torch.tensor(DATA, dtype=torch.float64)).reshape(-1, 1, 1)
    weight = torch.tensor([0.5, 1.0, 3.0, 0.1], dtype=torch.float64)
    exact_of = output.clone().requires_grad_()
    exact = weight * as_published(settings, exact_of, x, SIGMA, target)
    upstream = torch.tensor([1.0, -2.0, 0.3, 0.7], dtype=torch.float64)
    (exact_gradient,) = torch.autograd.grad(exact, exact_of, upstream)
    found_of = output.to(dtype).requires_grad_()
    found = settings.distance(found_of, scaled.to(dtype), SIGMA, target.to(dtype), weight=weight)
    (gradient,) = torch.autograd.grad(found, found_of, upstream.to(dtype))
    assert found.dtype == dtype
    bound = 1e-11 if dtype == torch.float64 else 2e-4
    scale = exact.detach().abs().max()
    assert (found.double() - exact).abs().max() <= bound * scale
    assert (gradient.double() - exact_gradient).abs().max() <= bound * exact_gradient.abs().max()
    plain = settings.distance(found_of.detach(), scaled.to(dtype), SIGMA, target.to(dtype))
    assert (plain.double() * weight - exact).abs().max() <= bound * scale
    tenfold = settings.distance(
        found_of.detach(), scaled.to(dtype), SIGMA, target.to(dtype), weight=10.0
    )
    assert (tenfold / 10 - plain).abs().max() <= 1e-6 * plain.max()


class Exact(nn.Module):
    """F of the exact solution of the probability flow of Gaussian data, with a free factor.

    f = MEAN + gain sqrt((STD² + sigma_min²) / (STD² + sigma²)) (x - MEAN), which for gain = 1 is
    the point at sigma_min on the path through x.
    """

    def __init__(self, settings: ConsistencyModel) -> None:
        super().__init__()
        self.settings = settings
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, scaled: Tensor, t: Tensor) -> Tensor:
        data, low = self.settings.sigma_data, self.settings.sigma_min
        sigma = torch.exp(4 * t / self.settings.time_scale).reshape(-1, *[1] * (scaled.ndim - 1))
        norm = (sigma**2 + data**2).sqrt()
        x = scaled * norm
        f = MEAN + self.gain * ((STD**2 + low**2) / (STD**2 + sigma**2)).sqrt() * (x - MEAN)
        return (f - data**2 / ((sigma - low) ** 2 + data**2) * x) / (data * (sigma - low) / norm)


def along_the_flow(x: Tensor, sigma: Tensor, after: Tensor) -> Tensor:
    return MEAN + ((STD**2 + after**2) / (STD**2 + sigma**2)).sqrt() * (x - MEAN)


@each_loss
def test_the_solution_of_the_probability_flow_has_no_loss(settings: ConsistencyModel) -> None:
    """Of two points on one path; the gradient by the model is 0 too."""
    model = Exact(settings)
    x = torch.randn(4, 50, dtype=torch.float64, generator=torch.manual_seed(0)) * SIGMA[:, None]
    lower = along_the_flow(x, SIGMA[:, None], SIGMA[:, None] / 3 + LOW)
    target = settings.denoise(model, lower, SIGMA / 3 + LOW)
    exact = along_the_flow(x, SIGMA[:, None], torch.tensor(LOW, dtype=torch.float64))
    assert (settings.denoise(model, x, SIGMA) - exact).abs().max() <= 1e-12
    scaled = x / torch.hypot(SIGMA, torch.tensor(DATA, dtype=torch.float64))[:, None]
    output = model(scaled, settings.time_scale * SIGMA.log() / 4)
    losses = settings.distance(output, scaled, SIGMA, target)
    assert (losses.abs() <= 1e-10).all()
    wrong = settings.distance(output + 0.1, scaled, SIGMA, target)
    assert (wrong > 1e-6).all()
    (gradient,) = torch.autograd.grad(losses.sum(), model.gain)
    assert abs(float(gradient)) <= 1e-8


def test_training_points_at_the_solution() -> None:
    """The expected gradient at the solution falls with the square of the distance of the levels.

    That is what two samples with the same noise are for: with noise of their own it would stay.
    E over data and noise by Gauss-Hermite quadrature, exact for this polynomial.
    """
    settings = ConsistencyModel(sigma_data=DATA, sigma_min=LOW, loss="mse")
    nodes, masses = np.polynomial.hermite_e.hermegauss(8)
    z, w = torch.tensor(nodes), torch.tensor(masses / masses.sum())
    x_start, noise = (y.reshape(-1, 1) for y in torch.meshgrid(MEAN + STD * z, z, indexing="ij"))
    mass = (w[:, None] * w).flatten()
    gradients = []
    for gap in (0.02, 0.01):
        high = torch.full((64,), 1.5, dtype=torch.float64)
        model = Exact(settings)
        losses = settings.training_losses(
            model, model, x_start, (high - gap, high), noise, weight=1.0
        )
        (gradient,) = torch.autograd.grad((mass * losses).sum(), model.gain)
        gradients.append(float(gradient))
    assert abs(gradients[0]) < 1e-3
    assert 3.8 < gradients[0] / gradients[1] < 4.2
    for gain, sign in ((0.9, -1), (1.1, 1)):  # and a model beside it is led there
        model, exact = Exact(settings), Exact(settings)
        model.gain.data.fill_(gain)
        losses = settings.training_losses(
            model, exact, x_start, (high - 0.01, high), noise, weight=1.0
        )
        (gradient,) = torch.autograd.grad((mass * losses).sum(), model.gain)
        assert sign * float(gradient) > 0.01


@each_loss
def test_a_training_step_is_its_parts(settings: ConsistencyModel) -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh()).double()
    target_net = copy.deepcopy(net)
    seen: list[tuple[Tensor, Tensor]] = []

    def model(x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        seen.append((x, t))
        return scale * net(x) + t[:, None, None] / 1000

    def target_model(x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
        assert not torch.is_grad_enabled()
        return scale * target_net(x) + t[:, None, None] / 1000

    x_start = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    pair = consistency.draw_pair(consistency.ladder(12, sigma_min=LOW), 4, KEY, dtype=torch.float64)
    found = settings.training_losses(
        model, target_model, x_start, pair, KEY, model_kwargs={"scale": 0.9}
    )
    z = diffcore.randn((4, 3, 5), KEY, dtype=torch.float64)
    low, high = (sigma.reshape(-1, 1, 1) for sigma in pair)

    def f(network: Callable[[Tensor], Tensor], sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x_start + sigma * z
        c_in = 1 / (sigma**2 + DATA**2).sqrt()
        output = 0.9 * network(c_in * x) + sigma.log() / 4
        skip = DATA**2 / ((sigma - LOW) ** 2 + DATA**2)
        return x, output, skip * x + DATA * (sigma - LOW) * c_in * output

    x, output, _ = f(net, high)
    target = f(target_net, low)[2].detach()
    exact = as_published(settings, output, x, pair[1], target) / (pair[1] - pair[0])
    assert (found - exact).abs().max() <= 1e-10 * exact.abs().max()
    ours = torch.autograd.grad(found.mean(), list(net.parameters()))
    theirs = torch.autograd.grad(exact.mean(), list(net.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    (first,) = seen
    assert (first[1] - 1000 * pair[1].log() / 4).abs().max() <= 1e-12
    again = settings.training_losses(
        model, target_model, x_start, pair, KEY, model_kwargs={"scale": 0.9}
    )
    assert torch.equal(found, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_and_the_boundary(dtype: torch.dtype) -> None:
    settings = ConsistencyModel()
    x = torch.randn(3, 2, 4, generator=torch.manual_seed(0)).to(dtype)
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return 100 * torch.ones_like(x)

    found = settings.denoise(model, x, settings.sigma_min)
    assert found.dtype == dtype
    assert (found - x).abs().max() <= torch.finfo(dtype).eps * 4 * x.abs().max()
    losses = settings.training_losses(
        model, model, x, (torch.full((3,), 0.002), torch.full((3,), 0.1))
    )
    assert losses.dtype == torch.float32
    assert losses.isfinite().all()
    assert all(t.shape == (3,) and t.dtype == torch.float32 for t in seen)
    table = solvers.consistency_table([0.1, 0.002])
    assert float(seen[1][0]) == pytest.approx(float(table.timesteps[0]))


def test_one_step_of_the_table_is_denoise() -> None:
    settings = ConsistencyModel(sigma_data=DATA, sigma_min=LOW)
    model = Exact(settings)
    x = 80 * torch.randn(4, 3, dtype=torch.float64, generator=torch.manual_seed(0))
    table = solvers.consistency_table([80.0, LOW], sigma_data=DATA, sigma_min=LOW)
    found = diffcore.sample(model, x, table)
    assert (found - settings.denoise(model, x, 80.0)).abs().max() <= 1e-12


# ---- refusals ----------------------------------------------------------------------------------

LADDER = get_sigmas_karras(5, 0.1, 5.0)[:-1].flip(0)
X = torch.zeros(2, 3)
PAIR = (torch.ones(2), torch.full((2,), 2.0))
OURS = ConsistencyModel()
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "step": (lambda: consistency.num_levels(-1, 10), ValueError, "step must be at least 0, got -1"),
    "last": (
        lambda: consistency.num_levels(0, 10, first=20, last=10),
        ValueError,
        "last must be at least first, 20, got 10",
    ),
    "total": (
        lambda: consistency.num_levels(0, 3),
        ValueError,
        "total_steps must be at least 8, got 3",
    ),
    "count": (lambda: consistency.ladder(1), ValueError, "count must be at least 2, got 1"),
    "order": (
        lambda: consistency.level_weights(LADDER.flip(0)),
        ValueError,
        "sigmas must rise and be above 0",
    ),
    "shape": (
        lambda: consistency.draw_pair(LADDER[:1], 3, KEY),
        ValueError,
        r"sigmas must have shape \[N\], N at least 2, got \(1,\)",
    ),
    "far": (
        lambda: consistency.level_weights(LADDER, mean=1000.0, std=0.1),
        ValueError,
        "mean must be near log",
    ),
    "weights": (
        lambda: consistency.draw_pair(LADDER, 3, KEY, weights=torch.ones(5)),
        ValueError,
        r"weights must have one number for each of the 4 pairs, got shape \(5,\)",
    ),
    "negative": (
        lambda: consistency.draw_pair(LADDER, 3, KEY, weights=-torch.ones(4)),
        ValueError,
        "weights must be at least 0 and finite, with one above 0",
    ),
    "key": (
        lambda: consistency.draw_pair(LADDER, 3, X),  # type: ignore[arg-type]
        TypeError,
        "noise must be a PhiloxNoise, got Tensor",
    ),
    "loss": (
        lambda: ConsistencyModel(loss="huber"),
        ValueError,
        "loss must be one of 'pseudo_huber_norm', 'pseudo_huber', 'mse', got 'huber'",
    ),
    "delta": (
        lambda: ConsistencyModel(loss="mse", delta=1.0),
        ValueError,
        "delta must be None with loss='mse', got 1.0",
    ),
    "width": (lambda: ConsistencyModel(delta=0.0), ValueError, "delta must be above 0, got 0.0"),
    "data": (lambda: ConsistencyModel(sigma_data=0), ValueError, "sigma_data must be above 0"),
    "pair": (
        lambda: OURS.training_losses(torch.sin, torch.sin, X, torch.ones(2)),  # type: ignore[arg-type]
        TypeError,
        "pair must be two tensors",
    ),
    "batch": (
        lambda: OURS.training_losses(torch.sin, torch.sin, X, (PAIR[0], torch.ones(3))),
        ValueError,
        r"pair\[1\] must have shape \(2,\), got \(3,\)",
    ),
    "samples": (
        lambda: OURS.training_losses(torch.sin, torch.sin, [1.0], PAIR),  # type: ignore[arg-type]
        TypeError,
        "x_start must be a floating-point tensor",
    ),
    "output": (
        lambda: OURS.training_losses(lambda x, t: x[:1], lambda x, t: x, X, PAIR),
        ValueError,
        r"model must return the shape \(2, 3\), got \(1, 3\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
