"""How the tests of bad input ask: no kernel may run, and the error names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore._engine import dispatch, execute
from support.cases import LOSSES, OpCase

Op = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that accepts its arguments fails the test: bad input has to stop before it."""
    real = execute._C

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def call(self, *args: Any) -> Any:
            reason = real.call(*args)
            assert reason is not None, "a kernel ran on bad input"
            return reason

    def launch(*args: Any) -> Any:
        found = real.launch(*args)
        assert isinstance(found, int), "a kernel ran on bad input"
        return found

    if real is not None:
        monkeypatch.setattr(execute, "_C", Watched())
        monkeypatch.setattr(dispatch, "_launch", launch)


def refused(kind: type[Exception], match: str, f: Op, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(kind, match=match):
        f(*args, **kwargs)


def pair(device: str = "cpu", **kwargs: Any) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 4, 3, device=device, **kwargs)
    return x, y


def read_by(case: OpCase) -> list[str]:
    """The elementwise arguments an op reads; a loss may leave one of its three alone."""
    kind = case.options(1).get("prediction_type") if case in LOSSES else None
    unused = {"epsilon": "x0", "sample": "noise"}.get(kind or "")
    return [name for name in case.tensors if name != unused]


def any_of(case: OpCase) -> str:
    return "(" + "|".join(case.tensors) + ")"
