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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WORK = ROOT / "build" / "emulate" / "mutants"
OPS = (
    "LinearCombination, Generated<LinearCombination>, SumOf<NormalKl>, "
    "Generated<WithGradient<MixedTargetLoss>>, X0Quantile<true>, VlbTerm<false>, Rescale, "
    "Generated<Randn>"
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

Edit = Callable[[str], str]


class Mutant(NamedTuple):
    name: str
    file: str  # in csrc/cuda
    edit: Edit
    run: tuple[str, str] = ("", "f32")  # arguments of check_kernels


def instead(old: str, new: str) -> Edit:
    """``old``, found once, becomes ``new``."""

    def edit(text: str) -> str:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} must be in the file once, found {text.count(old)} times")
        return text.replace(old, new)

    return edit


def without_barrier(n: int) -> Edit:
    def edit(text: str) -> str:
        at = [m.start() for m in re.finditer(r"__syncthreads\(\);", text)][n]
        return text[:at] + text[at + len("__syncthreads();") :]

    return edit


def barriers(file: str) -> Iterator[Mutant]:
    text = (ROOT / "csrc" / "cuda" / file).read_text()
    for n in range(text.count("__syncthreads();")):
        yield Mutant(f"{file}: barrier {n} gone", file, without_barrier(n))


ROWS, WORKER, SELECT = "map.cuh", "row_worker.cuh", "select.cuh"
MUTANTS = [
    *barriers("sum.cuh"),
    *barriers("select.cuh"),
    Mutant(
        "one pack too many, all at once",
        WORKER,
        instead("(kU - 1) * threads_x < count", "(kU - 1) * threads_x <= count"),
    ),
    Mutant(
        "one pack too many",
        WORKER,
        instead("if (p >= count) return;", "if (p > count) return;"),
    ),
    Mutant(
        "no bound on single elements that are read",
        WORKER,
        instead(
            "if (i >= at.count) continue;\n      DC_UNROLL\n      for (int k = 0; k < kIn",
            "DC_UNROLL\n      for (int k = 0; k < kIn",
        ),
    ),
    Mutant(
        "more single elements than there are",
        WORKER,
        instead("for (int i = 0; i < at.count; ++i) {", "for (int i = 0; i < kFew; ++i) {"),
    ),
    Mutant("one noise for four single elements", WORKER, instead("        z[j - 1] = z[j];\n", "")),
    Mutant(
        "one element four times if accesses are single",
        WORKER,
        instead("x[j - 1][k] = x[j][k];", ";"),
    ),
    Mutant(
        "the second pack is the first again",
        WORKER,
        instead("in[v - 1][k] = in[v][k];", ";"),
    ),
    Mutant(
        "the parts of a pack in the wrong order",
        "pack.cuh",
        instead("part[kParts - 1] = last;", "part[0] = last;"),
        ("", "bf16"),
    ),
    Mutant(
        "the first part of a pack twice",
        "pack.cuh",
        instead("part[i - 1] = part[i];", ";"),
        ("", "bf16"),
    ),
    Mutant(
        "partial sums left out",
        ROWS,
        instead("j += 4 * kThreads", "j += 5 * kThreads"),
        ("normal_kl_sum", "f64"),
    ),
    Mutant(
        "partial sums after the last",
        ROWS,
        instead("part[u] = j + u * kThreads < args.chunks ? ", "part[u] = u >= 0 ? "),
        ("normal_kl_sum", "f64"),
    ),
    Mutant(
        "elements after the last pack missing",
        ROWS,
        instead("layout.packed ? int(last) : turns", "layout.packed ? 0 : turns"),
    ),
    Mutant(
        "row strides are not aligned",
        ROWS,
        instead("if (args.rows > 1) low |= uintptr_t(args.row_stride[k]) * sizeof(S);", ""),
    ),
    Mutant(
        "rows of odd length in packs",
        ROWS,
        instead("if (args.rows > 1 && args.cols % kPack != 0) return false;", ""),
    ),
    Mutant(
        "packs in channels_last",
        ROWS,
        instead("if (kGeneratesNoise<Op> && args.noise.inner > 1) return false;", ""),
    ),
    Mutant(
        "a sum in another order if accesses are single",
        WORKER,
        instead(
            "own = kSum || kGeneratesNoise<Op> || neighbors",
            "own = kGeneratesNoise<Op> || neighbors",
        ),
    ),
    Mutant(
        "the noise of the first four elements twice",
        WORKER,
        instead("p * kParts + part, count}", "p * kParts, count}"),
        ("", "bf16"),  # a pack of float32 has no second four
    ),
    Mutant(
        "the noise of another channel",
        WORKER,
        instead("which * (run / 4) + along", "which * run + along"),
    ),
    Mutant(
        "a shuffle by a part of the warp",
        WORKER,
        instead("n_coef > 1 && threads_x >= 32", "n_coef > 1 && threads_x >= 16"),
    ),
    Mutant(
        "only threads with a row add",
        ROWS,
        instead(
            "      const R total = row_sum",
            "      if (row >= args.rows) continue;\n      const R total = row_sum",
        ),
    ),
    Mutant(
        "all blocks write the first partial sum",
        ROWS,
        instead("args.chunks + blockIdx.x] = ", "args.chunks] = "),
    ),
    Mutant(
        "a round too few",
        ROWS,
        instead(
            "args.chunk = per_round * layout.rounds", "args.chunk = per_round * (layout.rounds + 1)"
        ),
    ),
    Mutant(
        "counts of a block without atomics",
        SELECT,
        instead("atomicAdd(&counts[search.bucket(key)], 1u);", "counts[search.bucket(key)] += 1u;"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "counts of all blocks without atomics",
        SELECT,
        instead(
            "if (counts[i]) atomicAdd(&tally.counts[i], counts[i]);",
            "tally.counts[i] += counts[i];",
        ),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "counts are not cleared between digits",
        SELECT,
        instead("  narrow(tally);\n  clear(tally.counts);\n", "  narrow(tally);\n"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "finished blocks are counted on between digits",
        SELECT,
        instead("atomicInc(&done, blocks - 1)", "atomicAdd(&done, 1u)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "no fence before a block counts as finished",
        SELECT,
        instead(
            "    __threadfence();  // after the barrier: for the writes of the whole block\n", ""
        ),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "no fence after a block counts as finished",
        SELECT,
        instead("for the next digit\n    __threadfence();", "for the next digit"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "the last block but one continues the search",
        SELECT,
        instead("blocks - 1) == blocks - 1;", "blocks - 1) == blocks - 2;"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "a selection ignores NaN",
        SELECT,
        instead("return number_in(kNanKey<R>, 1);", "return 0;"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "one warp has the smallest key",
        SELECT,
        instead("if (threadIdx.x % 32 == 0 && mine", "if (threadIdx.x == 0 && mine"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "keys of an incomplete pack in one access",
        SELECT,
        instead("if (packed && at + kPack <= count)", "if (packed && at < count)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "no bound on single elements of a selection",
        SELECT,
        instead("at + i < count ? in[k][at + i] : S{}", "in[k][at + i]"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "keys after the end of a row",
        SELECT,
        instead("at + i < count ? key : kNoKey<R>", "key"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "the last packs of keys are not counted",
        SELECT,
        instead("if (p >= used) return;", "if (p + 1 >= used) return;"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "two packs of keys are the same",
        SELECT,
        instead(
            "const int p = (first + u) * threads + x, at = p * kPack;",
            "const int p = first * threads + x, at = p * kPack;",
        ),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "too few threads hold the keys of a row",
        SELECT,
        instead("while (threads * kHeld < args.cols)", "while (threads * kHeld * 2 < args.cols)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "a sum over more threads than a row has",
        SELECT,
        instead(
            "for (int offset = width / 2; offset > 0; offset /= 2) mine +=",
            "for (int offset = 16; offset > 0; offset /= 2) mine +=",
        ),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "rows of a warp stop their search on their own",
        SELECT,
        instead("while (__any_sync(~0u, searches()))", "while (searches())"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "threads without a row write the last one",
        SELECT,
        instead("if (x == 0 && mine == row)", "if (x == 0)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "the next key is the key itself",
        SELECT,
        instead("held.smallest_from(key + 1)", "held.smallest_from(key)"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "sums up to a thread leave out its warp",
        SELECT,
        instead("if (lane == 31) by_warp", "if (lane == 30) by_warp"),
        ("x0_quantile", "f32"),
    ),
    Mutant(
        "sums up to a thread count its warp twice",
        SELECT,
        instead("w < warp; ++w", "w <= warp; ++w"),
        ("x0_quantile", "f32"),
    ),
]


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
            raise RuntimeError(f"{mutant and mutant.name}: does not build: {error}")
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
        found = "; ".join(f"{k}: {v}" for k, v in outcome(csrc, mutant).items() if v)
        survivors += not found
        print(
            f"{mutant.name:48} {found or 'NOT NOTICED'} ({time.monotonic() - begin:.0f} s)",
            flush=True,
        )
    print(f"{survivors} not noticed")
    return survivors > 0


if __name__ == "__main__":
    sys.exit(main())
