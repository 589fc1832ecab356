"""Autograd for every kernel: one lean node, whose backward is other kernels or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore import _native
from diffcore._execute import Coef, Grads, Kernel, Step, direct, run_reference

Call = tuple[Kernel, tuple[Coef, ...], Step, bool]


class Function(torch.autograd.Function):
    """The lean autograd node of every kernel, for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> Any:
        ctx.call = call
        kernel, coefs, step, whole = call
        if kernel.saves_inputs:
            ctx.save_for_backward(*inputs)
        if kernel.outputs + kernel.sums > 1:
            ctx.set_materialize_grads(False)
        return direct(kernel, inputs, coefs, step, whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[1:]
        return (None, *run_backward(ctx.saved_tensors, ctx.call, grads, needs))


def run_backward(
    inputs: tuple[Tensor, ...], call: Call, grads: Grads, needs: Sequence[bool]
) -> Grads:
    """The gradients of the inputs that need one."""
    kernel, coefs, step, whole = call
    if all(g is None for g in grads):
        return [None] * len(needs)
    assert kernel.backward is not None, kernel.name
    # With create_graph the result must itself be differentiable: a nonlinear op is differentiated
    # through its reference. Linear backwards are made of differentiable ops, and keep no inputs.
    again = kernel.saves_inputs and torch.is_grad_enabled()
    device = next(g for g in grads if g is not None).device
    if not again and (not kernel.saves_inputs or _native.has_kernels(device)):
        result = kernel.backward(inputs, coefs, step, whole, grads, needs)
        if result is not None:
            return result
    return _reference_backward(inputs, call, grads, needs)


def _reference_backward(
    inputs: tuple[Tensor, ...], call: Call, grads: Grads, needs: Sequence[bool]
) -> Grads:
    kernel, coefs, step, whole = call
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = (
            inputs
            if create_graph
            else tuple(x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True))
        )
        outs = run_reference(kernel, leaves, coefs, step, whole)
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
