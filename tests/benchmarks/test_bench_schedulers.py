"""The benchmark of fused schedulers runs, and refuses what it must not time."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.suite import Run

from benchmarks import bench_pipelines, bench_schedulers, contest, report, runner, tables, timing

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

CPU = torch.device("cpu")
SHORTEST = timing.Budget(seconds=0, warmup_seconds=0, min_rounds=3)
SHAPE = (1, 4, 8, 8)
BOTH = ("schedulers", "scheduler_errors", "--device", "cpu", "--quick", "--seconds", "0.01")


def row(name: str, dtype: str = "f32") -> dict[str, Any]:
    family = bench_schedulers.families()[name]
    run = Run(CPU, quick=True, seconds=0.0)
    with torch.no_grad():
        return bench_schedulers.time_class(name, family, SHAPE, dtype, run)


def test_a_walk_is_prepared_each_time_and_outside_of_the_time() -> None:
    states: list[str] = []

    def prepare() -> None:
        states.append("ready")
        time.sleep(0.02)

    found = timing.walks({"a": (prepare, states.pop)}, CPU, SHORTEST, 10)
    assert states == []  # each walk had a state of its own
    assert found["a"].samples == 3
    assert found["a"].calls_per_sample == 10
    assert found["a"].p80 < 0.002  # the tenth part of what it sleeps


def test_noise_drawn_in_the_launch_takes_part_where_there_is_noise() -> None:
    assert set(row("DDPMScheduler")["timings"]) == {"stock", "fused", "philox"}
    found = row("DDIMScheduler", "bf16")
    assert set(found["timings"]) == {"stock", "fused"}
    assert 0 < found["relative_error"] < 2e-2
    medians = {how: t["median"] for how, t in found["timings"].items()}
    assert found["times_stock"]["fused"] == medians["stock"] / medians["fused"]


def test_other_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench_schedulers.Walker.step

    def wrong(self: Any, *arguments: Any) -> torch.Tensor:
        factor = 1.002 if hasattr(self.scheduler, "fallbacks") else 1.0
        return factor * right(self, *arguments)

    monkeypatch.setattr(bench_schedulers.Walker, "step", wrong)
    with pytest.raises(contest.WrongResultError, match=r"step 0 is off by 0\.002"):
        row("DDIMScheduler")


def test_stock_steps_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"variance_type": "fixed_large_log"}
    monkeypatch.setitem(bench_schedulers.OPTIONS, "DDPMScheduler", options)
    monkeypatch.setitem(bench_schedulers.AGREEMENT, "f32", float("inf"))
    with pytest.raises(
        contest.WrongResultError, match="not fused: variance_type='fixed_large_log'"
    ):
        row("DDPMScheduler")


def test_both_sections_and_their_tables(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    chosen = "DDPMScheduler,FlowMatchEulerDiscreteScheduler"
    arguments = (*BOTH, "--only", chosen, "--out", str(out))
    assert runner.main(arguments) == 0
    results = json.loads(out.read_text())
    rows = results["schedulers"]["rows"]
    assert [(r["what"], r["dtype"]) for r in rows] == [
        (name, dtype) for name in chosen.split(",") for dtype in ("f32", "bf16")
    ]
    errors = results["scheduler_errors"]["rows"]
    assert [r["what"] for r in errors] == chosen.split(",")
    assert all(0 < r[d]["fused"] < r[d]["stock"] for r in errors for d in ("bf16", "f16"))
    filled = tables.schedulers([out])
    rows_of = {name: text.count("| DDPMScheduler |") for name, text in filled.items()}
    assert rows_of == {"cpu-schedulers": 1, "cpu-scheduler-errors": 1}
    header, body = tables.speedups(rows)
    assert header[3:] == ["f32, 1×4×8×8", "bf16, 1×4×8×8", "philox"]
    ratios = [f"{r['times_stock']['fused']:.1f}×" for r in rows[:2]]
    assert body[0][3:5] == ratios
    assert body[1][-1] == "–"  # no noise
    for name in ("schedulers", "scheduler_errors"):
        header, body = report.SECTIONS[name].table(results[name]["rows"])
        assert all(len(cells) == len(header) for cells in body)


@pytest.mark.slow
def test_every_class_is_timed(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    assert runner.main([*BOTH, "--out", str(out)]) == 0
    results = json.loads(out.read_text())
    assert results["schedulers"]["refused"] == results["scheduler_errors"]["refused"] == []
    timed = {r["what"] for r in results["schedulers"]["rows"]}
    assert timed == set(bench_schedulers.families())


# ---- whole pipelines ------------------------------------------------------------------------


def test_pipelines_and_their_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="pipelines import it")
    out = tmp_path / "result.json"
    options = ("--device", "cpu", "--quick", "--seconds", "0.01", "--only", "ddpm,sd3")
    assert runner.main(["pipelines", *options, "--out", str(out)]) == 0
    section = json.loads(out.read_text())["pipelines"]
    assert section["refused"] == []
    assert [(r["what"], r["scheduler"], r["steps"]) for r in section["rows"]] == [
        ("ddpm", "DDPMScheduler", 5),
        ("sd3", "FlowMatchEulerDiscreteScheduler", 5),
    ]
    for row in section["rows"]:
        assert all(0 < share < 1 for share in row["shares"].values())
        assert row["shares"].keys() == row["timings"].keys() == {"stock", "fused"}
    header, body = report.SECTIONS["pipelines"].table(section["rows"])
    assert all(len(cells) == len(header) for cells in body)
    assert tables.schedulers([out]).keys() == {"cpu-pipelines"}


def test_a_pipeline_with_other_images_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="pipelines import it")
    family = bench_schedulers.families()["DDPMScheduler"]
    right = family._take

    def wrong(self: Any, *args: Any) -> Any:
        taken = right(self, *args)
        taken.prev_sample.mul_(1.01)
        return taken

    monkeypatch.setattr(family, "_take", wrong)
    with pytest.raises(contest.WrongResultError, match="the images are off by"):
        bench_pipelines.time_pipeline("ddpm", Run(CPU, quick=True, seconds=0.0))


def test_the_share_of_a_scheduler() -> None:
    class Scheduler:
        def step(self) -> None:
            time.sleep(0.03)

    pipe = SimpleNamespace(scheduler=Scheduler())

    def run(pipe: Any) -> None:
        pipe.scheduler.step()
        time.sleep(0.01)

    assert 0.5 < bench_pipelines.share_of(pipe, run, 3) < 0.85
    assert vars(pipe.scheduler) == {}
