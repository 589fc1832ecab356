"""Ops under functorch and forward mode: the safe route."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffcore import ops
from diffcore._engine import native
from support.bounds import each_case
from support.cases import CASES, OpCase, as_tuple

pytestmark = [
    pytest.mark.skipif(native._C is None, reason="needs the compiled module"),
    # torch's own compiler warns about its own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


# ---- functorch and forward mode -----------------------------------------------------------------


@each_case
def test_vmap(case: OpCase) -> None:
    samples = [case.make((3, 7), torch.float64, seed=i) for i in range(4)]
    f, _ = case.by_position(samples[0])
    tensors = [torch.stack([s.tensors[n] for s in samples]) for n in case.tensors]
    found = as_tuple(torch.vmap(f)(*tensors))
    for i in range(4):
        wanted = as_tuple(f(*(x[i] for x in tensors)))
        for y, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(y[i], w)


def test_vmap_over_coefficients_and_other_dimensions() -> None:
    x, y = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    a = torch.rand(4, dtype=torch.float64)
    found = torch.vmap(lambda x, y, a: ops.add_noise(x, y, a, 0.5), (2, None, 0), 1)(
        x, y[..., 0], a
    )
    for i in range(4):
        torch.testing.assert_close(
            found[:, i], ops.add_noise(x[..., i], y[..., 0], float(a[i]), 0.5)
        )


def test_vmap_of_the_operator() -> None:
    x, y = torch.randn(2, 4, 3, 5)
    f = torch.vmap(
        torch.ops.diffcore.linear_combination.default, (0, 0, None, None, None, None, None)
    )
    found = f(x, y, [None, None], [0.8, 0.6], None, -1, False)
    torch.testing.assert_close(found, ops.add_noise(x, y, 0.8, 0.6))


@each_case
def test_func_grad_jvp_and_jacobians(case: OpCase) -> None:
    args = case.make((2, 3), torch.float64)
    f, tensors = case.by_position(args)
    place = list(args.tensors).index(case.differentiable[0])

    def g(x: Tensor) -> Tensor:
        return sum(y.sum() for y in as_tuple(f(*tensors[:place], x, *tensors[place + 1 :])))

    x = tensors[place]
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(g(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(g)(x), wanted)
    torch.testing.assert_close(torch.func.jacrev(g)(x), wanted)
    torch.testing.assert_close(torch.func.jacfwd(g)(x), wanted)
    value, tangent = torch.func.jvp(g, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(value, g(x))
    torch.testing.assert_close(tangent, wanted.sum())
    per_row = torch.vmap(torch.func.grad(g))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(per_row[0], wanted)


def test_hessian() -> None:
    logvar = torch.randn(4, dtype=torch.float64)
    found = torch.func.hessian(
        lambda v: ops.standard_normal_kl(torch.zeros_like(v), v, reduction="sum")
    )(logvar)
    torch.testing.assert_close(found, torch.diag(0.5 * logvar.exp()))


@each_case
def test_forward_mode(case: OpCase) -> None:
    args = case.make((2, 3), torch.float64)
    f, tensors = case.by_position(args)
    assert torch.autograd.gradcheck(
        f,
        tuple(
            x.requires_grad_(n in case.differentiable)
            for n, x in zip(case.tensors, tensors, strict=True)
        ),
        check_forward_ad=True,
        check_backward_ad=False,
    )


def test_timesteps_out_of_range_do_not_wrap() -> None:
    x, table = torch.ones(2, 3), torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])

    def noised(x: Tensor, t: Tensor) -> Tensor:
        return ops.q_sample(x, t, torch.zeros_like(x), table)

    def gradient(x: Tensor, t: Tensor) -> Tensor:
        return torch.func.grad(lambda x, t: noised(x, t).sum())(x, t)

    each = torch.vmap(lambda x, t: noised(x[None], t)[0])
    for f in (gradient, each):
        assert f(x, torch.tensor([0, 2])).tolist() == [[1.0] * 3, [3.0] * 3]
        for wrong in (-1, 3):
            with pytest.raises((IndexError, RuntimeError), match="out of"):
                f(x, torch.tensor([0, wrong]))


def test_every_case_has_its_route() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
