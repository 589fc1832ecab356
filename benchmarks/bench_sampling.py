"""Times sampling loops, per step: what a solver costs beside its network.

    python -m benchmarks.bench_sampling [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

"Solver alone" stands for an infinitely fast network: its output is a tensor that is already there.
DDPM draws noise in every step: diffcore inside the step's kernel, the others into memory.
With the demo's U-Net the same loops show what is left of the gain. On CUDA the loops are also run
as CUDA graphs, and diffusers' scheduler takes part where it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
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

from benchmarks import report
from benchmarks.bench_training import row
from benchmarks.contest import check_outputs
from benchmarks.machine import RESULTS
from benchmarks.timing import Budget, Call, interleave
from diffcore import PhiloxNoise, ops
from diffcore.coefficients import ddim_coefficients, ddpm_coefficients
from diffcore.diffusion import GaussianDiffusion
from diffcore.schedules import make_betas

TRAINING_STEPS = 1000
SHAPES = {"cpu": [(1, 4, 8, 8), (64, 3, 32, 32)], "cuda": [(1, 4, 64, 64), (64, 3, 256, 256)]}
UNET_SHAPE = (64, 1, 28, 28)

Model = Callable[[Tensor, Tensor], Tensor]
Numbers = list[tuple[float, ...]]
Noises = Callable[[Tensor], Tensor]


class Sampler:
    """One sampler on one device: its tables, and every way of running its loop."""

    def __init__(self, kind: str, steps: int, device: torch.device) -> None:
        """Prepares the tables; nothing here is timed.

        Args:
            kind: "DDPM" or "DDIM".
            steps: how many of the training timesteps are visited.
            device: where.
        """
        self.kind, self.steps, self.device = kind, steps, device
        self.diffusion = GaussianDiffusion(make_betas("linear", TRAINING_STEPS))
        self.timesteps = [i * (TRAINING_STEPS // steps) for i in range(steps)]
        alpha, sigma = (c[self.timesteps] for c in self.diffusion.schedule.table.unbind(1))
        prev = torch.cat([torch.ones(1).double(), alpha[:-1]])
        sigma_prev = torch.cat([torch.zeros(1).double(), sigma[:-1]])
        levels = (alpha, sigma, prev, sigma_prev)
        if kind == "DDPM":
            table = ddpm_coefficients(
                *levels, prediction_type="epsilon", variance_type="fixed_small", clip_range=1.0
            )
        else:
            table = ddim_coefficients(
                *levels, eta=0.0, prediction_type="epsilon", rederive_epsilon=True, clip_range=1.0
            )
        self.table = torch.as_tensor(table).to(device)
        # Python numbers: the cheapest way to write a solver by hand.
        self.numbers: Numbers = [tuple(r) for r in self.table.tolist()]
        self.levels: Numbers = [tuple(r) for r in torch.stack(levels, 1).tolist()]

    def library(self, model: Model, start: Tensor, noise: PhiloxNoise | None = None) -> Tensor:
        """The loop of GaussianDiffusion; the noise of its steps is drawn inside the kernel."""
        if self.kind == "DDPM":
            loop = self.diffusion.p_sample_loop
        else:
            loop = self.diffusion.ddim_sample_loop
        return loop(model, start.shape, num_steps=self.steps, noise=start, step_noise=noise)

    def hand_written(self, model: Model, start: Tensor, noise: Noises = torch.randn_like) -> Tensor:
        """The formulas in plain PyTorch, with coefficients that are already numbers.

        Args:
            model: the network.
            start: x_T.
            noise: what draws the noise of a step, called once a step.
        """
        x = start
        for i in reversed(range(self.steps)):
            t = torch.full(start.shape[:1], self.timesteps[i], device=self.device)
            m = model(x, t)
            alpha, sigma, alpha_prev, sigma_prev = self.levels[i]
            x0 = ((x - sigma * m) / alpha).clamp(-1, 1)
            if self.kind == "DDIM":
                epsilon = (x - alpha * x0) / sigma
                x = alpha_prev * x0 + sigma_prev * epsilon
                continue
            c_x, _, c_0, c_z = self.numbers[i][:4]
            x = c_0 * x0 + c_x * x
            if i:
                x = x + c_z * noise(x)
        return x

    def diffusers(self, scheduler: Any, model: Model, start: Tensor) -> Tensor:
        """The loop that diffusers' pipelines run."""
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t.repeat(len(x))), t, x).prev_sample
        return x

    def scheduler(self) -> Any:
        """The scheduler of diffusers; None where that is not installed."""
        if importlib.util.find_spec("diffusers") is None:
            return None
        diffusers = importlib.import_module("diffusers")
        kind = diffusers.DDPMScheduler if self.kind == "DDPM" else diffusers.DDIMScheduler
        scheduler = kind(
            TRAINING_STEPS, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=True
        )
        scheduler.set_timesteps(self.steps, device=self.device)
        return scheduler

    def graphed(self, fused: bool, output: Tensor, start: Tensor) -> Call:
        """A DDIM loop of replays of one step, the solver alone; the step is counted on the device.

        Args:
            fused: diffcore's step, or the formula by hand.
            output: of the network.
            start: x_T.
        """
        x = start.clone()
        counter = torch.full((1,), self.steps - 1, device=self.device)
        single = self.table.to(x.dtype)

        def step() -> None:
            if fused:
                ops.reverse_step(x, output, self.table, t=counter, out=x)
            else:
                c_x, c_m, c_0, _, a_x, a_m, low, high = single.index_select(0, counter)[0].unbind()
                x0 = (a_x * x + a_m * output).clamp(low, high)
                x.copy_(c_x * x + c_m * output + c_0 * x0)
            counter.sub_(1)

        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()

        def loop() -> Tensor:
            x.copy_(start)
            counter.fill_(self.steps - 1)
            for _ in range(self.steps):
                graph.replay()
            return x

        return loop


def check(sampler: Sampler, model: Model, start: Tensor) -> None:
    """Checks the loop against the hand-written one in float64, with the same noise in every step.

    Raises:
        WrongResultError: it is further away than twice the hand-written loop in float32.
    """
    recipe = PhiloxNoise(2026)

    def noises() -> Noises:
        """Step i of the loop draws from the stream i + 1; in float32, whatever asks."""
        streams = itertools.count(1)
        return lambda x: recipe.at(next(streams)).tensor(x.shape, device=x.device)

    found = sampler.library(model, start, recipe)
    by_hand = sampler.hand_written(model, start, noises())
    wide = start.double()
    truth = sampler.hand_written(lambda x, t: model(x.float(), t).double(), wide, noises())
    check_outputs(f"diffcore's {sampler.kind} loop", [found], [by_hand], [truth], whole=True)


@torch.no_grad()
def time_solver(
    sampler: Sampler, shape: tuple[int, ...], budget: Budget, notes: list[str]
) -> dict[str, Any]:
    """One row: the solver alone, seconds a step.

    Args:
        sampler: which.
        shape: of the samples.
        budget: how long.
        notes: where to say what could not take part.
    """
    device = sampler.device
    start, output = (torch.randn(shape, device=device) for _ in range(2))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return output if x.dtype == output.dtype else output.to(x.dtype)

    check(sampler, model, start)
    calls: dict[str, list[Call]] = {
        "diffcore": [partial(sampler.library, model, start)],
        "eager": [partial(sampler.hand_written, model, start)],
    }
    scheduler = sampler.scheduler()
    if scheduler is not None:
        calls["diffusers"] = [partial(sampler.diffusers, scheduler, model, start)]
    if device.type == "cuda" and sampler.kind == "DDIM":
        try:
            for name, fused in (("diffcore, CUDA graph", True), ("eager, CUDA graph", False)):
                calls[name] = [sampler.graphed(fused, output, start)]
        except RuntimeError as error:
            notes.append(f"no CUDA graphs: {error}")
    what = f"{sampler.kind} step, solver alone, {report.times(shape)}"
    return _time(what, calls, sampler, budget)


@torch.no_grad()
def time_unet(sampler: Sampler, shape: tuple[int, ...], budget: Budget) -> dict[str, Any]:
    """One row: solver and the demo's U-Net, seconds a step.

    Args:
        sampler: which.
        shape: of the samples.
        budget: how long.
    """
    from diffcore.demo.networks import UNet

    net = UNet(num_timesteps=TRAINING_STEPS).to(sampler.device).eval()
    start = torch.randn(shape, device=sampler.device)

    def network_alone() -> None:
        for t in sampler.timesteps:
            net(start, torch.full(shape[:1], t, device=sampler.device))

    calls: dict[str, list[Call]] = {
        "diffcore": [partial(sampler.library, net, start)],
        "eager": [partial(sampler.hand_written, net, start)],
        "network alone": [network_alone],
    }
    what = f"{sampler.kind} step, U-Net, {report.times(shape)}"
    return _time(what, calls, sampler, budget)


def _time(
    what: str, calls: dict[str, list[Call]], sampler: Sampler, budget: Budget
) -> dict[str, Any]:
    report.progress(what)
    timings = interleave(calls, sampler.device, budget, wall=True)
    per_step = {
        name: dataclasses.replace(
            t, median=t.median / sampler.steps, p20=t.p20 / sampler.steps, p80=t.p80 / sampler.steps
        )
        for name, t in timings.items()
    }
    return row(what, per_step)


def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "sampling" section."""
    seconds = args.seconds or (0.2 if args.quick else 2.0)
    budget = Budget(seconds, seconds / 10, min_rounds=3 if args.quick else 7)
    steps = 5 if args.quick else 50
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for kind in ("DDPM", "DDIM"):
        sampler = Sampler(kind, steps, device)
        for shape in SHAPES[device.type]:
            rows.append(time_solver(sampler, shape, budget, notes))
    batch = 4 if args.quick else UNET_SHAPE[0]
    few = Sampler("DDIM", 5, device)
    rows.append(time_unet(few, (batch, *UNET_SHAPE[1:]), budget))
    report.progress("")
    if importlib.util.find_spec("diffusers") is None:
        notes.append("diffusers is not installed and did not take part")
    return {"rows": rows, "notes": notes}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    report.add_common_arguments(parser)
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    args = parser.parse_args(argv)
    for device in report.devices(args.device):
        report.finish({"sampling": measure(device, args)}, device, args.out or RESULTS, argv)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
