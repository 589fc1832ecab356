"""Second derivatives and Jacobians of a case, by every way of torch to compute them."""

from __future__ import annotations

import torch
from torch import Tensor

from support.op_case import without_kernels
from support.routes.case import Call, Function
from support.routes.route import (
    Tensors,
    differentiable,
    leaves,
    scalar,
    seed,
    upstream,
)


def backward_twice(f: Function, call: Call) -> Tensors:
    """Gradients of the second of two passes through one graph."""
    given = leaves(call)
    seed()
    outputs = f(*given)
    wanted = [y for y in outputs if y.requires_grad]
    torch.autograd.backward(wanted, upstream(wanted), retain_graph=True)
    for x in given:
        x.grad = None
    torch.autograd.backward(wanted, upstream(wanted))
    found = (torch.zeros_like(x) if x.grad is None else x.grad for x in given if x.requires_grad)
    return (*(y.detach() for y in outputs), *found)


def second_derivative(f: Function, call: Call) -> Tensors:
    """The gradient of the squared norm of the gradient."""
    given = tuple(x.clone().requires_grad_() for x in differentiable(call))
    first = torch.autograd.grad(
        scalar(f, call)(*given), given, create_graph=True, materialize_grads=True
    )
    norm = sum(g.square().sum() for g in first)
    if not norm.requires_grad:  # linear in every argument
        return (*first, *map(torch.zeros_like, given))
    second = torch.autograd.grad(norm, given, materialize_grads=True)
    return (*(g.detach() for g in first), *second)


def second_of_reference(f: Function, call: Call) -> Tensors:
    with without_kernels():
        return second_derivative(f, call)


def second_by_func(f: Function, call: Call) -> Tensors:
    """The same by ``torch.func``: the Hessian times twice the gradient."""
    given = differentiable(call)
    argnums = tuple(range(len(given)))
    grad = torch.func.grad(scalar(f, call), argnums)
    first = grad(*given)
    _, second = torch.func.jvp(grad, given, tuple(2 * g for g in first))
    return (*first, *second)


def jacobian(f: Function, call: Call) -> Tensors:
    """d output / d first differentiable tensor, row by row in plain reverse mode."""
    x = differentiable(call)[0].clone().requires_grad_()
    outputs = _of_first(f, call)(x)
    return tuple(_rows(y, x) for y in outputs)


def _rows(y: Tensor, x: Tensor) -> Tensor:
    if not y.requires_grad:
        return torch.zeros(*y.shape, *x.shape, dtype=x.dtype)
    rows = [
        torch.autograd.grad(one, x, retain_graph=True, materialize_grads=True)[0]
        for one in y.reshape(-1)
    ]
    return torch.stack(rows).reshape(*y.shape, *x.shape)


def _of_first(f: Function, call: Call) -> Function:
    place = call.needs.index(True)
    given = call.values

    def g(x: Tensor) -> Tensors:
        seed()
        return f(*given[:place], x, *given[place + 1 :])

    return g


def jacobian_by_rev(f: Function, call: Call) -> Tensors:
    return torch.func.jacrev(_of_first(f, call))(differentiable(call)[0])


def jacobian_by_fwd(f: Function, call: Call) -> Tensors:
    return torch.func.jacfwd(_of_first(f, call), randomness="same")(differentiable(call)[0])
