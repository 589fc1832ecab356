"""From a public op to a kernel, once for all ops: routes, layouts, autograd, torch.library.

A ``Kernel`` names one functor of csrc/ops. ``run`` takes the cheapest right route, in this order:

1. a functorch transform or forward-mode AD: the reference, whose plain torch ops compose with
   every transform;
2. compiling or tracing, a tensor subclass, or a dispatch or function mode: the registered operator.
   The function mode of a default device does not count: it changes no call of a kernel;
3. a gradient is needed: one lean ``autograd.Function``;
4. otherwise ``_C.launch``, and what that declines, with more care, through ``_C.call``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffcore._engine import messages, native
from diffcore._engine.autograd import Function
from diffcore._engine.dtensor import is_dtensor
from diffcore._engine.execute import Noise, direct, promoted, resolved, run_reference
from diffcore._engine.kernel import Kernel
from diffcore._engine.library import run_registered
from diffcore._types import Coefs, Step, Tensors

# The one tracer that activates no mode.
_compiling = torch.compiler.is_dynamo_compiling
_launch = None if native._C is None else native._C.launch


# Function.apply, less its search for functorch wrappers: no transform is active where it is called.
_apply: Callable[..., Any] = super(torch.autograd.Function, Function).apply

# What _C.launch answers where it has not run the kernel; without it every call takes one route.
_FOUND: dict[str, int] = {"not_plain": 1} if native._C is None else native._C.FOUND
_NOT_PLAIN = _FOUND["not_plain"]
_NEEDS_GRAD, _COEF_NEEDS_GRAD = (_FOUND.get(x, 0) for x in ("needs_grad", "coef_needs_grad"))
_NEGATED, _COEF_NEGATED = (_FOUND.get(x, 0) for x in ("negated", "coef_negated"))
_MODE, _DEFAULT_DEVICE = (_FOUND.get(x, 0) for x in ("mode", "default_device"))
_TRANSFORM = _FOUND.get("transform", 0)


def _run(  # noqa: C901 - the call path: one more function is time
    kernel: Kernel,
    inputs: Tensors,
    coefs: Coefs = (),
    step: Step = None,
    reduce_all: bool = False,
    out: Tensor | None = None,
    noise: Noise = None,
    modes_off: bool = False,
) -> Any:
    """The outputs of a kernel, one tensor or a tuple: elementwise first, then sums."""
    if _compiling():
        transformed = forward_ad._current_level >= 0 or native.transform_traced()
        route = run_reference if transformed else _run_registered
        return route(kernel, inputs, coefs, step, reduce_all, out, noise)
    found = _NOT_PLAIN
    if _launch is not None:
        inspect_only = out is not None or forward_ad._current_level >= 0 or native.DEBUG
        found = _launch(kernel.index, inputs, coefs, step, noise, inspect_only)
        if type(found) is not int:
            return found
    if found & _DEFAULT_DEVICE and not modes_off:
        with torch._C.DisableTorchFunction():  # the mode would make each call of torch slower
            return _run(kernel, inputs, coefs, step, reduce_all, out, noise, True)
    if found & _NOT_PLAIN and not all(isinstance(x, Tensor) for x in inputs):
        messages.refuse_non_tensor(kernel.inputs, inputs)
    if found & _TRANSFORM or forward_ad._current_level >= 0:
        return run_reference(kernel, inputs, coefs, step, reduce_all, out, noise)
    if found & (_NOT_PLAIN | _MODE):
        return _run_registered(kernel, inputs, coefs, step, reduce_all, out, noise)
    if found:
        if found & _NEGATED:  # the exchange API does not carry it
            inputs = tuple([x.resolve_neg() for x in inputs])
        if found & _COEF_NEGATED:
            coefs = resolved(coefs)
        if found & (_NEEDS_GRAD | _COEF_NEEDS_GRAD):
            if out is not None:
                raise ValueError(
                    "out must be None where an argument requires grad, got a tensor; call under "
                    "torch.no_grad()"
                )
            if found & _COEF_NEEDS_GRAD:
                return run_reference(kernel, inputs, coefs, step, reduce_all, None, noise)
            kernel, inputs, noise = promoted(kernel, inputs, noise)
            return _apply((kernel, coefs, step, reduce_all, noise), *inputs)
    return direct(kernel, inputs, coefs, step, reduce_all, out, noise)


def _run_registered(
    kernel: Kernel,
    inputs: Tensors,
    coefs: Coefs,
    step: Step,
    reduce_all: bool,
    out: Tensor | None,
    noise: Noise,
) -> Any:
    if not any(map(is_dtensor, (*inputs, *coefs, step, *(noise or ())))):
        return run_registered(kernel, inputs, coefs, step, reduce_all, out, noise)
    from diffcore._engine.sharding import run_sharded

    kernel, inputs, noise = promoted(kernel, inputs, noise)
    return run_sharded(_run, kernel, inputs, coefs, step, reduce_all, out, noise)


def plain_eager() -> bool:
    """Whether calls on plain tensors are neither compiled, transformed nor under a mode."""
    return not (
        _compiling()
        or forward_ad._current_level >= 0
        or native.transforms() is not None
        or native.dispatch_modes()
        or native.function_modes()
    )


# The same function, typed by what the kernel returns.
run: Callable[..., Tensor] = _run
run_tuple: Callable[..., Tensors] = _run
