"""One public call as a function of its tensors, which every route can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcore import PhiloxNoise
from support.op_case import Shape

Function = Callable[..., tuple[Tensor, ...]]


def nothing() -> None:
    """The object of a call that has none."""


@dataclass(frozen=True)
class Case:
    """A public function or method, and how to call it.

    ``subject`` makes the object that holds state: a diffusion, a table, a noise key. A new one is
    cold: its first call fills its caches.
    """

    name: str
    public: str  # its row in docs/routes.md
    kind: str  # which kernels it runs
    call: Callable[[Any, dict[str, Tensor]], Any]  # (subject, arguments by name)
    tensors: tuple[str, ...]  # elementwise arguments ``[B, ...]``
    differentiable: tuple[str, ...] = ()
    others: Callable[[int], dict[str, Tensor]] = lambda batch: {}  # coefficients, tables, timesteps
    subject: Callable[[], Any] = nothing
    reading: Case | None = None  # the same call, which reads the noise that this one generates

    @property
    def stateful(self) -> bool:
        """Whether the object fills caches in its first call."""
        return self.subject is not nothing and not isinstance(self.subject(), PhiloxNoise)

    def make(self, shape: Shape, dtype: torch.dtype, *, seed: int = 0) -> Call:
        """A call on random values, which are the same for every dtype up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        tensors = {name: _values(name, shape, generator).to(dtype) for name in self.tensors}
        return Call(self, tensors, self.others(shape[0]))


@dataclass(frozen=True)
class Call:
    """A case with its arguments."""

    case: Case
    tensors: dict[str, Tensor]
    others: dict[str, Tensor]

    @property
    def values(self) -> tuple[Tensor, ...]:
        return tuple(self.tensors.values())

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype

    @property
    def needs(self) -> tuple[bool, ...]:
        return tuple(name in self.case.differentiable for name in self.tensors)

    def of_all(self, subject: Any) -> Function:
        """The call as a function of every tensor: the elementwise ones, then the others."""
        names, call = (*self.tensors, *self.others), self.case.call

        def f(*given: Tensor) -> tuple[Tensor, ...]:
            return flat(call(subject, dict(zip(names, given, strict=True))))

        return f

    def of_tensors(self, subject: Any) -> Function:
        """The call as a function of the elementwise tensors; the others are closed over."""
        f, others = self.of_all(subject), tuple(self.others.values())
        return lambda *given: f(*given, *others)


def flat(result: Any) -> tuple[Tensor, ...]:
    """Every tensor of a result, in order."""
    if isinstance(result, Tensor):
        return (result,)
    if isinstance(result, dict):
        result = tuple(result.values())
    found: tuple[Tensor, ...] = ()
    for one in result:
        found = found + flat(one)
    return found


def _values(name: str, shape: Shape, generator: torch.Generator) -> Tensor:
    if name == "pixels":
        levels = torch.randint(256, shape, generator=generator)
        return levels.double() / 127.5 - 1
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return 0.7 * x - 0.5 if "log" in name else x
