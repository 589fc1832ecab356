"""Losses of groups against folding by hand, and of samples as their mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, ops
from support.folding import LAYOUTS

KEY = PhiloxNoise(5)
BETAS = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(
    "prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"]
)
def test_denoising_loss(name: str, prediction_type: str) -> None:
    layout = LAYOUTS[name]
    f = layout.folded
    x, m = layout.samples(), layout.samples()
    a, s, w = torch.rand(3, *layout.levels)
    by_group = m.clone().requires_grad_()
    loss = ops.denoising_loss(
        by_group,
        x,
        KEY,
        prediction_type=prediction_type,
        alpha=a,
        sigma=s,
        weight=w,
        group_dim=layout.dim,
        reduction="group",
    )
    by_hand = f(m).requires_grad_()
    wanted = ops.denoising_loss(
        by_hand,
        f(x),
        f(KEY.tensor(x.shape)),
        prediction_type=prediction_type,
        alpha=a.flatten(),
        sigma=s.flatten(),
        weight=w.flatten(),
    )
    torch.testing.assert_close(loss, wanted.view(layout.levels))
    loss.mean().backward()
    wanted.mean().backward()
    assert by_group.grad is not None
    torch.testing.assert_close(f(by_group.grad), by_hand.grad)
    of_samples = ops.denoising_loss(
        m,
        x,
        KEY,
        prediction_type=prediction_type,
        alpha=a,
        sigma=s,
        weight=w,
        group_dim=layout.dim,
    )
    torch.testing.assert_close(of_samples, loss.detach().mean(1))


def test_equal_levels_give_the_loss_of_samples() -> None:
    layout = LAYOUTS["video"]
    x, m = layout.samples(torch.float64), layout.samples(torch.float64)
    weight = torch.rand(2, dtype=torch.float64)
    plain = ops.denoising_loss(m, x, KEY, weight=weight)
    torch.testing.assert_close(ops.denoising_loss(m, x, KEY, weight=weight, group_dim=2), plain)


@pytest.mark.parametrize(
    "options", [{}, {"loss_type": "kl"}, {"variance_type": "learned_range"}], ids=str
)
@pytest.mark.parametrize("name", ["video", "video, channels last", "frames first"])
def test_training_losses(options: dict[str, str], name: str) -> None:
    layout = LAYOUTS[name]
    if "variance_type" in options and layout.dim == 1:
        return  # dimension 1 is that of the channels, which hold the variance
    diffusion = diffcore.GaussianDiffusion(BETAS, **options)  # type: ignore[arg-type]
    x, f = layout.samples(), layout.folded
    x = (x.clamp(-1, 1) * 127.5).round() / 127.5
    t = torch.randint(0, 100, layout.levels)
    channels = layout.shape[1] * (2 if "variance_type" in options else 1)
    output = torch.randn(layout.shape[0], channels, *layout.shape[2:])
    calls = []

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        calls.append((x_t, t))
        return output

    found = diffusion.training_losses(
        model, x, t, noise=KEY, decoder="gaussian", group_dim=layout.dim, reduction="group"
    )
    z = KEY.tensor(x.shape)
    wanted = diffusion.training_losses(
        lambda x_t, t: f(output),
        f(x),
        t.flatten(),
        noise=f(z),
        decoder="gaussian",
    )
    assert found.keys() == wanted.keys()
    for part, loss in wanted.items():
        torch.testing.assert_close(found[part], loss.view(layout.levels))
    x_t = diffusion.q_sample(x, t, KEY, group_dim=layout.dim)
    assert torch.equal(x_t, layout.unfolded(diffusion.q_sample(f(x), t.flatten(), f(z))))
    assert torch.equal(calls[0][0], x_t)
    assert torch.equal(calls[0][1], t)
    means = diffusion.training_losses(
        model, x, t, noise=KEY, decoder="gaussian", group_dim=layout.dim
    )
    for part, loss in found.items():
        torch.testing.assert_close(means[part], loss.mean(1))


def test_errors() -> None:
    layout = LAYOUTS["video"]
    x = layout.samples()
    with pytest.raises(ValueError, match="group_dim must be given with reduction='group'"):
        ops.denoising_loss(x, x, x, reduction="group")
    diffusion = diffcore.GaussianDiffusion(BETAS)
    with pytest.raises(ValueError, match="group_dim must be given with reduction='group'"):
        diffusion.training_losses(lambda x, t: x, x, 3, reduction="group")
    with pytest.raises(ValueError, match=r"t must be in 0 \.\. 99, got values from 100 to 100"):
        diffusion.training_losses(
            lambda x, t: x,
            x,
            torch.full((2, 5), 100),
            group_dim=2,
        )
