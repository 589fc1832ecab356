from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import bench_edm, bench_flow


@pytest.mark.slow
@pytest.mark.parametrize(("script", "name"), [(bench_edm, "edm"), (bench_flow, "flow")])
def test_it_runs(script: ModuleType, name: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--device", "cpu", "--quick", "--seconds", "0.02", "--out", str(out)]
    assert script.main(options) == 0
    rows = json.loads(out.read_text())[name]["rows"]
    assert len(rows) == 2
    assert all({"diffcore", "eager"} <= set(r["timings"]) for r in rows)
