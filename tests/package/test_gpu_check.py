"""`make gpu-check`: the runner with tiny commands, and the table of what it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.registry import SUITES  # noqa: E402
from tools import gpu_check, sanitizer_run, staged_run  # noqa: E402
from tools.staged_run import Run, Stage, Step  # noqa: E402

from support.cases import BY_NAME  # noqa: E402


def shell(name: str, text: str, seconds: float = 30, **options: object) -> Step:
    return Step(name, ["sh", "-c", text], seconds, **options)


def verdicts(out: Path) -> list[str]:
    """Each stage's name and verdict, in the summary."""
    lines = (out / "summary.txt").read_text(encoding="utf-8").splitlines()
    return [" ".join(line.split()[:2]) for line in lines]


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def wait_until_gone(pid: int) -> None:
    for _ in range(200):
        if is_gone(pid):
            return
        time.sleep(0.02)
    pytest.fail(f"the process {pid} is still there")


# ---- the runner ---------------------------------------------------------------------------------


def test_a_failed_stage_stops_nothing_and_each_result_is_on_disk_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, 60)
    run.stage(Stage("one", [shell("a", "echo 3 passed")]))
    assert not run.bad
    run.stage(Stage("two", [shell("a", "echo half; exit 4"), shell("b", "echo on")]))
    assert run.bad
    # the third sees what the first two left
    run.stage(Stage("three", [shell("a", f"cat {tmp_path}/summary.txt | tr '\\n' '|'")]))
    assert verdicts(tmp_path) == ["one ok", "two FAILED", "three ok"]
    one, two, three = (tmp_path / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert one.endswith("3 passed")
    assert two.endswith("on; a: FAILED exit 4")
    assert "3 passed|two" in three
    assert (tmp_path / "two-a.log").read_text(encoding="utf-8") == "half\n"
    steps = (tmp_path / "steps.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split()[:2] for line in steps] == [
        ["one-a", "ok"],
        ["two-a", "FAILED"],
        ["two-b", "ok"],
        ["three-a", "ok"],
    ]


@pytest.mark.parametrize("stubborn", ["", "trap '' TERM; "], ids=["plain", "ignores SIGTERM"])
def test_a_hanging_command_is_killed_with_its_children(
    tmp_path: Path, stubborn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_run, "GRACE_SECONDS", 0.3)
    run = Run(tmp_path, 60)
    text = f"{stubborn}sh -c '{stubborn}sleep 300' & echo $! > {tmp_path}/pid; echo begun; wait"
    start = time.monotonic()
    run.stage(Stage("hang", [shell("a", text, 0.5)]))
    assert time.monotonic() - start < 10
    assert run.bad
    assert verdicts(tmp_path) == ["hang TIMEOUT"]
    assert (tmp_path / "hang-a.log").read_text(encoding="utf-8") == "begun\n"
    wait_until_gone(int((tmp_path / "pid").read_text(encoding="utf-8")))


def test_what_a_command_leaves_behind_is_ended(tmp_path: Path) -> None:
    Run(tmp_path, 60).stage(Stage("s", [shell("a", f"sleep 300 & echo $! > {tmp_path}/pid")]))
    assert verdicts(tmp_path) == ["s ok"]
    wait_until_gone(int((tmp_path / "pid").read_text(encoding="utf-8")))


def test_the_time_of_all_stages_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staged_run, "GRACE_SECONDS", 0.1)
    monkeypatch.setattr(staged_run, "LEAST_SECONDS", 0.2)
    run = Run(tmp_path, 1)
    start = time.monotonic()
    run.stage(Stage("cut", [shell("a", "sleep 300"), shell("b", "echo on")]))
    run.stage(Stage("late", [shell("a", "echo on")]))
    assert time.monotonic() - start < 10
    assert run.bad
    assert verdicts(tmp_path) == ["cut CUT", "late CUT"]


def test_extra_steps_may_run_out_of_time_but_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_run, "GRACE_SECONDS", 0.1)
    run = Run(tmp_path, 60)
    run.stage(Stage("slow", [shell("a", "echo 1"), shell("b", "sleep 300", 0.3, extra=True)]))
    assert not run.bad
    assert verdicts(tmp_path) == ["slow ok"]
    assert "b TIMEOUT" in (tmp_path / "summary.txt").read_text(encoding="utf-8")
    run.stage(Stage("wrong", [shell("a", "exit 1", extra=True)]))
    assert run.bad


def test_what_the_machine_cannot_do_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, 60)
    refused = shell("a", "echo ERROR: ERR_NOT_ALLOWED; exit 1", excuse="ERR_NOT_ALLOWED")
    run.stage(Stage("refused", [refused]))
    run.stage(Stage("without", [Step("a", None, 1, "ncu is not on PATH", extra=True)]))
    assert not run.bad
    run.stage(Stage("missing", [Step("a", None, 1, "nvcc is not on PATH")]))
    assert run.bad
    lines = (tmp_path / "summary.txt").read_text(encoding="utf-8").splitlines()
    assert [" ".join(line.split()[1:3]) for line in lines[:2]] == ["left out", "left out"]
    assert "ERR_NOT_ALLOWED" in lines[0]
    assert lines[1].endswith("ncu is not on PATH")
    assert lines[2].endswith("nvcc is not on PATH")
    run.stage(Stage("nowhere", [Step("a", [str(tmp_path / "nothing")], 1)]))
    assert verdicts(tmp_path)[-1] == "nowhere FAILED"


def test_a_log_without_what_it_must_have_fails(tmp_path: Path) -> None:
    run = Run(tmp_path, 60)
    run.stage(Stage("one", [shell("a", "echo captured 3.5", expects=r"captured +[\d.]+")]))
    assert not run.bad
    run.stage(Stage("two", [shell("a", "echo captured: error", expects=r"captured +[\d.]+")]))
    assert run.bad
    assert verdicts(tmp_path) == ["one ok", "two FAILED"]


def test_a_log_of_another_form_does_not_end_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, 60)
    run.stage(Stage("one", [shell("a", "echo x")], lambda logs: logs["b"]))
    assert not run.bad
    assert verdicts(tmp_path) == ["one ok"]


def test_a_stopped_run_keeps_what_it_has_and_leaves_no_process(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tools.staged_run import Run, Stage, Step, stoppable
run = Run(Path({str(tmp_path)!r}), 60)
with stoppable():
    run.stage(Stage("one", [Step("a", ["echo", "done"], 9)]))
    run.stage(Stage("two", [Step("a", ["sh", "-c", "echo $$ > {tmp_path}/pid; sleep 300"], 99)]))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE
    ) as process:
        pid = tmp_path / "pid"
        while not (pid.exists() and pid.read_text(encoding="utf-8")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert b"StoppedError" in errors
    assert verdicts(tmp_path) == ["one ok", "two CUT"]
    wait_until_gone(int(pid.read_text(encoding="utf-8")))


# ---- the script ---------------------------------------------------------------------------------


def test_the_exit_status_and_the_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "machine", lambda: "a machine")
    good = Stage("good", [shell("a", "echo 7")])
    bad = Stage("bad", [shell("a", "exit 1")])
    monkeypatch.setattr(gpu_check, "STAGES", {"good": lambda s: good, "bad": lambda s: bad})
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "deep" / "out"
    assert gpu_check.main(["--stages", "good", "--out", str(out)]) == 0
    assert verdicts(out) == ["a machine", "good ok", "good: good"]
    assert gpu_check.main(["--stages", "bad good", "--out", str(out)]) == 1
    assert verdicts(out) == ["a machine", "bad FAILED", "good ok", "BAD: bad,"]
    for stages in ("good,other", ""):
        with pytest.raises(SystemExit):
            gpu_check.main(["--stages", stages, "--out", str(out)])


def test_a_dry_run_prints_every_command_and_runs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert gpu_check.main(["--dry-run", "--out", str(out)]) == 0
    assert not out.exists()
    lines = capsys.readouterr().out.splitlines()
    assert list(dict.fromkeys(line.split("-")[0] for line in lines)) == list(gpu_check.STAGES)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_command_names_what_exists(kind: str, tmp_path: Path) -> None:
    settings = gpu_check.Settings(kind, tmp_path, "native")
    for make in gpu_check.STAGES.values():
        for step in make(settings).steps:
            words = list(step.command or [])
            files = [w for w in words if w.startswith(("tests/", "tools/"))]
            assert [f for f in files if not (ROOT / f).exists()] == []
            assert step.command is not None or step.reason


def test_no_test_and_no_benchmark_is_forgotten(tmp_path: Path) -> None:
    settings = gpu_check.Settings("cuda", tmp_path, "native")
    commands = [w for step in gpu_check.tests(settings).steps for w in step.command or ()]
    folders = [w for w in commands if w.startswith("tests/")]
    assert sorted(folders) == sorted(
        {f"tests/{p.parent.name}" for p in ROOT.glob("tests/*/test_*.py")}
    )
    # "noise" runs one_core; errors of schedulers and tiny pipelines are for the CPU
    of_cpu = {"one_core", "scheduler_errors", "pipelines"}
    assert {*gpu_check.BENCHMARKS, "sampling"} == set(SUITES) - of_cpu


def test_a_skipped_test_fails_and_counts_are_added_up(tmp_path: Path) -> None:
    steps = gpu_check.tests(gpu_check.Settings("cuda", tmp_path, "native")).steps
    assert all("--require-cuda" in (step.command or ()) for step in steps)
    logs = {
        "noise": "x\n== 3 failed, 730 passed, 10 deselected in 3.14s ==\n",
        "ops": "== 12 passed in 1s ==",
        "others": "== 9 deselected in 0.1s ==",
    }
    assert gpu_check._tests_number(logs) == "3 failed, 742 passed"


@pytest.mark.parametrize("name", gpu_check.STAGES)
def test_a_stage_without_logs_has_no_number(name: str, tmp_path: Path) -> None:
    stage = gpu_check.STAGES[name](gpu_check.Settings("cuda", tmp_path, "native"))
    found = stage.number({})
    assert found in ("", *(f"0 of {len(stage.steps)} benchmarks {x}" for x in ("ran", "started")))


def test_the_numbers_of_capture_and_profile() -> None:
    log = """ what                        contestant          time
 DDPM step, solver alone, 1  diffcore            9 µs
 DDPM step, solver alone, 1  diffcore, captured  2 µs
"""
    assert gpu_check._capture_number({"sampling": log}).endswith("diffcore, captured 2 µs")
    log = '"0","1","python","k","gpu__time_duration.sum","us","12.5"\n"x","dram__x","%","91"\n'
    assert gpu_check._profile_number({"ncu": log}) == "12.5 us"


def test_the_short_list_of_the_sanitizers_has_every_kind_of_kernel() -> None:
    cases = [BY_NAME[name] for name in sanitizer_run.SHORT_CASES]
    assert {case.elementwise for case in cases} == {True, False}
    assert any("noise" in case.tensors for case in cases)
