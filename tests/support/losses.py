"""The losses to test: weights, upstream gradients, and the eager loss beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, losses, ops
from diffcore._engine import native
from diffcore.testing import assert_within_bound
from support import formulas
from support.cases import NOISE_TABLE, STEPS, steps_of

BATCH, COLUMNS = 6, 1031
KEY = PhiloxNoise(2**63 + 5, sample_ids=2**32 - 2, stream=9, first_element=64)
SNR = (NOISE_TABLE[:, 0] / NOISE_TABLE[:, 1]) ** 2

Options = dict[str, Any]
WEIGHTS: dict[str, Callable[[str], Options]] = {
    "none": lambda kind: {},
    "number": lambda kind: {"weight": 1.7},
    "samples": lambda kind: {"weight": torch.linspace(0.01, 3, BATCH)},
    "table": lambda kind: {"weight": torch.logspace(-2, 2, STEPS, dtype=torch.float64), **_at()},
    "min_snr": lambda kind: {"weight": losses.min_snr_weights(SNR, prediction_type=kind), **_at()},
    "edm": lambda kind: {"weight": losses.edm_weights(SNR, prediction_type=kind), **_at()},
    "a step": lambda kind: {"weight": torch.linspace(1, 2, STEPS), "t": 3},
}
UPSTREAM: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda loss: loss.mean(),
    "sum": lambda loss: loss.sum(),
    "scaled mean": lambda loss: 3 * loss.mean(),
    "weighted": lambda loss: (loss * torch.linspace(-2, 1.5, BATCH).to(loss)).sum(),
    "some samples": lambda loss: loss[1:3].mean() + loss[4],
    "mean of a part": lambda loss: loss[:BATCH].sum() / BATCH,
    "nothing": lambda loss: 0 * loss.sum(),
}
each_kind = pytest.mark.parametrize("kind", ops.PREDICTION_TYPES)
each_weight = pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
each_noise = pytest.mark.parametrize("drawn", [False, True], ids=["tensor", "key"])
needs_module = pytest.mark.skipif(native._C is None, reason="needs the compiled module")


def _at() -> Options:
    return {"t": steps_of(BATCH)}


def options_of(kind: str, weight: Callable[[str], Options], device: str = "cpu") -> Options:
    """The options of a loss; v_prediction's levels are tables where the weight is one."""
    options: Options = {"prediction_type": kind, **weight(kind)}
    if kind == "v_prediction":
        rows = slice(None) if "t" in options else steps_of(BATCH)
        options |= {"alpha": NOISE_TABLE[rows, 0], "sigma": NOISE_TABLE[rows, 1]}
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}


def tensors_of(
    dtype: torch.dtype, device: str = "cpu", shape: tuple[int, ...] = (BATCH, COLUMNS)
) -> tuple[Tensor, Tensor, Tensor]:
    """A model's output, x_0, and the noise of the key."""
    generator = torch.Generator().manual_seed(1)
    m, x0 = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    return m.requires_grad_(), x0, KEY.tensor(shape, dtype=dtype, device=device)


def eager(*args: Any, **options: Any) -> Tensor:
    loss: Tensor = formulas.denoising_loss(torch, *args, **options)
    return loss


def gradient(
    f: Callable[..., Tensor], m: Tensor, rest: Any, options: Options, total: Any
) -> Tensor:
    leaf = m.detach().requires_grad_()
    (found,) = torch.autograd.grad(total(f(leaf, *rest, **options)), leaf)
    return found


def judge(found: Tensor, plain: Tensor, exact: Tensor, name: str = "gradient") -> None:
    """The bound, all samples being of one scale: a large weight excuses nothing in another one."""
    top = exact.abs().amax(1, keepdim=True)
    scale = torch.where(top > 0, torch.exp2(-torch.log2(top).floor()), 1.0)
    same_scale = ((x.double() * scale).to(x.dtype) for x in (found, plain, exact))
    assert_within_bound(*same_scale, name=name)
