"""The callback of a loop: what it gets after a step, and what it may answer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, sampling, solvers

SIGMAS = torch.tensor([8.0, 5.0, 3.0, 1.2, 0.5, 0.15, 0.0], dtype=torch.float64)
KEY = PhiloxNoise(4)
TABLES = {
    "heun": solvers.heun_table(SIGMAS, prediction_type="sample"),
    "2m": solvers.dpmpp_2m_table(SIGMAS, prediction_type="sample"),
    "ancestral": solvers.euler_ancestral_table(SIGMAS, prediction_type="sample"),
}
each_table = pytest.mark.parametrize("name", TABLES)


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x / (1 + t.reshape(-1, 1).to(x.dtype))) + 0.1 * x


def start() -> Tensor:
    return 8 * torch.randn(2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def own_loop(table: solvers.SolverTable, x: Tensor) -> Tensor:
    """The loop on ``step``, with x halved and moved after every step."""
    history: tuple[Tensor, ...] = ()
    for i, row in enumerate(table.rows):
        noise = KEY.at(1 + i) if row.noisy else None
        x, history = table.step(i, x, model(x, table.timesteps[i].expand(2)), history, noise=noise)
        if i + 1 == len(table) or table.rows[i + 1].begins:
            x = 0.5 * x + row.step
    return x


@each_table
@pytest.mark.parametrize("recorded", [{}, {"differentiable": True}])
def test_the_loop_continues_with_the_answer(name: str, recorded: dict[str, bool]) -> None:
    table = TABLES[name]

    def callback(state: dict[str, Any]) -> Tensor:
        return 0.5 * state["x"] + state["i"]

    found = diffcore.sample(model, start(), table, noise=KEY, callback=callback, **recorded)
    assert torch.equal(found, own_loop(table, start()))


@each_table
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_flow_through_the_answer(name: str, checkpoint: bool) -> None:
    table, calls = TABLES[name], []

    def callback(state: dict[str, Any]) -> Tensor:
        calls.append(state["i"])
        return 0.5 * state["x"] + state["i"]

    def run(x: Tensor) -> Tensor:
        return diffcore.sample(
            model, x, table, noise=KEY, callback=callback, differentiable=True,
            checkpoint=checkpoint,
        )  # fmt: skip

    x, y = start().requires_grad_(), start().requires_grad_()
    (found,) = torch.autograd.grad(run(x).sin().sum(), x)
    (expected,) = torch.autograd.grad(own_loop(table, y).sin().sum(), y)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert calls == list(range(table.num_steps))


def test_an_answer_of_none_keeps_x() -> None:
    kept: list[Any] = []
    table = TABLES["heun"]
    found = diffcore.sample(
        model, start(), table, callback=lambda state: kept.append(copy.copy(state))
    )
    assert torch.equal(found, diffcore.sample(model, start(), table))
    assert kept[0].keys() == {"x", "i", "t", "sigma", "denoised"}
    for state, after in zip(kept, SIGMAS[1:], strict=True):
        exact = sampling.sample_heun(
            model, start(), [*SIGMAS[: state["i"] + 1].tolist(), float(after)]
        )
        torch.testing.assert_close(state["x"], exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda x: 3.0, TypeError, "callback must return a torch.Tensor or None, got float"),
        (lambda x: {"x": x}, TypeError, "callback must return a torch.Tensor or None, got dict"),
        (lambda x: x.float(), TypeError, "callback must return the dtype of x, torch.float64, got"),
        (lambda x: x[:1], ValueError, r"callback must return the shape of x, \(2, 3\), got"),
        (lambda x: x.to("meta"), ValueError, "callback must return the device of x, cpu, got meta"),
    ],
)
def test_wrong_answers(answer: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        diffcore.sample(model, start(), TABLES["2m"], callback=lambda state: answer(state["x"]))


def test_k_diffusion_ignores_answers_and_refuses_tensors() -> None:
    x = start()
    plain = sampling.sample_euler(model, x, SIGMAS)
    assert torch.equal(sampling.sample_euler(model, x, SIGMAS, callback=lambda _: True), plain)
    with pytest.raises(TypeError, match="callback must return None in a sampler of k-diffusion"):
        sampling.sample_euler(model, x, SIGMAS, callback=lambda state: state["x"])
