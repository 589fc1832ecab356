"""FlowMatching's training step: formulas, the Gaussian world, keys, groups and masks."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcore import FlowMatching, PhiloxNoise
from diffcore.noise import perturbation_key
from support.flows import CONVENTIONS, MEAN, STD, path, target, world

KEY = PhiloxNoise(2**35 + 1, sample_ids=3, stream=5)
each_convention = pytest.mark.parametrize("make", CONVENTIONS.values(), ids=CONVENTIONS)


def column(t: Tensor, like: Tensor) -> Tensor:
    return t.view(-1, *[1] * (like.ndim - 1))


@each_convention
@pytest.mark.parametrize("by_key", [True, False], ids=["key", "tensor"])
def test_a_step_is_its_formula(make: Any, by_key: bool) -> None:
    flow = make()
    x0 = torch.randn(5, 3, 4, dtype=torch.float64)
    eps = KEY.tensor(x0.shape, dtype=x0.dtype)
    noise = KEY if by_key else eps
    t = torch.rand(5, dtype=torch.float64)
    alpha, beta = path(flow, column(t, x0))
    x_t = alpha * x0 + beta * eps
    torch.testing.assert_close(flow.q_sample(x0, t, noise), x_t, rtol=1e-13, atol=1e-13)
    called = []
    output = torch.randn_like(x0, requires_grad=True)

    def model(x: Tensor, told: Tensor, scale: float) -> Tensor:
        called.append((x, told))
        return scale * output

    losses = flow.training_losses(model, x0, t, {"scale": 2.0}, noise)
    assert losses.keys() == {"loss", "mse"}
    (x, told), residual = called[0], 2 * output - target(flow, x0, eps)
    torch.testing.assert_close(x, x_t, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(told, flow.num_train_timesteps * t, rtol=1e-15, atol=0)
    wanted = residual.square().flatten(1).mean(1)
    torch.testing.assert_close(losses["loss"], wanted, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(losses["loss"].mean(), output)
    (wanted_slope,) = torch.autograd.grad(wanted.mean(), output)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-12, atol=1e-15)

    made = target(flow, x0, eps)
    torch.testing.assert_close(flow.velocity(x0, noise), made, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(flow.predict_x0(made, x_t, t), x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow.predict_noise(made, x_t, t), eps, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise_at", [0, 1])
def test_weights_are_functions_of_sigma(noise_at: int) -> None:
    x0 = torch.randn(5, 7, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    sigma = t if noise_at == 1 else 1 - t
    plain = FlowMatching(noise_at=noise_at, target="data_minus_noise")

    def model(x: Tensor, told: Tensor) -> Tensor:
        return 0.5 * x

    unweighted = plain.training_losses(model, x0, t, noise=KEY)["loss"]
    for weighting, weight in (
        ("sigma_sqrt", sigma**-2),
        ("cosmap", 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))),
        (lambda s: 1 + s**3, 1 + sigma**3),
    ):
        flow = FlowMatching(noise_at=noise_at, target="data_minus_noise", weighting=weighting)
        found = flow.training_losses(model, x0, t, noise=KEY)["loss"]
        torch.testing.assert_close(found, weight * unweighted, rtol=1e-12, atol=0)


@each_convention
def test_the_least_loss_is_the_conditional_variance(make: Any) -> None:
    """Var(target | x_t) = STD^2 / (alpha^2 STD^2 + beta^2); its gradient there is 0."""
    flow, n = make(), 60_000
    x0 = MEAN + STD * torch.randn(n, 3, dtype=torch.float64)
    best = world(flow)
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)

    def model(x: Tensor, told: Tensor) -> Tensor:
        return scale * best(x, told)

    for t in (0.2, 0.7):
        alpha, beta = path(flow, torch.tensor(t, dtype=torch.float64))
        losses = flow.training_losses(model, x0, t, noise=KEY)["loss"]
        per_entry = STD**2 / (alpha**2 * STD**2 + beta**2)
        # Of n losses, each a mean of three squares: Var = sum 2 v^2 / 9.
        error = (2 * per_entry**2).sum().sqrt() / 3 / n**0.5
        assert abs(losses.mean() - per_entry.mean()) < 5 * error
        slopes = torch.autograd.grad(losses.mean(), scale)[0]
        size = best(flow.q_sample(x0, t, KEY), torch.full((n,), t * flow.num_train_timesteps))
        error_of_slope = 2 / 3 * per_entry.sqrt() * size.square().mean(0).sqrt() / n**0.5
        assert (slopes.abs() < 5 * error_of_slope).all()


def test_one_key_replays_times_and_noise() -> None:
    flow = FlowMatching(timestep_density="logit_normal", shift=3.0, weighting="cosmap")
    x0, seen = torch.randn(8, 6), []

    def model(x: Tensor, told: Tensor) -> Tensor:
        seen.append((x, told))
        return 0.3 * x

    torch.manual_seed(0)
    first = flow.training_losses(model, x0, noise=KEY)["loss"]
    torch.manual_seed(1)
    t = flow.sample_timesteps(8, KEY)
    again = flow.training_losses(model, x0, t, noise=KEY)["loss"]
    assert torch.equal(first, again)
    for one, other in zip(*seen, strict=True):
        assert torch.equal(one, other)
    tail = flow.training_losses(model, x0[5:], noise=KEY.for_samples(3 + 5))["loss"]
    assert torch.equal(first[5:], tail)  # in any batch
    assert not torch.equal(flow.sample_timesteps(8, KEY.at(6)), t)
    # Without a key torch's generator governs, and the noise may be a tensor.
    torch.manual_seed(2)
    drawn = flow.training_losses(model, x0)["loss"]
    torch.manual_seed(2)
    assert torch.equal(flow.training_losses(model, x0)["loss"], drawn)
    with_tensor = flow.training_losses(model, x0, t, noise=KEY.tensor(x0.shape))["loss"]
    torch.testing.assert_close(with_tensor, first, rtol=1e-6, atol=0)


@pytest.mark.parametrize("preset", ["sd3", "ot_cfm", "openpi"])
def test_a_resumed_run_has_the_same_weights(preset: str) -> None:
    flow = getattr(FlowMatching, preset)(stratified=True)
    data = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))

    def begin() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(4)
        net = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))
        return net, torch.optim.AdamW(net.parameters(), lr=1e-2)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        def model(x: Tensor, told: Tensor) -> Tensor:
            output: Tensor = net(torch.cat([x, told[:, None] / flow.num_train_timesteps], 1))
            return output

        for step in steps:
            ids = torch.arange(8) + 8 * (step % 5)
            key = PhiloxNoise(11, sample_ids=ids, stream=step)
            optimizer.zero_grad()
            flow.training_losses(model, data[ids], noise=key)["loss"].mean().backward()
            optimizer.step()

    net, optimizer = begin()
    train(net, optimizer, range(12))
    other, its_optimizer = begin()
    train(other, its_optimizer, range(7))
    file = io.BytesIO()
    torch.save([other.state_dict(), its_optimizer.state_dict()], file)
    torch.manual_seed(99)  # another process
    other, its_optimizer = begin()
    for part, state in zip(
        (other, its_optimizer), torch.load(io.BytesIO(file.getvalue())), strict=True
    ):
        part.load_state_dict(state)
    train(other, its_optimizer, range(7, 12))
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_time_for_each_group() -> None:
    flow = FlowMatching(noise_at=0, target="data_minus_noise", weighting="cosmap")
    x0 = torch.randn(3, 2, 5, 4, dtype=torch.float64)  # [B, C, F, N]
    t = flow.sample_timesteps(x0.shape, KEY, group_dim=2, dtype=torch.float64)
    assert t.shape == (3, 5)
    assert t.unique().numel() == 15
    called = []

    def model(x: Tensor, told: Tensor) -> Tensor:
        called.append((x, told))
        return 0.5 * x

    options: dict[str, Any] = {"noise": KEY, "group_dim": 2}
    by_group = flow.training_losses(model, x0, reduction="group", **options)["loss"]
    eps = KEY.tensor(x0.shape, dtype=x0.dtype)
    at = t.view(3, 1, 5, 1)
    x_t = at * x0 + (1 - at) * eps
    torch.testing.assert_close(called[0][0], x_t, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(called[0][1], 1000 * t, rtol=1e-15, atol=0)
    weight = 2 / (torch.pi * (1 - 2 * t + 2 * t**2))
    wanted = weight * (0.5 * x_t - (x0 - eps)).square().mean((1, 3))
    torch.testing.assert_close(by_group, wanted, rtol=1e-12, atol=0)
    by_sample = flow.training_losses(model, x0, **options)["loss"]
    torch.testing.assert_close(by_sample, wanted.mean(1), rtol=1e-12, atol=0)
    keyed = KEY.for_groups(torch.arange(15).view(3, 5) + 2, dim=2)
    moved = KEY.for_groups(torch.arange(15).view(3, 5) + 3, dim=2)
    of_groups = flow.sample_timesteps(x0.shape, keyed, group_dim=2)
    assert torch.equal(
        flow.sample_timesteps(x0.shape, moved, group_dim=2).flatten()[:-1], of_groups.flatten()[1:]
    )


@pytest.mark.parametrize("loss", ["pseudo_huber", "smooth_l1"])
@pytest.mark.parametrize("form", ["number", "tensor", "function"])
def test_robust_losses_and_input_perturbation(loss: str, form: str) -> None:
    flow = FlowMatching(noise_at=0, target="data_minus_noise", sigma_min=0.1, weighting="cosmap")
    x0, t = torch.randn(5, 6, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    sigma = 1 - t
    delta = {"number": torch.full_like(t, 0.4), "tensor": 0.1 + t, "function": 1 + sigma**2}[form]
    given = {"number": 0.4, "tensor": delta, "function": lambda s: 1 + s**2}[form]
    inputs = []

    def model(x: Tensor, told: Tensor) -> Tensor:
        inputs.append(x)
        return torch.sin(x)

    options: dict[str, Any] = {"loss": loss, "delta": given, "input_perturbation": 0.3}
    found = flow.training_losses(model, x0, t, noise=KEY, **options)["loss"]
    eps = KEY.tensor(x0.shape, dtype=x0.dtype)
    second = perturbation_key(KEY).tensor(x0.shape, dtype=x0.dtype)
    alpha, beta = path(flow, t.unsqueeze(1))
    x_t = alpha * x0 + beta * (eps + 0.3 * second)
    torch.testing.assert_close(inputs[0], x_t, rtol=1e-12, atol=1e-13)
    e, d = torch.sin(x_t) - target(flow, x0, eps), delta.unsqueeze(1)
    if loss == "pseudo_huber":
        each = 2 * d * ((e**2 + d**2).sqrt() - d)
    else:
        each = torch.where(e.abs() < d, e**2 / (2 * d), e.abs() - d / 2)
    weight = 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
    torch.testing.assert_close(found, weight * each.mean(1), rtol=1e-10, atol=0)


def test_a_mask() -> None:
    flow = FlowMatching()
    x0, t = torch.randn(4, 3, 5, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    q = (torch.rand(4, 1, 5) > 0.4).double()
    eps = KEY.tensor(x0.shape, dtype=x0.dtype)

    def model(x: Tensor, told: Tensor) -> Tensor:
        return 0.5 * x

    squares = q * (0.5 * flow.q_sample(x0, t, KEY) - (eps - x0)) ** 2
    found = flow.training_losses(model, x0, t, noise=KEY, mask=q, mask_reduction="all")["loss"]
    torch.testing.assert_close(found, squares.mean((1, 2)), rtol=1e-12, atol=0)
    found = flow.training_losses(model, x0, t, noise=KEY, mask=q)["loss"]
    counted = 3 * q.sum((1, 2))
    torch.testing.assert_close(found, squares.sum((1, 2)) / counted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_and_autocast(dtype: torch.dtype) -> None:
    flow = FlowMatching.sd3()
    x0, t = torch.randn(4, 8), flow.sample_timesteps(4, KEY)
    assert t.dtype == torch.float32
    net = nn.Linear(8, 8)

    def model(x: Tensor, told: Tensor) -> Tensor:
        assert told.dtype == torch.float32
        output: Tensor = net(x)
        return output

    with torch.autocast("cpu", torch.bfloat16):
        under = flow.training_losses(model, x0, noise=KEY)["loss"]
    assert under.dtype == torch.float32
    with torch.no_grad():
        plain = flow.training_losses(model, x0, noise=KEY)["loss"]
    torch.testing.assert_close(under, plain, rtol=0.05, atol=0.02)
    net.to(dtype)
    x16 = x0.to(dtype)
    found = flow.training_losses(model, x16, noise=KEY)["loss"]
    assert found.dtype == torch.float32
    eps = KEY.tensor(x16.shape, dtype=dtype).double()
    x_t = flow.q_sample(x16, t, KEY)
    wanted = (net(x_t).double() - (eps - x16.double())).square().mean(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("given", [True, False], ids=["t given", "t drawn"])
def test_compiled_without_a_break(given: bool) -> None:
    flow = FlowMatching.ot_cfm(0.01, timestep_density="logit_normal", weighting="cosmap")
    x0 = torch.randn(4, 8)
    weight = torch.randn(8, 8, requires_grad=True)

    def step(x0: Tensor, t: Tensor | None, seed: Tensor) -> Tensor:
        def model(x: Tensor, told: Tensor) -> Tensor:
            return x @ weight + told.unsqueeze(1)

        return flow.training_losses(model, x0, t, noise=PhiloxNoise(seed))["loss"].mean()

    t, seed = (torch.rand(4) if given else None), torch.tensor(7)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(x0, t, seed)
    wanted = step(x0, t, seed)
    torch.testing.assert_close(found, wanted)
    for a, b in zip(*(torch.autograd.grad(x, weight) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b)
