"""torch.func inside torch.compile: values, gradients and tangents as without the compiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap
from torch.utils._pytree import tree_leaves

from diffcore import GaussianDiffusion, PhiloxNoise, make_betas, ops

KEY = PhiloxNoise(3)
X, Z, V = (torch.randn(4, 6, dtype=torch.float64) for _ in range(3))
T = torch.tensor([1, 2, 3, 4])
D = GaussianDiffusion(make_betas("linear", 20))
ALPHA, SIGMA = D.schedule.alpha[T, None], D.schedule.sigma[T, None]
Z_KEY = KEY.tensor(X.shape, dtype=torch.float64)


def setup_module() -> None:
    D.q_sample(X, T, Z)


def _dual(x: Tensor) -> Any:
    with forward_ad.dual_level():
        y = ops.add_noise(forward_ad.make_dual(x, V), KEY, 0.8, 0.6)
        return forward_ad.unpack_dual(y).tangent


def _mean_kl(x: Tensor) -> Tensor:
    return ops.normal_kl(x, x, Z[0], V[0], reduction="mean")


CASES: dict[str, tuple[Callable[[Tensor], Any], Callable[[], Any] | None]] = {
    # the expected value where it is not simply that of the same function in eager mode
    "grad": (
        lambda x: grad(lambda y: ops.add_noise(y, KEY, 0.8, 0.6).square().sum())(x),
        lambda: 1.6 * (0.8 * X + 0.6 * Z_KEY),
    ),
    "grad of a loss": (
        lambda x: grad(lambda y: ops.denoising_loss(y, x, Z).sum())(x),
        lambda: 2 * (X - Z) / 6,
    ),
    "vmap": (lambda x: vmap(lambda y: ops.add_noise(y[None], KEY, 0.8, 0.6))(x), None),
    "jvp": (
        lambda x: jvp(lambda y: D.q_sample(y, T, Z), (x,), (V,)),
        lambda: (ALPHA * X + SIGMA * Z, ALPHA * V),
    ),
    "forward mode": (_dual, lambda: 0.8 * V),
    "hessian": (lambda x: hessian(_mean_kl)(x[0]), None),
    "a gradient for each sample": (
        lambda x: vmap(grad(lambda y, t, z: D.q_sample(y[None], t[None], z[None]).sum()))(x, T, Z),
        lambda: ALPHA.expand_as(X),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_transform(name: str) -> None:
    f, right = CASES[name]
    found = tree_leaves(torch.compile(f, fullgraph=True, backend="aot_eager")(X))
    expected = tree_leaves(f(X) if right is None else right())
    for y, e in zip(found, expected, strict=True):
        torch.testing.assert_close(y, e, rtol=1e-12, atol=1e-14)
