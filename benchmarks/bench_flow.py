"""Times the mathematics of a flow-matching training step, from the times to the network's gradient.

    python -m benchmarks.bench_flow [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

A step draws logit-normal times, shifts them, adds noise, and computes the weighted loss and its
gradient in the output of a network that costs nothing. With "noise drawn", eager PyTorch and
``torch.compile`` write the noise to memory, and diffcore generates it inside its kernels.
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
from diffcore import FlowMatching, PhiloxNoise

SHAPES = {"cpu": [(64, 16, 64, 64), (8, 16, 32, 32)], "cuda": [(64, 16, 64, 64)]}
SHIFT = 3.0
FLOW = FlowMatching(timestep_density="logit_normal", shift=SHIFT, weighting="cosmap")

Outputs = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Any, Any], Outputs]


def eager_step(m: Tensor, x0: Tensor, noise: Tensor | None, t: Tensor | None) -> Outputs:
    """What one writes by hand; x_t goes to a network that does not wait for it.

    Args:
        m: the network's output.
        x0: clean samples.
        noise: standard normal; None to draw it.
        t: times `[B]`; None to draw them.

    Returns:
        x_t and the loss.
    """
    noise = torch.randn_like(x0) if noise is None else noise
    if t is None:
        t = torch.sigmoid(torch.randn(len(x0), device=x0.device))
        t = SHIFT * t / (1 + (SHIFT - 1) * t)
    at = t.reshape(-1, 1, 1, 1)
    x_t = (1 - at) * x0 + at * noise
    weight = 2 / (torch.pi * (1 - 2 * t + 2 * t * t))
    error = (m - (noise - x0)).square().flatten(1).mean(1)
    return x_t, (weight * error).mean()


def diffcore_step(m: Tensor, x0: Tensor, noise: Any, t: Tensor | None) -> Outputs:
    """The same through ``FlowMatching``: two launches beside those of the times.

    Args:
        m: the network's output.
        x0: clean samples.
        noise: standard normal, or a noise key; None for one seeded by torch's generator.
        t: times `[B]`; None to draw them.

    Returns:
        x_t and the loss.
    """
    seen = []

    def network(x_t: Tensor, told: Tensor) -> Tensor:
        seen.append(x_t)
        return m

    loss = FLOW.training_losses(network, x0, t, noise=noise)["loss"].mean()
    return seen[0], loss


def gradient(step: Step, m: Tensor, x0: Tensor, noise: Any, t: Any) -> tuple[Tensor, ...]:
    """x_t, the loss, and its gradient in the network's output."""
    x_t, loss = step(m, x0, noise, t)
    (slope,) = torch.autograd.grad(loss, m)
    return x_t, loss, slope


def time_shape(
    shape: tuple[int, ...], device: torch.device, budget: Budget, compiled: bool
) -> list[dict[str, Any]]:
    """Two rows: a step with its noise and times given, and drawn.

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
    t = FLOW.sample_timesteps(shape[0], key, device=device)
    steps: dict[str, Step] = {"diffcore": diffcore_step, "eager": eager_step}
    if compiled:
        torch.compiler.reset()
        steps["compile"] = torch.compile(eager_step, fullgraph=True, dynamic=False)
    wide = m.detach().double().requires_grad_()
    truth = gradient(eager_step, wide, x0.double(), noise.double(), t.double())
    by_hand = gradient(eager_step, m, x0, noise, t)
    for given, times in ((noise, t), (key, None)):  # the key draws this noise and these times
        check_outputs("diffcore", gradient(diffcore_step, m, x0, given, times), by_hand, truth)
    rows = []
    for given, times, text in ((noise, t, "noise given"), (None, None, "noise drawn")):
        calls = {n: [partial(gradient, step, m, x0, given, times)] for n, step in steps.items()}
        what = f"flow training step, {text}, {report.times(shape)}"
        report.progress(what)
        rows.append(row(what, interleave(calls, device, budget)))
    return rows


def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "flow" section."""
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
    return report.on_each_device(lambda d: {"flow": measure(d, args)}, args, argv)


if __name__ == "__main__":
    raise SystemExit(main())
