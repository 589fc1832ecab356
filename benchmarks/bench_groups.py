"""Times ops with a level for each frame, and for each sample, against eager and ``torch.compile``.

Samples are [B, C, F, H, W]. Eager PyTorch broadcasts the levels of the frames.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffcore import ops

from .bench_ops import jobs_of_cases
from .contest import OpCase

SHAPES = ((2, 16, 21, 60, 104),)
MOST = 64  # frames


def _levels(batch: int) -> dict[str, Tensor]:
    """The alpha of every frame that there may be; sigma is 1 - alpha, as in a rectified flow."""
    return {"alpha": torch.linspace(0.1, 0.9, batch * MOST).view(batch, MOST)}


def _of(x: Any, alpha: Any, by_frame: bool) -> tuple[Any, int | None]:
    """The levels of these samples, and ``group_dim``."""
    if not by_frame:
        return alpha[:, 0], None
    dim = min(2, x.ndim - 1)
    return alpha[:, : x.shape[dim]], dim


def _beside(x: Any, alpha: Any, by_frame: bool) -> Any:
    """The same to broadcast with the samples."""
    alpha, dim = _of(x, alpha, by_frame)
    return alpha.reshape([n if d in (0, dim) else 1 for d, n in enumerate(x.shape)])


def _add_noise(x0: Any, noise: Any, alpha: Any, by_frame: bool) -> Any:
    alpha, dim = _of(x0, alpha, by_frame)
    return ops.add_noise(x0, noise, alpha, 1 - alpha, group_dim=dim)


def _folded(x0: Any, noise: Any, alpha: Any) -> Any:
    """The frames as samples, by copies there and back."""
    alpha, dim = _of(x0, alpha, True)
    assert dim is not None
    frames = [y.movedim(dim, 1).flatten(0, 1).contiguous() for y in (x0, noise)]
    alpha = alpha.flatten()
    x_t = ops.add_noise(*frames, alpha, 1 - alpha)
    return x_t.unflatten(0, (len(x0), -1)).movedim(1, dim).contiguous()


def _loss(model_output: Any, x0: Any, noise: Any, alpha: Any, by_frame: bool) -> Any:
    weight, dim = _of(x0, alpha, by_frame)
    kind = "flow_prediction"
    given = (model_output, x0, noise)
    return ops.denoising_loss(*given, prediction_type=kind, weight=weight, group_dim=dim)


def _add_noise_formula(xp: Any, x0: Any, noise: Any, alpha: Any, by_frame: bool) -> Any:
    a = _beside(x0, alpha, by_frame)
    return a * x0 + (1 - a) * noise


def _loss_formula(
    xp: Any,
    model_output: Any,
    x0: Any,
    noise: Any,
    alpha: Any,
    by_frame: bool,
) -> Any:
    error = (model_output - (noise - x0)) ** 2 * _beside(x0, alpha, by_frame)
    return error.reshape(len(error), -1).mean(1)


def cases() -> list[OpCase]:
    """Each op by frame and by sample, and frames that are folded into the batch by copies."""
    pair = ("x0", "noise")
    of_loss = ("model_output", *pair)
    rows: list[tuple[str, Any, tuple[str, ...], Any]] = []
    for by_frame, named in ((True, "frames"), (False, "samples")):
        add, formula = (partial(f, by_frame=by_frame) for f in (_add_noise, _add_noise_formula))
        rows.append((f"add_noise, {named}", add, pair, formula))
        loss, formula = (partial(f, by_frame=by_frame) for f in (_loss, _loss_formula))
        rows.append((f"denoising_loss, {named}", loss, of_loss, formula))
    rows.append(("add_noise, folded", _folded, pair, partial(_add_noise_formula, by_frame=True)))
    return [OpCase(name, op, named, formula, _levels, ()) for name, op, named, formula in rows]


jobs = partial(jobs_of_cases, cases, SHAPES)
