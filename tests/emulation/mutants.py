"""Does the emulation notice faults of the CUDA loops? Each mutant is one edit of csrc/cuda.

    python tests/emulation/mutants.py [part of a name ...]

A mutant is built for a few ops, with ThreadSanitizer and with AddressSanitizer, and runs
`check_kernels`. It is noticed if a result is wrong, a sanitizer reports something, or the emulation
stops the program. A mutant that nobody notices is a finding: the exit status is 1.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutant_list import MUTANTS as OF_LOOPS
from mutant_list import Mutant
from mutant_list_select import MUTANTS as OF_SELECTION

MUTANTS = [*OF_LOOPS, *OF_SELECTION]
HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "emulate" / "mutants"
OPS = (
    "LinearCombination, Generated<LinearCombination>, SumOf<NormalKl>, "
    "Generated<WithGradient<MixedTargetLoss>>, X0Quantile<true>, VlbTerm<false>, Rescale, "
    "Generated<Randn>, GuidanceWeights"  # the last has several sums, one after the other
)
STORAGE = ("float", "double", "Bf16", "F16")
FLAGS = ("-std=c++17", "-march=x86-64-v3", "-O1", "-g1", "-w", "-fopenmp")
FLAGS += ("-ffp-contract=off", "-fno-math-errno")
SANITIZERS = {"thread": ["-fsanitize=thread"], "address": ["-fsanitize=address,undefined"]}
ENVIRONMENT = {
    "PATH": os.environ["PATH"],
    "OMP_NUM_THREADS": "1",
    "TSAN_OPTIONS": "halt_on_error=1",
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
}


def compile_all(jobs: list[list[str]]) -> str:
    """Runs compilers side by side; returns what the first that failed printed."""

    def one(job: list[str]) -> str:
        done = subprocess.run(job, capture_output=True, text=True, check=False)
        return done.stderr[:2000] if done.returncode else ""

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return next(filter(None, pool.map(one, jobs)), "")


def compiler(source: Path, out: Path, csrc: Path, *options: str) -> list[str]:
    includes = [f"-I{HERE}", f"-I{csrc}"]
    return ["g++", *FLAGS, *options, *includes, "-c", str(source), "-o", str(out)]


class DoesNotBuild(RuntimeError):
    """A mutant that no compiler takes."""


def prepare() -> Path:
    """A copy of the sources with few ops, and the objects that are the same for all mutants."""
    shutil.rmtree(WORK, ignore_errors=True)
    csrc = WORK / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    ops = csrc / "ops" / "all.h"
    text, found = re.subn(
        r"using AllOps = .*?;\n(?=// clang-format on)",
        f"using AllOps = OpList<{OPS}>;\n",
        ops.read_text(),
        flags=re.S,
    )
    if found != 1:
        raise ValueError("ops/all.h has another form than this script expects")
    ops.write_text(text)
    isa, dispatch = (
        ["-DDIFFCORE_ISA_NAMESPACE=v2"],
        ["-DDIFFCORE_WITHOUT_v3", "-DDIFFCORE_WITHOUT_v4"],
    )
    jobs = [
        compiler(csrc / "cpu" / "kernels.cc", WORK / "cpu.o", csrc, *isa),
        compiler(csrc / "cpu" / "dispatch.cc", WORK / "dispatch.o", csrc, *dispatch),
    ]
    for name, sanitizer in SANITIZERS.items():
        jobs += [
            compiler(HERE / f"{source}.cc", WORK / f"{source}_{name}.o", csrc, *sanitizer)
            for source in ("emulate", "check_kernels")
        ]
    if error := compile_all(jobs):
        raise RuntimeError(error)
    return csrc


def build(csrc: Path, sanitizer: str, folder: Path) -> str:
    options = [*SANITIZERS[sanitizer], '-DDIFFCORE_CUDA_ARCHITECTURES="emulated"']
    objects = {s: folder / f"{s}_{sanitizer}.o" for s in STORAGE}
    jobs = [
        compiler(HERE / "kernels.cc", out, csrc, *options, "-x", "c++", f"-DDIFFCORE_STORAGE={s}")
        for s, out in objects.items()
    ]
    device = folder / f"device_{sanitizer}.o"
    jobs.append(compiler(HERE / "device.cc", device, csrc, *options, "-x", "c++"))
    if error := compile_all(jobs):
        return error
    shared = [WORK / f"{s}_{sanitizer}.o" for s in ("emulate", "check_kernels")]
    shared += [WORK / "cpu.o", WORK / "dispatch.o"]
    link = ["g++", *FLAGS, *SANITIZERS[sanitizer], f"-Wl,-T,{HERE / 'shared.ld'}"]
    link += [
        "-o",
        str(folder / f"run_{sanitizer}"),
        *map(str, [*objects.values(), device, *shared]),
    ]
    return compile_all([link])


def noticed(text: str, status: int) -> str:
    """What the output of a program says about a fault."""
    found = []
    if "ThreadSanitizer: data race" in text:
        found.append("a race")
    if wrong := text.count("FAILED"):
        found.append(f"{wrong} wrong results")
    patterns = (
        r"(AddressSanitizer: \S+)",
        r"runtime error: (.{0,60})",
        r"^emulation: block \(.*?\): (.{0,80})",
    )
    found += [m[1] for m in (re.search(p, text, re.M) for p in patterns) if m]
    if not found and status:
        found.append(f"exit status {status}")
    return ", ".join(found)


def outcome(csrc: Path, mutant: Mutant | None) -> dict[str, str]:
    """What is noticed of a mutant, by sanitizer. Of None: of the sources as they are."""
    folder = WORK / "mutant"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(csrc, folder / "csrc")
    if mutant:
        path = folder / "csrc" / "cuda" / mutant.file
        path.write_text(mutant.edit(path.read_text()))
    found = {}
    for name in SANITIZERS:
        if error := build(folder / "csrc", name, folder):
            raise DoesNotBuild(error)
        done = subprocess.run(
            [
                "setarch",
                "-R",
                str(folder / f"run_{name}"),
                *(mutant.run if mutant else ("", "f32")),
            ],
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        found[name] = noticed(done.stdout + done.stderr, done.returncode)
        if found[name]:
            break
    return found


def main() -> int:
    words = sys.argv[1:]
    csrc = prepare()
    if any(as_it_is := outcome(csrc, None).values()):
        print(f"the sources as they are: {as_it_is}")
        return 1
    survivors = 0
    for mutant in MUTANTS:
        if words and not any(w in mutant.name for w in words):
            continue
        begin = time.monotonic()
        try:
            found = "; ".join(f"{k}: {v}" for k, v in outcome(csrc, mutant).items() if v)
        except DoesNotBuild as error:  # the sources have moved on from it, which is no notice
            found = ""
            print(f"{mutant.name}: does not build: {error}", file=sys.stderr)
        survivors += not found
        print(
            f"{mutant.name:48} {found or 'NOT NOTICED'} ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    print(f"{survivors} not noticed")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
