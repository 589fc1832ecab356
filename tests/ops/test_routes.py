"""Every route names the same wrong argument, and notices the same change before the backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from diffcore import PhiloxNoise, ops
from diffcore._engine import dispatch
from support.cases import NOISE_TABLE, without_kernels


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


ROUTES: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "function mode": Functions,
    "default device": lambda: torch.device("cpu"),
    "dispatch mode": Dispatches,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "without kernels": without_kernels,
}

X, SHORT = torch.randn(4, 3), torch.randn(4)
STEPS = torch.tensor([0, 1, 2])
MISTAKES: dict[str, tuple[Callable[[Callable[[Tensor], Tensor]], Any], type[Exception], str]] = {
    "short noise": (lambda f: ops.add_noise(f(X), f(SHORT), 0.8, 0.6), ValueError, "noise"),
    "integer noise": (lambda f: ops.add_noise(f(X), f(X.int()), 0.8, 0.6), TypeError, "noise"),
    "too many numbers": (
        lambda f: ops.add_noise(f(X), f(X), torch.rand(3), 0.6), ValueError, "alpha",
    ),
    "generated, too many numbers": (
        lambda f: ops.add_noise(f(X), PhiloxNoise(1), 0.8, torch.rand(3)), ValueError, "sigma",
    ),
    "an integer table": (
        lambda f: ops.q_sample(f(X), 0, f(X), NOISE_TABLE.long()), TypeError, "table",
    ),
    "too few steps": (lambda f: ops.q_sample(f(X), STEPS, f(X), NOISE_TABLE), ValueError, "t"),
    "a negative step": (lambda f: ops.q_sample(f(X), -1, f(X), NOISE_TABLE), ValueError, "t"),
    "a short x_t": (lambda f: ops.predict_x0(f(X), f(SHORT), 0.8, 0.6), ValueError, "model_output"),
    "a short target": (lambda f: ops.denoising_loss(f(X), f(X), f(SHORT)), ValueError, "noise"),
    "too many weights": (
        lambda f: ops.denoising_loss(f(X), f(X), f(X), weight=torch.rand(3)), ValueError, "weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_names_the_argument_on_every_route(mistake: str, route: str) -> None:
    call, kind, name = MISTAKES[mistake]
    with ROUTES[route]() as mode:
        change = mode.from_tensor if isinstance(mode, FakeTensorMode) else lambda x: x
        with pytest.raises(kind, match=f"^{name}[ =]"):
            call(change)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_names_the_argument_on_the_operator_route(
    mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_compiling", lambda: True)
    call, kind, name = MISTAKES[mistake]
    with pytest.raises(kind, match=f"^{name}[ =]"):
        call(lambda x: x)


@pytest.mark.parametrize("route", ["plain", "function mode", "default device", "dispatch mode"])
@pytest.mark.parametrize("changed", ["alpha", "t", "weight"])
def test_a_change_before_the_backward_pass_is_noticed(changed: str, route: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    alpha, t, weight = torch.full((4,), 0.8), torch.zeros(4, dtype=torch.int64), torch.ones(4)
    with ROUTES[route]():
        if changed == "alpha":
            y = ops.add_noise(x, X, alpha, 0.6)
        elif changed == "t":
            y = ops.q_sample(x, t, X, NOISE_TABLE)
        else:
            noise = X.clone().requires_grad_()  # the loss reads its weight again for this gradient
            y = ops.denoising_loss(x, X, noise, weight=weight)
        {"alpha": alpha, "t": t, "weight": weight}[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
