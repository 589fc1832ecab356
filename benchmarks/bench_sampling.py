"""Times complete sampling loops, per step: the cost of a solver relative to its network.

"Solver alone" stands for an infinitely fast network: its output is an existing tensor. DDPM adds
noise in every step: diffcore generates it inside the kernel of the step, the others write it to
memory. With the demo's U-Net, the same loops show how much of the gain remains. The loop of
diffcore is ``diffcore.sample``, that of eager is plain torch with coefficients as Python numbers,
that of diffusers is the one of its pipelines. On CUDA the first two are also recorded, loop and
network together, as a CUDA graph each.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, sample

from .contest import WrongResultError, check_outputs
from .sampling_loops import (
    TRAINING_STEPS,
    Model,
    Noises,
    SamplingLoop,
    has_diffusers,
)
from .suite import Job, Row, Run, Shape, times, timings_of
from .timing import Call, interleave

KINDS = ("DDPM", "DPM++ 2M", "Euler")
STEPS = 50
SHAPES = {"cpu": [(1, 4, 8, 8), (64, 3, 32, 32)], "cuda": [(1, 4, 64, 64), (64, 3, 256, 256)]}
UNET = {"cpu": [(5, (64, 1, 28, 28))], "cuda": [(50, (1, 1, 28, 28)), (50, (64, 1, 28, 28))]}
AGREEMENT = 1e-3  # relative, with the loop of diffusers, whose coefficients are float32


def loops(solver: SamplingLoop, model: Model, start: Tensor, run: Run) -> dict[str, list[Call]]:
    """The loops of all contestants, from the same start.

    Args:
        solver: the solver.
        model: the network.
        start: what to start from.
        run: who takes part; it gets a note for each contestant that cannot.
    """
    device = start.device
    plain = partial(solver.plain_torch(device), model, start)
    found: dict[str, Call] = {"diffcore": partial(sample, model, start, solver.table)}
    found["eager"] = plain
    if run.diffusers:
        found["diffusers"] = partial(solver.diffusers(device), model, start)
    if device.type == "cuda":
        for name, record in (
            ("diffcore, captured", partial(captured, solver, model, start)),
            ("eager, captured", partial(graphed, plain, device)),
        ):
            try:
                found[name] = record()
            except (RuntimeError, AttributeError) as error:
                run.note(f"{name}: {error}")
    return {name: [call] for name, call in found.items()}


def captured(solver: SamplingLoop, model: Model, start: Tensor) -> Call:
    """``diffcore.capture``: the loop as one CUDA graph, with another seed in each call."""
    loop = diffcore.capture(
        model, solver.table, start.shape, dtype=start.dtype, device=start.device
    )
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


def check(solver: SamplingLoop, model: Model, start: Tensor) -> None:
    """Checks the loops against the one in plain torch in float64, with the same noise in each step.

    Raises:
        WrongResultError: diffcore is further away than twice the plain loop in float32, or
            diffusers computes something else.
    """
    key = PhiloxNoise(2026)
    plain = solver.plain_torch(start.device)

    def noises() -> Noises:
        """Step i of the loop takes the stream i + 1, in float32 for samples of any dtype."""
        streams = itertools.count(1)
        return lambda x: key.at(next(streams)).tensor(x.shape, device=x.device)

    found = sample(model, start, solver.table, noise=key)
    eager = plain(model, start, noises())
    truth = plain(lambda x, t: model(x.float(), t).double(), start.double(), noises())
    check_outputs(f"diffcore's {solver.kind} loop", [found], [eager], [truth], whole=True)
    if has_diffusers() and not solver.table.stochastic:
        off = (solver.diffusers(start.device)(model, start) - truth).norm() / truth.norm()
        if not off <= AGREEMENT:
            raise WrongResultError(f"diffusers' {solver.kind} loop is off by {float(off):.2g}")


@torch.no_grad()
def time_solver(solver: SamplingLoop, shape: Shape, run: Run) -> Row:
    """One row: the solver alone, seconds a step.

    Args:
        solver: the solver.
        shape: shape of the samples.
        run: where and how long.
    """
    device = run.device
    start, output = (torch.randn(shape, device=device) for _ in range(2))
    start *= solver.table.init_noise_sigma

    def model(x: Tensor, t: Tensor) -> Tensor:
        return output if x.dtype == output.dtype else output.to(x.dtype)

    check(solver, model, start)
    what = f"{solver.kind} step, solver alone, {times(shape)}"
    return _time(what, loops(solver, model, start, run), solver, run)


@torch.no_grad()
def time_unet(solver: SamplingLoop, shape: Shape, run: Run) -> Row:
    """One row: solver and the demo's U-Net, seconds a step.

    Args:
        solver: the solver.
        shape: shape of the samples.
        run: where and how long.
    """
    from diffcore.demo.networks import UNet

    device = run.device
    net = UNet(num_timesteps=TRAINING_STEPS).to(device).eval()
    start = solver.table.init_noise_sigma * torch.randn(shape, device=device)
    timesteps = solver.table.timesteps.to(device)

    def network_alone() -> None:
        for t in timesteps:
            net(start, t.expand(len(start)))

    calls = {**loops(solver, net, start, run), "network alone": [network_alone]}
    return _time(f"{solver.kind} step, U-Net, {times(shape)}", calls, solver, run)


def _time(what: str, calls: dict[str, list[Call]], solver: SamplingLoop, run: Run) -> Row:
    timings = interleave(calls, run.device, run.budget(2.0, rounds=7), wall=True)
    n = solver.steps
    per_step = {
        name: dataclasses.replace(t, median=t.median / n, p20=t.p20 / n, p80=t.p80 / n)
        for name, t in timings.items()
    }
    return {"what": what, "timings": timings_of(per_step)}


def jobs(run: Run) -> Iterator[Job]:
    """The "sampling" section."""
    shapes = run.shape or SHAPES[run.device.type]
    for kind, shape in itertools.product(KINDS, shapes):
        solver = SamplingLoop(kind, 5 if run.quick else STEPS)
        what = f"{kind}, solver alone, {times(shape)}"
        yield Job(kind, what, partial(time_solver, solver, shape, run))
    for steps, shape in UNET[run.device.type]:
        few = SamplingLoop("DPM++ 2M", 5 if run.quick else steps)
        size = (4 if run.quick else shape[0], *shape[1:])
        what = f"DPM++ 2M, U-Net, {times(size)}"
        yield Job("U-Net", what, partial(time_unet, few, size, run))
