"""Times ops with a level for each frame, and for each sample, against eager and ``torch.compile``.

    python -m benchmarks.bench_groups [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

Samples are [B, C, F, H, W]. Eager PyTorch broadcasts the levels of the frames.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.case_command import measure_cases
from benchmarks.contest import OpCase
from diffcore import ops

SHAPES = ("2x16x21x60x104",)
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


def _ops(by_frame: bool) -> dict[str, tuple[Any, tuple[str, ...], Any]]:
    """Name: the call, its tensors, and the formula."""

    def add_noise(x0: Any, noise: Any, alpha: Any) -> Any:
        alpha, dim = _of(x0, alpha, by_frame)
        return ops.add_noise(x0, noise, alpha, 1 - alpha, group_dim=dim)

    def loss(model_output: Any, x0: Any, noise: Any, alpha: Any) -> Any:
        alpha, dim = _of(x0, alpha, by_frame)
        return ops.denoising_loss(
            model_output,
            x0,
            noise,
            prediction_type="flow_prediction",
            weight=alpha,
            group_dim=dim,
        )

    def add_noise_formula(xp: Any, x0: Any, noise: Any, alpha: Any) -> Any:
        a = _beside(x0, alpha, by_frame)
        return a * x0 + (1 - a) * noise

    def loss_formula(xp: Any, model_output: Any, x0: Any, noise: Any, alpha: Any) -> Any:
        error = (model_output - (noise - x0)) ** 2 * _beside(x0, alpha, by_frame)
        return error.reshape(len(error), -1).mean(1)

    return {
        "add_noise": (add_noise, ("x0", "noise"), add_noise_formula),
        "denoising_loss": (loss, ("model_output", "x0", "noise"), loss_formula),
    }


def cases() -> list[OpCase]:
    """Each op by frame, and by sample."""
    return [
        OpCase(f"{name}, {'frames' if by_frame else 'samples'}", op, tensors, formula, _levels, ())
        for by_frame in (True, False)
        for name, (op, tensors, formula) in _ops(by_frame).items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a result was refused."""
    return measure_cases("groups", __doc__, cases, SHAPES, argv)


if __name__ == "__main__":
    raise SystemExit(main())
