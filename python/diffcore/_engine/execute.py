"""Runs one kernel, or its plain-torch meaning: allocation, layouts, fallback. No autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from diffcore._engine import messages, native
from diffcore._types import Coef, NoiseParts, Step
from diffcore.reference import philox

Noise = NoiseParts | None  # what a kernel generates its noise from; None where it is read
Grads = Sequence[Tensor | None]

_C = native._C
_DONE, _LAYOUT = 0, 2
_OPS = () if _C is None else _C.op_table()
_INDEX: dict[tuple[str, bool], int] = {(op[0], op[5]): i for i, op in enumerate(_OPS)}
_new_like = torch.empty_like


@dataclass(eq=False)
class Kernel:
    """One functor: its name in csrc/ops/all.h, what it reads, and what it means in plain torch."""

    name: str
    inputs: tuple[str, ...]
    coefs: tuple[str, ...] = ()
    outputs: int = 1  # elementwise
    sums: int = 0  # per sample, or one for all when called with whole=True
    # (*inputs, *coefs), and whole= for sums; None for a backward kernel
    reference: Callable[..., Any] | None = None
    backward: Backward | None = None
    saves_inputs: bool = True  # False when the backward needs none of them
    makes_gradient: bool = False  # its first output is a gradient, kept for the backward
    table: str = "coefficients"  # what a table of several coefficients is called
    reads_inputs: bool = True  # False where the input only says what the output looks like
    draws: bool = False  # the last input of the functor is drawn, not among `inputs`
    drawn: Kernel | None = field(default=None, repr=False)  # the twin that draws its last input
    reading: Kernel | None = field(default=None, repr=False)  # of a twin that draws: the other
    index: int = field(init=False)
    op: Any = field(init=False)

    def __post_init__(self) -> None:
        self.index = _INDEX.get((self.name, self.draws), -1)

    def named(
        self, inputs: tuple[str, ...], coefs: tuple[str, ...] = (), table: str = "coefficients"
    ) -> Kernel:
        """The same kernel under the argument names of a public op, for its errors."""
        twin = copy.copy(self)
        twin.inputs, twin.coefs, twin.table = inputs, coefs or self.coefs, table
        if self.drawn is not None:
            twin.drawn = self.drawn.named(inputs[:-1], coefs, table)
        return twin


Call = tuple[Kernel, tuple[Coef, ...], Step, bool, Noise]
# (inputs, call, upstream gradients, which inputs need one) -> one each; None: take the reference's
Backward = Callable[[tuple[Tensor, ...], Call, Grads, Sequence[bool]], Grads | None]


def direct(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    out: Tensor | None = None,
    noise: Noise = None,
) -> Any:
    """Allocates and calls the kernel; whatever the kernel refuses is explained or mended."""
    if _C is None:
        return run_reference(kernel, inputs, coefs, step, whole, out, noise)
    if native.DEBUG:  # a CUDA kernel clamps a step that is out of range instead of refusing it
        messages.explain(kernel, inputs, coefs, step, whole, out, noise)
    first = inputs[0]
    if kernel.sums:
        outs = allocate(kernel, first, whole)
    elif kernel.outputs == 1:
        outs = (_new_like(first) if out is None else out,)
    else:
        outs = tuple([_new_like(first) for _ in range(kernel.outputs)])
    if out is not None and (type(out) is not Tensor or out.requires_grad):
        return _careful(kernel, outs, inputs, coefs, step, whole, out, noise)
    read = inputs if kernel.reads_inputs else ()
    try:
        status = _C.call(kernel.index, outs, read, coefs, step, whole, noise)
    except RuntimeError:  # a tensor without storage of its own: sparse, quantised, meta
        messages.explain(kernel, inputs, coefs, step, whole, out, noise)
        if not native.has_kernels(first.device):
            return run_reference(kernel, inputs, coefs, step, whole, out, noise)
        raise
    if status != _DONE:
        return _careful(kernel, outs, inputs, coefs, step, whole, out, noise)
    if out is not None:
        increment_version(out)
    return outs[0] if len(outs) == 1 else outs


def _careful(
    kernel: Kernel,
    outs: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    out: Tensor | None,
    noise: Noise,
) -> Any:
    """The slow twin of `direct`: explains what is wrong, falls back, makes layouts agree."""
    messages.explain(kernel, inputs, coefs, step, whole, out, noise)
    if not native.has_kernels(inputs[0].device):
        return run_reference(kernel, inputs, coefs, step, whole, out, noise)
    like = outs[0] if kernel.outputs else _new_like(inputs[0])
    tensors = tuple(_as(like, x) for x in inputs) if kernel.reads_inputs else ()
    status = _C.call(kernel.index, outs, tensors, coefs, step, whole, noise)
    if status == _LAYOUT and kernel.reading is not None:  # an order that kernels do not draw in
        z = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
        _C.call(_INDEX["randn", True], (z,), (), (), None, False, noise)
        return direct(kernel.reading, (*tensors, _as(like, z)), coefs, step, whole, out)
    if status != _DONE:  # samples interleaved in memory, or an output partly over an input
        tensors = tuple(x.contiguous() for x in tensors)
        fresh = tuple(torch.empty_like(o, memory_format=torch.contiguous_format) for o in outs)
        status = _C.call(kernel.index, fresh, tensors, coefs, step, whole, noise)
        if status != _DONE:
            raise RuntimeError(
                f"{kernel.name}: the kernel refused its arguments (status {status}); please report"
            )
        for o, f in zip(outs, fresh, strict=True):
            o.copy_(f)
    elif out is not None:
        increment_version(out)
    return outs[0] if len(outs) == 1 else outs


def _as(like: Tensor, x: Tensor) -> Tensor:
    """`x` in the memory layout of `like`."""
    return x if x.stride() == like.stride() else _new_like(like).copy_(x)


def allocate(kernel: Kernel, first: Tensor, whole: bool) -> tuple[Tensor, ...]:
    shape = () if whole or first.ndim == 0 else (first.shape[0],)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    outs = [_new_like(first) for _ in range(kernel.outputs)]
    outs += [first.new_empty(shape, dtype=dtype) for _ in range(kernel.sums)]
    return tuple(outs)


# ---- plain torch ---------------------------------------------------------------------------------


def run_reference(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    out: Tensor | None = None,
    noise: Noise = None,
) -> Any:
    messages.explain(kernel, inputs, coefs, step, whole, out, noise)
    assert kernel.reference is not None, kernel.name
    if noise is not None:
        like = inputs[0]
        inputs = (*inputs, philox.normals(noise, like.shape, like.dtype, like.device))
    extra = {"whole": whole} if kernel.sums and not kernel.outputs else {}
    result = kernel.reference(*inputs, *expand_coefs(coefs, step), **extra)
    if out is None:
        return result
    return out.copy_(result)


def expand_coefs(coefs: tuple[Coef, ...], step: Step) -> list[Coef]:
    """One number, 0-dim or `[B]` tensor a coefficient, tables gathered at the step."""
    expanded: list[Coef] = []
    for c in coefs:
        if not isinstance(c, Tensor) or c.ndim < 2:
            expanded.append(c)
        else:
            if isinstance(step, Tensor):
                # Indexing would take negative steps, which under a transform nobody has refused.
                rows = c.index_select(0, step.reshape(-1))
            else:
                rows = c if step is None else c[step]
            if rows.ndim == 2 and rows.shape[0] == 1:
                rows = rows[0]
            expanded.extend(rows.unbind(-1))
    return expanded


def split_coefs(coefs: tuple[Coef, ...]) -> list[Coef]:
    """One item a coefficient: the columns of tables as tables of one column."""
    split: list[Coef] = []
    for c in coefs:
        if isinstance(c, Tensor) and c.ndim == 2:
            split.extend(c.split(1, dim=1))
        else:
            split.append(c)
    return split


def resolved(coefs: tuple[Coef, ...]) -> tuple[Coef, ...]:
    """The coefficients without pending negations, of which the exchange API knows nothing."""
    return tuple(c.resolve_neg() if isinstance(c, Tensor) else c for c in coefs)


def coefs_need_grad(coefs: tuple[Coef, ...]) -> bool:
    for c in coefs:  # noqa: SIM110 - in every call, where a generator costs more
        if type(c) is not float and c.requires_grad:  # type: ignore[union-attr]
            return True
    return False
