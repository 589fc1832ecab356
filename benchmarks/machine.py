"""The machine of a measurement, and whether ``torch.compile`` can be a baseline on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from diffcore._engine.info import collect_info

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def describe(device: torch.device) -> dict[str, object]:
    """What belongs beside every result.

    Args:
        device: the device that was measured.

    Returns:
        Names and versions, as JSON holds them.
    """
    info = collect_info()
    facts: dict[str, object] = {
        "device": cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "device_type": device.type,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info.get("instruction_set", "none"),
        "diffcore": info["version"],
        "backend": info["backend"],
        "build": info.get("build_flags", "none"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "cuda": torch.version.cuda or "none",
            "driver": _driver(),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30),
            "l2_mib": round(properties.L2_cache_size / 2**20),
        }
    return facts


def cpu_model() -> str:
    """The processor's name as the kernel reports it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def slug(device: torch.device) -> str:
    """A file name for this device: its name, and for a CPU how many threads were used."""
    if device.type == "cpu":
        name = f"{cpu_model()} {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def last_level_cache() -> int:
    """Bytes of the largest CPU cache, 32 MiB if the kernel does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM]?)", path.read_text(encoding="utf-8").strip())
        if found:
            sizes.append(int(found.group(1)) * {"": 1, "K": 2**10, "M": 2**20}[found.group(2)])
    return max(sizes, default=32 * 2**20)


def why_no_compile(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot be a baseline here; None when it can."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "no torch.compile baseline: triton is not installed"
    names = ("c++", "g++", "clang++") if device.type == "cpu" else ("cc", "gcc", "clang")
    chosen = os.environ.get("CXX" if device.type == "cpu" else "CC")
    if not any(shutil.which(name) for name in (chosen, *names) if name):
        return f"no torch.compile baseline: no C++ compiler found (looked for {', '.join(names)})"
    return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip().splitlines()[0]
