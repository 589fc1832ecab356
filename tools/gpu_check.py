"""Checks this tree on a machine with a GPU, in stages that fit into minutes.

    make gpu-check STAGES=build,bits MAX_SECONDS=540 OUT=gpu-check-out
    python tools/gpu_check.py --stages build,bits --out gpu-check-out

Works offline, with what is installed. Results are in the folder as they come: `summary.txt` has a
line per stage, `steps.txt` one per command, and each command a log. The exit status is 0 only if
nothing failed, hung or was cut off. `--device cpu` tries the commands on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools.staged_run import Run, Stage, Step, StoppedError, last_line, stoppable  # noqa: E402

# The folders of tests, shortest first, in pytest runs of their own; `others` takes the rest.
TEST_GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "sampling": (("sampling", "diffusion"), 40),
    "noise": (("noise",), 40),
    "cuda": (("cuda",), 60),
    "ops": (("ops",), 70),
}
OTHERS_SECONDS = 30
BENCHMARKS = (
    "noise",
    "steps",
    "bound",
    "threshold",
    "guidance",
    "groups",
    "masks",
    "likelihood",
    "ops",
    "overhead",
    "memory",
    "accuracy",
    "training",
    "flow",
    "density",
    "compile",
    "schedulers",
)
METRICS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)
FACTS = """
import torch
gpu = torch.cuda.is_available()
name = torch.cuda.get_device_name() if gpu else "no GPU"
print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}")
"""


@dataclass(frozen=True)
class Settings:
    """What the stages are made for.

    Attributes:
        device: "cuda", or "cpu" to try the commands.
        out: The folder of the results.
        architectures: For CMake, such as ``native`` or ``90-real``.
    """

    device: str
    out: Path
    architectures: str

    @property
    def gpu(self) -> bool:
        """Whether there is a GPU to check."""
        return self.device == "cuda"


def python(*arguments: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *arguments]


def benchmark(*arguments: str) -> list[str]:
    """A command that measures, by the suites of this clone: a wheel has not all of them."""
    return python("-m", "benchmarks", *arguments)


def tool(name: str) -> tuple[list[str] | None, str]:
    """A program on PATH; or None, and why."""
    path = shutil.which(name)
    return ([path], "") if path else (None, f"{name} is not on PATH")


# ---- the stages ---------------------------------------------------------------------------------


def build(s: Settings) -> Stage:
    """Builds and installs into the environment of this interpreter, and prints what is there."""
    environment = {
        "DIFFCORE_CUDA": "ON" if s.gpu else "OFF",
        "DIFFCORE_CUDA_ARCHS": s.architectures,
        # One file has all kernels: its functions are optimized in parallel.
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} --split-compile=0".strip(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "--force-reinstall")
    folder = f"--config-settings=build-dir=build/gpu{'' if s.gpu else '-cpu'}"
    install = python("-m", "pip", "install", "--disable-pip-version-check", *flags, folder, ".")
    return Stage(
        "build",
        [
            Step("install", install, 300, environment=environment),
            Step("info", python("-m", "diffcore", "info"), 30),
        ],
        lambda logs: _found(r"(?m)^.*build.*$", logs.get("info", "")),
    )


def bits(s: Settings) -> Stage:
    """Committed bits of the noise and of ops that generate it; sums; all 2^31 square roots."""
    program = str((s.out / "square_roots").resolve())
    flags = ["-O3", "-std=c++17", "-Icsrc", "-o", program]
    host = ["-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
    compiler, reason = tool("nvcc" if s.gpu else "c++")
    if compiler and s.gpu:
        compiler += ["-arch=native", "--expt-relaxed-constexpr", f"-Xcompiler={','.join(host)}"]
    elif compiler:
        compiler += [*host, "-x", "c++"]
    command = compiler and [*compiler, *flags, "tests/cuda/square_roots.cu"]
    return Stage(
        "bits",
        [
            Step("noise", python("tools/gpu_bits.py", "--device", s.device), 60),
            Step("sums", python("tools/gpu_sums.py", "--device", s.device), 60),
            Step("compile", command, 60, reason),
            # On the CPU a part is enough to try the program.
            Step("roots", [program, *([] if s.gpu else ["16"])], 60),
        ],
        lambda logs: "; ".join(
            last_line(logs[name]) for name in ("noise", "sums", "roots") if logs.get(name)
        ),
    )


def tests(s: Settings) -> Stage:
    """The tests that need a GPU; a skipped one fails."""
    named = {folder for folders, _ in TEST_GROUPS.values() for folder in folders}
    rest = sorted(
        p.name
        for p in (ROOT / "tests").iterdir()
        if any(p.glob("test_*.py")) and p.name not in named
    )
    groups = {**TEST_GROUPS, "others": (tuple(rest), OTHERS_SECONDS)}
    options = ["-m", "cuda", "--tb=short", "--maxfail=20", "-v", "-p", "no:cacheprovider"]
    options += ["--require-cuda"] if s.gpu else ["--collect-only", "-q"]
    if s.gpu and _has("xdist"):
        options += ["-n", str(min(6, os.cpu_count() or 1)), "--dist", "worksteal"]
    return Stage(
        "tests",
        [
            Step(
                name,
                python(
                    *("-m", "pytest", *options, f"--junitxml={s.out}/tests-{name}.xml"),
                    *(f"tests/{folder}" for folder in folders),
                ),
                seconds,
                codes=frozenset({0, 5} if name == "others" or not s.gpu else {0}),  # 5: no tests
            )
            for name, (folders, seconds) in groups.items()
        ],
        _tests_number,
    )


def sanitize(s: Settings) -> Stage:
    """A short list of ops under compute-sanitizer: out of bounds, races, uninitialized reads."""
    sanitizer, reason = tool("compute-sanitizer") if s.gpu else ([], "")
    steps = []
    for name, seconds in (("memcheck", 60), ("racecheck", 90), ("initcheck", 60)):
        ops = python("tools/sanitizer_run.py", "--short", "--device", s.device)
        checked = ["--tool", name, "--error-exitcode", "9"] if s.gpu else []
        command = None if sanitizer is None else [*sanitizer, *checked, *ops]
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.append(Step(name, command, seconds, reason, environment=environment))
    return Stage(
        "sanitize",
        steps,
        lambda logs: "; ".join(f"{name}: {last_line(log)}" for name, log in logs.items()),
    )


def bench(s: Settings) -> Stage:
    """Every benchmark, small and short: it runs, and its results are right."""
    out = str(s.out / "quick")
    steps = [
        Step(
            name,
            benchmark(name, "--device", s.device, "--quick", "--out", out),
            40,
        )
        for name in (*BENCHMARKS, "sampling")
    ]
    return Stage("bench", steps, lambda logs: f"{len(logs)} of {len(steps)} benchmarks ran")


def capture(s: Settings) -> Stage:
    """Loops of 50 steps: captured, beside diffusers' loop in eager and an eager loop captured."""
    short = ["--seconds", "0.5"] if s.gpu else ["--quick"]
    command = benchmark("sampling", "--device", s.device, "--out", str(s.out))
    # A loop that cannot be captured is a note in the log, not a failure of the benchmark.
    expects = r"diffcore, captured +[\d.]+ " if s.gpu else ""
    step = Step("sampling", [*command, *short], 90, expects=expects)
    return Stage("capture", [step], _capture_number)


def profile(s: Settings) -> Stage:
    """Counters of five kernels, where this user may read them."""
    ops = python("tools/gpu_profile.py", "--device", s.device)
    ncu, reason = tool("ncu") if s.gpu else ([], "")
    options = ["--profile-from-start", "off", "--target-processes", "all", "--csv"]
    options += ["--metrics", ",".join(METRICS)] if s.gpu else []
    command = None if ncu is None else [*ncu, *(options if s.gpu else []), *ops]
    expects = METRICS[0] if s.gpu else ""
    step = Step("ncu", command, 60, reason, extra=True, excuse="ERR_NVGPUCTRPERM", expects=expects)
    return Stage("profile", [step], _profile_number)


def full(s: Settings) -> Stage:
    """Every benchmark in full, as time allows."""
    few = ["--seconds", "0.5"] if s.gpu else ["--quick", "--seconds", "0.01"]
    limited = {
        "ops": ["--dtype", "f32,bf16", "--compile-seconds", "60"],
        "noise": ["--dtype", "f32,bf16"],
    }
    steps = [
        Step(
            name,
            benchmark(
                *(name, "--device", s.device, "--out", str(s.out)), *few, *limited.get(name, [])
            ),
            180,
            extra=True,
        )
        for name in BENCHMARKS
    ]
    return Stage("full", steps, lambda logs: f"{len(logs)} of {len(steps)} benchmarks started")


STAGES: dict[str, Callable[[Settings], Stage]] = {
    stage.__name__: stage for stage in (build, bits, tests, sanitize, bench, capture, profile, full)
}


# ---- numbers ------------------------------------------------------------------------------------


def _found(pattern: str, log: str) -> str:
    match = re.search(pattern, log)
    return " ".join(match.group(0).split()) if match else ""


def _tests_number(logs: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for log in logs.values():
        for number, what in re.findall(r"(\d+) (passed|failed|error|skipped)", last_line(log)):
            counts[what] = counts.get(what, 0) + int(number)
    return ", ".join(f"{number} {what}" for what, number in counts.items())


def _capture_number(logs: Mapping[str, str]) -> str:
    rows = [x for x in logs.get("sampling", "").splitlines() if "solver" in x]
    rows = [x for x in rows if "diffcore, captured" in x] or rows
    return " ".join(rows[0].split()) if rows else ""


def _profile_number(logs: Mapping[str, str]) -> str:
    log = logs.get("ncu", "")
    times = re.findall(rf'"{re.escape(METRICS[0])}","([^"]*)","([^"]*)"', log)
    return ", ".join(f"{value} {unit}" for unit, value in times) or _found(r"\d+ calls on \w+", log)


def _has(module: str) -> bool:
    found = subprocess.run(python("-c", f"import {module}"), capture_output=True, check=False)
    return found.returncode == 0


def machine() -> str:
    """The device, its driver, the versions and the commit, as far as they can be found."""

    def said(*command: str) -> str:
        try:
            found = subprocess.run(
                command, capture_output=True, text=True, timeout=30, check=True, cwd=ROOT
            )
        except (OSError, subprocess.SubprocessError):
            return ""
        return found.stdout.strip()

    driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    facts = said(*python("-c", FACTS)) or "no torch"
    commit = said("git", "rev-parse", "--short", "HEAD") or "unknown"
    changed = " and changes" if said("git", "status", "--porcelain", "-uno") else ""
    driver = driver.splitlines()[0] if driver else "none"
    return f"{facts}, driver {driver}, commit {commit}{changed}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; 1 if any of them is bad."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--stages", default=",".join(STAGES), help=f"among {', '.join(STAGES)}")
    parser.add_argument("--max-seconds", type=float, default=540, help="of all stages together")
    parser.add_argument("--out", type=Path, default=Path("gpu-check-out"), help="the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    names = [name for name in re.split(r"[ ,]+", args.stages) if name]
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        parser.error(f"--stages must be among {', '.join(STAGES)}, got {args.stages!r}")
    architectures = os.environ.get("DIFFCORE_CUDA_ARCHS") or "native"
    settings = Settings(args.device, args.out.resolve(), architectures)
    stages = [STAGES[name](settings) for name in names]
    if args.dry_run:
        for stage in stages:
            for step in stage.steps:
                command = " ".join(step.command) if step.command else step.reason
                print(f"{stage.name}-{step.name} ({step.seconds:.0f} s): {command}")
        return 0
    os.chdir(ROOT)
    run = Run(settings.out, args.max_seconds)
    run.say(machine())
    with stoppable():
        try:
            for stage in stages:
                run.stage(stage)
        except StoppedError:
            run.bad = True
    run.say(f"{'BAD' if run.bad else 'good'}: {', '.join(names)}")
    return int(run.bad)


if __name__ == "__main__":
    raise SystemExit(main())
