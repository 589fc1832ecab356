"""denoising_loss with the coefficients of its target, against the prediction types."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from support.losses import KEY, each_noise

STEPS = 7
SHAPE = (4, 3, 5, 8)
TABLE = torch.rand(STEPS, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
T = torch.tensor([0, 6, 3, 3])
ALPHA, SIGMA = TABLE.unbind(1)
LEVELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "numbers": (
        {"prediction_type": "flow_prediction"},
        {"target": (-1.0, 1.0)},
    ),
    "samples": (
        {"prediction_type": "v_prediction", "alpha": ALPHA[T], "sigma": SIGMA[T]},
        {"target": (-SIGMA[T], ALPHA[T])},
    ),
    "a table": (
        {"prediction_type": "v_prediction", "alpha": ALPHA, "sigma": SIGMA, "t": T},
        {"target": (-SIGMA, ALPHA), "t": T},
    ),
}
each_level = pytest.mark.parametrize("name", LEVELS)


def samples(device: str) -> tuple[Tensor, Tensor, Tensor]:
    m, x0 = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)).to(device)
    return m.clone().requires_grad_(), x0, KEY.tensor(SHAPE, device=device)


@each_level
@each_noise
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_values_and_gradients(name: str, drawn: bool, masked: bool, device: str) -> None:
    m, x0, z = samples(device)
    noise: Tensor | PhiloxNoise = KEY if drawn else z
    rest: dict[str, Any] = {"weight": torch.tensor([1.0, 2.0, 0.5, 3.0], device=device)}
    if "t" in LEVELS[name][0]:
        rest["weight"] = torch.linspace(1, 2, STEPS, device=device)
    if masked:
        rest["mask"] = (x0 > 0).float()
    found = []
    for options in LEVELS[name]:
        loss = ops.denoising_loss(m, x0, noise, **options, **rest)
        found.append((loss, *torch.autograd.grad(loss.mean(), m)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_any_pair_against_float64(device: str) -> None:
    m, x0, z = samples(device)
    a, b = torch.tensor([0.3, -2.0, 1.0, 0.0]), torch.tensor([1.5, 0.2, -1.0, 1.0])
    loss = ops.denoising_loss(m, x0, KEY, target=(a, b), reduction="sample")
    wide = m.detach().double().requires_grad_()
    column = [c.double().view(-1, 1, 1, 1).to(device) for c in (a, b)]
    wanted = ((wide - column[0] * x0.double() - column[1] * z.double()) ** 2).mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-7)
    for own, exact in zip(
        torch.autograd.grad(loss.mean(), m),
        torch.autograd.grad(wanted.mean(), wide),
        strict=True,
    ):
        torch.testing.assert_close(own.double(), exact, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("reduction", ["group", "sample", "none"])
def test_groups(reduction: str, device: str) -> None:
    m, x0, z = samples(device)
    a, b = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3)).to(device)
    of_groups = {"group_dim": 2, "reduction": reduction}
    found = ops.denoising_loss(m, x0, KEY, target=(a, b), **of_groups)  # type: ignore[arg-type]
    column = [c[:, None, :, None].double() for c in (a, b)]
    square = (m.double() - column[0] * x0.double() - column[1] * z.double()) ** 2
    wanted = {"group": square.mean((1, 3)), "sample": square.mean((1, 2, 3)), "none": square}
    torch.testing.assert_close(found.double(), wanted[reduction], rtol=1e-5, atol=1e-6)
    t = torch.randint(0, STEPS, (4, 5), generator=torch.Generator().manual_seed(4)).to(device)
    tables = (ALPHA.to(device), SIGMA.to(device))
    by_table = ops.denoising_loss(m, x0, KEY, target=tables, t=t, **of_groups)  # type: ignore[arg-type]
    one = ops.denoising_loss(m, x0, KEY, target=(tables[0][t], tables[1][t]), **of_groups)  # type: ignore[arg-type]
    torch.testing.assert_close(by_table, one)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": 1.0}, TypeError, r"target must be a pair \(a, b\), got float"),
        ({"target": (1.0,)}, ValueError, r"target must be a pair \(a, b\), got 1 entries"),
        (
            {"target": (1.0, 1.0), "prediction_type": "sample"},
            ValueError,
            "prediction_type must be left out with target, got 'sample'",
        ),
        ({"target": (1.0, "x")}, TypeError, r"target\[1\] must be .*, got str"),
        ({"target": (torch.ones(3), 1.0)}, ValueError, r"target\[0\] must .*"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    m, x0, z = samples("cpu")
    with pytest.raises(error, match=message):
        ops.denoising_loss(m, x0, z, **options)
