"""FlowMatchEulerDiscreteScheduler, fused: schedules, noise, tokens, starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore.solvers import NoiseLevels, flow_euler_table, renoise_table
from support.fused import (
    STEPS,
    check_closer,
    check_exact,
    check_philox,
    check_same_steps,
    check_starts,
    check_steps,
    check_walk,
    samples,
)

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

CONFIGS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "terminal": {"shift_terminal": 0.1, "shift": 2.0},
    "mu": {"use_dynamic_shifting": True},
    "mu_linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "inverted": {"invert_sigmas": True},
    "stochastic": {"stochastic_sampling": True, "shift": 3.0},
    "stochastic_inverted": {"stochastic_sampling": True, "invert_sigmas": True},
}
IDS = list(CONFIGS)


def maker(name: str = "plain") -> Callable[[], Any]:
    return lambda: diffusers.FlowMatchEulerDiscreteScheduler(**CONFIGS[name])


def counted(name: str, steps: int) -> dict[str, Any]:
    return {"num_inference_steps": steps, **({"mu": 0.9} if name.startswith("mu") else {})}


@pytest.mark.parametrize("name", IDS)
def test_steps(name: str) -> None:
    drawn_in = torch.float32
    check_steps(maker(name), [counted(name, n) for n in STEPS], drawn_in=drawn_in)


@pytest.mark.parametrize("name", IDS)
def test_walks(name: str) -> None:
    check_walk(maker(name), counted(name, 10))
    check_starts(maker(name), steps=counted(name, 10))


@pytest.mark.parametrize("name", ["shift", "stochastic"])
def test_16_bits(name: str) -> None:
    check_closer(maker(name), drawn_in=torch.float32)


def test_own_sigmas_and_timesteps() -> None:
    sigmas, times = [1.0, 0.7, 0.7, 0.2], [990.0, 700.0, 650.0, 111.0]
    for given in ({"sigmas": sigmas}, {"timesteps": times}, {"sigmas": sigmas, "timesteps": times}):
        check_walk(maker("shift"), given)
        check_steps(maker("shift"), [given])


def test_noise_by_a_key() -> None:
    check_philox(maker("stochastic"))


def test_tables_are_those_of_the_solvers() -> None:
    for name in ("shift", "stochastic", "karras"):
        scheduler = fuse(maker(name)(), rules="exact")
        scheduler.set_timesteps(7)
        levels = NoiseLevels.from_flow(
            scheduler.sigmas.double(), timesteps=scheduler.timesteps.double()
        )
        make = renoise_table if name == "stochastic" else flow_euler_table
        wanted = make(levels, prediction_type="flow_prediction")
        check_same_steps(table_of(scheduler, rules="exact"), wanted)
        check_exact(maker(name))


def test_inverted_sigmas_are_the_signal() -> None:
    scheduler = maker("inverted")()
    scheduler.set_timesteps(5)
    table = table_of(scheduler)
    assert table.sigma[0] == pytest.approx(1.0)
    x0, noise = samples(), samples(seed=1)
    for i, row in enumerate(table.rows):
        x = row.alpha * x0 + row.sigma * noise
        torch.testing.assert_close(table.denoised(i, x, x0 - noise), x0, atol=1e-5, rtol=1e-5)


# ---- tokens with a sigma each ------------------------------------------------------------------


def of_tokens(sigmas: Tensor, x: Tensor, m: Tensor, tokens: Tensor, noise: Tensor | None) -> Tensor:
    """Token by token, in float64."""
    found = torch.empty_like(x, dtype=torch.float64)
    x, m = x.double(), m.double()
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            sigma = float(tokens[b, i]) / 1000
            after = max((s for s in sigmas.tolist() if s < sigma - 1e-6), default=0.0)
            if noise is None:
                found[b, i] = x[b, i] + (sigma - after) * m[b, i]
            else:
                x0 = x[b, i] - sigma * m[b, i]
                found[b, i] = (1 - after) * x0 + after * noise[b, i].double()
    return found


@pytest.mark.parametrize("name", ["shift", "inverted", "stochastic", "stochastic_inverted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens(name: str, dtype: torch.dtype) -> None:
    stock, fused = maker(name)(), fuse(maker(name)())
    generators = [torch.Generator().manual_seed(2) for _ in range(3)]
    for scheduler in (stock, fused):
        scheduler.set_timesteps(8)
    x, m = (samples((2, 5, 6), seed=s).to(dtype) for s in (1, 2))
    for i, t in enumerate(stock.timesteps):
        tokens = stock.timesteps[torch.arange(10).view(2, 5) % (8 - i) + i].clone()
        tokens[0, 0], tokens[1, 2] = 0.0, 0.97 * t
        noise = None
        if name.startswith("stochastic"):
            noise = torch.randn(x.shape, generator=generators[2])
        truth = of_tokens(stock.sigmas, x, m, tokens, noise)
        wanted, came = (
            scheduler.step(m, t, x, generator=g, per_token_timesteps=tokens).prev_sample
            for scheduler, g in zip((stock, fused), generators, strict=False)
        )
        assert came.dtype == wanted.dtype == torch.float32
        errors = [float((y.double() - truth).abs().max()) for y in (came, wanted)]
        assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float32).eps * truth.abs().max()
        assert torch.equal(generators[0].get_state(), generators[1].get_state())
        assert stock.step_index == fused.step_index == i + 1
    assert not fused.fallbacks


class Read(TorchDispatchMode):
    """Counts how often a tensor is read by the host."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["shift", "stochastic"])
def test_tokens_are_not_read_by_the_host(name: str) -> None:
    fused = fuse(maker(name)())
    fused.set_timesteps(4)
    x = samples((2, 5, 6))
    tokens = fused.timesteps[:1].expand(2, 5)
    fused.step(x, fused.timesteps[0], x, per_token_timesteps=tokens)
    with Read() as read:
        fused.step(x, fused.timesteps[1], x, per_token_timesteps=tokens)
        assert read.count == 0
        float(tokens[0, 0])
    assert read.count == 1


def test_tokens_of_transposed_samples() -> None:
    fused, stock = fuse(maker("shift")()), maker("shift")()
    for scheduler in (stock, fused):
        scheduler.set_timesteps(4)
    x, m = (samples((2, 6, 5), seed=s).transpose(1, 2) for s in (1, 2))
    t = stock.timesteps[1]
    tokens = stock.timesteps[:1].expand(2, 5)
    came, wanted = (
        s.step(m, t, x, per_token_timesteps=tokens, return_dict=False)[0] for s in (fused, stock)
    )
    torch.testing.assert_close(came, wanted, atol=1e-6, rtol=1e-6)
    assert not fused.fallbacks


def test_tokens_of_another_shape_go_to_diffusers() -> None:
    fused = fuse(maker("shift")())
    fused.set_timesteps(4)
    tokens = torch.full((1, 5), 500.0)
    x = samples((2, 5, 6))
    fused.step(x, fused.timesteps[0], x, per_token_timesteps=tokens)
    assert list(fused.fallbacks) == [
        "per_token_timesteps of shape (1, 5) for samples of shape (2, 5, 6)"
    ]


def test_tokens_with_a_noise_key() -> None:
    found = []
    for _ in range(2):
        fused = fuse(maker("stochastic")(), noise="philox")
        fused.set_timesteps(4)
        t, x = fused.timesteps[0], samples((2, 5, 8))
        tokens = t.expand(2, 5)
        args = {"generator": torch.Generator().manual_seed(3), "return_dict": False}
        found.append(fused.step(x, t, x, per_token_timesteps=tokens, **args)[0])
        fused.set_timesteps(4)
        args["generator"] = torch.Generator().manual_seed(3)
        found.append(fused.step(x, t, x, **args)[0])
    assert torch.equal(found[0], found[2])
    # All tokens at the step's own level: the step without tokens, with the same noise.
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


# ---- noising -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("begin", [None, 3])
def test_scale_noise(dtype: torch.dtype, begin: int | None) -> None:
    stock, fused = maker("shift")(), fuse(maker("shift")())
    x, noise = samples((3, 4, 6, 6)).to(dtype), samples((3, 4, 6, 6), seed=1).to(dtype)
    for scheduler in (stock, fused):
        scheduler.set_timesteps(8)
        if begin is not None:
            scheduler.set_begin_index(begin)
    for within in (False, True):
        for rows in ([2], [5, 5, 5], [0, 3, 7]):
            wanted, came = (
                s.scale_noise(x, s.timesteps[torch.tensor(rows)], noise) for s in (stock, fused)
            )
            index = ([4] if within else [3]) if begin is not None else rows
            sigma = stock.sigmas.double()[index].view(-1, 1, 1, 1)
            truth = sigma * noise.double() + (1 - sigma) * x.double()
            errors = [float((y.double() - truth).abs().max()) for y in (came, wanted)]
            assert came.dtype == wanted.dtype == dtype
            eps = torch.finfo(dtype).eps
            assert errors[0] <= 2 * errors[1] + eps * float(truth.abs().max())
            if dtype == torch.bfloat16:
                assert errors[0] <= errors[1]
        for scheduler in (stock, fused):
            scheduler.step(x, scheduler.timesteps[3], x)
    assert not fused.fallbacks


def test_scale_noise_without_noise() -> None:
    fused = fuse(maker()())
    fused.set_timesteps(4)
    with pytest.raises(TypeError, match="noise must be a torch"):
        fused.scale_noise(samples(), fused.timesteps[:1])


def test_an_index_is_refused_as_in_diffusers() -> None:
    fused = fuse(maker()())
    fused.set_timesteps(4)
    with pytest.raises(ValueError, match="Passing integer indices"):
        fused.step(samples(), 3, samples())
