"""Runs suites: the options, the progress, the results as they come, and what is shown at the end.

``diffcore bench`` calls :func:`main`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.util
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from diffcore._engine import native
from diffcore._usage import help_text
from support.clipping import clipping_by

from . import machine, report
from .compare import Change, Comparison
from .registry import Sections, sections_of
from .suite import AGAINST, DTYPES, Job, Row, Run

Results = dict[str, dict[str, Any]]

REPEATS = 3
"""A row that looks slower than before is measured again: it counts if it is slower each time."""


class Parser(argparse.ArgumentParser):
    """One line for a mistake, and the help of the ``diffcore`` command."""

    def error(self, message: str) -> NoReturn:
        """Ends the command."""
        print(f"diffcore bench: {message}", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self) -> str:
        """As for the other commands."""
        return help_text("bench") + "\n"


# ---- the options ----------------------------------------------------------------------------


def _list_of(known: Sequence[str]) -> Any:
    """Reads names with commas between them."""

    def read(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if any(name not in known for name in found):
            raise argparse.ArgumentTypeError(f"must be among {', '.join(known)}, got {text!r}")
        return found

    return read


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"must be sizes such as 64x3x128x128, got {text!r}")
    return tuple(int(size) for size in sizes)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return seconds


def parser() -> Parser:
    """The command line; ``diffcore._usage`` explains it."""
    p = Parser(prog="diffcore bench", allow_abbrev=False)
    p.add_argument("suites", nargs="*")
    p.add_argument("--quick", action="store_true")
    p.add_argument("--device", default="auto")
    p.add_argument("--dtype", type=_list_of(tuple(DTYPES)), default=())
    p.add_argument("--shape", type=_shape, action="append", default=[])
    p.add_argument("--sweep", action="store_true")
    p.add_argument("--only", type=lambda text: tuple(text.split(",")), default=())
    p.add_argument("--against", type=_list_of(AGAINST))
    p.add_argument("--seconds", type=_seconds)
    p.add_argument("--compile-seconds", type=_seconds)
    p.add_argument("--compare", type=Path)
    p.add_argument("--html", type=Path)
    p.add_argument("--out", type=Path, default=Path("diffcore-bench"))
    return p


def devices(name: str) -> list[torch.device]:
    """The devices that --device names.

    Raises:
        ValueError: There is no such device here.
    """
    gpu = torch.cuda.is_available()
    if name == "auto":
        cuda = torch.device("cuda", 0)
        return [torch.device("cpu"), *([cuda] if gpu and native.has_kernels(cuda) else [])]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:1, got {name!r}")
    if device.type == "cpu":
        return [device]
    index = device.index or 0
    if not gpu or index >= torch.cuda.device_count():
        count = torch.cuda.device_count() if gpu else 0
        raise ValueError(f"device must be one that torch sees, got {name!r}; it sees {count} GPUs")
    return [torch.device("cuda", index)]


def _check_files(args: argparse.Namespace) -> None:
    """Finds out now, not after an hour, what would fail at the end.

    Raises:
        ValueError: A file cannot be written.
    """
    if args.html and not importlib.util.find_spec("matplotlib"):
        raise ModuleNotFoundError(
            "diffcore bench --html needs matplotlib, not installed here: "
            'pip install "diffcore[bench]"'
        )
    for option in ("out", "html"):
        path = getattr(args, option)
        if path is None:
            continue
        folder = path if option == "out" and path.suffix != ".json" else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if path.is_dir() and folder != path:
                raise OSError
        except OSError:
            raise ValueError(f"{option} must be a file that can be written, got {path}") from None


def earlier(path: Path, names: Sequence[torch.device]) -> tuple[Comparison, torch.device]:
    """The results to compare with, and the device that they are of.

    Args:
        path: Of the results.
        names: The devices to choose from.

    Raises:
        ValueError: It does not hold results, or those of another device.
    """
    try:
        old = report.load(path)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"compare must be a result file, got {path}: {error}") from None
    facts = [body["machine"] for body in old.values() if isinstance(body, Mapping)]
    for device in names:
        here = machine.describe(device)
        if facts and all(facts[0].get(k) == here[k] for k in ("device", "threads")):
            return Comparison(old), device
    was = f"{facts[0].get('device')}, {facts[0].get('threads')} threads" if facts else "nothing"
    here = machine.describe(names[0])
    now = f"{here['device']}, {here['threads']} threads"
    raise ValueError(f"compare must be results of {now}, got {path} of {was}")


def _worst(changes: Sequence[Change]) -> float:
    """How far the worst is beyond what is allowed; 1 at the limit."""
    return max((c.factor / (1 + c.allowed) for c in changes), default=0.0)


# ---- the run --------------------------------------------------------------------------------


class Session:
    """One run on one device, with its results so far.

    Args:
        run: The options.
        path: Where the results go, beside what other runs have left there.
        command: For the results.
        old: What to compare with.

    Raises:
        ValueError: The file is there and holds something else.
    """

    def __init__(self, run: Run, path: Path, command: str, old: Comparison | None) -> None:
        self.run, self.path, self.command, self.old = run, path, command, old
        self.results: Results = {}
        if path.exists():
            report.load(path)  # what cannot be kept is found out now

    def measure(self, sections: Sections) -> None:
        """Measures sections and saves each; what there is of it if interrupted.

        Args:
            sections: by name, what makes their jobs.
        """
        native.warm_up(self.run.device)
        work: list[tuple[str, Run, list[Job]]] = []
        for name, jobs_of in sections.items():
            run = dataclasses.replace(self.run, notes=[])
            work.append((name, run, list(jobs_of(run))))
        if self.run.only:
            work = self._chosen(work)
        total = sum(len(jobs) for _, _, jobs in work)
        gc.collect()
        gc.freeze()  # or each collection before a row would go through all of torch
        try:
            # Without a terminal there is no bar.
            with tqdm(total=total, unit="row", disable=None, dynamic_ncols=True) as bar:
                for name, run, jobs in work:
                    self._section(name, run, jobs, bar)
        finally:
            gc.unfreeze()

    def _chosen(self, work: list[tuple[str, Run, list[Job]]]) -> list[tuple[str, Run, list[Job]]]:
        known = dict.fromkeys(job.name for *_, jobs in work for job in jobs)
        unknown = [name for name in self.run.only if name not in known]
        if unknown:
            raise ValueError(f"only must be among {', '.join(known)}, got {unknown[0]!r}")
        return [(n, r, [j for j in jobs if j.name in self.run.only]) for n, r, jobs in work]

    def _section(self, name: str, run: Run, jobs: Sequence[Job], bar: Any) -> None:
        rows: list[Row] = []
        refused: list[str] = []
        if not native.has_kernels(run.device):
            run.note("diffcore has no kernels here and ran in plain PyTorch")
        done = 0
        try:
            for job in jobs:
                bar.set_description(f"{name}: {job.what}"[:70], refresh=True)
                try:
                    rows += self._rows(name, job)
                except Exception as error:  # whatever one dies of, the others are measured
                    text = f"{job.what}: {type(error).__name__}: {error}".splitlines()[0]
                    refused.append(text)
                    bar.write(f"REFUSED {text}", file=sys.stderr)
                done += 1
                bar.update()
        except KeyboardInterrupt:
            run.note(f"interrupted: {done} of {len(jobs)} jobs were measured")
            raise
        finally:
            if rows or refused or run.notes:
                self._save(name, {"rows": rows, "refused": refused, "notes": run.notes})

    def _rows(self, section: str, job: Job) -> list[Row]:
        """Measures; again if it looks slower than before, to keep the best."""
        found: list[Row] = []
        kept: list[Change] = []
        for _ in range(REPEATS):
            with clipping_by(torch.clamp):
                measured = job.measure()
            rows = measured if isinstance(measured, list) else [measured]
            if self.old is None:
                return rows
            changes = self.old.of(section, rows)
            if not found or _worst(changes) < _worst(kept):
                found, kept = rows, changes
            if _worst(kept) <= 1:
                break
        if self.old is not None:
            self.old.changes += kept
        return found

    def _save(self, name: str, body: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        facts = {
            "machine": machine.describe(self.run.device),
            "date": now.strftime("%Y-%m-%d %H:%M UTC"),
            "command": self.command,
        }
        self.results[name] = {**facts, **body}
        existing = report.load(self.path) if self.path.exists() else {"schema": report.SCHEMA}
        report.save({**existing, **self.results}, self.path)

    def show(self) -> None:
        """Prints the tables, the losses and the comparison."""
        report.print_results(self.results)
        if self.old is not None:
            header, rows = self.old.table()
            if rows:
                report.print_table(header, rows, title="Compared with the earlier results")
            print(f"\n{self.old.summary()}")
        print(f"\n{self.path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes.

    Args:
        argv: The arguments; None for those of the process.

    Returns:
        The exit status: 1 if a result was refused or a row is slower than before.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    p = parser()
    args = p.parse_intermixed_args(argv)
    try:
        sections = sections_of(args.suites)
        chosen, old = devices(args.device), None
        _check_files(args)
        if args.compare is not None:
            old, device = earlier(args.compare, chosen)
            chosen = [device]
        if len(chosen) > 1 and args.out.suffix == ".json":
            raise ValueError(f"out must be a folder for two devices, got {args.out}")
    except ValueError as error:
        p.error(str(error))
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    against = args.against or tuple(x for x in AGAINST if x != "compile" or not args.quick)
    command = " ".join(["diffcore bench", *map(shlex.quote, argv)])
    sessions: list[Session] = []
    try:
        for device in chosen:
            run = Run(
                device,
                quick=args.quick,
                dtype=args.dtype,
                shape=args.shape,
                only=args.only,
                against=against,
                seconds=args.seconds,
                compile_seconds=args.compile_seconds,
                sweep=args.sweep,
            )
            name = f"{machine.slug(device)}.json"
            path = args.out if args.out.suffix == ".json" else args.out / name
            sessions.append(Session(run, path, command, old))
            sessions[-1].measure(sections)
            sessions[-1].show()
    except ValueError as error:
        p.error(str(error))
    except KeyboardInterrupt:
        saved = [s for s in sessions if s.results]
        for session in saved[-1:]:
            session.show()
        where = saved[-1].path if saved else "nowhere, as nothing was measured yet"
        print(f"\nStopped. The results so far are in {where}", file=sys.stderr)
        return 130
    if args.html is not None:
        from .page import write_page

        write_page([s.results for s in sessions], args.html, old)
        print(args.html)
    if old is not None and not old.changes:
        print(
            f"diffcore bench: compare has no row of this run, got {args.compare}", file=sys.stderr
        )
        return 2
    refused = any(body["refused"] for s in sessions for body in s.results.values())
    return int(refused or (old is not None and bool(old.slower)))
