from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


from benchmarks.suite import Run

from benchmarks import (
    bench_noise,
    bench_steps,
    contest,
    registry,
    report,
    runner,
    sampling_loops,
    tables,
    timing,
)
from diffcore import PhiloxNoise
from diffcore._engine import native

TINY = ["--device", "cpu", "--quick", "--shape", "2x1x8x8", "--seconds", "0.01"]


CPU = torch.device("cpu")
SHORTEST = Run(CPU, quick=True, seconds=0.0)


def run(suite: str, *arguments: str) -> None:
    """The command in this process: starting another takes longer than what it measures."""
    assert runner.main([suite, *arguments]) == 0


def section_of(suite: str, out: Path, *arguments: str) -> dict[str, Any]:
    """What a run of a suite leaves, with nothing refused."""
    run(suite, *arguments, "--out", str(out))
    found: dict[str, Any] = json.loads(out.read_text())[suite]
    assert found["refused"] == []
    return found


def run_as_a_user_would(*arguments: str) -> None:
    command = [sys.executable, "-m", "diffcore", "bench", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_bench_ops_writes_every_section_with_its_machine_and_quantiles(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    operators = "q_sample,reparameterize_kl"
    run_as_a_user_would("ops", "overhead", *TINY, "--only", operators, "--out", str(out))
    results = json.loads(out.read_text())
    assert set(results) == {"schema", "ops", "sizes", "overhead"}
    facts = {"device", "cpu", "threads", "torch", "diffcore", "commit", "clocks", "instruction_set"}
    for name in set(results) - {"schema"}:
        section = results[name]
        assert {"machine", "date", "command", "rows", "notes"} <= set(section)
        assert facts <= set(section["machine"])
        assert "diffcore bench ops overhead" in section["command"]
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
    run("overhead", *TINY, "--only", "add_noise", "--out", str(out))
    assert set(report.load(out)) == {"schema", "training", "overhead", "call"}


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
    assert runner.main(["ops", *TINY, "--only", "add_noise", "--out", str(out)]) == 1
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
    # One number, of which eager has every digit: three ulp are allowed.
    one, ulp = torch.tensor(1.5, dtype=torch.float64), 2**-23
    check = functools.partial(contest.check_outputs, eager=[one.float()], truth=[one])
    assert check("op", [one.float() + 3 * ulp]) == 1
    with pytest.raises(contest.WrongResultError, match="op: output 0"):
        check("op", [one.float() + 4 * ulp])


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


def test_the_score_counts_losses_beside_wins() -> None:
    ratios = [(2.0, 1.2), (0.97, 0.9), (0.5, None)]
    rows = [{"dtype": "f32", "times_eager": e, "times_compile": c} for e, c in ratios]
    assert tables.score(rows).endswith("| f32 | 1 / 1 / 1 | 1 / 0 / 1 |")


def test_the_pages_have_the_markers_that_tables_fill() -> None:
    names = [m["name"] for page in tables.PAGES for m in tables.MARKED.finditer(page.read_text())]
    places = [f"{a}{b}" for a in ("cpu", "cuda") for b in ("", "-full", "-schedulers", "-summary")]
    assert sorted(names) == sorted([*places, "cpu-scheduler-errors", "cpu-pipelines"])


def noise_row(case: bench_noise.DrawnCase, **how: Any) -> dict[str, Any]:
    return bench_noise.time_case(case, "f32", (2, 1, 8, 8), SHORTEST, **how)


@pytest.mark.parametrize("case", bench_noise.cases(), ids=lambda c: c.name)
def test_drawn_noise_is_checked_against_the_key_as_a_tensor(
    case: bench_noise.DrawnCase,
) -> None:
    row = noise_row(case)
    assert row["bytes"] == case.moves * 4 * 128
    assert row["error_over_bound"]["diffcore"] <= 1
    into = {"out="} if case.out else set()
    assert set(row["timings"]) == {"diffcore", "eager", "copy"} | into

    @functools.wraps(case.op)
    def wrong(*args: Any, **options: Any) -> Any:
        result = case.op(*args, **options)
        first, *others = contest.as_tuple(result)
        spoiled = (first * 1.001, *others)
        return spoiled if isinstance(result, tuple) else spoiled[0]

    with pytest.raises(contest.WrongResultError, match=case.name):
        noise_row(dataclasses.replace(case, op=wrong))


def test_the_noise_drawn_must_be_that_of_the_key() -> None:
    for case in bench_noise.cases():
        if not case.kept:

            @functools.wraps(case.op)
            def other(*args: Any, case: bench_noise.DrawnCase = case, **options: Any) -> Any:
                given = [a.at(1) if isinstance(a, PhiloxNoise) else a for a in args]
                drawn = {
                    k: v.at(1) if isinstance(v, PhiloxNoise) else v for k, v in options.items()
                }
                return case.op(*given, **drawn)

            with pytest.raises(contest.WrongResultError):
                noise_row(dataclasses.replace(case, op=other))


@pytest.mark.parametrize("name", ["denoising_loss_v_prediction", "normal_kl_sample"])
def test_numbers_for_each_sample_are_averaged_and_differentiated(name: str) -> None:
    case = contest.BY_NAME[name]
    args = contest.make_inputs(case, (4, 3, 5), torch.float32, torch.device("cpu"))
    timed = contest.Contest(case, "forward+backward", [args])
    leaves = [args.tensors[name] for name in case.differentiable]
    expected = torch.autograd.grad(case.native(args).mean(), leaves)
    for found, wanted in zip(timed.diffcore[0](), expected, strict=True):
        assert torch.equal(found, wanted)


def test_the_noise_tables_and_picture_hold_what_was_measured(tmp_path: Path) -> None:
    machine = {"device": "it", "device_type": "cpu", "threads": 2, "instruction_set": "v3"}
    facts = {"machine": {**machine, "torch": "2", "diffcore": "1"}, "date": "then", "command": "c"}
    q_sample, *_, last = bench_noise.cases()
    alone = noise_row(q_sample, where="1 thread, v3")
    alone["times_eager"] = 1234.5
    noise = {**facts, "rows": [noise_row(q_sample), noise_row(last), alone]}
    results = {"ops": {**facts, "rows": [noise_row(q_sample)]}, "noise": noise}
    short = tables.short(results)
    assert short.count("| `q_sample` | forward |") == 2
    assert short.count("| `reparameterize_kl` | forward+backward |") == 1
    assert "1234.5" not in short  # one core alone is not for comparison with the others
    full = tables.full(results)
    assert "1234.50×" in full
    assert "1 thread, v3" in full
    pytest.importorskip("matplotlib")
    from benchmarks import plots

    plots.draw_noise(results, tmp_path / "noise.png")
    plots.draw_speed({"cpu": results}, tmp_path / "speed.png")
    for name in ("noise", "speed"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    expected = {"q_sample", "q_sample, noise generated"}
    expected.add("reparameterize_kl + backward, noise generated")
    assert set(plots.speedups(results)) == expected


@pytest.mark.slow
def test_bench_noise_runs_with_each_instruction_set(tmp_path: Path) -> None:
    rows = section_of("noise", tmp_path / "result.json", *TINY)["rows"]
    assert {r["op"] for r in rows} == {c.name for c in bench_noise.cases()}
    best = native.info().get("best_instruction_set")
    known = bench_noise.INSTRUCTION_SETS
    sets = known[: known.index(best) + 1] if best else ()
    alone = {f"1 thread, {isa}" for isa in sets}
    assert {r["where"] for r in rows} == {"", "channels_last", "short rows"} | alone
    assert [65536, 2] in [r["shape"] for r in rows]


def step_row(case: bench_steps.Case, shape: tuple[int, ...]) -> dict[str, Any]:
    return bench_steps.time_step(case, "f32", shape, SHORTEST)


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), bench_steps.SMALL[0]])
@pytest.mark.parametrize("case", bench_steps.LARGE_CASES + bench_steps.SMALL_CASES[:3], ids=str)
def test_a_step_is_checked_and_timed(
    case: bench_steps.Case, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = step_row(case, shape)
    peers = {"diffusers"} if sampling_loops.has_diffusers() else set()
    if shape == bench_steps.SMALL[0]:
        assert set(row["timings"]) == {"diffcore", "eager", "reverse_step"} | peers
    else:
        assert set(row["timings"]) == {"diffcore", "eager", "copy"} | peers
    assert row["relative_error"]["diffcore"] < 1e-6

    right = bench_steps.Contest.diffcore

    def wrong(self: bench_steps.Contest) -> list[timing.Call]:
        return [lambda call=call: spoil(call()) for call in right(self)]

    def spoil(result: Any) -> Any:
        x, history = result
        return 1.00001 * x, history

    monkeypatch.setattr(bench_steps.Contest, "diffcore", wrong)
    with pytest.raises(contest.WrongResultError, match=case.kind.replace("+", r"\+")):
        step_row(case, shape)


def test_the_table_of_steps_ends_with_the_ratio_to_diffusers() -> None:
    case = bench_steps.LARGE_CASES[0]
    row = {**step_row(case, (2, 1, 8, 8)), "times_diffusers": 12.25}
    header, body = report.steps_table([row])
    assert (body[0][0], body[0][-1]) == ("DDPM, guided, noise given", "12.2×")
    assert len(header) == len(body[0])


def test_bench_threshold_runs(tmp_path: Path) -> None:
    section = section_of("threshold", tmp_path / "result.json", *TINY)
    assert [r["op"] for r in section["rows"]] == ["dynamic_threshold", "dynamic_threshold_guided"]
    for row in section["rows"]:
        assert set(row["timings"]) == {"diffcore", "eager", "copy"}
        assert row["error_over_bound"]["diffcore"] <= 1


OF_CASES = {
    "density": ("log-prob|log-prob, guided|KL of two steps|" * 2, "2x1x8x8"),
    "guidance": ("2M, cfg|2M, rescaled|2M, apg", "2x1x8x8"),
    "masks": ("step|step, known part|masked loss|pseudo-Huber loss", "2x1x8x8"),
    "groups": (
        "add_noise, frames|denoising_loss, frames|add_noise, samples|denoising_loss, samples|"
        "add_noise, folded",
        "2x2x3x4x4",
    ),
}


@pytest.mark.parametrize("name", OF_CASES)
def test_benchmarks_of_a_few_cases_run(name: str, tmp_path: Path) -> None:
    named, shape = OF_CASES[name]
    small = (*TINY[:3], "--shape", shape, *TINY[5:])
    section = section_of(name, tmp_path / "result.json", *small)
    assert [r["op"] for r in section["rows"]] == named.strip("|").split("|")
    for row in section["rows"]:
        assert row["error_over_bound"]["diffcore"] <= 1


def test_the_parts_of_a_call_take_less_than_the_call(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    run("overhead", "--quick", "--device", "cpu", "--only", "add_noise", "--out", str(out))
    rows = {r["what"]: r["median"] for r in json.loads(out.read_text())["call"]["rows"]}
    assert rows["module: what torch is asked before each launch"] < rows["module: the call"]


def test_bench_likelihood_runs(tmp_path: Path) -> None:
    section = section_of("likelihood", tmp_path / "result.json", *TINY)
    assert [r["what"] for r in section["rows"]] == [f"{m}, f32, 2×1×8×8" for m in contest.MODES]
    assert set(section["rows"][0]["timings"]) == {"diffcore", "eager", "exact, eager"}


def test_every_section_has_a_table() -> None:
    sections = [name for suite in registry.SUITES.values() for name in suite]
    assert sorted(sections) == sorted(report.SECTIONS)
