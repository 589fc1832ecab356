"""What EDM refuses, and how it says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffcore import EDM, PhiloxNoise

X = torch.zeros(3, 2, 4)
NET = lambda x, t: x  # noqa: E731


def losses(sigma: Any = 1.0, x: Any = X, net: Any = NET, **options: Any) -> Any:
    return EDM().training_losses(net, x, sigma, **options)


def sampled(shape: Any = (2, 3), steps: Any = 4, **options: Any) -> Any:
    return EDM().sample(NET, shape, steps, **options)


CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: EDM(0.0), ValueError, "sigma_data must be above 0, got 0.0"),
    (lambda: EDM("0.5"), TypeError, "sigma_data must be a number, got str"),
    (lambda: EDM(p_std=-1), ValueError, "p_std must be above 0, got -1.0"),
    (lambda: EDM(p_mean=math.inf), ValueError, "p_mean must be finite, got inf"),
    (lambda: EDM(sigma_min=90), ValueError, "sigma_min must be at most sigma_max, 80.0, got 90.0"),
    (lambda: EDM(rho=0), ValueError, "rho must be above 0, got 0.0"),
    (lambda: losses(0.0), ValueError, "sigma must be above 0 and finite, got 0"),
    (lambda: losses(-2), ValueError, "sigma must be above 0 and finite, got -2"),
    (lambda: losses(math.nan), ValueError, "sigma must be above 0 and finite, got nan"),
    (
        lambda: losses(torch.tensor([1.0, 0.0, 1.0])),
        ValueError,
        "sigma must be above 0 and finite, got 0",
    ),
    (lambda: losses(torch.ones(2)), ValueError, r"sigma must have shape \(3,\), got \(2,\)"),
    (
        lambda: losses(torch.ones(3, 2)),
        ValueError,
        r"\(3,\), got \(3, 2\); for a level of each frame pass",
    ),
    (
        lambda: losses(torch.ones(3, device="meta")),
        ValueError,
        "sigma must be on cpu, the device of x_start, got meta",
    ),
    (
        lambda: losses(torch.ones(3, dtype=torch.int64)),
        TypeError,
        "sigma must be a floating-point tensor, got torch.int64",
    ),
    (lambda: losses("1"), TypeError, "sigma must be a number, got str"),
    (lambda: losses(x=[1.0]), TypeError, "x_start must be a floating-point tensor, got list"),
    (
        lambda: losses(noise=torch.zeros(3, 2, 5)),
        ValueError,
        r"noise must have the shape of x_start, \(3, 2, 4\), got \(3, 2, 5\)",
    ),
    (lambda: losses(noise=7), TypeError, "noise must be a torch.Tensor or a PhiloxNoise, got int"),
    (
        lambda: losses(torch.ones(3, 3), group_dim=1),
        ValueError,
        r"sigma must have shape \(3, 2\), one for each group, got \(3, 3\)",
    ),
    (lambda: losses(reduction="mean"), ValueError, "reduction must be one of 'sample', 'group'"),
    (lambda: losses(reduction="group"), ValueError, "group_dim must be given with reduction"),
    (lambda: losses(model_kwargs=3), TypeError, "model_kwargs must be a mapping or None, got int"),
    (lambda: losses(net=lambda x, t: x[:, :1]), ValueError, "model must return the shape"),
    (
        lambda: losses(logvar=torch.zeros(2)),
        ValueError,
        r"logvar must have shape \(3,\), got \(2,\)",
    ),
    (
        lambda: losses(logvar=0.5),
        TypeError,
        "logvar must be or return a floating-point tensor, got float",
    ),
    (
        lambda: losses(weights=torch.ones(2)),
        ValueError,
        r"weights must have shape \(3,\), got \(2,\)",
    ),
    (
        lambda: losses(weights=lambda sigma: "many"),
        TypeError,
        "weights must be a number or a torch.Tensor, got str",
    ),
    (lambda: losses(mask_reduction="sum"), ValueError, "mask_reduction must be one of"),
    (
        lambda: EDM().denoise(NET, X, 0.0),
        ValueError,
        "sigma must be above 0 and finite, got 0",
    ),
    (lambda: EDM().q_sample(X, torch.ones(4)), ValueError, r"sigma must have shape \(3,\)"),
    (lambda: EDM().sample_sigmas(-1), ValueError, "batch must be at least 0, got -1"),
    (lambda: EDM().sample_sigmas(2, 5), TypeError, "noise must be a PhiloxNoise, got int"),
    (lambda: EDM().levels(0), ValueError, "num_steps must be at least 1, got 0"),
    (lambda: sampled(steps=2.5), TypeError, "num_steps must be an int, got float"),
    (lambda: sampled(solver="heun"), TypeError, "solver must be a function of diffcore.solvers"),
    (
        lambda: sampled(solver=lambda levels, **options: levels),
        TypeError,
        "solver must return a SolverTable, got NoiseLevels",
    ),
    (lambda: sampled(s_churn="1"), TypeError, "s_churn must be a number, got str"),
    (lambda: sampled(s_churn=-1.0), ValueError, "s_churn must be at least 0"),
    (lambda: sampled(clip_range=(1.0, 1.0)), ValueError, "clip_range must have lowest < highest"),
    (
        lambda: sampled(noise=torch.zeros(2, 4)),
        ValueError,
        r"noise must have the given shape, \(2, 3\), got \(2, 4\)",
    ),
    (
        lambda: sampled(torch.zeros(2, 3), noise=PhiloxNoise(1)),
        ValueError,
        "noise must be None where shape is a tensor of noise, got PhiloxNoise",
    ),
    (
        lambda: sampled(noise=PhiloxNoise(1), generator=torch.Generator()),
        ValueError,
        "generator must be None where noise is a PhiloxNoise",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}" for i in range(len(CASES))])
def test_refusals(case: tuple[Callable[[], Any], type[Exception], str]) -> None:
    call, kind, message = case
    with pytest.raises(kind, match=message) as caught:
        call()
    assert type(caught.value) is kind


def test_images_in_0_1_are_warned_of() -> None:
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    edm = EDM()
    with pytest.warns(UserWarning, match="x_start has values from .* none below 0"):
        edm.training_losses(NET, images, 1.0)
    edm.training_losses(NET, images, 1.0)  # once
