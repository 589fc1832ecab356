"""Densities of the noise level: distribution functions, diffusers, and keys."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, timesteps
from diffcore.spacings import shift_sigmas

U = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.float64)
KEY = PhiloxNoise(2**40 + 1, sample_ids=9, stream=4)


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x / math.sqrt(2))


# Density, parameters, and its distribution function as published: of sigma, or of 1 - sigma.
CASES: dict[str, tuple[str, dict[str, float], Callable[[Tensor], Tensor]]] = {
    "uniform": ("uniform", {}, lambda s: s),
    "logit_normal": ("logit_normal", {}, lambda s: normal_cdf(torch.logit(s))),
    "logit_normal, moved": (
        "logit_normal",
        {"mean": 0.6, "std": 1.6},
        lambda s: normal_cdf((torch.logit(s) - 0.6) / 1.6),
    ),
    "cosmap": ("cosmap", {}, lambda s: 2 / math.pi * torch.atan2(s, 1 - s)),
    "beta": ("beta", {}, lambda s: ((s - 0.001) / 0.999) ** 1.5),
    "beta(1, 3)": (
        "beta",
        {"a": 1.0, "b": 3.0, "low": 0.0},
        lambda s: 1 - (1 - s) ** 3,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_density_has_its_distribution_function(name: str) -> None:
    density, parameters, cdf = CASES[name]
    sigma = timesteps.DENSITIES[density](U, **parameters)
    assert sigma.dtype == torch.float64
    torch.testing.assert_close(cdf(sigma), U, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.8, 1.29, 1.75])
def test_mode(scale: float) -> None:
    u = U.numpy().astype(np.longdouble)
    wanted = 1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
    sigma = timesteps.mode(U, scale=scale)
    np.testing.assert_allclose(sigma.numpy(), wanted.astype(float), rtol=1e-12, atol=1e-15)
    assert (sigma.diff() < 0).all()  # one sigma for each u: it has a density
    assert ((sigma > 0) & (sigma < 1)).all()


def test_cosmap_visits_what_the_cosine_schedule_does() -> None:
    """The ratio of noise to signal is tan(πu/2): evenly spaced angles of a cosine schedule."""
    sigma = timesteps.cosmap(U)
    torch.testing.assert_close(sigma / (1 - sigma), torch.tan(math.pi * U / 2), rtol=1e-12, atol=0)
    density = 1 / torch.func.vmap(torch.func.grad(timesteps.cosmap))(U)
    weights = diffcore.losses.flow_weights(sigma, "cosmap")
    torch.testing.assert_close(density, weights, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scheme", ["logit_normal", "mode", "none"])
def test_diffusers_with_the_same_uniform_numbers(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = pytest.importorskip("diffusers.training_utils")
    u = U.float()
    monkeypatch.setattr(torch, "rand", lambda **_: u)
    monkeypatch.setattr(torch, "normal", lambda mean, std, **_: mean + std * torch.special.ndtri(u))
    theirs = training.compute_density_for_timestep_sampling(scheme, 1000, 0.3, 1.2, 1.29)
    monkeypatch.undo()
    ours = {
        "logit_normal": lambda: timesteps.logit_normal(u, mean=0.3, std=1.2),
        "mode": lambda: timesteps.mode(u, scale=1.29),
        "none": lambda: timesteps.uniform(u),
    }[scheme]()
    torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=1e-6)


def kolmogorov(u: Tensor) -> float:
    """sqrt(n) times the distance of an empirical distribution from the uniform one."""
    u, n = u.sort().values, len(u)
    at = torch.arange(n, dtype=torch.float64)
    return math.sqrt(n) * max(((at + 1) / n - u).max().item(), (u - at / n).max().item())


@pytest.mark.parametrize("name", CASES)
def test_what_is_drawn_has_the_density(name: str) -> None:
    density, parameters, cdf = CASES[name]
    sigma = timesteps.draw(density, 20_000, KEY, dtype=torch.float64, **parameters)
    assert kolmogorov(cdf(sigma)) < 1.95  # exceeded once in 1000 seeds; this one is fixed


def test_a_level_is_a_function_of_the_key() -> None:
    drawn = timesteps.draw("logit_normal", 8, KEY)
    assert drawn.dtype == torch.float32
    assert torch.equal(timesteps.draw("logit_normal", 8, KEY), drawn)
    assert torch.equal(timesteps.draw("logit_normal", 3, KEY.for_samples(9 + 5)), drawn[5:])
    assert not torch.equal(timesteps.draw("logit_normal", 8, KEY.at(5)), drawn)
    wanted = timesteps.logit_normal(KEY.uniform((8,), dtype=torch.float64) + 2.0**-54)
    assert torch.equal(drawn, wanted.float())
    torch.manual_seed(3)
    first = timesteps.draw("uniform", 8)
    torch.manual_seed(3)
    assert torch.equal(timesteps.draw("uniform", 8), first)


def test_shift_strata_and_functions() -> None:
    plain = timesteps.draw("mode", 64, KEY, dtype=torch.float64)
    shifted = timesteps.draw("mode", 64, KEY, shift=3.0, dtype=torch.float64)
    assert torch.equal(shifted, shift_sigmas(plain, 3.0))
    strata = timesteps.draw("uniform", 64, KEY, stratified=True, dtype=torch.float64)
    assert torch.equal((64 * strata).floor(), torch.arange(64, dtype=torch.float64))
    u = timesteps.draw("uniform", 64, KEY, dtype=torch.float64)
    torch.testing.assert_close((64 * strata) % 1, u, rtol=0, atol=1e-12)
    own = timesteps.draw(lambda u: u**2, 64, KEY, dtype=torch.float64)
    assert torch.equal(own, u**2)
    assert timesteps.draw("uniform", 0).shape == (0,)


def test_no_level_is_at_an_end() -> None:
    ends = torch.tensor([2.0**-54, 1 - 2.0**-53], dtype=torch.float64)
    for name, density in timesteps.DENSITIES.items():
        sigma = density(ends)
        assert ((sigma > 0) & (sigma <= 1)).all(), name
        assert sigma.isfinite().all(), name


def test_shards_of_a_sample_have_its_level() -> None:
    whole = timesteps.draw("cosmap", 4, KEY)
    boxes = [((4, 4, 8), (0, 0, 0)), ((4, 4, 8), (0, 4, 0)), ((4, 8, 3), (0, 0, 5))]
    for local, offset in boxes:
        shard = KEY.for_shard((4, 8, 8), local, offset)
        assert torch.equal(timesteps.draw("cosmap", 4, shard), whole)
    last = KEY.for_shard((4, 8, 8), (2, 8, 3), (2, 0, 5))
    assert torch.equal(timesteps.draw("cosmap", 2, last), whole[2:])
    frames = timesteps.draw("uniform", 4, KEY, groups=5)
    assert frames.shape == (4, 5)
    assert torch.equal(frames[:, 0], timesteps.draw("uniform", 4, KEY))
    assert frames.unique().numel() == 20
    strata = timesteps.draw("uniform", 4, KEY, groups=5, stratified=True, dtype=torch.float64)
    assert torch.equal((20 * strata).floor(), torch.arange(20.0, dtype=torch.float64).view(4, 5))


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "density": (
        lambda: timesteps.draw("logistic", 4),
        ValueError,
        "density must be one of 'uniform', 'logit_normal', .* got 'logistic'",
    ),
    "both": (
        lambda: timesteps.draw(torch.sqrt, 4, mean=1.0),
        ValueError,
        "density must be a name with mean, got a function",
    ),
    "u": (lambda: timesteps.uniform(torch.arange(3)), TypeError, "u must be a tensor of floating"),
    "u outside": (lambda: timesteps.mode(U + 1), ValueError, r"u must be in \(0, 1\), got values"),
    "groups": (lambda: timesteps.draw("mode", 4, groups=0), ValueError, "groups must be at least"),
    "group ids": (
        lambda: timesteps.draw("mode", 2, KEY.for_groups([[1, 2, 3]], 1), groups=3),
        ValueError,
        r"group_ids must have shape \(2, 3\), one for each group, got \(1, 3\)",
    ),
    "std": (lambda: timesteps.logit_normal(U, std=0.0), ValueError, "std must be"),
    "scale": (lambda: timesteps.mode(U, scale=2.0), ValueError, r"scale must be in \[-1, 2 / "),
    "beta": (lambda: timesteps.beta(U, a=2.0, b=3.0), ValueError, "b must be 1 where a is not"),
    "low": (lambda: timesteps.beta(U, low=0.5, high=0.4), ValueError, "low must be at least 0"),
    "batch": (lambda: timesteps.draw("mode", 4.0), TypeError, "batch must be"),  # type: ignore[arg-type]
    "noise": (lambda: timesteps.draw("mode", 4, U), TypeError, "noise must be a PhiloxNoise"),  # type: ignore[arg-type]
    "stratified": (
        lambda: timesteps.stratified(U.view(10, 100)),
        ValueError,
        r"u must have shape \[B\], got \(10, 100\)",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_errors(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
