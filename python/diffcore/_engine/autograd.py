"""Autograd for every kernel: one lean node, whose backward is other kernels or the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._engine import native
from diffcore._engine.execute import Noise, direct, run_reference
from diffcore._engine.kernel import Call, Grads

_TASK = getattr(torch._C, "_autograd", None)
_keeps_graph = getattr(_TASK, "_get_current_graph_task_keep_graph", lambda: True)


class Function(torch.autograd.Function):
    """The lean autograd node of every kernel, for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Tensor) -> Any:
        ctx.call = call
        kernel, coefs, step, reduce_all, noise = call
        outs = direct(kernel, inputs, coefs, step, reduce_all, None, noise)
        if kernel.outputs + kernel.sums > 1:
            ctx.set_materialize_grads(False)
        made = ()
        if kernel.makes_gradient:
            made = outs[:1]
            ctx.mark_non_differentiable(*made)
        if kernel.saves_inputs:
            ctx.save_for_backward(*to_save(inputs, made, noise), *read_again(call))
        else:
            ctx.save_for_backward(*read_again(call))
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[1:]
        saved = ctx.saved_tensors
        if not ctx.call[0].saves_inputs:
            saved = ()
        return (None, *run_backward(saved, ctx.call, grads, needs))


def read_again(call: Call) -> list[Tensor]:
    """Coefficients and timesteps that the backward pass reads again.

    They are saved only for autograd to notice when one is changed in place before that.
    """
    kernel, coefs, step, _, _ = call
    if kernel.makes_gradient:
        return []  # read in the forward pass only
    return [c for c in (*coefs, step) if isinstance(c, Tensor) and not c.is_inference()]


def to_save(
    inputs: tuple[Tensor, ...], made: tuple[Tensor, ...], noise: Noise
) -> tuple[Tensor, ...]:
    """The tensors that the backward pass needs, and those that it generates its noise from again.

    The latter are saved only for autograd to notice when one is changed in place before that.
    """
    if noise is None:
        return (*inputs, *made)
    return (*inputs, *made, *[p for p in noise if isinstance(p, Tensor)])


def run_backward(
    saved: tuple[Tensor, ...], call: Call, grads: Grads, needs: Sequence[bool]
) -> Grads:
    """The gradients of the inputs that need one."""
    kernel = call[0]
    if kernel.makes_gradient:
        grads = (None, *grads[1:])  # that output is for the backward pass only
    if all(g is None for g in grads):
        return [None] * len(needs)
    assert kernel.backward is not None, kernel.name
    # With create_graph the result must itself be differentiable: a nonlinear op is differentiated
    # through its reference. Linear backwards are made of differentiable ops, and keep no inputs.
    again = kernel.saves_inputs and torch.is_grad_enabled()
    device = next(g for g in grads if g is not None).device
    if not again and (not kernel.saves_inputs or native.has_kernels(device)):
        saved = saved[: len(needs) + kernel.makes_gradient]
        result = kernel.backward(saved, call, grads, needs)
        if result is not None:
            return result
    return _reference_backward(saved[: len(needs)], call, grads, needs)


def last_use() -> bool:
    """Whether the running backward pass is the last one that uses what was saved for it."""
    return not _keeps_graph()


def _reference_backward(
    inputs: tuple[Tensor, ...], call: Call, grads: Grads, needs: Sequence[bool]
) -> Grads:
    kernel, coefs, step, reduce_all, noise = call
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # One view an argument: a tensor given twice, or made of another argument, must not count
        # for both.
        leaves = tuple(
            x.view_as(x) if create_graph else x.detach().requires_grad_(n)
            for x, n in zip(inputs, needs, strict=True)
        )
        outs = run_reference(kernel, leaves, coefs, step, reduce_all, None, noise)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [x for x, n in zip(leaves, needs, strict=True) if n]
    pairs = [(o, g) for o, g in zip(outs, grads, strict=True) if g is not None and o.requires_grad]
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
