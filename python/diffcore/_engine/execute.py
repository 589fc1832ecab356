"""Runs one kernel, or its plain-torch meaning: allocation, layouts, fallback. No autograd."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from diffcore._checks import check_dense, check_memory
from diffcore._engine import messages, native
from diffcore._engine.kernel import RANDN_INDEX, Kernel
from diffcore._engine.messages import Arguments
from diffcore._types import Coef, Coefs, NoiseParts, Step, Tensors
from diffcore.reference import philox

Noise = NoiseParts | None  # what a kernel generates its noise from; None where it reads it

_C = native._C
_new_like = torch.empty_like


def direct(
    kernel: Kernel,
    inputs: Tensors,
    coefs: Coefs,
    step: Step,
    reduce_all: bool,
    out: Tensor | None = None,
    noise: Noise = None,
) -> Any:
    """Allocates and calls the kernel.

    Raises what is wrong with the arguments; copies first what lies in memory in an order that
    kernels do not read.
    """
    if _C is None:
        return run_reference(kernel, inputs, coefs, step, reduce_all, out, noise)
    if native.DEBUG:  # a CUDA kernel clamps a step that is out of range instead of refusing it
        messages.explain(Arguments(kernel, inputs, coefs, step, out, noise))
    first = inputs[0]
    try:
        if kernel.sums:
            outs = allocate(kernel, first, reduce_all)
        elif kernel.outputs == 1:
            outs = (_new_like(first) if out is None else out,)
        else:
            outs = tuple([_new_like(first) for _ in range(kernel.outputs)])
    except RuntimeError:  # torch makes nothing like a nested tensor, or one of MKL-DNN
        messages.explain(Arguments(kernel, inputs, coefs, step, out, noise))
        raise
    if out is not None and (type(out) is not Tensor or out.requires_grad):
        messages.check_out(kernel, inputs, out)
    read = inputs if kernel.reads_inputs else ()
    reason = _C.call(kernel.index, outs, read, coefs, step, reduce_all, noise)
    if reason is not None:
        args = Arguments(kernel, inputs, coefs, step, out, noise)
        return _careful(reason, outs, args, reduce_all)
    if out is not None:
        increment_version(out)
    return outs[0] if len(outs) == 1 else outs


# Reasons that are no mistake: the arguments lie in memory as kernels do not read or write them.
_DEVICES = ("unreadable", "device_kind")  # sparse, quantized, meta, or of another device
_DTYPES = ("other_dtype", *_DEVICES)
_ORDERS = ("layout", "noise_layout")
_COPIES = (*_ORDERS, "overlap", "outputs_overlap")


def _careful(reason: native.Reason, outs: Tensors, args: Arguments, reduce_all: bool) -> Any:
    """What ``direct`` does where the kernel did not run: falls back, copies, or raises."""
    kernel, inputs, coefs, step, out, noise = args
    code = messages.code_of(reason)
    if code in _DTYPES:
        kernel, wide, noise = promoted(kernel, inputs, noise)
        if wide is not inputs:
            return direct(kernel, wide, coefs, step, reduce_all, out, noise)
    if code in _DEVICES:
        messages.explain(args)
        if not native.has_kernels(inputs[0].device):
            return run_reference(kernel, inputs, coefs, step, reduce_all, out, noise)
    if code not in _COPIES:
        messages.refuse(reason, args)
    if out is not None:
        messages.check_out(kernel, inputs, out)
    like = outs[0] if kernel.outputs else _new_like(inputs[0])
    tensors = tuple(_as(like, x) for x in inputs) if kernel.reads_inputs else ()
    again = _C.call(kernel.index, outs, tensors, coefs, step, reduce_all, noise)
    reads_noise_too = kernel.generates_noise and kernel.reads_inputs
    if reads_noise_too and again is not None and messages.code_of(again) in _ORDERS:
        z = _generated(noise, inputs[0])
        return direct(kernel.reading(), (*tensors, _as(like, z)), coefs, step, reduce_all, out)
    if again is not None:  # samples interleaved in memory, or an output partly over an input
        tensors = tuple(x.contiguous() for x in tensors)
        fresh = tuple(torch.empty_like(o, memory_format=torch.contiguous_format) for o in outs)
        last = _C.call(kernel.index, fresh, tensors, coefs, step, reduce_all, noise)
        if last is not None:
            messages.refuse(last, args)
        for o, f in zip(outs, fresh, strict=True):
            o.copy_(f)
    elif out is not None:
        increment_version(out)
    return outs[0] if len(outs) == 1 else outs


def _generated(noise: Noise, like: Tensor) -> Tensor:
    """The noise of a key, in row-major order."""
    z = torch.empty_like(like, memory_format=torch.contiguous_format)
    reason = _C.call(RANDN_INDEX, (z,), (), (), None, False, noise)
    if reason is not None:
        raise RuntimeError(f"randn: the kernel refused the noise key ({messages.code_of(reason)})")
    return z


def promoted(kernel: Kernel, inputs: Tensors, noise: Noise) -> tuple[Kernel, Tensors, Noise]:
    """The call in the widest dtype of its inputs, by torch's promotion.

    The noise of a key is rounded to the dtype of the samples first, as in every other call with
    these samples.
    """
    first = inputs[0].dtype
    for x in inputs:
        if x.dtype is not first:
            break
    else:
        return kernel, inputs, noise
    dtypes = [x.dtype for x in inputs]
    if not all(d in messages.DTYPES for d in dtypes):
        return kernel, inputs, noise  # refused by name later
    for name, x in zip(kernel.inputs, inputs, strict=True):
        check_dense(name, x)  # torch reads it below
        check_memory(name, x)
    widest = functools.reduce(torch.promote_types, dtypes)
    like = inputs[kernel.samples]
    if noise is not None and like.dtype != widest:
        messages.check_noise(noise, like.shape[0] if like.ndim else 1, like)
        inputs = (*inputs, philox.normals(noise, like.shape, like.dtype, like.device))
        kernel, noise = kernel.reading(), None
    return kernel, tuple([x.to(widest) for x in inputs]), noise


def _as(like: Tensor, x: Tensor) -> Tensor:
    """``x`` in the memory layout of ``like``."""
    return x if x.stride() == like.stride() else _new_like(like).copy_(x)


def allocate(kernel: Kernel, first: Tensor, reduce_all: bool) -> Tensors:
    shape = () if reduce_all or first.ndim == 0 else (first.shape[0],)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    outs = [_new_like(first) for _ in range(kernel.outputs)]
    outs += [first.new_empty(shape, dtype=dtype) for _ in range(kernel.sums)]
    return tuple(outs)


# ---- plain torch ---------------------------------------------------------------------------------


def run_reference(
    kernel: Kernel,
    inputs: Tensors,
    coefs: Coefs,
    step: Step,
    reduce_all: bool,
    out: Tensor | None = None,
    noise: Noise = None,
) -> Any:
    kernel, inputs, noise = promoted(kernel, inputs, noise)
    messages.explain(Arguments(kernel, inputs, coefs, step, out, noise))
    assert kernel.reference is not None, kernel.name
    if noise is not None:
        like = inputs[0]
        inputs = (*inputs, philox.normals(noise, like.shape, like.dtype, like.device))
    extra = {"reduce_all": reduce_all} if kernel.sums and not kernel.outputs else {}
    result = kernel.reference(*inputs, *expand_coefs(coefs, step), **extra)
    if out is None:
        return result
    return out.copy_(result)


def expand_coefs(coefs: Coefs, step: Step) -> list[Coef]:
    """One number, 0-dim or ``[B]`` tensor a coefficient, tables gathered at the step."""
    expanded: list[Coef] = []
    for c in coefs:
        if not isinstance(c, Tensor) or c.ndim < 2:
            expanded.append(c)
        else:
            if isinstance(step, Tensor):
                # Indexing would take negative steps, which no kernel refuses under a transform.
                rows = c.index_select(0, step.reshape(-1))
            else:
                rows = c if step is None else c[step]
            if rows.ndim == 2 and rows.shape[0] == 1:
                rows = rows[0]
            expanded.extend(rows.unbind(-1))
    return expanded


def split_coefs(coefs: Coefs) -> list[Coef]:
    """One item a coefficient: the columns of tables as tables of one column."""
    split: list[Coef] = []
    for c in coefs:
        if isinstance(c, Tensor) and c.ndim == 2:
            split.extend(c.split(1, dim=1))
        else:
            split.append(c)
    return split


def resolved(coefs: Coefs) -> Coefs:
    """The coefficients without pending negations, which the exchange API does not carry."""
    return tuple(c.resolve_neg() if isinstance(c, Tensor) else c for c in coefs)


def coefs_need_grad(coefs: Coefs) -> bool:
    for c in coefs:  # noqa: SIM110 - in every call, where a generator costs more
        if isinstance(c, Tensor) and c.requires_grad:
            return True
    return False
