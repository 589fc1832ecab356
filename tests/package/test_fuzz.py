"""The fuzzer: a short run finds nothing, and what it looks for it reports."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import fuzz_calls
from tools.fuzz_arguments import ODD, Maker, arguments_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about the kinds of tensors


def test_a_short_run_finds_nothing() -> None:
    failures = [failure for index in range(1000) if (failure := fuzz_calls.one(2026, index))]
    assert not failures


def test_calls_are_the_same_for_a_seed() -> None:
    def shown(index: int) -> list[str]:
        seen: list[str] = []
        fuzz_calls.one(7, index, lambda name, args: seen.extend((name, describe(args))))
        return seen

    def describe(value: Any) -> str:
        if isinstance(value, dict):
            return repr({k: describe(v) for k, v in value.items() if k != "out"})
        if isinstance(value, (tuple, list)):  # outputs in it hold what the memory held before
            return repr([describe(v) for v in value])
        return fuzz_calls.describe(value)

    for index in range(40):
        first, second = shown(index), shown(index)
        assert [s.split(" object at")[0] for s in first] == [
            s.split(" object at")[0] for s in second
        ]


def test_every_op_and_every_odd_argument_is_reached() -> None:
    assert set(fuzz_calls.OPS) == {
        n for n in ops.__all__ if n not in ("PREDICTION_TYPES", "PhiloxNoise")
    }
    for name in fuzz_calls.OPS:
        for index in range(5):
            arguments_of(name, Maker(Random(index)))
    for make in ODD:
        make()


def failing(monkeypatch: pytest.MonkeyPatch, wrong: Any) -> list[str]:
    """What 200 calls report with ``wrong`` in place of every op."""
    for name in fuzz_calls.OPS:
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, real=real, **k: wrong(real, *a, **k))
        monkeypatch.setattr(getattr(ops, name), "__signature__", None, raising=False)
    monkeypatch.setattr(fuzz_calls, "arguments_of", lambda name, maker: arguments(maker))
    return [f.what for i in range(60) if (f := fuzz_calls.one(1, i))]


def arguments(maker: Maker) -> dict[str, Any]:
    x = maker.tensor((3, 4), torch.float32)
    return {"mean": x, "logvar": maker.tensor((3, 4), torch.float32)}


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("RuntimeError", lambda real, **k: error(RuntimeError("please report"))),
        ("object is not", lambda real, **k: error(TypeError("'int' object is not iterable"))),
        ("wrote outside", lambda real, mean, logvar: overwritten(mean)),
        ("contiguous copies", lambda real, mean, logvar: mean + mean.storage_offset()),
        ("refused in this layout", lambda real, mean, logvar: picky(mean)),
        ("from the reference", lambda real, mean, logvar: unlike_the_reference(mean)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_reported(words: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(words in what for what in failing(monkeypatch, wrong))


def error(what: Exception) -> None:
    raise what


def overwritten(x: Tensor) -> Tensor:
    result = x.clone()
    x.untyped_storage().fill_(1)
    return result


def picky(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")
    return x.clone()


def unlike_the_reference(x: Tensor) -> Tensor:
    return x.clone() if fuzz_calls.native._C is not None else x + 10


def test_a_crash_is_reported_with_its_number(tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1], 'w').write('%12d' % 17); os.abort()"

    class Crashing(fuzz_calls.Driver):
        def command(self, start: int, count: int) -> list[str]:
            return [sys.executable, "-c", code if start == 0 else "", str(self.at)]

    driver = Crashing(seed=1, chunk=50, at=tmp_path / "at")
    assert driver.run(calls=100, until=float("inf")) == 100
    assert [f.at for f in driver.failures] == [17]
    assert "process ended" in driver.failures[0].what
