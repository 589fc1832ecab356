"""The kernel of guidance that depends on both predictions of a sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore._engine import native
from diffcore._engine.kernel import Kernel
from diffcore._engine.library import define
from diffcore.reference import guidance as formulas

KINDS = ("rescaled", "zero_star", "projected", "tangential", "norm_preserving")
if native._C is not None and native._C.GUIDANCE_KINDS != KINDS:
    raise ImportError(f"_C.GUIDANCE_KINDS must be {KINDS}, got {native._C.GUIDANCE_KINDS}")


def _plain(
    m: Tensor, uncond: Tensor, kind: Any, *numbers: Any, reduce_all: bool
) -> tuple[Tensor, Tensor]:
    assert not reduce_all
    if not isinstance(kind, Tensor):
        return formulas.guidance_weights(m, uncond, KINDS[int(kind)], *numbers)
    # No rule passes a tensor, but the registered operator takes one.
    each = [torch.stack(formulas.guidance_weights(m, uncond, name, *numbers)) for name in KINDS]
    chosen = kind.reshape(-1).long().clamp(0, len(KINDS) - 1).expand(each[0].shape)
    w, g = torch.stack(each).gather(0, chosen[None])[0]
    return w, g


def _backward(*_: Any) -> None:
    """Through the reference."""


GUIDANCE_WEIGHTS = define(
    Kernel(
        "guidance_weights",
        ("model_output", "model_output_uncond"),
        ("kind", "scale", "parameter", "norm_threshold"),
        outputs=0,
        sums=2,
        reference=_plain,
        backward=_backward,
        reads_samples=True,
    )
)
