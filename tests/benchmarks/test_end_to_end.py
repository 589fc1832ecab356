"""Sampling loops, training steps and what is compiled of them: they run, and agree."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import bench_bound, bench_sampling, bench_steps, runner, sampling_loops


def section_of(suite: str, out: Path, *arguments: str) -> dict[str, Any]:
    assert runner.main([suite, *arguments, "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())[suite]
    assert found["refused"] == []
    return found


@pytest.mark.parametrize("kind", bench_sampling.KINDS)
@pytest.mark.parametrize("steps", [5, 20])
def test_loops_that_are_timed_agree(kind: str, steps: int) -> None:
    walk = sampling_loops.SamplingLoop(kind, steps)
    start = walk.table.init_noise_sigma * torch.randn(3, 2, 4)
    with torch.no_grad():
        bench_sampling.check(walk, lambda x, t: torch.tanh(x), start)


QUICK = ("--device", "cpu", "--quick", "--seconds", "0.01")


def end_to_end(suite: str, out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = section_of(suite, out, *QUICK)["rows"]
    assert all({"diffcore", "eager"} <= set(r["timings"]) for r in rows)
    assert any("U-Net" in r["what"] for r in rows)
    return rows


@pytest.mark.slow
def test_bench_sampling_runs(tmp_path: Path) -> None:
    rows = end_to_end("sampling", tmp_path / "result.json")
    assert {r["what"].partition(" step")[0] for r in rows} == set(bench_sampling.KINDS)


@pytest.mark.slow
def test_bench_bound_runs(tmp_path: Path) -> None:
    section = section_of("bound", tmp_path / "result.json", *QUICK)
    assert len(section["rows"]) == 2 * len(bench_bound.CASES)


@pytest.mark.slow
def test_bench_steps_runs(tmp_path: Path) -> None:
    section = section_of("steps", tmp_path / "result.json", *QUICK)
    cases = len(bench_steps.LARGE_CASES), len(bench_steps.SMALL_CASES)
    assert len(section["rows"]) == 2 * cases[0] + 2 * cases[1]


@pytest.mark.slow
def test_bench_flow_runs(tmp_path: Path) -> None:
    rows = section_of("flow", tmp_path / "result.json", *QUICK)["rows"]
    assert [r["what"].split()[0] for r in rows] == ["flow", "flow", "EDM", "EDM"]
    assert all({"diffcore", "eager"} <= set(r["timings"]) for r in rows)


@pytest.mark.slow
def test_bench_compile_runs(tmp_path: Path) -> None:
    rows = section_of("compile", tmp_path / "result.json", *QUICK)["rows"]
    assert [set(r["timings"]) for r in rows] == [{"eager"}, {"eager"}]


@pytest.mark.slow
def test_bench_training_runs_and_drawn_noise_takes_no_memory(tmp_path: Path) -> None:
    rows = end_to_end("training", tmp_path / "result.json")
    what = "diffusion part, epsilon, noise drawn, 8×3×16×16"
    (peaks,) = [r["peak_bytes"] for r in rows if r["what"] == what]
    if None in peaks.values():
        pytest.skip("this torch does not tell how much memory a call held")
    tensor = 4 * 8 * 3 * 16 * 16
    # x_t, the gradient, and numbers for each of the 8 samples
    assert 2 * tensor <= peaks["diffcore"] <= 2 * tensor + 16 * 8
    assert peaks["eager"] >= 4 * tensor
