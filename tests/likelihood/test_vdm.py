"""The bound of a variational diffusion model; its values are tested in the Gaussian world."""

from __future__ import annotations

import math

import pytest
import torch

from diffcore import PhiloxNoise
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.likelihood import VDMBound, vdm_bound

LOW, HIGH = -8.0, 5.0
RANGE = {"gamma_min": LOW, "gamma_max": HIGH}


def pixels(count=6, dtype=torch.float64):
    k = torch.randint(256, (count, 2, 3, 3), generator=torch.Generator().manual_seed(1))
    return (k.double() / 127.5 - 1).to(dtype)


def model(z, gamma):
    return 0.7 * z + 0.2 * torch.sin(z + gamma.reshape(-1, 1, 1, 1))


def test_each_part_is_its_formula():
    x, key = pixels(), PhiloxNoise(3)
    t = torch.linspace(0.05, 0.95, len(x), dtype=torch.float64)
    found = vdm_bound(model, x, **RANGE, t=t, noise=key)
    gamma = LOW + (HIGH - LOW) * t
    noise, noise_0 = (key.at(k).tensor(x.shape, dtype=torch.float64) for k in (0, 1))
    column = gamma.reshape(-1, 1, 1, 1)
    z = torch.sigmoid(-column).sqrt() * x + torch.sigmoid(column).sqrt() * noise
    error = (noise - model(z, gamma)).square().flatten(1).sum(1)
    torch.testing.assert_close(found.diffusion_nats, 0.5 * (HIGH - LOW) * error, rtol=1e-10, atol=0)
    alpha2, sigma2 = 1 / (1 + math.exp(HIGH)), 1 / (1 + math.exp(-HIGH))
    prior = 0.5 * (alpha2 * x**2 + sigma2 - 1 - math.log(sigma2)).flatten(1).sum(1)
    torch.testing.assert_close(found.prior_nats, prior, rtol=1e-12, atol=0)
    normal = torch.distributions.Normal(x + math.exp(LOW / 2) * noise_0, math.exp(LOW / 2))
    upper = torch.where(x > 0.999, 1.0, normal.cdf(x + 1 / 255))
    lower = torch.where(x < -0.999, 0.0, normal.cdf(x - 1 / 255))
    nats = -(upper - lower).log().flatten(1).sum(1)
    torch.testing.assert_close(found.reconstruction_nats, nats, rtol=1e-9, atol=0)
    total = found.prior_nats + found.diffusion_nats + found.reconstruction_nats
    assert torch.equal(found.total_nats, total)
    assert found.dimensions == 18
    bits = found.prior_bpd + found.diffusion_bpd + found.reconstruction_bpd
    torch.testing.assert_close(bits, found.total_bpd, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.total_bpd * 18 * math.log(2), total, rtol=1e-14, atol=0)

    steps = vdm_bound(model, x, **RANGE, t=t, noise=key, num_timesteps=10)
    assert torch.equal(steps.t, torch.ceil(10 * t) / 10)
    gamma = LOW + (HIGH - LOW) * steps.t
    column = gamma.reshape(-1, 1, 1, 1)
    z = torch.sigmoid(-column).sqrt() * x + torch.sigmoid(column).sqrt() * noise
    error = (noise - model(z, gamma)).square().flatten(1).sum(1)
    weight = 5 * math.expm1((HIGH - LOW) / 10)
    torch.testing.assert_close(steps.diffusion_nats, weight * error, rtol=1e-10, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_any_prediction_of_the_same_noise_is_the_same_bound(prediction_type):
    x, key = pixels(), PhiloxNoise(3)
    t = torch.linspace(0.3, 0.9, len(x), dtype=torch.float64)

    def other(z, gamma):
        column = gamma.reshape(-1, 1, 1, 1)
        alpha, sigma = torch.sigmoid(-column).sqrt(), torch.sigmoid(column).sqrt()
        epsilon = model(z, gamma)
        x0 = (z - sigma * epsilon) / alpha
        return {
            "epsilon": epsilon,
            "sample": x0,
            "v_prediction": alpha * epsilon - sigma * x0,
            "flow_prediction": epsilon - x0,
        }[prediction_type]

    truth = vdm_bound(model, x, **RANGE, t=t, noise=key).diffusion_nats
    found = vdm_bound(other, x, **RANGE, t=t, noise=key, prediction_type=prediction_type)
    torch.testing.assert_close(found.diffusion_nats, truth, rtol=1e-9, atol=0)


def test_gamma_may_be_any_function():
    x, key, t = pixels(), PhiloxNoise(3), torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    linear = vdm_bound(model, x, **RANGE, t=t, noise=key)
    options = {"t": t, "noise": key}
    same = vdm_bound(model, x, gamma=lambda t: LOW + (HIGH - LOW) * t, **options)
    assert torch.equal(same.total_nats, linear.total_nats)

    def bent(t):
        return LOW + (HIGH - LOW) * t**2

    by_autograd = vdm_bound(model, x, gamma=bent, **options)
    given = vdm_bound(model, x, gamma=bent, gamma_prime=lambda t: 2 * (HIGH - LOW) * t, **options)
    torch.testing.assert_close(by_autograd.total_nats, given.total_nats, rtol=1e-12, atol=0)
    # At the same gamma the losses differ by the density of the times only (Kingma et al. 5.1).
    at = {"t": t.sqrt(), "noise": key}
    other = vdm_bound(model, x, gamma=bent, **at).diffusion_nats
    torch.testing.assert_close(other, linear.diffusion_nats * 2 * t.sqrt(), rtol=1e-9, atol=0)


def test_times_cover_the_interval_evenly():
    x = pixels(8)
    torch.manual_seed(0)
    found = vdm_bound(model, x, **RANGE)
    times = found.t.sort().values
    torch.testing.assert_close(times.diff(), torch.full((7,), 1 / 8, dtype=torch.float64))
    assert 0 <= times[0] < 1 / 8
    torch.manual_seed(0)
    assert torch.equal(vdm_bound(model, x, **RANGE).total_nats, found.total_nats)
    generator = torch.Generator().manual_seed(4)
    seeded = vdm_bound(model, x, **RANGE, generator=generator)
    again = vdm_bound(model, x, **RANGE, generator=torch.Generator().manual_seed(4))
    assert torch.equal(seeded.total_nats, again.total_nats)
    # One time for each step of a finite bound
    steps = vdm_bound(model, x, **RANGE, num_timesteps=8).t
    assert torch.equal((8 * steps).round().sort().values, torch.arange(1, 9).double())


def test_the_bound_has_the_gradient_of_a_training_loss():
    x = pixels()
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)

    def loss(weight):
        return vdm_bound(
            lambda z, g: weight * z, x, **RANGE, t=t, noise=PhiloxNoise(1)
        ).total_bpd.mean()

    assert torch.autograd.gradcheck(loss, (weight,))


def test_low_precision_is_near_float64():
    t, key = torch.linspace(0.1, 0.9, 6, dtype=torch.float64), PhiloxNoise(3)
    truth = vdm_bound(model, pixels(), **RANGE, t=t, noise=key).total_bpd
    for dtype in (torch.float32, torch.bfloat16):
        found = vdm_bound(model, pixels(dtype=dtype), **RANGE, t=t, noise=key).total_bpd
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), truth, rtol=8 * eps, atol=0)


def test_inference_mode():
    x, options = pixels(), {"t": torch.rand(6, dtype=torch.float64), "noise": PhiloxNoise(3)}

    def bent(t):
        return LOW + (HIGH - LOW) * t**2

    wanted = vdm_bound(model, x, gamma=bent, **options)
    with torch.inference_mode():
        found = vdm_bound(model, x, gamma=bent, **options)
        drawn = vdm_bound(model, x, gamma=bent)
    assert torch.equal(found.total_nats, wanted.total_nats)
    assert drawn.total_nats.isfinite().all()


def test_bounds_of_parts_combine():
    x, key = pixels(), PhiloxNoise(3)
    t = key.at(9).uniform((6,), dtype=torch.float64)
    bounds = [
        vdm_bound(model, part, **RANGE, t=t[first : first + 2], noise=key.for_samples(first))
        for first, part in zip((0, 2, 4), x.split(2), strict=True)
    ]
    whole, combined = vdm_bound(model, x, **RANGE, t=t, noise=key), VDMBound.combine(bounds)
    for name in ("prior_nats", "diffusion_nats", "reconstruction_nats", "t", "total_bpd"):
        assert torch.equal(getattr(combined, name), getattr(whole, name)), name
    with pytest.raises(ValueError, match="bounds must have at least one entry"):
        VDMBound.combine([])
    small = vdm_bound(model, x[..., :2], **RANGE, noise=key)
    with pytest.raises(ValueError, match=r"bounds must have one number of dimensions, got .12, 18"):
        VDMBound.combine([whole, small])


def test_bad_arguments_are_named():
    x = pixels()
    for name, options in (
        ("gamma_min and gamma_max must both be given, or gamma, got None and None", {}),
        ("gamma_min must be less than gamma_max", {"gamma_min": 1.0, "gamma_max": 1.0}),
        ("gamma must be None if gamma_min", {**RANGE, "gamma": lambda t: t}),
        ("t must have shape", {**RANGE, "t": torch.zeros(3)}),
        ("num_timesteps must be at least 1, got 0", {**RANGE, "num_timesteps": 0}),
        ("prediction_type", {**RANGE, "prediction_type": "x0"}),
        ("decoder", {**RANGE, "decoder": "x0"}),
        ("noise must have the shape", {**RANGE, "noise": x[:2]}),
        ("t must lie in", {**RANGE, "t": torch.full((6,), 1.1)}),
        ("t must lie in", {**RANGE, "t": torch.full((6,), math.nan)}),
        ("gamma must rise", {"gamma": lambda t: HIGH - t}),
    ):
        with pytest.raises(ValueError, match=name):
            vdm_bound(model, x, **options)
    with pytest.raises(ValueError, match="x must be pixels"):
        vdm_bound(model, 0.99 * x, **RANGE)
    with pytest.raises(TypeError, match="t must be a tensor of floating point numbers"):
        vdm_bound(model, x, **RANGE, t=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match="x must have at least one sample"):
        vdm_bound(model, x[:0], **RANGE)
    for count in (2.5, True):
        with pytest.raises(TypeError, match="num_timesteps must be an int"):
            vdm_bound(model, x, **RANGE, num_timesteps=count)
    with pytest.raises(TypeError, match="x must be a floating-point tensor"):
        vdm_bound(model, x.long(), **RANGE)
    assert vdm_bound(model, 0.99 * x, **RANGE, decoder="gaussian").total_nats.isfinite().all()
