"""From a public op to a kernel, once for all ops: routes, layouts, autograd, torch.library.

A `Kernel` names one functor of csrc/ops. `run` takes the cheapest right route, in this order:

1. compiling or tracing, a tensor subclass, or a dispatch or function mode: the registered operator;
2. a functorch transform or forward-mode AD: the reference, whose plain torch ops compose with
   every transform;
3. a gradient is needed: one lean `autograd.Function`;
4. otherwise `_C.call` directly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffcore import _native, _validate

Coef = float | Tensor
Step = int | Tensor | None
Grads = Sequence[Tensor | None]
Backward = Callable[
    [tuple[Tensor, ...], tuple[Coef, ...], Step, bool, Grads, Sequence[bool]], Grads | None
]

_C = _native._C
_DONE = 0
_INDEX: dict[str, int] = {op[0]: i for i, op in enumerate(_C.op_table())} if _C is not None else {}
_LIBRARY = torch.library.Library("diffcore", "DEF")
_compiling = torch.compiler.is_compiling
_new_like = torch.empty_like


def _probe(owner: Any, name: str, present: Callable[[Any], bool]) -> Callable[[], bool]:
    """A private torch query, answering "active" (the slow, right route) if torch lacks it."""
    query = getattr(owner, name, None)
    return (lambda: True) if query is None else (lambda: present(query()))


_functorch_active = _probe(
    getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda top: top is not None
)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_function_modes = getattr(torch._C, "_len_torch_function_stack", lambda: 1)


@dataclass(eq=False)
class Kernel:
    """One functor: its name in csrc/ops/all.h, what it reads, and what it means in plain torch."""

    name: str
    inputs: tuple[str, ...]
    coefs: tuple[str, ...] = ()
    outputs: int = 1  # elementwise
    sums: int = 0  # per sample, or one for all when called with whole=True
    reference: Callable[..., Any] | None = (
        None  # (*inputs, *coefs, whole) for sums; None for a backward kernel
    )
    backward: Backward | None = None
    saves_inputs: bool = True  # False when the backward needs none of them
    table: str = "coefficients"  # what a table of several coefficients is called
    index: int = field(init=False)
    op: Any = field(init=False)

    def __post_init__(self) -> None:
        self.index = _INDEX.get(self.name, -1)
        self.op = _register(self)

    def named(
        self, inputs: tuple[str, ...], coefs: tuple[str, ...] = (), table: str = "coefficients"
    ) -> Kernel:
        """The same kernel under the argument names of a public op, for its errors."""
        twin = copy.copy(self)
        twin.inputs, twin.coefs, twin.table = inputs, coefs or self.coefs, table
        return twin


# ---- the routes --------------------------------------------------------------------------------


def _run(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...] = (),
    step: Step = None,
    whole: bool = False,
    out: Tensor | None = None,
) -> Any:
    """The outputs of a kernel, one tensor or a tuple: elementwise first, then sums."""
    if _compiling():
        return _run_registered(kernel, inputs, coefs, step, whole, out)
    needs_grad = False
    for x in inputs:
        kind = type(x)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            if not isinstance(x, Tensor):
                _validate.refuse_non_tensor(kernel.inputs, inputs)
            return _run_registered(kernel, inputs, coefs, step, whole, out)
        if x.requires_grad:
            needs_grad = True
    if _dispatch_modes() or _function_modes():
        return _run_registered(kernel, inputs, coefs, step, whole, out)
    if forward_ad._current_level >= 0 or _functorch_active():
        return _run_reference(kernel, inputs, coefs, step, whole, out)
    for c in coefs:
        if type(c) is not float:
            if c.requires_grad and torch.is_grad_enabled():  # type: ignore[union-attr]
                _refuse_out(out)
                return _run_reference(kernel, inputs, coefs, step, whole, out)
            if c.is_neg():  # type: ignore[union-attr]
                coefs = _resolved(coefs)
    if needs_grad and torch.is_grad_enabled():
        _refuse_out(out)
        return _Function.apply(kernel, coefs, step, whole, *inputs)  # type: ignore[no-untyped-call]
    return _direct(kernel, inputs, coefs, step, whole, out)


def _refuse_out(out: Tensor | None) -> None:
    if out is not None:
        raise ValueError("out=: an argument requires grad; write to out= under torch.no_grad()")


def plain_eager() -> bool:
    """Whether a plain tensor is just its numbers: no compiler, transform or mode is looking on."""
    return not (
        _compiling()
        or forward_ad._current_level >= 0
        or _functorch_active()
        or _dispatch_modes()
        or _function_modes()
    )


# The same function, typed by what the kernel returns.
run: Callable[..., Tensor] = _run
run_tuple: Callable[..., tuple[Tensor, ...]] = _run


def _direct(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    out: Tensor | None = None,
) -> Any:
    """Allocates and calls the kernel; whatever the kernel refuses is explained or mended."""
    first = inputs[0]
    if kernel.sums:
        outs = _allocate(kernel, first, whole)
    elif kernel.outputs == 1:
        outs = (_new_like(first) if out is None else out,)
    else:
        outs = tuple([_new_like(first) for _ in range(kernel.outputs)])
    if _C is None or out is not None:
        return _careful(kernel, outs, inputs, coefs, step, whole, out)
    for x in inputs:
        if x.is_neg():
            return _careful(kernel, outs, inputs, coefs, step, whole, out)
    try:
        status = _C.call(kernel.index, outs, inputs, coefs, step, whole)
    except RuntimeError:  # a tensor without storage of its own: sparse, quantised, meta
        _validate.explain(kernel, inputs, coefs, step, whole)
        if not _native.has_kernels(first.device):
            return _run_reference(kernel, inputs, coefs, step, whole)
        raise
    if status != _DONE:
        return _careful(kernel, outs, inputs, coefs, step, whole, out)
    return outs[0] if len(outs) == 1 else outs


def _careful(
    kernel: Kernel,
    outs: tuple[Tensor, ...],
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    out: Tensor | None,
) -> Any:
    """The slow twin of `_direct`: explains what is wrong, falls back, makes layouts agree."""
    _validate.explain(kernel, inputs, coefs, step, whole, out)
    if not _native.has_kernels(inputs[0].device):
        return _run_reference(kernel, inputs, coefs, step, whole, out)
    like = outs[0] if kernel.outputs else _new_like(inputs[0])
    tensors = tuple(_as(like, x.resolve_neg()) for x in inputs)
    status = _C.call(kernel.index, outs, tensors, coefs, step, whole)
    if status != _DONE:  # samples interleaved in memory, or an output partly over an input
        tensors = tuple(x.contiguous() for x in tensors)
        fresh = tuple(torch.empty_like(o, memory_format=torch.contiguous_format) for o in outs)
        status = _C.call(kernel.index, fresh, tensors, coefs, step, whole)
        if status != _DONE:
            raise RuntimeError(
                f"{kernel.name}: the kernel refused its arguments (status {status}); please report"
            )
        for o, f in zip(outs, fresh, strict=True):
            o.copy_(f)
    elif out is not None:
        torch.autograd.graph.increment_version(out)
    return outs[0] if len(outs) == 1 else outs


def _as(like: Tensor, x: Tensor) -> Tensor:
    """`x` in the memory layout of `like`."""
    return x if x.stride() == like.stride() else _new_like(like).copy_(x)


def _allocate(kernel: Kernel, first: Tensor, whole: bool) -> tuple[Tensor, ...]:
    shape = () if whole or first.ndim == 0 else (first.shape[0],)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    outs = [_new_like(first) for _ in range(kernel.outputs)]
    outs += [torch.empty(shape, dtype=dtype, device=first.device) for _ in range(kernel.sums)]
    return tuple(outs)


# ---- plain torch -------------------------------------------------------------------------------


def _run_reference(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    out: Tensor | None = None,
) -> Any:
    _validate.explain(kernel, inputs, coefs, step, whole, out)
    assert kernel.reference is not None, kernel.name
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


def _resolved(coefs: tuple[Coef, ...]) -> tuple[Coef, ...]:
    """The coefficients without pending negations, of which the exchange API knows nothing."""
    return tuple(c.resolve_neg() if isinstance(c, Tensor) else c for c in coefs)


def _coefs_need_grad(coefs: tuple[Coef, ...]) -> bool:
    for c in coefs:
        if type(c) is not float and c.requires_grad:  # type: ignore[union-attr]
            return True
    return False


# ---- autograd ----------------------------------------------------------------------------------


class _Function(torch.autograd.Function):
    """The lean autograd node of every kernel, for plain eager calls."""

    @staticmethod
    def forward(
        ctx: Any, kernel: Kernel, coefs: tuple[Coef, ...], step: Step, whole: bool, *inputs: Tensor
    ) -> Any:
        ctx.call = (kernel, coefs, step, whole)
        ctx.set_materialize_grads(False)
        if kernel.saves_inputs:
            ctx.save_for_backward(*inputs)
        return _direct(kernel, inputs, coefs, step, whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        kernel, coefs, step, whole = ctx.call
        needs = ctx.needs_input_grad[4:]
        return (
            None,
            None,
            None,
            None,
            *_backward(kernel, ctx.saved_tensors, coefs, step, whole, grads, needs),
        )


def _backward(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    grads: Grads,
    needs: Sequence[bool],
) -> Grads:
    if all(g is None for g in grads):
        return [None] * len(needs)
    assert kernel.backward is not None, kernel.name
    # With create_graph the result must itself be differentiable: a nonlinear op is differentiated
    # through its
    # reference. Linear backwards are made of differentiable ops already, and keep no inputs.
    if not (kernel.saves_inputs and torch.is_grad_enabled()):
        result = kernel.backward(inputs, coefs, step, whole, grads, needs)
        if result is not None:
            return result
    return _reference_backward(kernel, inputs, coefs, step, whole, grads, needs)


def _reference_backward(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    grads: Grads,
    needs: Sequence[bool],
) -> Grads:
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = (
            inputs
            if create_graph
            else tuple(x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True))
        )
        outs = _run_reference(kernel, leaves, coefs, step, whole)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [x for x, n in zip(leaves, needs, strict=True) if n]
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            wanted,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if n else None for n in needs]


# ---- torch.library -----------------------------------------------------------------------------
#
# Schema: the inputs by name, then the coefficients as two lists of the same length (a tensor, or
# None and a number),
# the step as a tensor or as an int (-1: none), and whether a sum is over everything.


def _pack(
    coefs: tuple[Coef, ...], step: Step
) -> tuple[list[Tensor | None], list[float], Tensor | None, int]:
    tensors = [c if isinstance(c, Tensor) else None for c in coefs]
    numbers = [0.0 if isinstance(c, Tensor) else c for c in coefs]
    if isinstance(step, Tensor):
        return tensors, numbers, step, -1
    return tensors, numbers, None, -1 if step is None else step


def _unpack(
    tensors: Sequence[Tensor | None], numbers: Sequence[float], at: Tensor | None, step: int
) -> tuple[tuple[Coef, ...], Step]:
    coefs = tuple(n if x is None else x for x, n in zip(tensors, numbers, strict=True))
    return coefs, at if at is not None else (None if step < 0 else step)


def _run_registered(
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...],
    step: Step,
    whole: bool,
    out: Tensor | None,
) -> Any:
    if not isinstance(step, Tensor) and step is not None and step < 0:
        raise ValueError(f"t={step} is negative")  # -1 stands for "no step" in the schema
    if not _native.has_kernels(inputs[0].device) or (
        torch.is_grad_enabled() and _coefs_need_grad(coefs)
    ):
        return _run_reference(kernel, inputs, coefs, step, whole, out)
    result = kernel.op(*inputs, *_pack(coefs, step), whole)
    if out is None:
        return result
    _validate.check_out(kernel, inputs, out)
    return out.copy_(result)


def _no_gradient(argument: Any) -> Any:
    """None, in the form that register_autograd wants it: a list for a list of tensors alone."""
    is_list = isinstance(argument, list) and all(isinstance(x, Tensor) for x in argument)
    return [None] * len(argument) if is_list else None


def _slice(argument: Any, dim: Any, i: int) -> Any:
    """The `i`-th slice of whatever is batched in (nested lists of) arguments."""
    if isinstance(argument, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(argument)
        return [_slice(a, d, i) for a, d in zip(argument, dims, strict=True)]
    return argument if dim is None else argument.select(dim, i)


def _register(kernel: Kernel) -> Any:
    arity, name = len(kernel.inputs), kernel.name
    tensors = ", ".join(f"Tensor {i}" for i in kernel.inputs)
    returns = ", ".join(["Tensor"] * (kernel.outputs + kernel.sums))
    _LIBRARY.define(
        f"{name}({tensors}, Tensor?[] coef_tensors, float[] coef_numbers, Tensor? step_tensor, "
        "int step, bool whole)"
        f" -> {returns if kernel.outputs + kernel.sums == 1 else f'({returns})'}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def native(*args: Any) -> Any:
        coefs, step = _unpack(*args[arity : arity + 4])
        return _direct(kernel, args[:arity], _resolved(coefs), step, args[-1])

    def fake(*args: Any) -> Any:
        outs = _allocate(kernel, args[0], args[-1])
        return outs[0] if len(outs) == 1 else outs

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        # A call a slice. Outside torch.compile, transforms get the reference, which needs no rule.
        op = getattr(torch.ops.diffcore, name).default
        calls = [op(*_slice(args, in_dims, i)) for i in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(calls[0])

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call = inputs[arity:]
        ctx.save_for_backward(*(inputs[:arity] if kernel.saves_inputs else ()))

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if kernel.backward is None:
            raise RuntimeError(
                f"diffcore::{name} is the first derivative of another op and is not "
                "differentiable itself; differentiate twice through diffcore.ops"
            )
        coefs, step = _unpack(*ctx.call[:4])
        needs = ctx.needs_input_grad[:arity]
        found = _backward(kernel, ctx.saved_tensors, coefs, step, ctx.call[-1], grads, needs)
        return (*found, *map(_no_gradient, ctx.call))

    qualified = f"diffcore::{name}"
    _LIBRARY.impl(name, native, "CPU")
    _LIBRARY.impl(name, native, "CUDA")
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    torch.library.register_vmap(qualified, vmap, lib=_LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)
    return getattr(torch.ops.diffcore, name).default
