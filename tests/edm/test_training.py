"""EDM's training loss: closed forms, the paper's first form, replay, and its learned weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcore import EDM, PhiloxNoise, losses
from diffcore.noise import perturbation_key

KEY = PhiloxNoise(11, sample_ids=5, stream=3)
SIGMAS = torch.tensor([1e-3, 0.02, 0.3, 0.5, 2.0, 16.0, 1e3], dtype=torch.float64)
F64 = {"dtype": torch.float64}
each_sigma_data = pytest.mark.parametrize("sigma_data", [0.5, 1.0, 16.0])


def column(x: Tensor) -> Tensor:
    return x.reshape(-1, 1)


def first_form(
    output: Tensor, x0: Tensor, noise: Tensor, sigma: Tensor, sigma_data: float
) -> Tensor:
    """lambda (D - x0)^2 of the paper's table 1, with nothing rearranged."""
    s, d = sigma.reshape(-1, *[1] * (x0.ndim - 1)), sigma_data
    x = x0 + s * noise
    denoised = d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * output
    weight = (s**2 + d**2) / (s * d) ** 2
    return (weight * (denoised - x0) ** 2).flatten(1).mean(1)


class World:
    """Data of N(mean, std^2): four elements that have exactly its moments with the noise."""

    mean, std = 0.3, 0.7

    def __init__(self, sigma_data: float) -> None:
        self.d = sigma_data
        signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], **F64).T
        self.x0 = (self.mean + self.std * signs[0]).expand(len(SIGMAS), 4)
        self.noise = signs[1].expand(len(SIGMAS), 4)
        self.total = self.std**2 + SIGMAS**2  # the variance of x
        self.r = (SIGMAS**2 + sigma_data**2).sqrt()

    def best(self) -> tuple[Tensor, Tensor]:
        """F = slope (c_in x) + offset of the best denoiser (std^2 x + sigma^2 mean) / total."""
        skip = self.d**2 / self.r**2
        out = SIGMAS * self.d / self.r
        slope = (self.std**2 / self.total - skip) / out * self.r
        return slope, SIGMAS**2 * self.mean / self.total / out


@each_sigma_data
def test_least_loss_and_gradient_of_gaussian_data(sigma_data: float) -> None:
    world, edm = World(sigma_data), EDM(sigma_data)
    best = world.best()
    lam = (SIGMAS**2 + sigma_data**2) / (SIGMAS * sigma_data) ** 2
    least = lam * world.std**2 * SIGMAS**2 / world.total
    for move in (0.0, 0.4):
        slope = (best[0] + move).requires_grad_()
        offset = best[1].clone().requires_grad_()
        model = lambda x, t: column(slope) * x + column(offset)  # noqa: B023, E731
        loss = edm.training_losses(model, world.x0, SIGMAS, noise=world.noise)["loss"]
        # The error of a moved slope is move (c_in x); its second moment is all that is added.
        power = (world.total + world.mean**2) / world.r**2
        torch.testing.assert_close(loss, least + move**2 * power, rtol=1e-11, atol=0)
        d_slope, d_offset = torch.autograd.grad(loss.sum(), (slope, offset))
        torch.testing.assert_close(d_slope, 2 * move * power, rtol=1e-11, atol=1e-9)
        wanted = 2 * move * world.mean / world.r
        torch.testing.assert_close(d_offset, wanted, rtol=1e-11, atol=1e-9)


def test_data_of_the_declared_deviation_has_loss_one() -> None:
    x0 = 0.5 * torch.tensor([1.0, 1, -1, -1], **F64).expand(len(SIGMAS), 4)
    noise = torch.tensor([1.0, -1, 1, -1], **F64).expand(len(SIGMAS), 4)
    found = EDM().training_losses(lambda x, t: 0 * x, x0, SIGMAS, noise=noise)["loss"]
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-14, atol=0)


@each_sigma_data
@pytest.mark.parametrize("by_key", [True, False], ids=["key", "tensor"])
def test_loss_and_gradient_are_those_of_the_first_form(sigma_data: float, by_key: bool) -> None:
    shape = (6, 3, 4, 5)
    x0 = sigma_data * torch.randn(shape, generator=torch.Generator().manual_seed(1), **F64)
    sigma = sigma_data * torch.tensor([0.02, 0.2, 0.9, 1.0, 3.0, 80.0], **F64)
    z = KEY.tensor(shape, **F64)
    weight = torch.linspace(-1, 1, 3, **F64).reshape(3, 1, 1).requires_grad_()
    seen: list[tuple[Tensor, Tensor]] = []

    def model(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append((x.detach(), t))
        return torch.tanh(weight * x + t.reshape(-1, 1, 1, 1)) + label.reshape(-1, 1, 1, 1)

    label = torch.arange(6.0, **F64)
    edm = EDM(sigma_data)
    found = edm.training_losses(model, x0, sigma, {"label": label}, KEY if by_key else z)["loss"]
    wide = sigma.reshape(-1, 1, 1, 1)
    x_in = (x0 + wide * z) / (wide**2 + sigma_data**2).sqrt()
    torch.testing.assert_close(seen[0][0], x_in, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(seen[0][1], sigma.log() / 4, rtol=1e-14, atol=0)
    wanted = first_form(model(x_in, sigma.log() / 4, label), x0, z, sigma, sigma_data)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss.mean(), weight)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


@each_sigma_data
def test_extreme_noise_in_float32(sigma_data: float) -> None:
    shape = (4, 2, 8, 8)
    sigma = torch.tensor([1e-6, 1e-4, 1e4, 1e6])
    x0 = sigma_data * torch.randn(shape, generator=torch.Generator().manual_seed(2))
    z = KEY.tensor(shape)
    edm = EDM(sigma_data)
    net = lambda x, t: torch.sin(3 * x)  # noqa: E731
    found = edm.training_losses(net, x0, sigma, noise=KEY)["loss"]
    s = sigma.double().numpy().astype(np.longdouble).reshape(-1, 1, 1, 1)
    x64, z64 = (v.double().numpy().astype(np.longdouble) for v in (x0, z))
    d = np.longdouble(sigma_data)
    r = np.sqrt(s * s + d * d)
    noised = x64 + s * z64
    target = (x64 - d * d / r**2 * noised) / (s * d / r)
    wanted = ((np.sin(3 * noised / r) - target) ** 2).reshape(4, -1).mean(1)
    np.testing.assert_allclose(found.numpy(), wanted.astype(float), rtol=3e-6)


def test_the_weight_is_edm_weights() -> None:
    x0, noise = torch.randn(2, len(SIGMAS), 5, generator=torch.Generator().manual_seed(3), **F64)
    edm = EDM(0.8)
    model = lambda x, t: torch.cos(x)  # noqa: E731
    loss = edm.training_losses(model, x0, SIGMAS, noise=noise)["loss"]
    denoised = edm.denoise(model, edm.q_sample(x0, SIGMAS, noise), SIGMAS)
    weight = losses.edm_weights(SIGMAS**-2, sigma_data=0.8, prediction_type="sample")
    error = (denoised - x0).square().mean(1)
    torch.testing.assert_close(loss, weight * error, rtol=1e-11, atol=0)


def test_weights_and_mask() -> None:
    x0 = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(4))
    edm, sigma = EDM(), torch.tensor([0.1, 0.5, 2.0, 9.0])
    net = lambda x, t: 0.3 * x  # noqa: E731
    plain = edm.training_losses(net, x0, sigma, noise=KEY)["loss"]
    soft = lambda s: s**2 / (s**2 + 0.25)  # noqa: E731
    found = edm.training_losses(net, x0, sigma, noise=KEY, weights=soft)["loss"]
    torch.testing.assert_close(found, soft(sigma) * plain)
    given = edm.training_losses(net, x0, sigma, noise=KEY, weights=soft(sigma))["loss"]
    torch.testing.assert_close(given, found)
    mask = torch.zeros(1, 1, 6, 6)
    mask[..., :3] = 1
    found = edm.training_losses(net, x0, sigma, noise=KEY, mask=mask)["loss"]
    z = KEY.tensor(x0.shape)
    wide = sigma.reshape(-1, 1, 1, 1)
    output = net((x0 + wide * z) / (wide**2 + 0.25).sqrt(), None)
    kept = [v[..., :3] for v in (output, x0, z)]
    torch.testing.assert_close(found, first_form(*kept, sigma, 0.5))


def test_the_law_of_the_noise_levels() -> None:
    edm = EDM(p_mean=-0.4, p_std=1.7)
    sigma = edm.sample_sigmas(4096, KEY, **F64)
    standard = (sigma.log() + 0.4) / 1.7
    u = KEY.uniform((4096,), **F64)
    torch.testing.assert_close(
        0.5 * torch.erfc(-standard / math.sqrt(2)), u, rtol=1e-12, atol=1e-13
    )
    ordered, count = u.sort().values, torch.arange(1, 4097)
    assert (ordered - count / 4096).abs().max() < 1.95 / 64  # Kolmogorov-Smirnov at 0.1 %
    # A sample has its level in any batch, and it is another number than its noise.
    later = PhiloxNoise(11, sample_ids=5 + 100, stream=3)
    assert torch.equal(edm.sample_sigmas(10, later, **F64), sigma[100:110])
    noise = KEY.tensor((4096,), **F64)
    assert torch.corrcoef(torch.stack([standard, noise]))[0, 1].abs() < 0.06
    strata = edm.sample_sigmas(4096, KEY, stratified=True, **F64).log()
    assert (strata.diff() > 0).all()


def test_a_key_gives_levels_and_noise() -> None:
    x0 = torch.randn(5, 7, generator=torch.Generator().manual_seed(5))
    edm = EDM()
    net = lambda x, t: x + column(t)  # noqa: E731
    whole = edm.training_losses(net, x0, noise=KEY)["loss"]
    given = edm.training_losses(net, x0, edm.sample_sigmas(5, KEY), noise=KEY)["loss"]
    assert torch.equal(whole, given)
    part = edm.training_losses(net, x0[2:], noise=KEY.for_samples(7))["loss"]
    assert torch.equal(part, whole[2:])


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(6)) * 0.5
    edm = EDM()
    for step in steps:
        ids = (torch.arange(16) + 16 * step) % 64
        key = PhiloxNoise(3, sample_ids=ids, stream=step)
        model = lambda x, t: net(torch.cat([x, column(t)], 1))  # noqa: E731
        loss = edm.training_losses(model, data[ids], noise=key)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2)

    net, optimizer = start()
    _train(net, optimizer, range(8))
    first, optimizer = start()
    _train(first, optimizer, range(3))
    saved: dict[str, Any] = {"net": first.state_dict(), "optimizer": optimizer.state_dict()}
    second, optimizer = start()
    torch.manual_seed(99)  # the process that resumes has another state of torch's generator
    second.load_state_dict(saved["net"])
    optimizer.load_state_dict(saved["optimizer"])
    _train(second, optimizer, range(3, 8))
    for name, value in net.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_learned_weight() -> None:
    """EDM2's loss / exp(u) + u, whose best u is the logarithm of the loss."""
    x0 = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(7), **F64)
    edm, sigma = EDM(), torch.tensor([0.05, 0.4, 1.0, 7.0], **F64)
    scale = torch.tensor(0.3, **F64, requires_grad=True)
    net = lambda x, t: scale * x  # noqa: E731
    plain = edm.training_losses(net, x0, sigma, noise=KEY)["loss"]
    (plain_gradient,) = torch.autograd.grad(plain[1], scale, retain_graph=True)
    u = torch.tensor([0.5, -1.0, 0.0, 2.0], **F64, requires_grad=True)
    found = edm.training_losses(net, x0, sigma, noise=KEY, logvar=u)
    assert torch.equal(found["mse"], plain)
    torch.testing.assert_close(found["loss"], plain / u.exp() + u, rtol=1e-14, atol=0)
    gradient, to_net = torch.autograd.grad(found["loss"][1], (u, scale))
    wanted = torch.zeros(4, **F64)
    wanted[1] = 1 - plain[1].item() / math.exp(-1)
    torch.testing.assert_close(gradient, wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(to_net, plain_gradient * math.e, rtol=1e-13, atol=0)

    slope = torch.tensor(0.7, **F64, requires_grad=True)
    found = edm.training_losses(net, x0, sigma, noise=KEY, logvar=lambda c: column(slope * c))
    u = (slope * sigma.log() / 4).detach()
    torch.testing.assert_close(found["loss"], plain / u.exp() + u, rtol=1e-13, atol=0)
    (gradient,) = torch.autograd.grad(found["loss"].sum(), slope)
    wanted = ((1 - plain / u.exp()) * sigma.log() / 4).sum()
    torch.testing.assert_close(gradient, wanted, rtol=1e-13, atol=0)

    best = plain.detach().log().requires_grad_()
    loss = edm.training_losses(net, x0, sigma, noise=KEY, logvar=best)["loss"].sum()
    (gradient,) = torch.autograd.grad(loss, best)
    assert gradient.abs().max() < 1e-14


def test_16_bits_and_autocast() -> None:
    shape = (8, 3, 16, 16)
    x0 = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(8))
    edm, weight = EDM(), torch.full((3, 3, 1, 1), 0.2)
    seen: list[torch.dtype] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.extend((x.dtype, t.dtype))
        return nn.functional.conv2d(x, weight.to(x.dtype))

    sigma = edm.sample_sigmas(8, KEY)
    low = x0.bfloat16()
    exact = edm.training_losses(
        net, low.double(), sigma, noise=KEY.tensor(shape).bfloat16().double()
    )
    found = edm.training_losses(net, low, sigma, noise=KEY)["loss"]
    assert seen[2:] == [torch.bfloat16, torch.float32]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact["loss"], rtol=2e-2, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = edm.training_losses(net, x0, sigma, noise=KEY)["loss"]
    wanted = edm.training_losses(net, x0, sigma, noise=KEY)["loss"]
    torch.testing.assert_close(cast, wanted, rtol=2e-2, atol=0)


def test_one_number_and_default_noise() -> None:
    x0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(9))
    edm = EDM()
    net = lambda x, t: x * column(t)  # noqa: E731
    one = edm.training_losses(net, x0, 0.7, noise=KEY)["loss"]
    assert torch.equal(one, edm.training_losses(net, x0, [0.7] * 3, noise=KEY)["loss"])
    torch.manual_seed(1)
    first = edm.training_losses(net, x0)["loss"]
    torch.manual_seed(1)
    assert torch.equal(first, edm.training_losses(net, x0)["loss"])
    assert not torch.equal(first, edm.training_losses(net, x0)["loss"])
    z = torch.randn(3, 4)
    assert torch.equal(edm.q_sample(x0, 2.0, z), x0 + 2 * z)


def test_a_level_for_each_frame_is_that_of_folded_frames() -> None:
    x0 = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(10), **F64)
    z = KEY.tensor(x0.shape, **F64)
    sigma = torch.tensor([[0.1, 0.5, 2.0, 9.0], [0.3, 0.02, 40.0, 1.0]], **F64)
    edm = EDM()

    def fold(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(0, 1)

    def net(x: Tensor, t: Tensor) -> Tensor:
        at = t.reshape(-1, 1, 4, 1, 1) if x.ndim == 5 else t.reshape(-1, 1, 1, 1)
        return torch.sin(x + at)

    wanted = edm.training_losses(net, fold(x0), sigma.flatten(), noise=fold(z))["loss"].view(2, 4)
    options: dict[str, Any] = {"noise": KEY, "group_dim": 2}
    found = edm.training_losses(net, x0, sigma, **options, reduction="group")
    torch.testing.assert_close(found["loss"], wanted, rtol=1e-12, atol=0)
    found = edm.training_losses(net, x0, sigma, **options)
    torch.testing.assert_close(found["loss"], wanted.mean(1), rtol=1e-12, atol=0)
    u = lambda c: 0.3 * c  # noqa: E731
    found = edm.training_losses(net, x0, sigma, **options, reduction="group", logvar=u)
    in_u = 0.3 * sigma.log() / 4
    torch.testing.assert_close(found["loss"], wanted / in_u.exp() + in_u, rtol=1e-12, atol=1e-12)
    noised = edm.q_sample(x0, sigma, KEY, group_dim=2)
    torch.testing.assert_close(fold(noised), edm.q_sample(fold(x0), sigma.flatten(), fold(z)))


@pytest.mark.parametrize("groups", [False, True], ids=["samples", "frames"])
def test_robust_loss_and_perturbed_input(groups: bool) -> None:
    edm, gamma, d = EDM(0.7), 0.1, 0.7
    x0 = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(2), **F64)
    sigma = torch.tensor([0.02, 0.3, 2.0, 16.0], **F64)
    level = {"group_dim": 1} if groups else {}
    if groups:
        sigma = sigma.unsqueeze(1) * torch.tensor([1.0, 0.5, 2.0], **F64)
    s = sigma.reshape(4, -1, 1)
    r = (s**2 + d**2).sqrt()
    z, more = KEY.tensor(x0.shape, **F64), perturbation_key(KEY).tensor(x0.shape, **F64)
    given = []

    def model(x: Tensor, c_noise: Tensor) -> Tensor:
        given.append(x)
        return torch.tanh(x)

    options: Any = {"loss": "pseudo_huber", "delta": lambda sigma: 0.1 + sigma, **level}
    found = edm.training_losses(model, x0, sigma, noise=KEY, input_perturbation=gamma, **options)[
        "loss"
    ]
    x = (x0 + s * (z + gamma * more)) / r
    torch.testing.assert_close(given[0], x, rtol=1e-12, atol=1e-12)
    error = torch.tanh(x) - (s * x0 / d - d * z) / r
    delta = 0.1 + s
    wanted = (2 * delta * ((error**2 + delta**2).sqrt() - delta)).mean((1, 2))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="noise must be a PhiloxNoise or None with input_pert"):
        edm.training_losses(model, x0, sigma, noise=z, input_perturbation=gamma, **level)
    options["delta"] = lambda sigma: sigma[:1]
    with pytest.raises(ValueError, match="delta must return the shape of sigma"):
        edm.training_losses(model, x0, sigma, noise=z, **options)


def test_a_key_gives_each_frame_a_level() -> None:
    edm, x0 = EDM(), torch.randn(4, 3, 5, 2, generator=torch.Generator().manual_seed(1))
    levels = edm.sample_sigmas(4, KEY, groups=5)
    assert len(levels.unique()) == 20

    def model(x: Tensor, c_noise: Tensor) -> Tensor:
        assert c_noise.shape == (4, 5)
        return torch.tanh(x)

    drawn, given = (
        edm.training_losses(model, x0, sigma, noise=KEY, group_dim=2, reduction="group")["loss"]
        for sigma in (None, levels)
    )
    assert drawn.shape == (4, 5)
    assert torch.equal(drawn, given)
