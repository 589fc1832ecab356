"""The machine of a measurement, and whether ``torch.compile`` can be a baseline on it."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
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
    versions = {name: _version(name) for name in ("numpy", "triton", "diffusers")}
    facts: dict[str, object] = {
        "device": cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "device_type": device.type,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": info.get("instruction_set", "none"),
        "diffcore": info["version"],
        "commit": commit(),
        "clocks": clocks(device),
        "backend": info["backend"],
        "build": info.get("build_flags", "none"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: version for name, version in versions.items() if version},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "cuda": torch.version.cuda or "none",
            "driver": _nvidia_smi("driver_version").get("driver_version", "unknown"),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30),
            "l2_mib": round(properties.L2_cache_size / 2**20),
        }
    return facts


def cpu_model() -> str:
    """The processor's name as the kernel reports it."""
    text = _read(Path("/proc/cpuinfo"))
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


def commit() -> str:
    """The commit of a clone, marked if files differ from it; or that of an installation by pip."""
    if (ROOT / "pyproject.toml").is_file():
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
        found = _output(command)
        if found:
            return found
    try:
        text = metadata.distribution("diffcore").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        text = None
    origin = json.loads(text or "{}").get("vcs_info", {})
    return str(origin.get("commit_id", "unknown"))


def clocks(device: torch.device) -> dict[str, object]:
    """Clocks now, and how busy the CPU is: what explains a slow measurement.

    Args:
        device: the device that was measured.
    """
    found: dict[str, object] = {}
    text = _read(Path("/proc/cpuinfo"))
    mhz = [float(x) for x in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE)]
    if mhz:
        found["cpu_mhz"] = [min(mhz), max(mhz)]
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    for name, file in (("cpu_max_khz", "cpuinfo_max_freq"), ("governor", "scaling_governor")):
        if value := _read(folder / file).strip():
            found[name] = value
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        found |= _nvidia_smi("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "pstate")
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _output(command: list[str]) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def _nvidia_smi(*fields: str) -> dict[str, str]:
    """Fields of the first GPU that it lists; empty without it."""
    said = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    values = said.splitlines()[0].split(", ") if said else []
    return dict(zip(fields, values, strict=False))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
