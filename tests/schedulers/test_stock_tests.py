"""tools/diffusers_tests.py, on two tests in the place of diffusers' own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import diffusers_tests  # noqa: E402

TESTS = """
import pytest, torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

def walk(scheduler):
    scheduler.set_timesteps(4)
    x = torch.ones(1, 2)
    for t in scheduler.timesteps:
        x = scheduler.step(0.1 * scheduler.scale_model_input(x, t), t, x).prev_sample
    return x

def test_from_config():
    walk(DDPMScheduler.from_config(EulerDiscreteScheduler().config))

def test_class():
    scheduler = DDPMScheduler()
    walk(scheduler)
    assert type(scheduler) is DDPMScheduler, "of another class"

def test_variance():
    walk(DDPMScheduler(variance_type="fixed_large_log"))

def test_wrong():
    assert 1 == 2

def test_skipped():
    pytest.skip()
"""


@pytest.mark.slow
def test_both_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tests" / "schedulers"
    folder.mkdir(parents=True)
    (folder / "test_scheduler_one.py").write_text(TESTS, encoding="utf-8")
    (folder / "test_scheduler_two.py").write_text("def test_two(): pass", encoding="utf-8")
    assert diffusers_tests.main([str(tmp_path), "--only", "one", "--show"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("stock: 3 passed, 1 failed, 1 skipped")
    assert lines[1].startswith("fused: 2 passed, 2 failed, 1 skipped")
    assert lines[2].startswith("8 fused steps, ")
    assert any(line.startswith("passed -> failed: ") and "::test_class" in line for line in lines)
    assert any("of another class" in line for line in lines)
    assert any("DDPMScheduler: variance_type='fixed_large_log'" in line for line in lines)
    assert any(line.startswith("failed in both: ") and "::test_wrong" in line for line in lines)
    assert diffusers_tests.main([str(tmp_path), "--only", "two"]) == 0
    with pytest.raises(SystemExit, match="no tests in"):
        diffusers_tests.main([str(tmp_path), "--only", "three"])
