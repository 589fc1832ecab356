"""`diffcore bench`: options, progress kept, comparison with an earlier run, the page."""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import json
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.compare import LEAST, Comparison, change
from benchmarks.machine import ROOT
from benchmarks.suite import Job, Run

from benchmarks import (
    bench_accuracy,
    bench_ops,
    bench_overhead,
    contest,
    registry,
    report,
    runner,
)

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--quick", "--shape", "2x1x8x8", "--seconds", "0.01"]


def timing(median: float, spread: float = 0.01) -> dict[str, float]:
    return {"median": median, "p20": median * (1 - spread), "p80": median * (1 + spread)}


def row(op: str = "op", **medians: float) -> dict[str, Any]:
    return {"op": op, "timings": {name: timing(t) for name, t in medians.items()}}


def of_jobs(monkeypatch: pytest.MonkeyPatch, *measures: Callable[[], Any]) -> None:
    """Makes the suite "overhead" of these jobs."""

    def jobs(run: Run) -> Iterator[Job]:
        for i, measure in enumerate(measures):
            yield Job(f"job {i}", f"the job {i}", measure)

    monkeypatch.setattr(bench_overhead, "jobs", jobs)
    monkeypatch.setattr(bench_overhead, "jobs_of_parts", lambda run: [])


def good() -> dict[str, Any]:
    return {**row("good", diffcore=1e-6, eager=2e-6), "mode": "forward", "times_eager": 2.0}


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "name must be one of ops, noise,"),
        (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:1, got 'gpu'"),
        (["--device", "cuda:99"], "device must be one that torch sees, got 'cuda:99'"),
        (["--dtype", "f33"], "--dtype: must be among f32, bf16, f16, f64, got 'f33'"),
        (["--shape", "4x0"], "--shape: must be sizes such as 64x3x128x128, got '4x0'"),
        (["--against", "jax"], "--against: must be among eager, compile, diffusers, got 'jax'"),
        (["--seconds", "nan"], "--seconds: must be a number of seconds, got 'nan'"),
        (["--compare", "/none.json"], "compare must be a result file, got /none.json"),
        (["--out", "/dev/null/x"], "out must be a file that can be written, got /dev/null/x"),
        (["--html", "/dev/null/x"], "html must be a file that can be written, got /dev/null/x"),
        (["--wrong"], "unrecognized arguments: --wrong"),
        (["overhead", "--device", "cpu", "--only", "x"], "only must be among add_noise,"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_option(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        runner.main(["--out", str(tmp_path), *arguments])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diffcore bench: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_page_needs_matplotlib_and_says_so_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    page = tmp_path / "report.html"
    assert runner.main(["--html", str(page), "--out", str(tmp_path / "r.json")]) == 1
    assert 'pip install "diffcore[bench]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_suites_and_options_may_be_mixed() -> None:
    args = runner.parser().parse_intermixed_args(["ops", "--quick", "noise", "--dtype", "f32,f64"])
    assert (args.suites, args.quick, args.dtype) == (["ops", "noise"], True, ("f32", "f64"))
    assert set(registry.sections_of([])) == {s for x in registry.USUAL.values() for s in x}
    assert set(registry.sections_of(["all"])) == set(report.SECTIONS)


def test_only_those_that_are_named_take_part(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = [*TINY, "--only", "add_noise", "--against", "eager", "--out", str(out)]
    assert runner.main(["ops", *arguments]) == 0
    rows = json.loads(out.read_text())["ops"]["rows"]
    assert {r["op"] for r in rows} == {"add_noise"}
    assert not any("compile" in r["timings"] for r in rows)
    assert Run(CPU, against=("eager",)).diffusers is False
    assert Run(CPU, against=("eager",)).compiles is False


# ---- results so far -----------------------------------------------------------------------------


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_jobs(monkeypatch, good, lambda: signal.raise_signal(signal.SIGINT), good)
    out = tmp_path / "r.json"
    arguments = ["accuracy", "overhead", *TINY, "--only", "add_noise,job 0,job 1,job 2"]
    assert runner.main([*arguments, "--out", str(out)]) == 130
    assert f"The results so far are in {out}" in capsys.readouterr().err
    results = report.load(out)
    assert {r["op"] for r in results["accuracy"]["rows"]} == {"add_noise"}
    assert [r["op"] for r in results["overhead"]["rows"]] == ["good"]
    assert "interrupted: 1 of 3 jobs were measured" in results["overhead"]["notes"]


def test_what_one_job_dies_of_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_jobs(monkeypatch, lambda: 1 // 0, good)
    out = tmp_path / "r.json"
    assert runner.main(["overhead", "--device", "cpu", "--out", str(out)]) == 1
    section = report.load(out)["overhead"]
    assert section["refused"] == [
        "the job 0: ZeroDivisionError: integer division or modulo by zero"
    ]
    assert len(section["rows"]) == 1


# ---- comparison ---------------------------------------------------------------------------------


def verdict(before: dict[str, Any], now: dict[str, Any]) -> str:
    found = change("ops", now, before)
    assert found is not None
    return found.verdict


def test_a_row_is_slower_if_its_time_and_its_ratio_to_the_baselines_grew() -> None:
    before = row(diffcore=1.0, eager=3.0, copy=1.0)
    assert verdict(before, row(diffcore=1.2, eager=3.0, copy=1.0)) == "slower"
    assert verdict(before, row(diffcore=0.8, eager=3.0, copy=1.0)) == "faster"
    assert verdict(before, row(diffcore=1.04, eager=3.0, copy=1.0)) == "within"
    # A machine that is twice as slow, and one whose torch is twice as fast.
    assert verdict(before, row(diffcore=2.0, eager=6.0, copy=2.0)) == "within"
    assert verdict(before, row(diffcore=1.0, eager=1.5, copy=0.5)) == "within"
    # Both at once: the machine is 1.5 times as slow, and the op another 1.4 times.
    found = change("ops", row(diffcore=2.1, eager=4.5, copy=1.5), before)
    assert found is not None
    assert found.factor == pytest.approx(1.4)


def test_what_both_runs_scatter_is_allowed() -> None:
    before, now = row(diffcore=1.0, eager=3.0), row(diffcore=1.3, eager=3.0)
    for r in (before, now):
        r["timings"]["diffcore"] = timing(r["timings"]["diffcore"]["median"], 0.2)
    found = change("ops", now, before)
    assert found is not None
    assert found.allowed == pytest.approx(0.4)
    assert found.verdict == "within"
    tight = change("ops", row(diffcore=1.0, eager=1.0), row(diffcore=1.0, eager=1.0))
    assert tight is not None
    assert tight.allowed == LEAST


def test_rows_are_found_by_all_that_names_them() -> None:
    old = Comparison({"ops": {"rows": [row("a", diffcore=1.0), row("b", diffcore=1.0)]}})
    changes = old.of("ops", [row("b", diffcore=2.0), row("c", diffcore=9.0)])
    assert [(c.row, c.factor) for c in changes] == [("b", 2.0)]
    assert old.of("noise", [row("b", diffcore=2.0)]) == []


def test_a_slowed_op_is_caught_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.json"
    common = ["ops", *TINY[:-1], "0.1", "--only", "add_noise"]
    assert runner.main([*common, "--out", str(old)]) == 0
    compared = [*common, "--compare", str(old), "--out", str(tmp_path / "new.json")]
    assert runner.main(compared) == 0
    assert "rows compared" in capsys.readouterr().out
    right = contest.BY_NAME["add_noise"]

    def slowed(*args: Any, **options: Any) -> Any:
        for _ in range(9):
            right.op(*args, **options)
        return right.op(*args, **options)

    slow = dataclasses.replace(right, op=slowed)
    monkeypatch.setitem(contest.BY_NAME, "add_noise", slow)
    assert runner.main(compared) == 1
    said = capsys.readouterr().out
    assert re.search(r"add_noise, forward, f32, 2×1×8×8 .* slower", said)


def test_a_row_that_looks_slower_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, out = tmp_path / "old.json", tmp_path / "new.json"
    common = ["overhead", "--device", "cpu"]
    of_jobs(monkeypatch, good)
    assert runner.main([*common, "--out", str(old)]) == 0
    times = iter([3e-6, 2e-6, 1.01e-6])

    def disturbed() -> dict[str, Any]:
        return {**good(), **row("good", diffcore=next(times), eager=2e-6)}

    of_jobs(monkeypatch, disturbed)
    assert runner.main([*common, "--compare", str(old), "--out", str(out)]) == 0
    assert next(times, None) is None
    (kept,) = report.load(out)["overhead"]["rows"]
    assert kept["timings"]["diffcore"]["median"] == 1.01e-6
    times = iter([3e-6, 2e-6, 4e-6])
    assert runner.main([*common, "--compare", str(old), "--out", str(out)]) == 1


def test_results_of_another_machine_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_jobs(monkeypatch, good)
    old = tmp_path / "old.json"
    assert runner.main(["overhead", "--device", "cpu", "--out", str(old)]) == 0
    results = report.load(old)
    results["overhead"]["machine"]["device"] = "another"
    report.save(results, old)
    with pytest.raises(SystemExit):
        runner.main(["overhead", "--compare", str(old), "--out", str(tmp_path)])
    assert re.search(r"compare must be results of .*, got .* of another", capsys.readouterr().err)


def test_a_comparison_of_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old, common = tmp_path / "old.json", ["overhead", "--device", "cpu"]
    of_jobs(monkeypatch, good)
    assert runner.main([*common, "--out", str(old)]) == 0
    of_jobs(monkeypatch, lambda: {**good(), "op": "another"})
    assert runner.main([*common, "--compare", str(old), "--out", str(tmp_path / "new.json")]) == 2
    assert f"compare has no row of this run, got {old}" in capsys.readouterr().err


def test_a_file_that_is_no_result_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of_jobs(monkeypatch, good)
    out = tmp_path / "other.json"
    out.write_text('{"mine": 1}')
    with pytest.raises(SystemExit) as stop:
        runner.main(["overhead", "--device", "cpu", "--out", str(out)])
    assert stop.value.code == 2
    assert f"{out} must have schema 1, got None" in capsys.readouterr().err
    assert out.read_text() == '{"mine": 1}'


# ---- losses, sizes, accuracy --------------------------------------------------------------------


def test_losses_are_listed_the_worst_first() -> None:
    rows = [row("a", diffcore=1.0, eager=0.9), row("b", diffcore=1.0, eager=2.0, compile=0.5)]
    rows += [row("c", diffcore=1.0, eager=0.999), {"what": "d", "timings": {"eager": timing(1.0)}}]
    _, found = report.losses({"schema": 1, "ops": {"rows": rows}})
    assert [cells[1:4] for cells in found] == [["b", "compile", "0.50×"], ["a", "eager", "0.90×"]]


def test_sizes_that_memory_does_not_hold_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_ops, "free_bytes", lambda device: 2.0**30)
    run = Run(CPU, sweep=True)
    sizes = [math.prod(job.measure.args[3]) for job in bench_ops.jobs_by_size(run)]
    assert min(sizes) == 2**10
    assert 2**20 <= max(sizes) < 2**28
    assert any("268435456" in n or "64×4194304 was left out" in n for n in run.notes)
    monkeypatch.setattr(bench_ops, "free_bytes", lambda device: math.inf)
    jobs = list(bench_ops.jobs_by_size(Run(CPU, sweep=True)))
    assert math.prod(jobs[-1].measure.args[3]) == 2**28


def test_errors_are_in_epsilons_of_the_dtype() -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    found = truth.float() + torch.tensor([0.0, 5 * 2.0**-20])
    assert bench_accuracy.relative_error([found], [truth], torch.float32) == 8.0
    assert bench_accuracy.relative_error([None], [truth], torch.float32) == 0.0


def test_the_accuracy_of_an_op_beside_eager(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    arguments = ["accuracy", *TINY, "--only", "normal_kl", "--out", str(out)]
    assert runner.main(arguments) == 0
    rows = report.load(out)["accuracy"]["rows"]
    assert {r["dtype"] for r in rows} == {"f32", "bf16", "f16"}
    for r in rows:
        assert 0 < r["errors"]["diffcore"] < 2
        assert r["error_over_bound"] <= 1
    assert any(r["errors"]["eager"] > r["errors"]["diffcore"] for r in rows if r["dtype"] == "bf16")


# ---- the page -----------------------------------------------------------------------------------


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, out = tmp_path / "report.html", tmp_path / "r.json"
    arguments = ["ops", "overhead", "accuracy", "steps", *TINY, "--only", "q_sample,Euler"]
    assert runner.main([*arguments, "--html", str(page), "--out", str(out)]) == 0
    text = page.read_text()
    assert text.count("<svg") == 5
    assert not re.findall(r"<(?:script|link|img|iframe)|url\(http|src=|@import", text)
    for heading in ("Where diffcore is slower", "By size", "How exact", "Share of the bandwidth"):
        assert heading in text
    raw = re.search(r"data:application/json;base64,([^\"]+)", text)
    assert raw is not None
    assert set(json.loads(base64.b64decode(raw[1]))) == set(report.load(out)) - {"schema"}


# ---- in a wheel ---------------------------------------------------------------------------------


def test_a_wheel_has_the_suites_and_the_cases_that_they_import() -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    mapped = re.findall(r'^"diffcore/benchmarks/support/(\w+)\.py"', settings, re.MULTILINE)
    (listed,) = re.findall(r"^exclude = \[(.*)\]$", settings, re.MULTILINE)
    left_out = set(re.findall(r'"/(\w+\.py)"', listed))
    folder = ROOT / "benchmarks"
    assert left_out < {path.name for path in folder.glob("*.py")}
    unread = [path for path in folder.glob("*.py") if path.name not in left_out]
    texts = {path.stem: path.read_text(encoding="utf-8") for path in unread}
    for suite in registry.SUITES.values():
        assert {where.partition(".")[0] for where in suite.values()} <= texts.keys()
    for text in texts.values():
        assert set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE)) <= texts.keys()
    wanted: set[str] = set()
    while unread:
        text = unread.pop().read_text(encoding="utf-8")
        named = re.findall(r"^ *from support\.(\w+) import", text, re.MULTILINE)
        named += re.findall(r"^from support import (\w+)", text, re.MULTILINE)
        unread += [ROOT / "tests" / "support" / f"{name}.py" for name in set(named) - wanted]
        wanted |= set(named)
    assert sorted(mapped) == sorted({*wanted, "__init__"})
