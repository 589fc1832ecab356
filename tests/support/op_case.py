"""One way of calling an op: inputs, the diffcore call, and the plain formula.

`formula` is what a user would write, generic over `xp`: with `xp=torch` in the dtype of the inputs
it is the eager baseline, with `xp=numpy` in extended precision (80-bit `longdouble`) it is the
truth.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcore._engine import dispatch, execute, native
from support.formulas import extended

Shape = tuple[int, ...]
Options = Callable[[int], dict[str, Any]]

STEPS = 50
BETAS = torch.linspace(1e-3, 0.2, STEPS, dtype=torch.float64)
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, 0)
NOISE_TABLE = torch.stack([ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt()], 1)
"""`[T, 2]` float64: alpha, sigma."""


@dataclass(frozen=True)
class Arguments:
    """What one call gets: elementwise tensors `[B, ...]`; coefficients, steps and strings."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """The same call with every elementwise tensor changed: another dtype, layout, ..."""
        return replace(self, tensors={name: change(x) for name, x in self.tensors.items()})

    def to(self, device: torch.device | str) -> Arguments:
        """The same call on another device."""
        move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return Arguments({name: x.to(device) for name, x in self.tensors.items()}, move)


@dataclass(frozen=True)
class OpCase:
    """One way of calling an op."""

    name: str
    op: Callable[..., Any]
    tensors: tuple[str, ...]  # the elementwise arguments
    formula: Callable[..., Any]  # (xp, **tensors, **options), naive plain code
    options: Options  # everything else, for a batch
    differentiable: tuple[str, ...]
    has_exp: bool = False  # bound by arithmetic as well as by memory
    out: bool = False  # takes out=
    benchmarked: bool = False  # has a row in the table of benchmarks/bench_ops.py
    backward_elements: int | None = None  # moved backward, if not what its launches say

    def make(
        self, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> Arguments:
        """Random arguments, the same values for every dtype (up to rounding) and device."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {}
        for name in self.tensors:
            x = torch.randn(shape, generator=generator, dtype=draw)
            tensors[name] = (0.7 * x - 0.5 if "log" in name else x).to(dtype)
        return Arguments(tensors, self.options(shape[0] if shape else 1)).to(device)

    def native(self, args: Arguments) -> Any:
        """The diffcore call."""
        return self.op(**args.tensors, **args.options)

    def by_position(self, args: Arguments) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """The op as a function of its tensors, coefficients being closed over."""
        names = list(args.tensors)

        def f(*tensors: Tensor) -> Any:
            return self.op(**dict(zip(names, tensors, strict=True)), **args.options)

        return f, tuple(args.tensors.values())

    def reference(self, args: Arguments) -> Any:
        """The same call on `diffcore.reference`, plain torch."""
        with without_kernels():
            return self.op(**args.tensors, **args.options)

    def eager(self, args: Arguments) -> Any:
        """What a user would write: the naive formula in plain torch, in the dtype of the inputs."""
        return self.formula(torch, **args.tensors, **args.options)

    def truth(self, args: Arguments) -> Any:
        """The formula on the very values given, in `longdouble`: an array, or a tuple."""
        values = {k: _extended(v) for k, v in {**args.tensors, **args.options}.items()}
        with np.errstate(all="ignore"):
            return self.formula(np, **values)

    @property
    def moves(self) -> int:
        """Elements read and written for each element of a tensor, forward."""
        return _launched(self)[0]

    @property
    def backward_moves(self) -> int:
        """The same backward, to all ``differentiable``, the upstream gradient included."""
        return _launched(self)[1] if self.backward_elements is None else self.backward_elements

    @property
    def elementwise(self) -> bool:
        """Whether an output has the shape of the inputs."""
        args = self.make((2, 3), torch.float32)
        return any(y.shape == (2, 3) for y in as_tuple(self.native(args)))

    def bytes_per_element(self, dtype: torch.dtype, *, backward: bool = False) -> int:
        """Memory traffic of the fused kernel per element; the roof is a copy of as much."""
        return (self.backward_moves if backward else self.moves) * dtype.itemsize


@functools.cache
def _launched(case: OpCase) -> tuple[int, int]:
    """What the kernels of a call read and write for each element, forward and backward."""
    args = case.make((2, 3), torch.float32)
    forward = sum(_moved(lambda: case.native(args)))
    if not case.differentiable:
        return forward, 0
    for name in case.differentiable:
        args.tensors[name].requires_grad_()

    def both() -> None:
        outputs = as_tuple(case.native(args))
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return forward, sum(_moved(both)) - forward


def _moved(call: Callable[[], Any]) -> list[int]:
    """Elementwise inputs and outputs of each kernel that a call launches.

    A tensor that is two inputs of a kernel is read from memory once.
    """
    module, launch = native._C, dispatch._launch
    table, seen = module.op_table(), []

    def add(index: int, inputs: tuple[Tensor, ...]) -> None:
        seen.append(len({x.data_ptr() for x in inputs}) + table[index][2])

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return getattr(module, name)

        def call(self, index: int, *arguments: Any) -> Any:
            add(index, arguments[1])
            return module.call(index, *arguments)

    def recorded(index: int, *arguments: Any) -> Any:
        found = module.launch(index, *arguments)
        if not isinstance(found, int):
            add(index, arguments[0])
        return found

    execute._C, dispatch._launch = Recorder(), recorded
    try:
        call()
    finally:
        execute._C, dispatch._launch = module, launch
    return seen


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Runs the public ops on `diffcore.reference`, as an install without the module does."""
    module = native._C
    native._C = execute._C = None
    dispatch._launch = None
    try:
        yield
    finally:
        native._C = execute._C = module
        dispatch._launch = None if module is None else module.launch


def as_tuple(result: Any) -> tuple[Any, ...]:
    """The outputs of a call, always as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def _extended(value: Any) -> Any:
    if isinstance(value, Tensor):
        return extended(value) if value.is_floating_point() else value.cpu().numpy()
    return np.longdouble(value) if isinstance(value, float) else value


def steps_of(batch: int) -> Tensor:
    """Steps `[B]` that touch the first and the last row of the tables."""
    return (torch.arange(batch) * 17 + STEPS - 1) % STEPS


def ramp(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, max(n, 1), dtype=torch.float64)[:n]
