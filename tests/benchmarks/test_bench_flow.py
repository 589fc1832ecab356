"""The benchmark of training steps runs, and compares what it times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_flow


@pytest.mark.slow
def test_bench_flow_runs(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    arguments = ("--device", "cpu", "--quick", "--seconds", "0.02", "--out", str(out))
    assert bench_flow.main(arguments) == 0
    rows = json.loads(out.read_text())["flow"]["rows"]
    assert [r["what"].split()[0] for r in rows] == ["flow", "flow", "EDM", "EDM"]
    assert all({"diffcore", "eager"} <= set(r["timings"]) for r in rows)
