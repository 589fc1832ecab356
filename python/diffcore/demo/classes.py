"""Classes of images: dropped in training, told in sampling, guided by both predictions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLASSES = 10  # of every data set; as a label, "any class"


def drop_classes(labels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Replace a random share of the labels by the class "any", ``CLASSES``.

    A network trained so makes both predictions of classifier-free guidance.

    Args:
        labels: Classes ``[B]``, int64.
        share: Probability that a label is replaced, in [0, 1].
        generator: A CPU generator, so that the choice is the same on every device.

    Returns:
        Like ``labels``.

    Source:
        Ho and Salimans 2022 (arXiv 2207.12598), algorithm 1.
    """
    dropped = torch.rand(len(labels), generator=generator) < share
    return labels.masked_fill(dropped.to(labels.device), CLASSES)


def class_guidance(labels: Tensor, guidance_scale: float) -> dict[str, Any]:
    """The arguments of a sampling loop for ``m_any + w (m_class - m_any)``.

    Args:
        labels: The classes to sample ``[B]``, int64.
        guidance_scale: w; 1 for the prediction of the class alone.

    Returns:
        ``guidance_scale``, ``model_kwargs`` and ``uncond_kwargs``.

    Source:
        Ho and Salimans 2022 (arXiv 2207.12598) eq. 6, whose w is this one minus 1.
    """
    return {
        "guidance_scale": guidance_scale,
        "model_kwargs": {"labels": labels},
        "uncond_kwargs": {"labels": torch.full_like(labels, CLASSES)},
    }
