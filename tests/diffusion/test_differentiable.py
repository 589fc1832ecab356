"""Gradients through the loops of GaussianDiffusion: against finite differences, row by row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise
from diffcore.diffusion import GaussianDiffusion

D = GaussianDiffusion(torch.linspace(0.01, 0.3, 10, dtype=torch.float64))
KEY = PhiloxNoise(5)
LOOPS = {
    "ddpm": (D.p_sample_loop, {}),
    "ddim": (D.ddim_sample_loop, {"eta": 0.3, "num_steps": 5}),
}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", LOOPS)
def test_gradients_of_ten_steps(name: str, checkpoint: bool) -> None:
    loop, options = LOOPS[name]
    x = KEY.tensor((2, 3), dtype=torch.float64).requires_grad_()
    weight = torch.tensor([0.4, -0.3, 0.8], dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, **more: Any) -> Tensor:
        def model(x: Tensor, t: Tensor) -> Tensor:
            return torch.tanh(x * weight) + 0.01 * t[:, None]

        return loop(model, x.shape, noise=x, step_noise=KEY, clip_denoised=False, **options, **more)

    recorded = {"differentiable": True, "checkpoint": checkpoint}
    assert torch.autograd.gradcheck(lambda x, w: run(x, w, **recorded), (x, weight))
    plain = run(x, weight)
    assert not plain.requires_grad
    assert torch.equal(run(x, weight, **recorded), plain)


def test_checkpoint_needs_a_recorded_loop() -> None:
    with pytest.raises(ValueError, match="checkpoint must be False without differentiable=True"):
        D.p_sample_loop(lambda x, t: x, (2, 3), checkpoint=True)
