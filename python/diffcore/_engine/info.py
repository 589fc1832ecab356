"""What a bug report needs about this installation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import torch

from diffcore._engine import native

_INSTRUCTION_SETS = {"v2": "SSE4.2", "v3": "AVX2", "v4": "AVX-512"}
_MAPS = Path("/proc/self/maps")  # what Linux has loaded into this process
_DRIVER = Path("/proc/driver/nvidia/version")
_WIDTH = 78  # of the frame of a report


def installed_version(package: str) -> str:
    """Return an installed package's version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def version() -> str:
    """Return the version of the package in use, which is written in pyproject.toml alone.

    The compiled module holds the version that it was built as. Metadata may be missing in a source
    tree on ``PYTHONPATH``, or be those of another installation, and are read only without it.

    Returns:
        The version; "0+unknown" if there is neither a compiled module nor metadata.
    """
    if native._C is not None:
        return str(native._C.build_info()["version"])
    found = installed_version("diffcore")
    return "0+unknown" if found == "not installed" else found


def collect_info() -> dict[str, object]:
    """Describe build, hardware and versions.

    Returns:
        What ``diffcore._engine.native.info`` reports of the build, then the NVIDIA driver, the
        OpenMP runtimes, versions, the platform and the variables that change what runs; the values
        are what JSON can hold.
    """
    info = {name: _plain(value) for name, value in native.info().items()}
    for name, value in {
        "version": version(),
        "threads": torch.get_num_threads(),
        "driver": _nvidia_driver(),
        "openmp": _openmp_runtimes(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "environment": _environment(),
    }.items():
        info.setdefault(name, value)
    return info


def as_text(info: dict[str, object]) -> dict[str, str]:
    """``collect_info`` for people: names with spaces, values in words."""
    return {_TITLES.get(name, name.replace("_", " ")): _words(info, name) for name in info}


def report(info: dict[str, object]) -> str:
    """What a bug report must have of ``collect_info``: a few lines to paste."""
    devices = info["devices"]
    build = f"build: {info['build_flags']}" if "build_flags" in info else "no compiled module"
    lines = [
        f"diffcore {info['version']} ({build}), torch {info['torch']}, Python {info['python']}",
        str(info["platform"]),
        f"devices: {' + '.join(devices) if isinstance(devices, list) else devices}",
        f"backend: {info['backend']}, threads: {info['threads']}",
    ]
    shown = ("load_error", "instruction_set", "cuda", "openmp", "environment")
    known = [name for name in shown if info.get(name) not in (None, [])]
    lines += [f"{_TITLES[name]}: {_words(info, name, short=True)}" for name in known]
    return "\n".join([" for a bug report ".center(_WIDTH, "-"), *lines, "-" * _WIDTH])


_TITLES = {
    "cuda": "CUDA kernels",
    "cuda_architectures": "CUDA architectures",
    "cuda_devices": "CUDA devices",
    "cuda_driver": "CUDA of the driver",
    "cuda_min_driver": "CUDA needed",
    "driver": "NVIDIA driver",
    "environment": "environment",
    "instruction_set": "CPU kernels",
    "load_error": "load error",
    "openmp": "OpenMP runtime",
    "torch_cuda": "CUDA of torch",
    "torch_rocm": "ROCm of torch",
}


def _words(info: dict[str, object], name: str, *, short: bool = False) -> str:
    """A fact in words; ``short`` leaves out folders, which a report should not show."""
    value = info[name]
    if name == "cuda":
        return _cuda(info)
    if name == "instruction_set":
        return _cpu(info)
    if name == "openmp":
        return _openmp(value, short)
    if name.startswith("cuda_") and isinstance(value, int) and "driver" in name:
        return native.cuda_version(value) if value else "none"
    return _text(value)


def _cuda(info: dict[str, object]) -> str:
    """Whether the CUDA kernels are built, and whether they can run here."""
    if not info["cuda"]:
        return "not built"
    driver = info["cuda_driver"]
    assert isinstance(driver, int)
    if info.get("torch_rocm", "none") != "none":
        problem = "torch is built for ROCm"
    elif not driver:
        problem = "no driver"
    elif driver < native.MIN_CUDA_DRIVER:
        needed, found = map(native.cuda_version, (native.MIN_CUDA_DRIVER, driver))
        named = f"{info['driver']}, " if info.get("driver") else "one "
        problem = f"driver too old: needs R580, for CUDA {needed}; found {named}for CUDA {found}"
    elif not info["cuda_devices"]:
        problem = "no device"
    elif info["torch_cuda"] == "none":
        problem = "this torch has no CUDA"
    else:
        return "built, usable"
    return f"built, not usable here ({problem})"


def _cpu(info: dict[str, object]) -> str:
    """The instruction set of the CPU kernels, and whether there is a better one here."""
    used, best = str(info["instruction_set"]), str(info["best_instruction_set"])
    text = f"{used} ({_INSTRUCTION_SETS[used]})" if used in _INSTRUCTION_SETS else used
    chosen = "the best that this processor runs" if used == best else f"chosen; it runs {best} too"
    return f"{text}, {chosen}"


def _openmp(runtimes: object, short: bool) -> str:
    """Whether the kernels of the CPU and torch have one runtime, and so one pool of threads."""
    if not isinstance(runtimes, list):
        return "not known on this platform"
    names = [os.path.basename(path) if short else path for path in map(str, runtimes)]
    if len(names) == 1:
        return f"{names[0]}, shared with torch"
    return f"{len(names)}, each with threads of its own: {', '.join(names)}" if names else "none"


def _openmp_runtimes() -> list[str] | None:
    """The files of the OpenMP runtimes in this process; ``None`` where that is not known."""
    try:
        maps = _MAPS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return sorted(set(re.findall(r"(/[^\n]*/lib(?:gomp|omp|iomp5)[^/\n]*\.so[.\d]*)", maps)))


def _nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, such as 580.95.05; ``None`` where there is none."""
    try:
        found = re.search(r"\b\d{3,}\.\d[.\d]*", _DRIVER.read_text(encoding="utf-8"))
    except OSError:
        return None
    return found.group() if found else None


def _environment() -> list[str]:
    """The variables that change what runs, as they are set."""
    names = [n for n in os.environ if n.startswith("DIFFCORE_")] + ["OMP_NUM_THREADS"]
    return [f"{name}={os.environ[name]}" for name in sorted(names) if name in os.environ]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return ("\n".join(map(str, value)) if isinstance(value, list) else str(value)) or "none"


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    plain = value is None or isinstance(value, (bool, int, float, str, dict))
    return value if plain else str(value)
