"""Registers every kernel with torch.library, for compilers, tracers, subclasses and modes.

Schema: the inputs by name; for a kernel with coefficients these as two lists of the same length (a
tensor, or None and a number) and the step as a tensor or as an int (-1: none); and whether a sum is
over everything. A kernel that generates noise also takes seed, sample ids and stream, each a
tensor, or None and a number, and the first element.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._engine import compiled_ops, execute, messages, native
from diffcore._engine.autograd import read_again, run_backward, to_save
from diffcore._engine.execute import (
    Noise,
    allocate,
    coefs_need_grad,
    direct,
    promoted,
    resolved,
    run_reference,
)
from diffcore._engine.kernel import Kernel, NoisyKernel
from diffcore._engine.messages import Arguments
from diffcore._types import Coefs, Step, Tensors

LIBRARY = torch.library.Library("diffcore", "DEF")


def pack(kernel: Kernel, first: Tensor, coefs: Coefs, step: Step) -> tuple[Any, ...]:
    """Coefficients and step as the operator takes them: nothing if the kernel has none.

    ``first`` is an input, on the device of the call.
    """
    if not coefs and not kernel.coefs:  # a trace guards on each name that it reads
        return ()  # ahead-of-time inductor hands an empty list of optional tensors over as None
    # Dynamo shows a symbolic number as a float.
    if torch.compiler.is_compiling() or any(isinstance(c, torch.SymFloat) for c in coefs):
        coefs = _without_symbols(coefs, first)
    tensors = [c if isinstance(c, Tensor) else None for c in coefs]
    numbers = [0.0 if isinstance(c, Tensor) else c for c in coefs]
    if isinstance(step, Tensor):
        return tensors, numbers, step, -1
    return tensors, numbers, None, -1 if step is None else step


def _without_symbols(coefs: Coefs, like: Tensor) -> Coefs:
    """The coefficients with each number that a tracer derives from a size as a tensor.

    As a number it would be a constant of the graph, and each size another compilation. In an
    exported program infinite numbers are tensors too: ahead-of-time inductor writes them as JSON
    strings that it does not read again.
    """
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import

    exporting = torch.compiler.is_exporting()

    def fixed(c: Any) -> bool:
        return has_static_value(c) and not (exporting and math.isinf(c))

    return tuple(
        [
            c
            if isinstance(c, Tensor) or fixed(c)
            else torch.full((), c, dtype=torch.float64, device=like.device)
            for c in coefs
        ]
    )


def unpack(kernel: Kernel, packed: Sequence[Any]) -> tuple[Coefs, Step, bool, Noise]:
    """Coefficients, step, ``reduce_all`` and noise, from what follows the inputs."""
    if not kernel.coefs:
        reduce_all, *noise = packed
        return (), None, reduce_all, unpack_noise(noise)
    tensors, numbers, at, step, reduce_all, *noise = packed
    coefs = tuple(numbers)
    for x in tensors:
        if x is not None:
            coefs = tuple([n if x is None else x for x, n in zip(tensors, numbers, strict=True)])
            break
    where = at if at is not None else (None if step < 0 else step)
    return coefs, where, reduce_all, unpack_noise(noise)


def pack_noise(noise: Noise) -> list[Tensor | int | None]:
    if noise is None:
        return []
    *parts, first_element = noise
    packed: list[Tensor | int | None] = []
    for part in parts:
        packed += (part, 0) if isinstance(part, Tensor) else (None, part)
    return [*packed, first_element]


def unpack_noise(packed: Sequence[Any]) -> Noise:
    if not packed:
        return None
    seed, ids, stream = (packed[2 * i + (packed[2 * i] is None)] for i in range(3))
    return seed, ids, stream, packed[6]


_COEF_SCHEMA = ", Tensor?[] coef_tensors, float[] coef_numbers, Tensor? step_tensor, SymInt step"
_NOISE_SCHEMA = (
    ", Tensor? seed, SymInt seed_number, Tensor? sample_ids, SymInt first_id, "
    "Tensor? stream, SymInt stream_number, int first_element"
)


def run_registered(
    kernel: Kernel,
    inputs: Tensors,
    coefs: Coefs,
    step: Step,
    reduce_all: bool,
    out: Tensor | None,
    noise: Noise = None,
) -> Any:
    kernel, inputs, noise = promoted(kernel, inputs, noise)
    if not isinstance(step, Tensor) and step is not None and step < 0:
        # -1 is "no step" in the schema.
        raise ValueError(f"{kernel.step} must be at least 0, got {step}")
    if not native.has_kernels(inputs[0].device) or (
        torch.is_grad_enabled() and coefs_need_grad(coefs)
    ):
        return run_reference(kernel, inputs, coefs, step, reduce_all, out, noise)
    compiling = torch.compiler.is_compiling()
    if compiling and compiled_ops.kind == "formula" and noise is None:
        coefs = _without_symbols(coefs, inputs[0])
        return run_reference(kernel, inputs, coefs, step, reduce_all, out)
    if not compiling and native.dispatch_modes():  # fake tensors: no kernel will check anything
        messages.explain(Arguments(kernel, inputs, coefs, step, None, noise))
    op = getattr(torch.ops.diffcore, kernel.operator).default
    packed = pack(kernel, inputs[0], coefs, step)
    arguments = (*inputs, *packed, reduce_all, *pack_noise(noise))
    if compiling:
        result = op(*arguments)
    else:
        try:
            result = op(*arguments)
        except (TypeError, ValueError):
            # The operator names the arguments of the kernel; the error names those of the function.
            messages.explain(Arguments(kernel, inputs, coefs, step, None, noise))
            raise
    if out is None:
        return result
    messages.check_out(kernel, inputs, out)
    return out.copy_(result)


def _no_gradient(argument: Any) -> Any:
    """None as register_autograd expects it: a list of None for a list of tensors only."""
    is_list = isinstance(argument, list) and all(isinstance(x, Tensor) for x in argument)
    return [None] * len(argument) if is_list else None


def _slice(argument: Any, dim: Any, i: int) -> Any:
    """The ``i``-th slice of what is batched in (nested lists of) arguments."""
    if isinstance(argument, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(argument)
        return [_slice(a, d, i) for a, d in zip(argument, dims, strict=True)]
    return argument if dim is None else argument.select(dim, i)


def _check_devices(kernel: Kernel, args: Sequence[Any]) -> None:
    """Raises where an argument is on another device than the first input.

    A tensor on "meta" makes torch take any call for one without data, and return garbage.
    """
    at = args[0].device
    tensors = [x for a in args for x in (a if isinstance(a, (list, tuple)) else (a,))]
    for x in tensors:
        if isinstance(x, Tensor) and x.device != at:
            raise ValueError(
                f"{kernel.operator}: the arguments must be on one device, got {at} and {x.device}"
            )


def define_noisy(kernel: Kernel) -> NoisyKernel:
    """Registers a kernel whose last input is noise, and the one that generates this noise."""
    return NoisyKernel(define(kernel), define(kernel.generating()))


def define(kernel: Kernel) -> Kernel:
    """Registers a kernel as the operator ``torch.ops.diffcore.<name>``, and returns it."""
    arity, name = len(kernel.inputs), kernel.operator
    tensors = ", ".join(f"Tensor {i}" for i in kernel.inputs)
    returns = ", ".join(["Tensor"] * (kernel.outputs + kernel.sums))
    LIBRARY.define(
        f"{name}({tensors}{_COEF_SCHEMA * bool(kernel.coefs)}, bool reduce_all"
        f"{_NOISE_SCHEMA * kernel.generates_noise})"
        f" -> {returns if kernel.outputs + kernel.sums == 1 else f'({returns})'}",
        tags=(torch.Tag.pt2_compliant_tag,),
    )

    def on_device(*args: Any) -> Any:
        coefs, step, reduce_all, noise = unpack(kernel, args[arity:])
        return direct(kernel, args[:arity], resolved(coefs), step, reduce_all, None, noise)

    def fake(*args: Any) -> Any:
        _check_devices(kernel, args)
        outs = allocate(kernel, args[0], args[arity + 4 * bool(kernel.coefs)])
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
        coefs, step, _, noise = unpack(kernel, ctx.call)
        made = (output[0],) if kernel.makes_gradient else ()
        kept = to_save(inputs[:arity], made, noise) if kernel.saves_inputs else ()
        ctx.save_for_backward(*kept, *read_again((kernel, coefs, step, False, noise)))

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if kernel.backward is None:
            raise RuntimeError(
                f"diffcore::{name} is the first derivative of another op and is not "
                "differentiable itself; differentiate twice through diffcore.ops"
            )
        needs = ctx.needs_input_grad[:arity]
        call = (kernel, *unpack(kernel, ctx.call))
        saved = ctx.saved_tensors
        found = run_backward(saved if kernel.saves_inputs else (), call, grads, needs)
        return (*found, *map(_no_gradient, ctx.call))

    qualified = f"diffcore::{name}"

    def launched(*args: Any) -> Any:
        """The outputs, or an int where anything is not plain, as ``_C.launch`` finds."""
        module = execute._C
        if module is None:
            return 0
        coefs, step, _, noise = unpack(kernel, args[arity:])
        return module.launch(kernel.index, args[:arity], coefs, step, noise, native.DEBUG)

    LIBRARY.impl(name, on_device, "CPU")
    LIBRARY.impl(name, on_device, "CUDA")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    batched = _AtFirstUse(torch.library.register_vmap, qualified, vmap)
    how = {"setup_context": setup_context}
    differentiable = _AtFirstUse(torch.library.register_autograd, qualified, backward, **how)

    def call(keyset: Any, *args: Any) -> Any:
        # Torch's way from an operator to its kernel takes several times as long as the call of a
        # small tensor. Where nothing on the way has anything to do, the kernel is launched at once.
        found = launched(*args)
        return differentiable(keyset, *args) if type(found) is int else found

    LIBRARY.impl(name, batched, "FuncTorchBatched", with_keyset=True)
    LIBRARY.impl(name, call, "Autograd", with_keyset=True)
    return kernel


class _AtFirstUse:
    """An implementation that torch makes of functions, made when it is first called.

    Made for all operators at the import, they would be half of its time.

    Args:
        register: Registers it with a library, which is this object: it keeps the implementation.
        *args: Of ``register``.
        **options: Of ``register``.
    """

    def __init__(self, register: Callable[..., Any], *args: Any, **options: Any) -> None:
        self._make = functools.partial(register, *args, **options, lib=self)
        self._made: Callable[..., Any] | None = None

    def impl(self, name: str, made: Callable[..., Any], *key: Any, **how: Any) -> None:  # noqa: ARG002
        """What ``torch.library.Library.impl`` is for others."""
        self._made = made

    def __call__(self, keyset: Any, *args: Any) -> Any:
        if self._made is None:
            self._make()
        assert self._made is not None
        return self._made(keyset, *args)
