"""Times the steps of every fused scheduler beside the stock one, and compares both with float64.

"schedulers": a walk of 20 steps, or of 5 for large samples, by ``scheduler.step`` alone, on an
existing prediction; the time is that of a step. ``set_timesteps`` is called before each walk and is
not timed; what a scheduler makes at the first step is. "stock" and "fused" draw the same noise with
torch's generator; "philox" draws it in the launch. Before it is timed, every step of "fused" is
compared with the stock step from the same sample in float64.

"scheduler_errors", on the CPU: how far a step in 16 bits is from the same step in float64, the
largest error of a step in units of its largest value, on average over walks of 10 and 50 steps.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from support.schedulers import in_float64, step_errors

from .contest import WrongResultError
from .suite import DTYPES, Job, Row, Run, Shape, times
from .timing import Call, walks

TIMED = ("f32", "bf16")
SIXTEEN = ("bf16", "f16")
SHAPES = ((1, 4, 8, 8), (1, 16, 128, 128), (64, 3, 128, 128))
STEPS, FEW_STEPS, MANY = 20, 5, 2**20  # FEW_STEPS for samples of MANY elements and more
COUNTS = (10, 50)
# With float64, root mean squares, relative: that it is the same step.
AGREEMENT = {"f32": 1e-4, "bf16": 2e-2}

# What a class needs to be fused, where its default configuration has steps that no table has.
OPTIONS: dict[str, dict[str, Any]] = {"PNDMScheduler": {"skip_prk_steps": True}}
# And what ``set_timesteps`` needs for any number of steps.
SET_TIMESTEPS: dict[str, dict[str, Any]] = {"SCMScheduler": {"intermediate_timesteps": None}}
# Timesteps at the end that are levels to reach, and of no step.
LEFT_OUT = {"SCMScheduler": 1}


def families() -> dict[str, Any]:
    """The families of fused schedulers, by the name of the stock class."""
    from diffcore.diffusers.registry import FAMILIES

    return {stock.__name__: family for stock, family in FAMILIES.items()}


class Walker:
    """A scheduler, and walks of it on an existing prediction.

    Args:
        family: of ``families``.
        steps: of a walk.
        device: where.
        how: "stock", "fused" or "philox".
    """

    def __init__(self, family: Any, steps: int, device: torch.device, how: str) -> None:
        from diffcore.diffusers import fuse

        name = family.stock.__name__
        self.scheduler = family.stock(**OPTIONS.get(name, {}))
        if how != "stock":
            fuse(self.scheduler, noise="philox" if how == "philox" else "generator")
        self.options = {"num_inference_steps": steps, "device": device}
        self.options |= SET_TIMESTEPS.get(name, {})
        self.device = device
        self.takes = inspect.signature(self.scheduler.step).parameters
        self.start()

    def start(self) -> None:
        """Begins a walk."""
        scheduler = self.scheduler
        scheduler.set_timesteps(**self.options)
        self.generator = torch.Generator(self.device).manual_seed(1)
        self.given = {"generator": self.generator} if "generator" in self.takes else {}
        left_out = LEFT_OUT.get(type(scheduler).__name__, 0)
        self.times = list(scheduler.timesteps)[: len(scheduler.timesteps) - left_out]

    def scale(self, x: Tensor) -> None:
        """Asks for the input of the first model call, as some schedulers want it."""
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(x, self.times[0])

    def step(self, i: int, m: Tensor, x: Tensor) -> Tensor:
        """Step i."""
        found: Tensor = self.scheduler.step(m, self.times[i], x, return_dict=False, **self.given)[0]
        return found

    def contest(self, m: Tensor, x: Tensor) -> tuple[Call, Call]:
        """What makes the state of a walk, and the walk."""

        def prepare() -> None:
            self.start()
            self.scale(x)

        def walk() -> Tensor:
            step, given, at = self.scheduler.step, self.given, x
            for t in self.times:
                at = step(m, t, at, return_dict=False, **given)[0]
            return at

        return prepare, walk

    def check(self) -> None:
        """Refuses a walk that was not fused.

        Raises:
            WrongResultError: A step went to the stock scheduler.
        """
        if self.scheduler.fallbacks:
            raise WrongResultError(f"not fused: {'; '.join(self.scheduler.fallbacks)}")


def compare(truth: Walker, fused: Walker, m: Tensor, x: Tensor, dtype: str) -> float:
    """Every step of a walk, each from the same sample, against the stock step in float64.

    Args:
        truth: stock, at the start of a walk.
        fused: likewise.
        m: the prediction.
        x: the first sample.
        dtype: of both, by its short name.

    Returns:
        The largest relative difference.

    Raises:
        WrongResultError: The steps differ, or were not fused.
    """
    worst = 0.0
    for walker in (truth, fused):
        walker.scale(x)
    drawn_in = fused.scheduler.noise_dtype or DTYPES[dtype]
    for i in range(len(truth.times)):
        with in_float64(truth.scheduler, drawn_in):
            wanted = truth.step(i, m.double(), x.double())
        found = fused.step(i, m, x).double()
        fused.check()
        off = float(((found - wanted).square().mean() / wanted.square().mean()).sqrt())
        if not off <= AGREEMENT[dtype]:
            raise WrongResultError(f"step {i} is off by {off:.2g}")
        worst, x = max(worst, off), wanted.to(DTYPES[dtype])
    return worst


def time_class(name: str, family: Any, shape: Shape, dtype: str, run: Run) -> Row:
    """One row: compares the steps, then times walks in turns.

    Args:
        name: of the class.
        family: its family.
        shape: of the samples.
        dtype: of the samples, by its short name.
        run: where and how long.

    Returns:
        What the JSON holds of it.

    Raises:
        WrongResultError: The fused steps are others, or not fused.
    """
    device = run.device
    steps = FEW_STEPS if math.prod(shape) >= MANY else STEPS
    x, m = (torch.randn(shape, device=device).to(DTYPES[dtype]) for _ in range(2))
    stock, fused = (Walker(family, steps, device, how) for how in ("stock", "fused"))
    start = x * float(getattr(stock.scheduler, "init_noise_sigma", 1.0))
    off = compare(Walker(family, steps, device, "stock"), fused, m, start, dtype)
    walkers = {"stock": stock, "fused": fused}
    before = torch.Generator(device).manual_seed(1).get_state()
    if not torch.equal(fused.generator.get_state(), before):  # it has drawn noise
        walkers["philox"] = Walker(family, steps, device, "philox")
    contest = {how: walker.contest(m, start) for how, walker in walkers.items()}
    found = walks(contest, device, run.budget(1.0, rounds=7), len(stock.times))
    for how in walkers:
        if how != "stock":
            walkers[how].check()
    median = {how: timing.median for how, timing in found.items()}
    return {
        "what": name,
        "dtype": dtype,
        "shape": list(shape),
        "steps": len(stock.times),
        "relative_error": off,
        "times_stock": {how: median["stock"] / t for how, t in median.items()},
        "timings": {how: dataclasses.asdict(timing) for how, timing in found.items()},
    }


def errors_of(name: str, family: Any, dtype: str, counts: Sequence[int]) -> dict[str, float]:
    """Mean errors of the steps of walks, for "stock" and "fused".

    Args:
        name: of the class.
        family: its family.
        dtype: of the samples, by its short name.
        counts: of the steps of each walk.
    """

    def make() -> Any:
        return family.stock(**OPTIONS.get(name, {}))

    last = {"stop": -LEFT_OUT[name]} if name in LEFT_OUT else {}
    found: dict[str, list[float]] = {"stock": [], "fused": []}
    most = make().config.num_train_timesteps
    for count in (min(count, most) for count in counts):
        options = {"num_inference_steps": count, **SET_TIMESTEPS.get(name, {})}
        drawn_in = family.noise_dtype or DTYPES[dtype]
        for at_x, _ in step_errors(make, options, dtype=DTYPES[dtype], drawn_in=drawn_in, **last):
            found["stock"].append(at_x.stock / at_x.largest)
            found["fused"].append(at_x.ours / at_x.largest)
    return {how: sum(values) / len(values) for how, values in found.items()}


def quietly(row: Callable[..., Row]) -> Callable[..., Row]:
    """Without gradients and without the warnings of diffusers."""

    @wraps(row)
    def quiet(*arguments: Any) -> Row:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return row(*arguments)

    return quiet


def jobs(run: Run) -> Iterator[Job]:
    """The "schedulers" section."""
    known = families() if run.diffusers else {}
    for name, family in known.items():
        for shape in run.shapes(SHAPES, SHAPES[0]):
            for dtype in run.dtype or TIMED:
                what = f"{name} {dtype} {times(shape)}"
                row = partial(quietly(time_class), name, family, shape, dtype, run)
                yield Job(name, what, row)


def error_row(name: str, family: Any, counts: Sequence[int]) -> Row:
    """The errors in each of the dtypes of 16 bits."""
    return {"what": name, **{d: errors_of(name, family, d, counts) for d in SIXTEEN}}


def jobs_of_errors(run: Run) -> Iterator[Job]:
    """The "scheduler_errors" section."""
    known = families() if run.diffusers and run.device.type == "cpu" else {}
    for name, family in known.items():
        row = partial(quietly(error_row), name, family, (3,) if run.quick else COUNTS)
        yield Job(name, f"{name}, errors", row)
