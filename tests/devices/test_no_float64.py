"""Every public call on a device without float64, beside the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from diffcore import _devices
from support.device_calls import CALLS
from support.no_float64 import COMPILER, DTYPES
from support.routes.matrix import CASES
from support.subprocess import run_python

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")

NAMES = [case.name for case in CASES] + list(CALLS)


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    """What is wrong with each call, found by a process that has the device."""
    code = """
        import json
        import torch
        from support import no_float64
        no_float64.install()
        torch.set_num_threads(1)
        print(json.dumps(no_float64.problems()))
    """
    lines = run_python("\n".join(line.strip() for line in code.splitlines())).splitlines()
    found: dict[str, str] = json.loads(lines[-1])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_results_are_those_of_the_cpu(name: str, dtype: str, problems: dict[str, str]) -> None:
    problem = problems.get(f"{name}, {dtype}")
    assert problem is None, problem


def test_every_problem_belongs_to_a_test(problems: dict[str, str]) -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert problems.keys() <= {f"{name}, {dtype}" for name in NAMES for dtype in DTYPES}


def test_the_device_refuses_float64() -> None:
    code = """
        import pytest, torch
        from support import no_float64
        no_float64.install()
        from diffcore import _devices
        there = torch.ones(3, device=no_float64.NAME)
        wide = torch.ones(3, dtype=torch.float64)
        for refused in (
            lambda: wide.to(there.device),
            lambda: there.to("cpu", torch.float64),
            lambda: there.double(),
            lambda: there.sum(dtype=torch.float64),
            lambda: torch.zeros(3, dtype=torch.float64, device=there.device),
        ):
            with pytest.raises(TypeError, match="no float64"):
                refused()
        with torch.device("meta"):
            assert not _devices.has_float64(there.device)
        assert _devices.to_device(wide, there.device).dtype == torch.float32
        print(type(there).__name__, there.device)
    """
    text = run_python("\n".join(line[8:] for line in code.splitlines()))
    assert text == "Tensor without_double:0"


def test_devices_with_float64_keep_it() -> None:
    for device in ("cpu", "meta"):
        x = torch.ones(3, device=device)
        assert _devices.wide_dtype(device) == torch.float64
        assert _devices.in_float64(x).device == x.device
        assert _devices.beside(y := x.double(), x) is y
    assert _devices.wide_dtype("cuda") == torch.float64  # whether or not there is one


@pytest.mark.parametrize("missing", [TypeError, RuntimeError, AssertionError])
def test_a_device_is_asked_once(missing: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ones(*size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        asked.append(device.type)
        raise missing("Required aspect fp64 is not supported on the device")

    monkeypatch.setattr(_devices, "_found", {})
    monkeypatch.setattr(torch, "ones", ones)
    assert not _devices.has_float64("xpu")
    assert not _devices.has_float64(torch.device("xpu"))
    assert asked == ["xpu"]
