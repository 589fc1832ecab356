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


@pytest.mark.parametrize("mask_reduction", ["mask", "all"])
@pytest.mark.parametrize("name", ["video", "video, channels last", "tokens"])
def test_masks(name: str, mask_reduction: str) -> None:
    """Of elements, of groups, and a group of which nothing counts."""
    layout = LAYOUTS[name]
    f = layout.folded
    x, m, w = layout.samples(), layout.samples(), torch.rand(layout.levels)
    of_elements = torch.rand(layout.shape[-1])
    of_groups = torch.ones(layout.levels)
    of_groups[0, 1] = 0
    shape = [n if d in (0, layout.dim) else 1 for d, n in enumerate(layout.shape)]
    mask = of_groups.view(shape) * of_elements
    options = {"prediction_type": "flow_prediction", "mask_reduction": mask_reduction}

    def loss(output: Tensor, reduction: str) -> Tensor:
        return ops.denoising_loss(
            output,
            x,
            KEY,
            weight=w,
            mask=mask,
            group_dim=layout.dim,
            reduction=reduction,
            **options,
        )

    q = mask.expand(layout.shape)
    error = f(q) * (f(m) - (f(KEY.tensor(x.shape)) - f(x))) ** 2
    sums = (w.flatten() * error.flatten(1).sum(1)).view(layout.levels)
    counts = f(q if mask_reduction == "mask" else torch.ones_like(q)).flatten(1).sum(1)
    counts = counts.view(layout.levels)
    by_group = torch.where(counts > 0, sums / counts, 0.0)
    torch.testing.assert_close(loss(m, "group"), by_group)
    of_samples = sums.sum(1) / counts.sum(1)
    torch.testing.assert_close(loss(m, "sample"), of_samples)
    torch.testing.assert_close(loss(m, "mean"), of_samples.mean())
    torch.testing.assert_close(loss(m, "sum"), of_samples.sum())
    elementwise = layout.folded(loss(m, "none"))
    torch.testing.assert_close(elementwise, error * w.flatten().view(-1, *[1] * (error.ndim - 1)))
    wide = m.double().requires_grad_()
    for reduction in ("group", "sample", "mean"):
        found = torch.autograd.grad(loss(wide, reduction).sum(), wide)[0]
        truth = wide.detach().requires_grad_()
        terms = f(q.double()) * (f(truth) - f((KEY.tensor(x.shape) - x).double())) ** 2
        rows = (w.flatten() * terms.flatten(1).sum(1)).view(layout.levels)
        each = {
            "group": (rows / counts.clamp(min=1e-30)).sum(),
            "sample": (rows.sum(1) / counts.sum(1)).sum(),
            "mean": (rows.sum(1) / counts.sum(1)).mean(),
        }
        torch.testing.assert_close(found, torch.autograd.grad(each[reduction], truth)[0])


def test_a_mask_of_frames_in_training_losses() -> None:
    layout = LAYOUTS["video"]
    diffusion = diffcore.GaussianDiffusion(BETAS, variance_type="learned_range")
    x, t = layout.samples().clamp(-1, 1), torch.randint(0, 100, layout.levels)
    output = torch.randn(2, 6, 5, 4, 6)
    options = {"noise": KEY, "decoder": "gaussian", "group_dim": 2}

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return output

    full = diffusion.training_losses(model, x, t, reduction="group", **options)
    frames = torch.tensor([[1.0, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    masked = diffusion.training_losses(
        model, x, t, mask=frames[:, None, :, None, None], reduction="group", **options
    )
    of_samples = diffusion.training_losses(
        model, x, t, mask=frames[:, None, :, None, None], **options
    )
    for part, each in full.items():
        torch.testing.assert_close(masked[part], each * frames)
        torch.testing.assert_close(of_samples[part], (each * frames).sum(1) / frames.sum(1))


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


def test_the_noise_of_a_key_has_the_dtype_of_x0() -> None:
    """As without groups: beside a prediction in bfloat16 the noise is not rounded to it."""
    x, m = torch.randn(2, 4, 8), torch.randn(2, 4, 8).bfloat16()
    for prediction_type in ("epsilon", "flow_prediction"):
        found = ops.denoising_loss(m, x, KEY, prediction_type=prediction_type, group_dim=1)
        wanted = ops.denoising_loss(m, x, KEY, prediction_type=prediction_type)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
