"""What the ``diffcore`` command needs without typer: its texts, and where its benchmarks are."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import textwrap
from pathlib import Path
from types import ModuleType

ABOUT = "Fused diffusion and VAE mathematics for PyTorch."

COMMANDS = {
    "info": "Show versions, build, instruction set, threads and devices, for bug reports.",
    "demo": "Train a small VAE, DDPM and flow on real images, and save their samples.",
    "bench": "Time the ops and what is built of them against PyTorch and diffusers, here.",
}

OPTIONS = {
    "": {"--version": "Show the version and exit."},
    "info": {"--json": "Print JSON instead of a table."},
    "demo": {
        "--out": "Folder for pictures, checkpoints, report. Default: demo-output.",
        "--steps": "Optimizer steps of the DDPM. Default: 2500.",
        "--vae-steps": "Optimizer steps of the VAE. Default: 3000.",
        "--flow-steps": "Optimizer steps of the flow. Default: 2500.",
        "--only": "vae, ddpm or flow: this model alone.",
        "--data": "auto, mnist, fashion or digits. auto is Fashion-MNIST if Debian's "
        "dataset-fashion-mnist is installed, else MNIST. Default: auto.",
        "--seed": "Seed of all randomness, a signed int of 64 bits. Default: 0.",
        "--resume": "Continue the run in --out.",
        "--device": "auto, cpu, cuda, cuda:1, ... Default: auto.",
        "--quick": "A smoke run of a few seconds on 8x8 digits.",
    },
    "bench": {
        "NAME": "Suites: ops, noise, steps, sampling, training, likelihood, memory, overhead, "
        "accuracy; bound, compile, density, flow, groups, guidance, masks, one_core, pipelines, "
        "schedulers, scheduler_errors, threshold, all. Default: the first nine.",
        "--quick": "Small and short: a smoke test of a minute or two, not a measurement.",
        "--device": "auto (the CPU, and a GPU with kernels), cpu, cuda, cuda:1. Default: auto.",
        "--dtype": "Among f32, bf16, f16, f64, with commas. Default: those of the suite.",
        "--shape": "Of the samples, such as 64x3x128x128; may be repeated.",
        "--sweep": "ops: from 1 Ki to 256 Mi elements, as far as memory allows.",
        "--only": "Ops, cases or classes by name, with commas.",
        "--against": "Among eager, compile, diffusers, with commas; eager always takes part. "
        "Default: all, with --quick all but compile.",
        "--seconds": "Of timing, for each row. Default: 0.3 to 8, with --quick 0.05.",
        "--compile-seconds": "After so many in a section, later rows go without torch.compile. "
        "Default: 900, on CUDA 90.",
        "--compare": "An earlier result file: exit status 1 if a row is slower, beyond the spread.",
        "--html": "Write one page with pictures and all tables to this file.",
        "--out": "Folder, or a .json file; sections of earlier runs stay. Default: diffcore-bench.",
    },
}

_HELP = {"--help": "Show this message and exit."}


def help_text(command: str = "") -> str:
    """The help of a command, without typer.

    Args:
        command: A name of ``COMMANDS``, or "" for the list of commands.

    Returns:
        Lines of at most 100 characters.
    """
    usage, about = "[OPTIONS] COMMAND [ARGS]...", ABOUT
    if command:
        usage, about = f"{command} [OPTIONS]", COMMANDS[command]
    if command == "bench":
        usage = f"{usage} [NAME]..."
    rows = OPTIONS[command] | _HELP
    lines = [f"Usage: diffcore {usage}", "", f"  {about}", "", "Options:", *_rows(rows)]
    if not command:
        lines += ["", "Commands:", *_rows(COMMANDS)]
    return "\n".join(lines)


def _rows(rows: dict[str, str]) -> list[str]:
    width = max(map(len, rows)) + 2
    return [
        textwrap.fill(
            text,
            100,
            initial_indent=f"  {name:{width}}",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
        for name, text in rows.items()
    ]


def clone_of(package: Path) -> Path | None:
    """The repository clone that a package is installed from, as editable.

    Only the clone itself counts: a folder above it, or the current one, may be anyone's.

    Args:
        package: A file directly in the package.

    Returns:
        The folder ``X`` if the package is ``X/python/diffcore`` and ``X`` has a pyproject.toml.
    """
    folder = package.resolve().parent.parent
    inside = folder.name == "python" and (folder.parent / "pyproject.toml").is_file()
    return folder.parent if inside else None


def benchmarks() -> ModuleType:
    """``diffcore.benchmarks``: installed with a wheel, or of the clone that diffcore is used from.

    Returns:
        The module that runs them.

    Raises:
        ModuleNotFoundError: There is neither.
    """
    package = "diffcore.benchmarks"
    if importlib.util.find_spec(package) is None:
        clone = clone_of(Path(__file__))
        folder = clone / "benchmarks" if clone else Path(__file__).parent / "benchmarks"
        if not (folder / "runner.py").is_file():
            raise ModuleNotFoundError(f"the benchmarks are not installed: {folder} is missing")
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[package] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[package])
    return importlib.import_module(f"{package}.runner")
