"""Times the mathematics of an EDM training step, from the noise levels to the network's gradient.

    python -m benchmarks.bench_edm [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

A step samples noise levels, adds noise, scales the input of a network that costs nothing, and
computes the preconditioned loss and its gradient in the network's output. With "noise drawn", eager
PyTorch and ``torch.compile`` write the noise to memory, and diffcore generates it in its kernels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.bench_training import row
from benchmarks.contest import check_outputs
from benchmarks.machine import why_no_compile
from benchmarks.timing import Budget, interleave
from diffcore import EDM, PhiloxNoise

SHAPES = {"cpu": [(64, 16, 64, 64), (8, 16, 32, 32)], "cuda": [(64, 16, 64, 64)]}
OURS = EDM()

Outputs = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Any, Any], Outputs]


def eager_step(m: Tensor, x0: Tensor, noise: Tensor | None, sigma: Tensor | None) -> Outputs:
    """What one writes by hand; the input goes to a network that does not wait for it.

    Args:
        m: the network's output.
        x0: clean samples.
        noise: standard normal; None to draw it.
        sigma: noise levels `[B]`; None to draw them.

    Returns:
        The network's input and the loss.
    """
    noise = torch.randn_like(x0) if noise is None else noise
    if sigma is None:
        sigma = torch.exp(1.2 * torch.randn(len(x0), device=x0.device) - 1.2)
    at = sigma.reshape(-1, 1, 1, 1)
    total = at**2 + 0.25
    x = x0 + at * noise
    denoised = 0.25 / total * x + at * 0.5 / total.sqrt() * m
    weight = total / (at * 0.5) ** 2
    return x / total.sqrt(), (weight * (denoised - x0) ** 2).mean()


def diffcore_step(m: Tensor, x0: Tensor, noise: Any, sigma: Tensor | None) -> Outputs:
    """The same through ``EDM``: two launches beside those of the noise levels.

    Args:
        m: the network's output.
        x0: clean samples.
        noise: standard normal, or a noise key; None for one seeded by torch's generator.
        sigma: noise levels `[B]`; None to draw them.

    Returns:
        The network's input and the loss.
    """
    inputs = []

    def network(x: Tensor, c_noise: Tensor) -> Tensor:
        inputs.append(x)
        return m

    loss = OURS.training_losses(network, x0, sigma, noise=noise)["loss"].mean()
    return inputs[0], loss


def gradient(step: Step, m: Tensor, x0: Tensor, noise: Any, sigma: Any) -> tuple[Tensor, ...]:
    """The network's input, the loss, and its gradient in the network's output."""
    x, loss = step(m, x0, noise, sigma)
    (slope,) = torch.autograd.grad(loss, m)
    return x, loss, slope


def time_shape(
    shape: tuple[int, ...], device: torch.device, budget: Budget, compiled: bool
) -> list[dict[str, Any]]:
    """Two rows: a step with its noise and levels given, and drawn.

    Args:
        shape: of the samples.
        device: where.
        budget: how long, for each row.
        compiled: whether ``torch.compile`` takes part.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    m, x0 = (torch.randn(shape, device=device) for _ in range(2))
    m.requires_grad_()
    key = PhiloxNoise(2026)
    noise = key.tensor(shape, dtype=x0.dtype, device=device)
    sigma = OURS.sample_sigmas(shape[0], key, device=device)
    steps: dict[str, Step] = {"diffcore": diffcore_step, "eager": eager_step}
    if compiled:
        torch.compiler.reset()
        steps["compile"] = torch.compile(eager_step, fullgraph=True, dynamic=False)
    wide = m.detach().double().requires_grad_()
    truth = gradient(eager_step, wide, x0.double(), noise.double(), sigma.double())
    by_hand = gradient(eager_step, m, x0, noise, sigma)
    for given, levels in ((noise, sigma), (key, None)):  # the key gives this noise and these levels
        check_outputs("diffcore", gradient(diffcore_step, m, x0, given, levels), by_hand, truth)
    rows = []
    for given, levels, text in ((noise, sigma, "noise given"), (None, None, "noise drawn")):
        calls = {n: [partial(gradient, step, m, x0, given, levels)] for n, step in steps.items()}
        what = f"EDM training step, {text}, {report.times(shape)}"
        report.progress(what)
        rows.append(row(what, interleave(calls, device, budget)))
    return rows


def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "edm" section."""
    seconds = args.seconds or (0.2 if args.quick else 4.0)
    budget = Budget(seconds, seconds / 10, min_rounds=3 if args.quick else 10)
    note = why_no_compile(device)
    compiled = note is None and not args.no_compile and not args.quick
    rows = []
    for shape in [(8, 3, 16, 16)] if args.quick else SHAPES[device.type]:
        rows += time_shape(shape, device, budget, compiled)
    report.progress("")
    return {"rows": rows, "notes": [note] if note else []}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    report.add_common_arguments(parser)
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    args = parser.parse_args(argv)
    return report.on_each_device(lambda d: {"edm": measure(d, args)}, args, argv)


if __name__ == "__main__":
    raise SystemExit(main())
