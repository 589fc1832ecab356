"""From a public op to a kernel, once for all ops: routes, layouts, autograd, torch.library.

A `Kernel` names one functor of csrc/ops. `run` takes the cheapest right route, in this order:

1. compiling or tracing, a tensor subclass, or a dispatch or function mode: the registered operator;
2. a functorch transform or forward-mode AD: the reference, whose plain torch ops compose with
   every transform;
3. a gradient is needed: one lean `autograd.Function`;
4. otherwise `_C.launch`, and what that declines, with more care, through `_C.call`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffcore._engine import execute, messages, native
from diffcore._engine.autograd import Function
from diffcore._engine.execute import Backward as Backward
from diffcore._engine.execute import Call as Call
from diffcore._engine.execute import Grads as Grads
from diffcore._engine.execute import Noise as Noise
from diffcore._engine.execute import direct, resolved, run_reference
from diffcore._engine.execute import split_coefs as split_coefs
from diffcore._engine.library import register, run_registered
from diffcore._types import Coef, Step

# Nobody but Dynamo looks on without a mode.
_compiling = torch.compiler.is_dynamo_compiling
_launch = None if native._C is None else native._C.launch


# Function.apply, less its search for functorch wrappers: no transform is active where it is called.
_apply: Callable[..., Any] = super(torch.autograd.Function, Function).apply

# What _C.launch answers where it has not run the kernel.
_NOT_PLAIN, _NEEDS_GRAD, _NEGATED, _COEF_NEEDS_GRAD, _COEF_NEGATED, _MODE, _TRANSFORM = (
    1 << k for k in range(7)
)


class Kernel(execute.Kernel):
    """A kernel that torch.library knows too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.op = register(self)


def drawing(kernel: Kernel) -> Kernel:
    """The kernel, with its twin that draws the last input instead of reading it."""
    twin = {f.name: getattr(kernel, f.name) for f in fields(kernel) if f.init}
    twin |= {"inputs": kernel.inputs[:-1], "draws": True, "reading": kernel}
    kernel.drawn = Kernel(**twin)
    return kernel


def _run(  # noqa: C901 - the call path: one more function is time
    kernel: Kernel,
    inputs: tuple[Tensor, ...],
    coefs: tuple[Coef, ...] = (),
    step: Step = None,
    whole: bool = False,
    out: Tensor | None = None,
    noise: Noise = None,
) -> Any:
    """The outputs of a kernel, one tensor or a tuple: elementwise first, then sums."""
    if _compiling():
        return run_registered(kernel, inputs, coefs, step, whole, out, noise)
    found = _NOT_PLAIN
    if _launch is not None:
        look = out is not None or forward_ad._current_level >= 0 or native.DEBUG
        found = _launch(kernel.index, inputs, coefs, step, noise, look)
        if type(found) is not int:
            return found
    if found & _NOT_PLAIN and not all(isinstance(x, Tensor) for x in inputs):
        messages.refuse_non_tensor(kernel.inputs, inputs)
    if found & (_NOT_PLAIN | _MODE):
        return run_registered(kernel, inputs, coefs, step, whole, out, noise)
    if found & _TRANSFORM or forward_ad._current_level >= 0:
        return run_reference(kernel, inputs, coefs, step, whole, out, noise)
    if found:
        if found & _NEGATED:  # the exchange API knows nothing of it
            inputs = tuple([x.resolve_neg() for x in inputs])
        if found & _COEF_NEGATED:
            coefs = resolved(coefs)
        if found & (_NEEDS_GRAD | _COEF_NEEDS_GRAD):
            if out is not None:
                raise ValueError("out=: an argument requires grad; write to it under no_grad()")
            if found & _COEF_NEEDS_GRAD:
                return run_reference(kernel, inputs, coefs, step, whole, None, noise)
            return _apply((kernel, coefs, step, whole, noise), *inputs)
    return direct(kernel, inputs, coefs, step, whole, out, noise)


def plain_eager() -> bool:
    """Whether a plain tensor is just its numbers: no compiler, transform or mode is looking on."""
    return not (
        _compiling()
        or forward_ad._current_level >= 0
        or native.transforms() is not None
        or native.dispatch_modes()
        or native.function_modes()
    )


# The same function, typed by what the kernel returns.
run: Callable[..., Tensor] = _run
run_tuple: Callable[..., tuple[Tensor, ...]] = _run
