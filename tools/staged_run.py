"""Runs commands in stages, each with a bound, and leaves results on disk as they come.

A step that fails, hangs or is cut off stops nothing after it. `steps.txt` gets a line when a step
ends and `summary.txt` a line when a stage ends, so a run that is cut off keeps what it has done.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

LEAST_SECONDS = 2.0  # with less time left, nothing is started
GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL, and after it
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

OK, FAILED, TIMEOUT, CUT, LEFT_OUT = "ok", "FAILED", "TIMEOUT", "CUT", "left out"


def last_line(log: str) -> str:
    """The last line of a log that is not empty."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Names its log, ``<stage>-<name>.log``.
        command: The command; ``None`` where ``reason`` says why there is none.
        seconds: Its bound.
        reason: Why it cannot run here.
        extra: Done only as time allows: running out of time is no failure. A missing command is
            none either.
        codes: The exit codes that pass.
        excuse: What the log of a failed command says where the machine does not allow it: the step
            is then left out.
        expects: A pattern that the log of a passing command must have: some programs exit with 0
            after doing less.
        environment: Variables for the command.
    """

    name: str
    command: Sequence[str] | None
    seconds: float
    reason: str = ""
    extra: bool = False
    codes: frozenset[int] = frozenset({0})
    excuse: str = ""
    expects: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Steps that make one line of the summary.

    Attributes:
        name: The name on the command line.
        steps: In their order.
        number: The number that matters, from the logs of the steps that ran.
    """

    name: str
    steps: Sequence[Step]
    number: Callable[[Mapping[str, str]], str] = lambda logs: (
        last_line(list(logs.values())[-1]) if logs else ""
    )


@dataclass(frozen=True)
class Outcome:
    """How a step ended."""

    step: Step
    verdict: str
    seconds: float
    detail: str = ""

    @property
    def bad(self) -> bool:
        """Whether the run has failed by it."""
        if self.verdict in (TIMEOUT, CUT):
            return not self.step.extra
        return self.verdict == FAILED


class StoppedError(Exception):
    """The run was told to end (SIGTERM, or SIGINT)."""


def _stop(_number: int, _frame: FrameType | None) -> None:
    for number in STOP_SIGNALS:  # a second one would interrupt the end
        signal.signal(number, signal.SIG_IGN)
    raise StoppedError


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Makes SIGTERM and SIGINT a `StoppedError`."""
    before = [signal.signal(number, _stop) for number in STOP_SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(STOP_SIGNALS, before, strict=True):
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it started in its group; a hung driver may keep it alive."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def _wait(command: Sequence[str], environment: Mapping[str, str], log: IO[bytes], s: float) -> int:
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    try:
        return process.wait(s)
    finally:
        _end(process)  # what it left behind in its group, too


class Run:
    """Runs stages within a number of seconds and writes what they gave into a folder."""

    def __init__(self, out: Path, seconds: float) -> None:
        """Starts the clock.

        Args:
            out: The folder of the results.
            seconds: The most that all stages take together.
        """
        self.out = out
        self.ends = time.monotonic() + seconds
        self.bad = False
        out.mkdir(parents=True, exist_ok=True)
        for name in ("summary.txt", "steps.txt"):
            (out / name).write_text("", encoding="utf-8")

    def say(self, line: str) -> None:
        """Prints a line, and appends it to the summary."""
        print(line, flush=True)
        self._append(line, "summary.txt")

    def _append(self, line: str, name: str) -> None:
        with (self.out / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def log(self, stage: Stage, step: Step) -> Path:
        """Where the output of a step goes."""
        return self.out / f"{stage.name}-{step.name}.log"

    def step(self, stage: Stage, step: Step) -> Outcome:
        """Runs one step.

        Args:
            stage: Its stage.
            step: The step.

        Raises:
            StoppedError: The run was told to end. The step's line is on disk.
        """
        if step.command is None:
            verdict = LEFT_OUT if step.extra else FAILED
            return self._ended(stage, Outcome(step, verdict, 0.0, step.reason))
        left = self.ends - time.monotonic() - 2 * GRACE_SECONDS
        if left < LEAST_SECONDS:
            return self._ended(stage, Outcome(step, CUT, 0.0, "no time left"))
        start = time.monotonic()
        verdict, detail, stopped = OK, "", False
        try:
            with self.log(stage, step).open("wb") as log:
                code = _wait(step.command, step.environment, log, min(step.seconds, left))
            log_text = _text(self.log(stage, step))
            if code not in step.codes:
                verdict, detail = FAILED, f"exit {code}"
                if step.excuse and step.excuse in log_text:
                    verdict, detail = LEFT_OUT, step.excuse
            elif not re.search(step.expects, log_text):
                verdict, detail = FAILED, f"nothing in its log is {step.expects!r}"
        except subprocess.TimeoutExpired as error:
            verdict = TIMEOUT if step.seconds <= left else CUT
            detail = f"after {error.timeout:.0f} s"
        except OSError as error:
            verdict, detail = FAILED, str(error)
        except StoppedError:
            verdict, detail, stopped = CUT, "the run was stopped", True
        outcome = self._ended(stage, Outcome(step, verdict, time.monotonic() - start, detail))
        if stopped:
            self.bad = True
            raise StoppedError
        return outcome

    def _ended(self, stage: Stage, outcome: Outcome) -> Outcome:
        name = f"{stage.name}-{outcome.step.name}"
        line = f"{name:<22} {outcome.verdict:<8} {outcome.seconds:6.1f} s  {outcome.detail}"
        self._append(line.rstrip(), "steps.txt")
        return outcome

    def stage(self, stage: Stage) -> None:
        """Runs the steps of a stage, and writes its line.

        Args:
            stage: The stage.

        Raises:
            StoppedError: The run was told to end. The stage's line is on disk.
        """
        print(f"{stage.name} ...", flush=True)
        outcomes: list[Outcome] = []
        start = time.monotonic()
        try:
            outcomes += [self.step(stage, step) for step in stage.steps]
        except StoppedError:
            self.say(f"{stage.name:<9} {CUT:<8} {time.monotonic() - start:6.1f} s  stopped")
            raise
        bad = [o for o in outcomes if o.bad]
        self.bad |= bool(bad)
        ran = [o for o in outcomes if o.verdict != LEFT_OUT]
        verdict = bad[0].verdict if bad else OK if ran else LEFT_OUT
        notes = [f"{o.step.name}: {o.verdict} {o.detail}".rstrip() for o in outcomes if o.bad]
        notes += [f"{o.step.name} {o.verdict}: {o.detail}" for o in outcomes if _partly(o)]
        logs = {o.step.name: _text(self.log(stage, o.step)) for o in ran}
        try:
            found = stage.number({name: log for name, log in logs.items() if log})
        except Exception as error:  # a log of an unexpected form must not end the run
            found = f"no number ({error!r})"
        line = "; ".join(x for x in (found[:150], *notes) if x)
        seconds = sum(o.seconds for o in outcomes)
        self.say(f"{stage.name:<9} {verdict:<8} {seconds:6.1f} s  {line}".rstrip())


def _partly(outcome: Outcome) -> bool:
    return outcome.verdict != OK and not outcome.bad


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
