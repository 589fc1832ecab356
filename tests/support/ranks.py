"""Checks that several processes make together, over gloo.

``run_cells`` starts one Python process, which imports everything once and forks into the ranks.
Each rank runs every cell; what a cell raises on any rank is its result.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

TESTS = Path(__file__).resolve().parents[1]
MARK = "results of cells: "

Cells = dict[str, Callable[[int], None]]
"""Checks by name; each gets the number of ranks."""


def run_cells(module: str, world: int) -> dict[str, str]:
    """Runs the cells of a module on ``world`` ranks: by name what went wrong, empty if nothing."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-m", "support.ranks", module, str(world)],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert found, done.stdout + done.stderr
    results: dict[str, str] = json.loads(found[0].removeprefix(MARK))
    return results


def _run_rank(rank: int, world: int, cells: Cells, store: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for name, cell in cells.items():
        torch.manual_seed(0)
        error = ""
        try:
            cell(world)
        except (Exception, pytest.fail.Exception):
            error = f"rank {rank}: {traceback.format_exc()}"
        errors: list[str] = [""] * world
        dist.all_gather_object(errors, error)
        results[name] = "\n".join(filter(None, errors))
    if rank == 0:
        print(MARK + json.dumps(results), flush=True)
    dist.destroy_process_group()


def _main(module: str, world: int) -> None:
    cells: Cells = importlib.import_module(module).cells(world)
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            fork.Process(target=_run_rank, args=(r, world, cells, store)) for r in range(world)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
