"""Loops with a hook before the model, and loops that autograd records."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, solvers
from diffcore.guidance import APG, CFG, RescaledCFG

SIGMAS = torch.tensor(
    [8.0, 5.0, 3.0, 2.0, 1.2, 0.8, 0.5, 0.3, 0.15, 0.05, 0.0], dtype=torch.float64
)
KEY = PhiloxNoise(4)


def model(x: Tensor, t: Tensor, scale: Any = 1.0) -> Tensor:
    s = t.reshape(-1, 1).to(x.dtype)
    return torch.tanh(scale * x / (1 + s)) + 0.1 * scale * x


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 8 * torch.randn(2, 3, generator=generator, dtype=dtype)


TABLES = {
    "euler": lambda: solvers.euler_table(SIGMAS, prediction_type="sample"),
    "heun": lambda: solvers.heun_table(SIGMAS, prediction_type="sample"),
    "2m": lambda: solvers.dpmpp_2m_table(SIGMAS, prediction_type="sample"),
    "ancestral": lambda: solvers.euler_ancestral_table(SIGMAS, prediction_type="sample"),
    "churn": lambda: solvers.euler_table(SIGMAS, s_churn=3.0, prediction_type="sample"),
}
each_table = pytest.mark.parametrize("name", TABLES)


# ---- gradients -----------------------------------------------------------------------------------


@each_table
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_through_ten_steps(name: str, checkpoint: bool) -> None:
    table = TABLES[name]()

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return diffcore.sample(
            model,
            x,
            table,
            noise=KEY,
            model_kwargs={"scale": scale},
            differentiable=True,
            checkpoint=checkpoint,
        )

    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = start().requires_grad_()
    found = run(x, scale)
    plain = diffcore.sample(model, x.detach(), table, noise=KEY, model_kwargs={"scale": scale})
    assert not plain.requires_grad
    assert torch.equal(found, plain)
    assert torch.autograd.gradcheck(run, (x, scale))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_under_guidance(checkpoint: bool) -> None:
    table = TABLES["2m"]()

    def run(x: Tensor, scale: Tensor) -> Tensor:
        return diffcore.sample(
            model,
            x,
            table,
            guidance=RescaledCFG(2.0, 0.5, interval=(0.0, 0.8)),
            model_kwargs={"scale": scale},
            uncond_kwargs={"scale": 0.4},
            dynamic_thresholding_ratio=None,
            differentiable=True,
            checkpoint=checkpoint,
        )

    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (start().requires_grad_(), scale))


class Wide(torch.nn.Module):
    """A model whose activations are much larger than the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(8, 512), torch.nn.Tanh(), torch.nn.Linear(512, 512), torch.nn.Tanh()
        )
        self.last = torch.nn.Linear(512, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.layers(x))


def test_a_checkpointed_loop_keeps_one_step_at_a_time() -> None:
    net = Wide()
    x = torch.randn(64, 8, requires_grad=True)
    parameters = {p.data_ptr() for p in net.parameters()}

    def most_bytes(steps: int, checkpoint: bool) -> int:
        alive: dict[int, int] = {}
        peak = 0

        class Held:
            def __init__(self, x: Tensor) -> None:
                nonlocal peak
                self.x = x
                self.counted = x.data_ptr() not in parameters
                if self.counted:
                    alive[id(self)] = x.numel() * x.element_size()
                    peak = max(peak, sum(alive.values()))

            def __del__(self) -> None:
                alive.pop(id(self), None)

        table = solvers.euler_table(torch.linspace(8, 0, steps + 1), prediction_type="sample")
        with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.x):
            out = diffcore.sample(net, x, table, differentiable=True, checkpoint=checkpoint)
            out.square().sum().backward()
        return peak

    one = most_bytes(1, False)
    assert most_bytes(10, False) > 9 * one
    assert most_bytes(10, True) < 1.3 * one


def test_a_checkpointed_loop_calls_the_callback_once() -> None:
    seen: list[int] = []
    x = start().requires_grad_()
    out = diffcore.sample(
        model,
        x,
        TABLES["heun"](),
        callback=lambda state: seen.append(state["i"]),
        differentiable=True,
        checkpoint=True,
    )
    out.sum().backward()
    assert seen == list(range(10))


def test_a_model_that_takes_gradients_of_its_own() -> None:
    """As guided-diffusion's cond_fn: also where the loop records nothing."""

    def guided(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(-(leaf - 1).square().sum(), leaf)
        return model(x, t) + 0.1 * slope

    table = TABLES["2m"]()
    found = diffcore.sample(guided, start(), table)
    expected = diffcore.sample(lambda x, t: model(x, t) - 0.2 * (x - 1), start(), table)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_wrong_ways_to_ask_for_gradients() -> None:
    table = TABLES["euler"]()
    with pytest.raises(ValueError, match="checkpoint must be False without differentiable=True"):
        diffcore.sample(model, start(), table, checkpoint=True)
    with pytest.raises(TypeError, match="differentiable must be a bool, got str"):
        diffcore.sample(model, start(), table, differentiable="yes")  # type: ignore[arg-type]
    rule = APG(2.0, momentum=-0.5)
    with pytest.raises(ValueError, match="checkpoint must be False under guidance with momentum"):
        diffcore.sample(
            model,
            start(),
            table,
            guidance=rule,
            uncond_kwargs={},
            differentiable=True,
            checkpoint=True,
        )


# ---- before_model --------------------------------------------------------------------------------


def test_the_known_part_is_put_in_before_each_call() -> None:
    known, z = torch.randn(2, 2, 3, dtype=torch.float64)
    mask = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)  # 1 where to sample
    seen: list[dict[str, Any]] = []

    def inpaint(state: dict[str, Any]) -> Tensor:
        seen.append(dict(state))
        noised = state["alpha"] * known + state["sigma"] * z
        return mask * state["x"] + (1 - mask) * noised

    got: list[Tensor] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        got.append(x)
        return model(x, t)

    table = TABLES["heun"]()
    found = diffcore.sample(watched, start(), table, before_model=inpaint)
    assert [state["i"] for state in seen] == list(range(10))
    begins = [r for r, row in enumerate(table.rows) if row.begins]
    for state, row in zip(seen, begins, strict=True):
        assert state["sigma"] == table.rows[row].sigma
        expected = mask * state["x"] + (1 - mask) * (known + state["sigma"] * z)
        assert torch.equal(got[row], expected)
    x, history = start(), ()
    for i, row in enumerate(table.rows):
        if row.begins:
            x = mask * x + (1 - mask) * (known + row.sigma * z)
        t = table.timesteps[i].expand(2)
        x, history = table.step(i, x, model(x, t), history)
    assert torch.equal(found, x)


def test_before_model_may_leave_x() -> None:
    table = TABLES["2m"]()
    plain = diffcore.sample(model, start(), table)
    assert torch.equal(diffcore.sample(model, start(), table, before_model=lambda _: None), plain)


def test_the_state_before_the_model_is_only_read() -> None:
    def write(state: dict[str, Any]) -> None:
        state["x"] = state["x"] * 2

    message = "state must not be changed, because it is only read; return another x instead"
    with pytest.raises(TypeError, match=message):
        diffcore.sample(model, start(), TABLES["euler"](), before_model=write)
    kept: list[Any] = []
    diffcore.sample(
        model, start(), TABLES["euler"](), before_model=lambda s: kept.append(copy.deepcopy(s))
    )
    kept[0]["x"] = 3
    kept[0]["t"] = None
    assert pickle.loads(pickle.dumps(kept[0])) == kept[0]


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda x: 3.0, TypeError, "before_model must return a torch.Tensor or None, got float"),
        (lambda x: x.float(), TypeError, "before_model must return the dtype of x"),
        (lambda x: x[:1], ValueError, r"before_model must return the shape of x, \(2, 3\), got"),
        (lambda x: x.to("meta"), ValueError, "before_model must return the device of x, cpu, got"),
    ],
)
def test_wrong_answers(answer: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        diffcore.sample(
            model, start(), TABLES["euler"](), before_model=lambda state: answer(state["x"])
        )
    with pytest.raises(TypeError, match="before_model must be a function, got float"):
        diffcore.sample(model, start(), TABLES["euler"](), before_model=2.0)  # type: ignore[arg-type]


def test_hooks_and_guidance_together() -> None:
    table = TABLES["2m"]()
    x = start().requires_grad_()
    conditions: dict[str, Any] = {"model_kwargs": {"scale": 0.9}, "uncond_kwargs": {"scale": 0.4}}
    found = diffcore.sample(
        model,
        x,
        table,
        guidance=CFG(2.0),
        before_model=lambda state: 0.9 * state["x"],
        differentiable=True,
        checkpoint=True,
        **conditions,
    )
    y, history = start(), ()
    for i in range(len(table)):
        y = 0.9 * y
        t = table.timesteps[i].expand(2)
        m, u = model(y, t, 0.9), model(y, t, 0.4)
        y, history = table.step(i, y, m, history, model_output_uncond=u, guidance_scale=2.0)
    assert torch.equal(found.detach(), y)
    assert found.requires_grad
