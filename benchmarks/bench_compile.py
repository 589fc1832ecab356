"""Times what torch.compile makes of diffcore: a training step, and a sampling loop of ten steps.

The network is an MLP on ``[B, 16, 7]``, such as a robot policy, so small that calls count. Each
workload runs in eager, compiled with the operators ("kernel"), and compiled with the formulas
("formula", see ``diffcore.set_compiled_ops``), interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import diffcore
from diffcore import GaussianDiffusion, NoiseSchedule, make_betas, respaced_timesteps, solvers
from diffcore._engine import compiled_ops
from diffcore._engine.compiled_ops import KINDS

from .suite import Job, Row, Run, times, timings_of
from .timing import Call, interleave

SHAPE = (16, 7)
STEPS = 10
BATCHES = {"loop": 1, "training": 64}


class Policy(torch.nn.Module):
    """An MLP with one hidden layer, told the time."""

    def __init__(self) -> None:
        super().__init__()
        n = SHAPE[0] * SHAPE[1]
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(n, 128), torch.nn.SiLU(), torch.nn.Linear(128, n)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction, like ``x``."""
        flat: Tensor = self.layers(x.flatten(1) + 1e-3 * t.to(x).unsqueeze(1))
        return flat.view_as(x)


def loop(device: torch.device) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Ten DDIM steps by ``table.step``, and where they start."""
    model = Policy().to(device)
    schedule = NoiseSchedule.from_betas(make_betas("squaredcos_cap_v2", 100))
    levels = solvers.NoiseLevels.from_schedule(schedule, respaced_timesteps(100, STEPS))
    table = solvers.ddim_table(levels, clip_range=1.0)
    t = table.to(device).timesteps.unsqueeze(1)

    @torch.no_grad()
    def run(x: Tensor) -> Tensor:
        history: tuple[Tensor, ...] = ()
        for i in range(len(table)):
            x, history = table.step(i, x, model(x, t[i]), history)
        return x

    return run, (torch.randn(BATCHES["loop"], *SHAPE, device=device),)


def training(device: torch.device) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """The loss of ``GaussianDiffusion`` with a tensor of noise, and its gradients."""
    model, batch = Policy().to(device), BATCHES["training"]
    diffusion = GaussianDiffusion(make_betas("linear", 1000))
    x0, noise = torch.randn(2, batch, *SHAPE, device=device)
    t = torch.randint(1000, (batch,), device=device)

    def run(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return diffusion.training_losses(model, x0, t, noise=noise)["loss"].mean()

    return run, (x0, t, noise)


def step(kind: str, run: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> Tensor:
    """One call, and a backward pass where there is a gradient to compute."""
    compiled_ops.kind = kind  # compiled code is for one choice, and compiled again for another
    result = run(*arguments)
    if result.requires_grad:
        result.backward()
    return result


def contestants(
    make: Callable[..., Any], device: torch.device, compiled: bool
) -> dict[str, list[Call]]:
    """The workload by name of what runs it; the compiled ones are compiled and checked."""
    run, arguments = make(device)
    calls: dict[str, list[Call]] = {"eager": [partial(step, KINDS[0], run, arguments)]}
    wanted = run(*arguments).detach()
    for kind in KINDS if compiled else ():
        diffcore.set_compiled_ops(kind)

        def traced(*arguments: Tensor, run: Callable[..., Tensor] = run) -> Tensor:
            return run(*arguments)

        # A code object each: one would hold both, and try them in turn.
        traced.__code__ = traced.__code__.replace(co_name=kind)
        function = torch.compile(traced, fullgraph=True)
        torch.testing.assert_close(function(*arguments).detach(), wanted, rtol=1e-4, atol=1e-5)
        calls[f"compiled, {kind}"] = [partial(step, kind, function, arguments)]
    return calls


def time_workload(what: str, make: Callable[..., Any], run: Run) -> Row:
    """One row."""
    try:
        calls = contestants(make, run.device, run.compiles)
        timings = interleave(calls, run.device, run.budget(5.0), wall=True)
    finally:
        diffcore.set_compiled_ops(KINDS[0])
    return {"what": what, "timings": timings_of(timings)}


def jobs(run: Run) -> Iterator[Job]:
    """The "compile" section."""
    for name, make in (("loop of ten steps", loop), ("training step", training)):
        batch = BATCHES["loop" if make is loop else "training"]
        what = f"{name}, MLP, {times((batch, *SHAPE))}"
        yield Job(name, what, partial(time_workload, what, make, run))
