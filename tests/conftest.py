"""Devices, markers and options for all tests."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Generator
from typing import Any

import pytest
import torch

from support import emulated

EMULATED = emulated.install()  # before the first import of diffcore

from diffcore._engine import dispatch, execute, native  # noqa: E402

PEERS = ("diffusers",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-cuda",
        action="store_true",
        help="a skipped CUDA test counts as failed: a GPU run cannot pass by skipping",
    )

    parser.addoption(
        "--require-peers",
        action="store_true",
        default=os.environ.get("CI") == "true",
        help="fail without the packages that tests compare with; the default where CI=true",
    )

    parser.addoption("--slow", action="store_true", help="run slow tests too (-m slow: only these)")

    parser.addoption(
        "--all-ranks",
        action="store_true",
        help="run the distributed tests on 3 and 4 processes too, not only on 2",
    )

    parser.addoption(
        "--all-routes",
        action="store_true",
        help="compile and export every case of the matrix of routes, not only the representatives",
    )


def _leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects slow tests, and what runs on more than two processes, unless asked for."""
    left = set()
    if not (config.getoption("--slow") or config.getoption("--require-cuda")):
        left |= {i for i in items if i.get_closest_marker("slow")}
    if not config.getoption("--all-ranks"):
        calls = [(i, getattr(i, "callspec", None)) for i in items]
        left |= {i for i, call in calls if call and call.params.get("world", 2) > 2}
    if left:
        config.hook.pytest_deselected(items=list(left))
        items[:] = [i for i in items if i not in left]


def pytest_configure(config: pytest.Config) -> None:
    required = config.getoption("--require-peers")
    missing = [p for p in PEERS if required and importlib.util.find_spec(p) is None]
    if missing:
        raise pytest.UsageError(
            f"--require-peers: {', '.join(missing)} is not installed; "
            "run pip install -r requirements-dev.txt -c constraints-dev.txt"
        )
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests raise it
    # Parallel test processes share the cores; with more threads than cores they get slower.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, torch.get_num_threads() // workers)
        torch.set_num_threads(threads)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of processes that tests start


def why_no_cuda() -> str | None:
    """Why CUDA tests cannot run here; None when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not native.has_kernels(torch.device("cuda")):
        return "diffcore is built without CUDA kernels, or the driver is too old for them"
    return None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `device` runs on the CPU, and on CUDA where there is one (or must be).

    With DIFFCORE_EMULATED all tests run on the CUDA kernels compiled for the CPU.
    """
    if "device" in metafunc.fixturenames:
        devices: list[Any] = [pytest.param("cpu", id="emulated") if EMULATED else "cpu"]
        if why_no_cuda() is None or metafunc.config.getoption("--require-cuda"):
            devices.append(pytest.param("cuda", marks=pytest.mark.cuda))
        metafunc.parametrize("device", devices)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _leave_out(config, items)
    reason = why_no_cuda()
    if reason is None or config.getoption("--require-cuda"):
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and item.config.getoption("--require-cuda"):
        reason = why_no_cuda()
        if reason is not None:
            pytest.fail(f"--require-cuda: {reason}", pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    required = item.config.getoption("--require-cuda") and item.get_closest_marker("cuda")
    excused = hasattr(report, "wasxfail") or item.get_closest_marker("two_gpus")
    if required and report.skipped and not excused:
        report.outcome = "failed"
        report.longrepr = f"--require-cuda: skipped: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _same_numbers_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels run since, by name; a star marks those that draw noise."""
    if execute._C is None:
        pytest.skip("no kernels to launch without the compiled module")
    real = execute._C
    names: list[str] = []

    def count(index: int) -> None:
        name, *_, draws = real.op_table()[index]
        names.append(name + "*" * draws)

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def call(self, index: int, *arguments: Any) -> Any:
            count(index)
            return real.call(index, *arguments)

        def launch(self, index: int, *arguments: Any) -> Any:
            found = real.launch(index, *arguments)
            if not isinstance(found, int):
                count(index)
            return found

    counted = Counted()
    monkeypatch.setattr(execute, "_C", counted)
    monkeypatch.setattr(dispatch, "_launch", counted.launch)
    return names
