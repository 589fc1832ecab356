"""Times one reverse step against diffusers, the formula in plain PyTorch, and its compilation.

    python -m benchmarks.bench_steps [--device auto|cpu|cuda] [--out FOLDER-OR-FILE] [--quick]

The step is in the middle of a sampling loop of 50. With guidance, diffusers' step gets
m_u + w (m_c - m_u), combined before the call as its pipelines do. "Noise given": every contestant
reads the same tensor (diffusers' ``randn_tensor`` is replaced by a function that returns it).
"Noise drawn": each contestant generates its own noise, diffcore inside the kernel. Euler's step
excludes ``scale_model_input`` for everyone; diffusers also computes x_0. Its schedulers count steps
and keep history: both are reset before each call, by one or two assignments inside the timed region
(under 0.1 µs). torch.compile gets the coefficients of this one step as constants; a loop would have
to compile every step.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.bench_ops import DTYPES, derived
from benchmarks.contest import WrongResultError, check_outputs, copy_calls
from benchmarks.machine import last_level_cache, why_no_compile
from benchmarks.timing import Budget, Call, interleave
from benchmarks.walks import NO_DIFFUSERS, Walk, has_diffusers
from diffcore import PhiloxNoise, ops
from diffcore.ops._launcher import row_plan

STEPS, AT = 50, 25
SCALE = 7.5
RECIPE = PhiloxNoise(2026)
GIVEN, DRAWN = "noise given", "noise drawn"
LARGE = {"cpu": (64, 3, 128, 128), "cuda": (64, 3, 256, 256)}
SMALL = ((1, 4, 8, 8), (256, 7, 16))
# Root mean square against float64, relative: that all have computed the same step.
AGREEMENT = {"f32": 1e-4, "bf16": 2e-2}

Tensors = dict[str, Tensor | None]


@dataclasses.dataclass(frozen=True)
class Case:
    """One step: of which solver, and what it is given."""

    kind: str
    guided: bool = False
    noise: str = ""

    def __str__(self) -> str:
        """For people."""
        return ", ".join(x for x in (self.kind, "guided" * self.guided, self.noise) if x)


LARGE_CASES = (
    Case("DDPM", guided=True, noise=GIVEN),
    Case("DDPM", guided=True, noise=DRAWN),
    Case("DPM++ 2M", guided=True),
    Case("Euler"),
)
SMALL_CASES = (
    Case("DDPM", noise=GIVEN),
    Case("DDPM", noise=DRAWN),
    Case("DPM++ 2M"),
    Case("Euler"),
)


class Contest:
    """One step on some sets of inputs, and everyone who can take it."""

    def __init__(
        self, case: Case, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.case, self.device = case, device
        self.walk = Walk(case.kind, STEPS)
        self.row = self.walk.table.rows[AT]
        self.plan = row_plan(self.row.coefficients, None)
        self.formula = self.walk.formula(AT)
        names = ["x", "m", *["m_u"] * case.guided, *["h"] * self.plan.reads]
        names += ["z"] * (case.noise == GIVEN)
        self.moved = len(names) + 1 + self.plan.keeps  # tensors read and written
        size = math.prod(shape) * dtype.itemsize * len(names)
        self.count = 1
        if device.type == "cpu" and shape not in SMALL:  # as many as keep its cache cold
            self.count = max(1, min(8, math.ceil(4 * last_level_cache() / size)))
        self.sets: list[Tensors] = [
            {name: torch.randn(*shape, device=device).to(dtype) for name in names}
            for _ in range(self.count)
        ]

    def by_hand(
        self,
        x: Tensor,
        m: Tensor,
        m_u: Tensor | None = None,
        h: Tensor | None = None,
        z: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The formulas in plain PyTorch."""
        if m_u is not None:
            m = m_u + SCALE * (m - m_u)
        if z is None and self.case.noise == DRAWN:
            z = torch.randn_like(x)
        return self.formula(x, m, h, z)

    def calls(self, function: Callable[..., object]) -> list[Call]:
        """A function of the tensors, on each set of them."""
        return [partial(function, **tensors) for tensors in self.sets]

    def diffcore(self) -> list[Call]:
        """``SolverTable.step``."""
        step = self.walk.table.step
        return [partial(step, AT, s["x"], s["m"], **self._options(s)) for s in self.sets]

    def op(self) -> list[Call]:
        """``ops.reverse_step``, which the table calls."""
        row = self.row
        return [
            partial(
                ops.reverse_step,
                *(s["x"], s["m"], row.coefficients),
                **self._options(s),
                return_history=self.plan.keeps,
            )
            for s in self.sets
        ]

    def _options(self, s: Tensors) -> dict[str, Any]:
        """What a user would name: what the step has."""
        every = {
            "noise": RECIPE if self.case.noise == DRAWN else s.get("z"),
            "history": (s["h"],) if "h" in s else None,
            "model_output_uncond": s.get("m_u"),
            "guidance_scale": SCALE if self.case.guided else None,
        }
        return {name: value for name, value in every.items() if value is not None}

    def diffusers(self) -> list[Call]:
        """``scheduler.step``, put back to this step before each call."""
        scheduler = self.walk.scheduler(self.device)
        t = scheduler.timesteps[AT]
        scheduler.scale_model_input(self.sets[0]["x"], t)  # it asks to be called once
        scheduler.lower_order_nums = 2  # that many outputs are known to it

        def step(
            x: Tensor,
            m: Tensor,
            m_u: Tensor | None = None,
            h: Tensor | None = None,
            z: Tensor | None = None,
        ) -> Tensor:
            if m_u is not None:
                m = m_u + SCALE * (m - m_u)
            scheduler._step_index = AT
            if h is not None:
                scheduler.model_outputs[1] = h
            if z is not None:
                self.given = z
            x_next: Tensor = scheduler.step(m, t, x, return_dict=False)[0]
            return x_next

        return self.calls(step)

    @contextmanager
    def same_noise(self) -> Iterator[None]:
        """While it lasts, diffusers gets the noise of the set instead of drawing."""
        if self.case.noise != GIVEN or not has_diffusers():
            yield
            return
        module = importlib.import_module("diffusers.schedulers.scheduling_ddpm")

        def given(*_: object, **__: object) -> Tensor:
            return self.given

        with mock.patch.object(module, "randn_tensor", given):
            yield


def check(contest: Contest, calls: dict[str, list[Call]], dtype: str) -> dict[str, float]:
    """Checks the first call of each against float64: diffcore as closely as rounding allows.

    Args:
        contest: what is timed.
        calls: of each contestant.
        dtype: of the samples.

    Returns:
        Errors: relative root mean squares. Of what draws its own noise there is only diffcore's.

    Raises:
        WrongResultError: someone computes another step.
    """
    given = dict(contest.sets[0])
    x = given["x"]
    assert x is not None
    if contest.case.noise == DRAWN:
        given["z"] = RECIPE.tensor(x.shape, dtype=x.dtype, device=x.device)
    wide = {name: None if t is None else t.double() for name, t in given.items()}
    truth, eager = contest.by_hand(**wide), contest.by_hand(**given)
    found = {name: _first_two(c[0]()) for name, c in calls.items()}
    check_outputs(str(contest.case), found["diffcore"], eager, truth)
    if "reverse_step" in found and not torch.equal(found["reverse_step"][0], found["diffcore"][0]):
        raise WrongResultError(f"{contest.case}: reverse_step differs from the table's step")
    errors = {}
    for name, (x_next, _) in found.items():
        if contest.case.noise == DRAWN and name not in ("diffcore", "reverse_step"):
            continue
        size = truth[0].square().mean().sqrt()
        errors[name] = float((x_next.double() - truth[0]).square().mean().sqrt() / size)
        if not errors[name] <= AGREEMENT[dtype]:
            raise WrongResultError(f"{contest.case}: {name} is off by {errors[name]:.2g}")
    return errors


def _first_two(result: Any) -> tuple[Tensor, Tensor | None]:
    """What someone returned: the samples, and the history where there is one."""
    if isinstance(result, Tensor):
        return result, None
    x_next, left = result
    return x_next, (left or (None,))[0] if isinstance(left, tuple) else left


def time_step(
    case: Case,
    dtype: str,
    shape: tuple[int, ...],
    device: torch.device,
    budget: Budget,
    compiled: bool,
) -> dict[str, Any]:
    """One row: checks everyone, then times them in turns.

    Args:
        case: the step.
        dtype: of the samples, by its short name.
        shape: likewise.
        device: likewise.
        budget: how long.
        compiled: whether ``torch.compile`` takes part.

    Returns:
        What the JSON holds of it.

    Raises:
        WrongResultError: someone computes another step.
    """
    small = shape in SMALL
    contest = Contest(case, shape, DTYPES[dtype], device)
    calls = {"diffcore": contest.diffcore(), "eager": contest.calls(contest.by_hand)}
    if small:
        calls["reverse_step"] = contest.op()
    if compiled:
        torch.compiler.reset()
        whole = torch.compile(contest.by_hand, fullgraph=True, dynamic=False)
        calls["compile"] = contest.calls(whole)
    if has_diffusers():
        calls["diffusers"] = contest.diffusers()
    with contest.same_noise():
        errors = check(contest, calls, dtype)
        elements = math.prod(shape)
        nbytes = contest.moved * DTYPES[dtype].itemsize * elements
        if not small:  # where memory is the roof
            calls["copy"] = copy_calls(nbytes, contest.count, device)
        timings = interleave(calls, device, budget, wall=small)
    t = {name: timing.median for name, timing in timings.items()}
    return {
        "step": str(case),
        "dtype": dtype,
        "shape": list(shape),
        "elements": elements,
        "bytes": nbytes,
        "input_sets": contest.count,
        "relative_error": errors,
        "times_diffusers": t["diffusers"] / t["diffcore"] if "diffusers" in t else None,
        **derived(timings, elements, nbytes),
    }


@torch.no_grad()
def measure(device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """The "steps" section."""
    seconds = args.seconds or (0.1 if args.quick else 2.0)
    budget = Budget(seconds, min(0.1, seconds / 5), min_rounds=3 if args.quick else 10)
    why_not = why_no_compile(device)
    compiled = why_not is None and not args.no_compile and not args.quick
    notes = [why_not] if why_not else []
    if not has_diffusers():
        notes.append(NO_DIFFUSERS)
    large = (4, 3, 16, 16) if args.quick else LARGE[device.type]
    grid = [(case, dtype, large) for dtype in ("f32", "bf16") for case in LARGE_CASES]
    grid += [(case, "f32", shape) for shape in SMALL for case in SMALL_CASES]
    rows, refused = [], []
    for case, dtype, shape in grid:
        report.progress(f"{case} {dtype} {report.times(shape)}")
        try:
            rows.append(time_step(case, dtype, shape, device, budget, compiled))
        except WrongResultError as error:
            refused.append(f"{dtype} {report.times(shape)}: {error}")
    report.progress("")
    return {"rows": rows, "refused": refused, "notes": notes}


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes; 1 if a result was refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    report.add_common_arguments(parser)
    parser.add_argument("--seconds", type=float, help="of timing, for each row")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    args = parser.parse_args(argv)
    return report.on_each_device(lambda d: {"steps": measure(d, args)}, args, argv)


if __name__ == "__main__":
    raise SystemExit(main())
