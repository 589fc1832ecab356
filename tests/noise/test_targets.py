"""x_t and the model's target in one launch: ``return_target`` of add_noise and q_sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from support.bounds import assert_same_bits, each_dtype
from support.cases import NOISE_TABLE, steps_of
from support.refusals import refused

KEY = PhiloxNoise(2**63 + 5, sample_ids=2**32 - 2, stream=9, first_element=64)
TARGETS = ("epsilon", "v_prediction", "flow_prediction")
LEVELS: dict[str, Callable[[], dict[str, Any]]] = {
    "numbers": lambda: {"alpha": 0.8, "sigma": 0.6},
    "0-dim": lambda: {"alpha": NOISE_TABLE[7, 0], "sigma": NOISE_TABLE[7, 1]},
    "rows": lambda: {
        "alpha": NOISE_TABLE[steps_of(5), 0].float(),
        "sigma": NOISE_TABLE[steps_of(5), 1],
    },
    "tables": lambda: {"alpha": NOISE_TABLE[:, 0], "sigma": NOISE_TABLE[:, 1], "t": steps_of(5)},
    "a step": lambda: {"alpha": NOISE_TABLE[:, 0], "sigma": NOISE_TABLE[:, 1], "t": 7},
}
each_target = pytest.mark.parametrize("kind", TARGETS)


def target(kind: str, x0: Tensor, noise: Tensor, levels: dict[str, Any]) -> Tensor:
    if kind == "v_prediction":
        return ops.velocity(x0, noise, **levels)
    return noise if kind == "epsilon" else noise - x0


@each_target
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@each_dtype
def test_targets_are_those_made_alone(
    kind: str, levels: Callable[[], dict[str, Any]], dtype: torch.dtype, device: str
) -> None:
    at = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in levels().items()}
    for shape in ((5,), (5, 1), (5, 65), (5, 3, 700)):
        x0 = torch.randn(shape, device=device).to(dtype)
        noise = KEY.tensor(shape, dtype=dtype, device=device)
        wanted = ops.add_noise(x0, noise, **at), target(kind, x0, noise, at)
        for form in (noise, KEY):
            assert_same_bits(ops.add_noise(x0, form, **at, return_target=kind), wanted)


@each_target
@pytest.mark.parametrize("t", [7, "rows"], ids=str)
def test_targets_of_q_sample(kind: str, t: Any, device: str) -> None:
    x0 = torch.randn(5, 33, device=device)
    table = NOISE_TABLE.to(device)
    t = steps_of(5).to(device) if t == "rows" else t
    noise = KEY.tensor((5, 33), device=device)
    levels = {"alpha": table[:, 0], "sigma": table[:, 1], "t": t}
    wanted = ops.q_sample(x0, t, noise, table), target(kind, x0, noise, levels)
    for form in (noise, KEY):
        assert_same_bits(ops.q_sample(x0, t, form, table, return_target=kind), wanted)


@each_target
@pytest.mark.parametrize("drawn", [False, True], ids=["tensor", "key"])
def test_gradients_of_targets(kind: str, drawn: bool, device: str) -> None:
    x0, noise = torch.randn(2, 5, 3, dtype=torch.float64, device=device)
    at = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in LEVELS["tables"]().items()}
    leaves = (x0.requires_grad_(),) if drawn else (x0.requires_grad_(), noise.requires_grad_())

    def f(x0: Tensor, noise: Any = KEY) -> Any:
        return ops.add_noise(x0, noise, **at, return_target=kind)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    for i in range(2):
        if not (drawn and kind == "epsilon" and i):  # of x_0 no function at all
            assert torch.autograd.gradcheck(lambda *x, i=i: f(*x)[i], leaves)


def test_an_infinite_x0_leaves_the_noise_alone(device: str) -> None:
    x0 = torch.full((2, 9), torch.inf, device=device)
    _, noise = ops.add_noise(x0, KEY, 0.8, 0.6, return_target="epsilon")
    assert_same_bits(noise, KEY.tensor((2, 9), device=device))


def test_wrong_targets() -> None:
    x0 = torch.randn(2, 9)
    for f in (
        lambda **kwargs: ops.add_noise(x0, KEY, 0.8, 0.6, **kwargs),
        lambda **kwargs: ops.q_sample(x0, 3, KEY, NOISE_TABLE, **kwargs),
    ):
        refused(
            ValueError,
            "^return_target must be one of .*; its target is x0",
            f,
            return_target="sample",
        )
        for bad in ("eps", "", 3, True):
            kind = ValueError if isinstance(bad, str) else TypeError
            refused(kind, "^return_target must be", f, return_target=bad)
        refused(ValueError, "^out must be None", f, return_target="epsilon", out=x0.clone())
