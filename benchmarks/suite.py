"""What a run asks for, and what a suite answers: jobs, each of which measures rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch

from .contest import Compiler
from .machine import why_no_compile
from .sampling_loops import NO_DIFFUSERS, has_diffusers
from .timing import Budget, Timing

Row = dict[str, Any]
Shape = tuple[int, ...]

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
AGAINST = ("eager", "compile", "diffusers")
COMPILE_SECONDS = {"cpu": 900.0, "cuda": 90.0}


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement.

    Attributes:
        name: Of the op, case or class; ``--only`` chooses by it.
        what: For people: it with its mode, dtype and shape.
        measure: Makes one row or several.
    """

    name: str
    what: str
    measure: Callable[[], Row | list[Row]]


@dataclasses.dataclass
class Run:
    """The options of the command, for one section on one device.

    Attributes:
        device: Where.
        quick: Small and short: a smoke test, not a measurement.
        dtype: Short names; empty for those of the suite.
        shape: Of the samples; empty for those of the suite.
        only: Names of jobs; empty for those of the suite.
        against: Which of ``AGAINST`` take part. Eager PyTorch always does.
        seconds: Of timing for each row; None for those of the suite.
        compile_seconds: After so many in a section, later rows go without ``torch.compile``.
        sweep: Many sizes.
        notes: What the tables have to say besides.
    """

    device: torch.device
    quick: bool = False
    dtype: Sequence[str] = ()
    shape: Sequence[Shape] = ()
    only: Sequence[str] = ()
    against: Sequence[str] = ("eager", "diffusers")
    seconds: float | None = None
    compile_seconds: float | None = None
    sweep: bool = False
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        """Adds a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def dtypes(self, *usual: str) -> Sequence[str]:
        """The dtypes to measure; of the usual ones the first alone if quick."""
        return self.dtype or usual[: 1 if self.quick else None]

    def shapes(self, usual: Sequence[Shape], quick: Shape) -> Sequence[Shape]:
        """The shapes to measure."""
        return self.shape or ((quick,) if self.quick else usual)

    def budget(self, cpu: float, cuda: float | None = None, *, rounds: int = 10) -> Budget:
        """How long to time one row.

        Args:
            cpu: Seconds.
            cuda: Seconds on CUDA, if others.
            rounds: At least.
        """
        usual = cpu if cuda is None or self.device.type == "cpu" else cuda
        seconds = min(0.05, usual) if self.quick else usual
        if self.seconds is not None:
            seconds = self.seconds
        return Budget(seconds, min(0.1, seconds / 5), min_rounds=3 if self.quick else rounds)

    @cached_property
    def compiles(self) -> bool:
        """Whether ``torch.compile`` takes part."""
        compiles = "compile" in self.against
        why_not = why_no_compile(self.device) if compiles else "torch.compile was left out"
        if why_not:
            self.note(why_not)
        return why_not is None

    @cached_property
    def compiler(self) -> Compiler:
        """The baseline of the cases."""
        seconds = self.compile_seconds
        if seconds is None:
            seconds = COMPILE_SECONDS[self.device.type]
        return Compiler(seconds if self.compiles else 0.0, self.note)

    @cached_property
    def diffusers(self) -> bool:
        """Whether diffusers takes part."""
        if "diffusers" not in self.against:
            return False
        if not has_diffusers():
            self.note(NO_DIFFUSERS)
        return has_diffusers()


def times(shape: Sequence[int]) -> str:
    """A shape for people."""
    return "×".join(str(n) for n in shape)


def timings_of(found: dict[str, Timing]) -> dict[str, Any]:
    """Timings as JSON holds them."""
    return {name: dataclasses.asdict(timing) for name, timing in found.items()}


def derived(timings: dict[str, Timing], elements: int, nbytes: int) -> Row:
    """Timings with what follows from them; every ratio is one of medians.

    Args:
        timings: of each contestant, "diffcore" and "eager" among them.
        elements: of one tensor.
        nbytes: that the fused op must move.
    """
    medians = {name: t.median for name, t in timings.items()}
    ours = medians["diffcore"]
    return {
        "timings": timings_of(timings),
        "ns_per_element": {name: m * 1e9 / elements for name, m in medians.items()},
        "gb_per_s": nbytes / ours / 1e9,
        "percent_of_copy": 100 * medians["copy"] / ours if "copy" in medians else None,
        "times_eager": medians["eager"] / ours,
        "times_compile": medians["compile"] / ours if "compile" in medians else None,
    }
