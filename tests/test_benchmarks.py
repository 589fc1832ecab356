from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import bench_ops, contest, report, tables, timing
from benchmarks.machine import ROOT

TINY = ["--device", "cpu", "--quick", "--shape", "2x1x8x8", "--seconds", "0.01"]


def run(script: str, *arguments: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{script}", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_bench_ops_writes_every_section_with_its_machine_and_quantiles(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    run("bench_ops", *TINY, "--ops", "q_sample,reparameterize_kl", "--out", str(out))
    results = json.loads(out.read_text())
    assert set(results) == {"schema", "ops", "overhead", "memory"}
    for name in ("ops", "overhead", "memory"):
        section = results[name]
        assert {"machine", "date", "command", "rows", "notes"} <= set(section)
        assert {"device", "cpu", "threads", "torch", "diffcore", "instruction_set"} <= set(
            section["machine"]
        )
        assert "benchmarks.bench_ops" in section["command"]
    rows = results["ops"]["rows"]
    found = {(r["op"], r["mode"], r["dtype"]) for r in rows}
    ops, modes = ("q_sample", "reparameterize_kl"), contest.MODES
    assert found == {(op, mode, "f32") for op in ops for mode in modes}
    for row in rows:
        assert row["elements"] == 128
        assert row["bytes"] % (4 * 128) == 0
        writes_out = {"out="} if (row["op"], row["mode"]) == ("q_sample", "forward") else set()
        assert set(row["timings"]) == {"diffcore", "eager", "copy"} | writes_out
        for t in row["timings"].values():
            assert 0 < t["p20"] <= t["median"] <= t["p80"]
            assert t["samples"] >= 3
        medians = {k: t["median"] for k, t in row["timings"].items()}
        ratio = medians["eager"] / medians["diffcore"]
        assert row["times_eager"] == pytest.approx(ratio, rel=1e-3)
        assert row["error_over_bound"]["diffcore"] <= 1


def test_a_second_run_keeps_the_sections_of_other_scripts(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    report.save({"schema": report.SCHEMA, "training": {"date": "then", "rows": []}}, out)
    run("bench_ops", *TINY, "--only", "overhead", "--ops", "add_noise", "--out", str(out))
    assert set(report.load(out)) == {"schema", "training", "overhead"}


@pytest.mark.parametrize("spoil", [lambda y: y * 1.0001, lambda y: y * math.nan, lambda y: y[:1]])
def test_a_wrong_result_is_refused_and_not_timed(
    spoil: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = contest.BY_NAME["add_noise"]

    def wrong(x0: torch.Tensor, noise: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        return spoil(alpha * x0 + sigma * noise)  # type: ignore[operator]

    monkeypatch.setitem(
        contest.BY_NAME, "add_noise", dataclasses.replace(right, op=wrong, out=False)
    )
    out = tmp_path / "result.json"
    arguments = [*TINY, "--only", "ops", "--ops", "add_noise", "--out", str(out)]
    assert bench_ops.main(arguments) == 1
    section = json.loads(out.read_text())["ops"]
    assert section["rows"] == []
    assert any("add_noise forward f32" in line for line in section["refused"])


def test_the_check_has_the_bound_of_the_library() -> None:
    truth = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    eager = truth.float() + torch.tensor([0.0, 1e-3, 0.0])
    inside, outside = truth.float() + 1.9e-3, truth.float() + 2.1e-3
    assert contest.check_outputs("op", [inside], [eager], [truth]) <= 1
    with pytest.raises(contest.WrongResultError, match="op: output 0 is wrong at 3 of 3"):
        contest.check_outputs("op", [outside], [eager], [truth])


def test_contestants_take_turns_and_the_order_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    calls = {name: [lambda name=name: seen.append(name)] for name in "abc"}
    budget = timing.Budget(seconds=0, warmup_seconds=0, min_rounds=3)
    monkeypatch.setattr(timing, "MIN_SAMPLE_SECONDS", 0)
    found = timing.interleave(calls, torch.device("cpu"), budget)
    assert {t.samples for t in found.values()} == {3}
    assert "".join(seen[-9:]) == "abc" + "bca" + "cab"


def test_quantiles_are_those_of_the_samples() -> None:
    t = timing.Timing.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (t.p20, t.median, t.p80, t.samples) == (2.0, 3.5, 5.0, 6)


def test_tables_go_between_their_markers_and_nowhere_else() -> None:
    page = "a\n<!-- bench:cpu:begin -->\nold\n<!-- bench:cpu:end -->\nb\n"
    filled = tables.fill(page, {"cpu": "| new |", "cuda": "| other |"})
    assert filled == page.replace("old", "| new |")
    assert tables.fill(filled, {"cpu": "| new |"}) == filled


def test_the_pages_have_the_markers_that_tables_fill() -> None:
    names = [m["name"] for page in tables.PAGES for m in tables.MARKED.finditer(page.read_text())]
    assert sorted(names) == ["cpu", "cpu-full", "cuda", "cuda-full"]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["bench_training", "bench_sampling"])
def test_end_to_end_benchmarks_run(script: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    run(script, "--device", "cpu", "--quick", "--seconds", "0.02", "--out", str(out))
    rows = json.loads(out.read_text())[script.removeprefix("bench_")]["rows"]
    assert all({"diffcore", "eager"} <= set(r["timings"]) for r in rows)
    assert any("U-Net" in r["what"] for r in rows)
