"""Ops under functorch and forward mode: the safe route."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffcore import ops
from diffcore._engine import native

pytestmark = [
    pytest.mark.skipif(native._C is None, reason="needs the compiled module"),
    # torch's own compiler warns about its own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


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


def test_hessian() -> None:
    logvar = torch.randn(4, dtype=torch.float64)
    found = torch.func.hessian(
        lambda v: ops.standard_normal_kl(torch.zeros_like(v), v, reduction="sum")
    )(logvar)
    torch.testing.assert_close(found, torch.diag(0.5 * logvar.exp()))


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
