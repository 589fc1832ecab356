"""What a bug report needs about this installation."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from diffcore._engine import native


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
        What ``diffcore._engine.native.info`` reports of the build, then versions and the platform;
        the values are what JSON can hold.
    """
    info = {name: _plain(value) for name, value in native.info().items()}
    for name, value in {
        "version": version(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }.items():
        info.setdefault(name, value)
    return info


def as_text(info: dict[str, object]) -> dict[str, str]:
    """``collect_info`` for people: names with spaces, values in words."""
    return {
        name.replace("_", " "): _cuda(info) if name == "cuda" else _text(value)
        for name, value in info.items()
    }


def one_line(info: dict[str, object]) -> str:
    """What a bug report must have of ``collect_info``, in one line to paste."""
    build = f"{info['backend']} {info.get('instruction_set', '')}".strip()
    devices = info["devices"]
    parts = {
        "diffcore": info["version"],
        "torch": info["torch"],
        "Python": info["python"],
        "kernels": build,
        "threads": info["threads"],
        "devices": " + ".join(devices) if isinstance(devices, list) else devices,
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items()) + f", {info['platform']}"


def _cuda(info: dict[str, object]) -> str:
    """Whether the CUDA kernels are built, and whether they can run here."""
    if not info["cuda"]:
        return "not built"
    driver, devices = info["cuda_driver"], info["cuda_devices"]
    assert isinstance(driver, int)
    if not devices:
        problem = "no device"
    elif driver < native.MIN_CUDA_DRIVER:
        found, needed = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, native.MIN_CUDA_DRIVER))
        problem = f"driver for CUDA {found}, needs {needed}"
    elif info["torch_cuda"] == "none":
        problem = "this torch has no CUDA"
    else:
        return "built and usable"
    return f"built, not usable here ({problem})"


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
