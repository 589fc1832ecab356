"""The classes of the demo: dropped in training, told to the model in sampling and measuring."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

for _package in ("matplotlib", "PIL", "safetensors", "tqdm", "sklearn"):
    pytest.importorskip(_package)

from diffcore.demo import ddpm, flow, likelihood  # noqa: E402
from diffcore.demo.classes import CLASSES, drop_classes  # noqa: E402
from diffcore.demo.config import quick_config  # noqa: E402
from diffcore.demo.training import LossFunction  # noqa: E402

CONFIG = quick_config("digits").replace({"bits_images": 300})
DIFFUSION = ddpm.build_diffusion(CONFIG)
LABELS = torch.tensor([7, 0, 3, 3])


class Recording(nn.Module):
    """Keeps the inputs of every call, and predicts a number for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((x.clone(), t.clone(), labels.clone()))
        return (self.scale * labels / 16).view(-1, 1, 1, 1).expand_as(x)


# ---- training -----------------------------------------------------------------------------------


def _check_dropped(found: Tensor, labels: Tensor, share: float) -> None:
    """Each label is its own or "any", and about the share of them are "any"."""
    dropped = found == CLASSES
    assert torch.equal(found[~dropped], labels[~dropped])
    deviation = math.sqrt(len(labels) * share * (1 - share))
    assert abs(dropped.sum().item() - len(labels) * share) < 5 * deviation


def test_dropped_labels_are_the_class_any() -> None:
    labels = torch.arange(4000) % CLASSES
    found = drop_classes(labels, 0.1, torch.Generator().manual_seed(0))
    _check_dropped(found, labels, 0.1)
    assert found.dtype == labels.dtype
    assert torch.equal(found, drop_classes(labels, 0.1, torch.Generator().manual_seed(0)))
    assert not torch.equal(found, drop_classes(labels, 0.1, torch.Generator().manual_seed(1)))
    assert torch.equal(labels, torch.arange(4000) % CLASSES)  # not in place


@pytest.mark.parametrize(
    "loss",
    [ddpm.training_loss(DIFFUSION, 0.3), flow.training_loss(flow.build_flow(), 0.3)],
    ids=["ddpm", "flow"],
)
def test_training_drops_classes(loss: LossFunction) -> None:
    model = Recording()
    labels = torch.arange(1000) % CLASSES
    loss(model, torch.zeros(1000, 1, 4, 4), labels, torch.Generator().manual_seed(0))
    ((_, _, found),) = model.calls
    _check_dropped(found, labels, 0.3)


# ---- sampling -----------------------------------------------------------------------------------


def _ddpm(model: nn.Module, x_T: Tensor, scale: float) -> Tensor:
    return ddpm.sample_ddpm(
        DIFFUSION, model, x_T, LABELS, guidance_scale=scale, seed=1, progress=False
    )


def _ddim(model: nn.Module, x_T: Tensor, scale: float) -> Tensor:
    return ddpm.sample_ddim(
        DIFFUSION, model, x_T, LABELS, guidance_scale=scale, num_steps=10, progress=False
    )


def _strip(model: nn.Module, x_T: Tensor, scale: float) -> Tensor:
    return ddpm.reverse_strip(
        DIFFUSION, model, x_T, LABELS, [49, 20, 0], guidance_scale=scale, seed=1
    )


def _flow(model: nn.Module, x_T: Tensor, scale: float) -> Tensor:
    config = CONFIG.replace({"guidance_scale": scale})
    return flow.sample_flow(model, x_T, LABELS, config, progress=False)


@pytest.mark.parametrize("sample", [_ddpm, _ddim, _strip, _flow])
def test_sampling_is_told_the_classes_and_guided(
    sample: Callable[[nn.Module, Tensor, float], Tensor],
) -> None:
    """Both predictions are asked for at each x, and the step takes m_any + w (m_class - m_any)."""
    x_T = ddpm.initial_noise((4, 1, 8, 8), 0, torch.device("cpu"))
    scale = 2.5
    model = Recording()
    found = sample(model, x_T, scale)
    assert len(model.calls) % 2 == 0
    for one, other in zip(model.calls[::2], model.calls[1::2], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        told = {tuple(labels.tolist()) for _, _, labels in (one, other)}
        assert told == {tuple(LABELS.tolist()), (CLASSES,) * len(LABELS)}

    class Guided(nn.Module):
        """Returns the guided prediction whatever class it is told."""

        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            mixed = CLASSES + scale * (LABELS - CLASSES)  # exact, as are sixteenths of it
            return (mixed / 16).view(-1, 1, 1, 1).expand_as(x)

    torch.testing.assert_close(found, sample(Guided(), x_T, 1.0))


# ---- measuring ----------------------------------------------------------------------------------


def _of_class(labels: Tensor) -> Tensor:
    """Images of one gray level, 28 k for class k."""
    return (labels * 28 / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()


def _class_of(x: Tensor, t: Tensor) -> Tensor:
    """The class of noisy images of ``_of_class``, where the noise is small."""
    x_0 = x.mean((1, 2, 3)) / DIFFUSION.schedule.alpha[t]
    return ((x_0 + 1) * 127.5 / 28).round().long()


def _labelled(count: int) -> tuple[Tensor, Tensor]:
    labels = torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(0))
    return _of_class(labels), labels


def _check_told(model: Recording, count: int) -> None:
    """Every image was measured with its class."""
    x, t, labels = (torch.cat(part) for part in zip(*model.calls, strict=True))
    assert (labels < CLASSES).all()
    assert len(model.calls) > 1
    first = t == 0
    assert first.sum() == count
    assert torch.equal(_class_of(x[first], t[first]), labels[first])


def test_the_held_out_loss_is_told_the_class() -> None:
    model = Recording()
    images, labels = _labelled(300)
    ddpm.held_out_loss(DIFFUSION, model, images, labels, seed=0)
    assert sum(len(called) for _, _, called in model.calls) == 1200
    assert torch.equal(torch.cat([called for _, _, called in model.calls]), labels.repeat(4))
    _check_told(model, 1200 // DIFFUSION.num_timesteps)


def test_the_bound_is_told_the_class() -> None:
    model = Recording()
    images, labels = _labelled(400)  # more than are measured, in two batches
    likelihood.held_out_bits(DIFFUSION, model, images, labels, CONFIG, seed=0, progress=False)
    _check_told(model, CONFIG.bits_images + CONFIG.bits_exact_images)
