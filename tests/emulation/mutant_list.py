"""Faults of the CUDA loops: edits of csrc/cuda. mutants.py builds and runs each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

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


def both(first: Edit, second: Edit) -> Edit:
    return lambda text: second(first(text))


def without_barrier(n: int) -> Edit:
    def edit(text: str) -> str:
        at = [m.start() for m in re.finditer(r"__syncthreads\(\);", text)][n]
        return text[:at] + text[at + len("__syncthreads();") :]

    return edit


def barriers(file: str) -> Iterator[Mutant]:
    text = (ROOT / "csrc" / "cuda" / file).read_text()
    for n in range(text.count("__syncthreads();")):
        yield Mutant(f"{file}: barrier {n} gone", file, without_barrier(n))


ROWS, WORKER, CLUSTER = "map.cuh", "row_worker.cuh", "cluster.cuh"
SUMS = ("normal_kl_sum", "f32")
MUTANTS = [
    *barriers("sum.cuh"),
    *barriers("cluster.cuh"),
    Mutant(
        "no barrier before blocks send",
        CLUSTER,
        instead("  __cluster_barrier_wait();", "  "),
        SUMS,
    ),
    Mutant(
        "the first block does not wait for the bytes",
        CLUSTER,
        instead("if (threadIdx.x == 0) wait_for_bytes(&box.arrived);", ";"),
        SUMS,
    ),
    Mutant(
        "bytes of seven blocks are expected",
        CLUSTER,
        instead("unsigned(sizeof(box.partials))", "unsigned(7 * sizeof(double))"),
        SUMS,
    ),
    Mutant(
        "bytes are expected after the barrier",
        CLUSTER,
        both(
            instead("  __cluster_barrier_arrive_relaxed();  // expect", "  // expect"),
            instead(
                "  if (blockIdx.x == 0 && thr",
                "  __cluster_barrier_arrive_relaxed();\n  if (blockIdx.x == 0 && thr",
            ),
        ),
        SUMS,
    ),
    Mutant(
        "all blocks send the same partial sum",
        CLUSTER,
        instead("send_to_first(&box.partials[k][blockIdx.x]", "send_to_first(&box.partials[k][0]"),
        SUMS,
    ),
    Mutant(
        "seven of eight partial sums are added",
        CLUSTER,
        instead("if (threadIdx.x < kCluster) mine", "if (threadIdx.x < kCluster - 1) mine"),
        SUMS,
    ),
    Mutant(
        "only blocks that are not empty send",
        CLUSTER,
        instead(
            "      send_to_first(&box.partials[k]",
            "      if (totals[k] != 0) send_to_first(&box.partials[k]",
        ),
        SUMS,
    ),
    Mutant(
        "the threads of one warp enter a cluster",
        ROWS,
        instead(
            "if (layout.cluster) enter",
            "if (Op::n_sum && layout.cluster && threadIdx.x < 32) enter",
        ),
        SUMS,
    ),
    Mutant(
        "elements after the last pack in the last block",
        ROWS,
        instead("Op::n_sum ? 0 <= after && after < args.chunk : blockIdx", "blockIdx"),
        SUMS,
    ),
    Mutant(
        "elements after the last pack in later blocks too",
        ROWS,
        instead("0 <= after && after < args.chunk", "after < args.chunk"),
        SUMS,
    ),
    Mutant(
        "seven blocks to a medium row",
        ROWS,
        instead(
            "medium ? kCluster : args.cols ?", "medium && !clusters() ? kCluster - 1 : args.cols ?"
        ),
        SUMS,
    ),
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
            "totals[k] = double(row_sum",
            "if (row < args.rows) totals[k] = double(row_sum",
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
]
