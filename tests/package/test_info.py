"""What ``diffcore info`` says of the kernels, the driver and the OpenMP runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffcore._engine import info as info_module
from diffcore._engine import native
from diffcore._engine.info import as_text, collect_info


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"cuda": False}, "not built"),
        ({}, "built, not usable here (no driver)"),
        ({"cuda_driver": 13000}, "built, not usable here (no device)"),
        (
            {"cuda_devices": 1, "cuda_driver": 12040},
            "built, not usable here (driver too old: needs R580, for CUDA 13.0; found one for CUDA "
            "12.4)",
        ),
        (
            {"cuda_devices": 1, "cuda_driver": 12080, "driver": "570.86.15"},
            "built, not usable here (driver too old: needs R580, for CUDA 13.0; found 570.86.15, "
            "for CUDA 12.8)",
        ),
        (
            {"cuda_devices": 1, "cuda_driver": 13000},
            "built, not usable here (this torch has no CUDA)",
        ),
        (
            {"cuda_devices": 1, "cuda_driver": 13000, "torch_rocm": "6.4"},
            "built, not usable here (torch is built for ROCm)",
        ),
        ({"cuda_devices": 1, "cuda_driver": 13000, "torch_cuda": "13.0"}, "built, usable"),
    ],
)
def test_info_says_whether_cuda_can_be_used(facts: dict[str, object], text: str) -> None:
    none = {"cuda": True, "cuda_devices": 0, "cuda_driver": 0, "torch_cuda": "none"}
    assert as_text(none | facts)["CUDA kernels"] == text


@pytest.mark.parametrize(
    ("used", "best", "text"),
    [
        ("v4", "v4", "v4 (AVX-512), the best that this processor runs"),
        ("v2", "v3", "v2 (SSE4.2), chosen; it runs v3 too"),
        ("neon", "neon", "neon, the best that this processor runs"),
    ],
)
def test_info_says_which_cpu_kernels_run(used: str, best: str, text: str) -> None:
    facts: dict[str, object] = {"instruction_set": used, "best_instruction_set": best}
    assert as_text(facts)["CPU kernels"] == text


TORCHS = "7f00-7f01 r-xp 0 08:01 12 /opt/a b/torch/lib/libgomp-98b21ff3.so.1.0.0"
SYSTEMS = "7f02-7f03 r-xp 0 08:01 13 /usr/lib/libiomp5.so"


@pytest.mark.parametrize(
    ("maps", "text"),
    [
        ([TORCHS, TORCHS], "/opt/a b/torch/lib/libgomp-98b21ff3.so.1.0.0, shared with torch"),
        (
            [TORCHS, SYSTEMS],
            "2, each with threads of its own: /opt/a b/torch/lib/libgomp-98b21ff3.so.1.0.0, "
            "/usr/lib/libiomp5.so",
        ),
        (["7f00-7f01 r-xp 0 08:01 12 /usr/lib/libcompute.so"], "none"),
        (None, "not known on this platform"),
    ],
)
def test_info_names_the_openmp_runtimes(
    maps: list[str] | None, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "maps"
    if maps is not None:
        file.write_text("\n".join(maps) + "\n", encoding="utf-8")
    monkeypatch.setattr(info_module, "_MAPS", file)
    assert as_text(collect_info())["OpenMP runtime"] == text


def test_info_reads_the_version_of_the_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(info_module, "_DRIVER", tmp_path / "version")
    assert collect_info()["driver"] is None
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
    (tmp_path / "version").write_text(text + "GCC version:  gcc version 12.2.0\n")
    assert collect_info()["driver"] == "580.95.05"


# ---- which devices have kernels -----------------------------------------------------------------


def _driver_for(cuda: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module with CUDA kernels beside such a driver."""

    class Module:
        @staticmethod
        def build_info() -> dict[str, object]:
            return {"cuda": True, "cuda_driver": cuda}

    monkeypatch.setattr(native, "_C", Module)
    monkeypatch.setattr(native, "_cuda_usable", None)


def test_an_old_driver_is_warned_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _driver_for(12040, monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"need driver R580, for CUDA 13.0; .* for CUDA 12.4"):
        assert not native.has_kernels(torch.device("cuda"))
    assert not native.has_kernels(torch.device("cuda"))


def test_the_compiled_module_needs_the_driver_that_is_said() -> None:
    if native._C is None:
        pytest.skip("needs the compiled module")
    assert native._C.build_info()["cuda_min_driver"] == native.MIN_CUDA_DRIVER


def test_rocm_has_no_kernels_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    # Its devices are called "cuda", and a driver of NVIDIA may be there too.
    _driver_for(13000, monkeypatch)
    assert native.has_kernels(torch.device("cuda"))
    _driver_for(13000, monkeypatch)
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert not native.has_kernels(torch.device("cuda"))


@pytest.mark.parametrize("other", ["mps", "xpu", "hpu", "meta"])
def test_other_devices_have_no_kernels(other: str) -> None:
    assert not native.has_kernels(torch.device(other))
