"""Times complete sampling loops, per step: the cost of a solver beside its network.

    python -m benchmarks.bench_sampling [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

"Solver alone" stands for an infinitely fast network: its output is an existing tensor. DDPM adds
noise in every step: diffcore generates it inside the step's kernel, the others in memory. With the
demo's U-Net the same loops show how much of the gain is left. diffcore's loop is
``diffcore.sample``; eager's loop has coefficients that are Python numbers already; diffusers' is
the loop of its pipelines. On CUDA the first two are also captured, network included, as one CUDA
graph each.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import diffcore
from benchmarks import report
from benchmarks.bench_training import row
from benchmarks.contest import WrongResultError, check_outputs
from benchmarks.timing import Budget, Call, interleave
from benchmarks.walks import NO_DIFFUSERS, TRAINING_STEPS, Model, Noises, Walk, has_diffusers
from diffcore import PhiloxNoise, sample

KINDS = ("DDPM", "DPM++ 2M", "Euler")
STEPS = 50
SHAPES = {"cpu": [(1, 4, 8, 8), (64, 3, 32, 32)], "cuda": [(1, 4, 64, 64), (64, 3, 256, 256)]}
UNET = {"cpu": [(5, (64, 1, 28, 28))], "cuda": [(50, (1, 1, 28, 28)), (50, (64, 1, 28, 28))]}
AGREEMENT = 1e-3  # of diffusers' loop, whose coefficients are float32: relative


def loops(walk: Walk, model: Model, start: Tensor, notes: list[str]) -> dict[str, list[Call]]:
    """Everyone's loop from the same start.

    Args:
        walk: the solver.
        model: the network.
        start: what to start from.
        notes: where to say what could not take part.
    """
    device = start.device
    by_hand = partial(walk.by_hand(device), model, start)
    found: dict[str, Call] = {"diffcore": partial(sample, model, start, walk.table)}
    found["eager"] = by_hand
    if has_diffusers():
        found["diffusers"] = partial(walk.diffusers(device), model, start)
    if device.type == "cuda":
        for name, record in (
            ("diffcore, captured", partial(captured, walk, model, start)),
            ("eager, captured", partial(graphed, by_hand, device)),
        ):
            try:
                found[name] = record()
            except (RuntimeError, AttributeError) as error:
                notes.append(f"{name}: {error}")
    return {name: [call] for name, call in found.items()}


def captured(walk: Walk, model: Model, start: Tensor) -> Call:
    """``diffcore.capture``: the loop as one CUDA graph, another seed in every call."""
    loop = diffcore.capture(model, walk.table, start.shape, dtype=start.dtype, device=start.device)
    return partial(loop, x=start)


def graphed(loop: Callable[[], Tensor], device: torch.device) -> Call:
    """A loop in plain PyTorch as one CUDA graph."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        loop()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        samples = loop()

    def replay() -> Tensor:
        graph.replay()
        return samples

    return replay


def check(walk: Walk, model: Model, start: Tensor) -> None:
    """Checks the loops against the hand-written one in float64, with the same noise in every step.

    Raises:
        WrongResultError: diffcore is further away than twice the hand-written loop in float32, or
            diffusers computes something else.
    """
    recipe = PhiloxNoise(2026)
    by_hand = walk.by_hand(start.device)

    def noises() -> Noises:
        """Step i of the loop draws from the stream i + 1; in float32, whatever asks."""
        streams = itertools.count(1)
        return lambda x: recipe.at(next(streams)).tensor(x.shape, device=x.device)

    found = sample(model, start, walk.table, noise=recipe)
    eager = by_hand(model, start, noises())
    truth = by_hand(lambda x, t: model(x.float(), t).double(), start.double(), noises())
    check_outputs(f"diffcore's {walk.kind} loop", [found], [eager], [truth], whole=True)
    if has_diffusers() and not walk.table.stochastic:
        off = (walk.diffusers(start.device)(model, start) - truth).norm() / truth.norm()
        if not off <= AGREEMENT:
            raise WrongResultError(f"diffusers' {walk.kind} loop is off by {float(off):.2g}")


@torch.no_grad()
def time_solver(
    walk: Walk, shape: tuple[int, ...], device: torch.device, budget: Budget, notes: list[str]
) -> dict[str, Any]:
    """One row: the solver alone, seconds a step.

    Args:
        walk: which.
        shape: of the samples.
        device: where.
        budget: how long.
        notes: where to say what could not take part.
    """
    start, output = (torch.randn(shape, device=device) for _ in range(2))
    start *= walk.table.init_noise_sigma

    def model(x: Tensor, t: Tensor) -> Tensor:
        return output if x.dtype == output.dtype else output.to(x.dtype)

    check(walk, model, start)
    what = f"{walk.kind} step, solver alone, {report.times(shape)}"
    return _time(what, loops(walk, model, start, notes), walk, device, budget)


@torch.no_grad()
def time_unet(
    walk: Walk, shape: tuple[int, ...], device: torch.device, budget: Budget, notes: list[str]
) -> dict[str, Any]:
    """One row: solver and the demo's U-Net, seconds a step.

    Args:
        walk: which solver.
        shape: of the samples.
        device: where.
        budget: how long.
        notes: where to say what could not take part.
    """
    from diffcore.demo.networks import UNet

    net = UNet(num_timesteps=TRAINING_STEPS).to(device).eval()
    start = walk.table.init_noise_sigma * torch.randn(shape, device=device)
    told = walk.table.timesteps.to(device)

    def network_alone() -> None:
        for t in told:
            net(start, t.expand(len(start)))

    calls = {**loops(walk, net, start, notes), "network alone": [network_alone]}
    what = f"{walk.kind} step, U-Net, {report.times(shape)}"
    return _time(what, calls, walk, device, budget)


def _time(
    what: str, calls: dict[str, list[Call]], walk: Walk, device: torch.device, budget: Budget
) -> dict[str, Any]:
    report.progress(what)
    timings = interleave(calls, device, budget, wall=True)
    n = walk.steps
    per_step = {
        name: dataclasses.replace(t, median=t.median / n, p20=t.p20 / n, p80=t.p80 / n)
        for name, t in timings.items()
    }
    return row(what, per_step)


def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "sampling" section."""
    seconds = args.seconds or (0.2 if args.quick else 2.0)
    budget = Budget(seconds, seconds / 10, min_rounds=3 if args.quick else 7)
    rows: list[dict[str, Any]] = []
    notes = [] if has_diffusers() else [NO_DIFFUSERS]
    for kind in KINDS:
        walk = Walk(kind, 5 if args.quick else STEPS)
        rows += [time_solver(walk, shape, device, budget, notes) for shape in SHAPES[device.type]]
    for steps, shape in UNET[device.type]:
        batch = 4 if args.quick else shape[0]
        few = Walk("DPM++ 2M", 5 if args.quick else steps)
        rows.append(time_unet(few, (batch, *shape[1:]), device, budget, notes))
    report.progress("")
    return {"rows": rows, "notes": list(dict.fromkeys(notes))}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    report.add_common_arguments(parser)
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    args = parser.parse_args(argv)
    return report.on_each_device(lambda d: {"sampling": measure(d, args)}, args, argv)


if __name__ == "__main__":
    raise SystemExit(main())
