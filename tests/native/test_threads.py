"""Threads that call ops at the same time, in a new process and in this one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from support.subprocess import run_python

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import wheel_smoke  # noqa: E402


def test_eight_threads_get_what_each_gets_alone() -> None:
    wheel_smoke.check_threads()


def test_their_calls_may_be_the_first_of_the_process() -> None:
    out = run_python(
        "import wheel_smoke; wheel_smoke.check_threads(); wheel_smoke.check_gil(); print('same')",
        PYTHONPATH=f"{ROOT}/python:{ROOT}/tools",
    )
    assert out.strip() == "same"


def test_another_result_in_one_thread_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, seen = wheel_smoke.calls, []

    def once_wrong(number: int) -> tuple[torch.Tensor, ...]:
        results = whole(number)
        seen.append(number)
        if seen.count(3) == 2 and number == 3:
            results[4].view(torch.int32)[0, 0, 0, 0] ^= 1
        return results

    monkeypatch.setattr(wheel_smoke, "calls", once_wrong)
    with pytest.raises(AssertionError, match="other results in thread 3"):
        wheel_smoke.check_threads()


def test_the_pinned_noise_of_the_smoke_test_is_the_format() -> None:
    wheel_smoke.check_noise()
