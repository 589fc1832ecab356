"""The texts of the ``diffcore`` command. They need no package: help works without the extras."""

from __future__ import annotations

import textwrap
from pathlib import Path

ABOUT = "Fused diffusion and VAE mathematics for PyTorch."

COMMANDS = {
    "info": "Show versions, build, instruction set, threads and devices, for bug reports.",
    "demo": "Train a small VAE, DDPM and flow on real images, and save their samples.",
    "bench": "Run a benchmark of a repository clone; more arguments are passed on to it.",
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
    "bench": {"--path": "Folder of the clone, if diffcore is not installed from it."},
}

_HELP = {"--help": "Show this message and exit."}

REPOSITORY = "https://github.com/diffcore/diffcore"


def help_text(command: str = "") -> str:
    """The help of a command, without typer.

    Args:
        command: A name of ``COMMANDS``, or "" for the list of commands.

    Returns:
        Lines of at most 100 characters.
    """
    usage, about, rows = "[OPTIONS] COMMAND [ARGS]...", ABOUT, {}
    if command:
        usage, about = f"{command} [OPTIONS]", COMMANDS[command]
    if command == "bench":
        usage, rows = f"{usage} [NAME] [ARGS]...", {"NAME": bench_names_text()}
    rows |= OPTIONS[command] | _HELP
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


def benchmarks(clone: Path | None) -> dict[str, Path]:
    """The benchmarks of a clone.

    Args:
        clone: The folder of the clone, or ``None``.

    Returns:
        Scripts by name; none if there are none.
    """
    scripts = [] if clone is None else sorted((clone / "benchmarks").glob("bench_*.py"))
    return {script.stem.removeprefix("bench_"): script for script in scripts}


def bench_names_text() -> str:
    """What the argument of ``diffcore bench`` can be here."""
    names = benchmarks(clone_of(Path(__file__)))
    if not names:
        return "Which benchmark. None are installed here: pass --path. Default: ops."
    return f"Which benchmark: {', '.join(names)}. Default: ops."
