"""The ``diffcore`` command. It needs typer and rich: ``pip install "diffcore[cli]"``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    name="diffcore",
    help="Fused diffusion and VAE mathematics for PyTorch.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _fail(message: str, code: int = 1) -> typer.Exit:
    # rich would read "[demo]" as a style and wrap long paths.
    print(message, file=sys.stderr)
    return typer.Exit(code)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Show versions, build, instruction set, threads and devices, for bug reports."""
    from diffcore._engine.info import collect_info, one_line

    facts = collect_info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title="diffcore", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _cell(value))
    Console().print(table, markup=False)
    print(f"For a bug report: {one_line(facts)}")


def _cell(value: object) -> str:
    from rich.markup import escape

    if isinstance(value, list):
        return escape("\n".join(str(item) for item in value)) if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else escape(str(value))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, checkpoints, report.")] = Path(
        "demo-output"
    ),
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of the DDPM. [default: 2500]")
    ] = None,
    vae_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps of the VAE. [default: 3000]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="auto, mnist, fashion or digits. auto is Fashion-MNIST if Debian's "
            "dataset-fashion-mnist is installed, else MNIST. [default: auto]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all randomness. [default: 0]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="A smoke run of a few seconds on 8x8 digits.")
    ] = False,
) -> None:
    """Train a small VAE and a small DDPM on real images, and save their samples."""
    from diffcore.demo import MissingExtraError, check_extra

    try:
        check_extra()
    except MissingExtraError as error:
        raise _fail(str(error)) from None
    from diffcore.demo.run import run_demo
    from diffcore.demo.training import Interrupted

    command = f"diffcore demo --resume --out {out}"
    if device != "auto":
        command += f" --device {device}"
    try:
        run_demo(
            out,
            data=data,
            steps=steps,
            vae_steps=vae_steps,
            seed=seed,
            quick=quick,
            resume=resume,
            device=device,
            log=print,
        )
    except (ValueError, FileNotFoundError) as error:
        raise _fail(f"diffcore demo: {error}", 2) from None
    except Interrupted as stop:
        raise _fail(f"\n{stop}. Continue with:\n  {command}", 130) from None
    except KeyboardInterrupt:
        raise _fail(
            f"\nStopped. Continue from the last checkpoint with:\n  {command}", 130
        ) from None


def benchmarks_folder(start: Path, package: Path = Path(__file__)) -> Path | None:
    """Find the benchmarks of a repository clone.

    Args:
        start: First folder to search, with its parents.
        package: A file of the package, whose parents are searched next: an editable install is
            inside the clone.

    Returns:
        The folder with ``bench_ops.py``, or None.
    """
    for folder in (start, *start.parents, *package.resolve().parents):
        if (folder / "benchmarks" / "bench_ops.py").exists():
            return folder / "benchmarks"
    return None


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(
    context: typer.Context,
    name: Annotated[
        str, typer.Argument(help="Which benchmark: ops, training, sampling, ...")
    ] = "ops",
) -> None:
    """Run a benchmark of a repository clone; more arguments are passed on to it."""
    folder = benchmarks_folder(Path.cwd())
    if folder is None:
        raise _fail(
            "The benchmarks are in the repository, not in the wheel. Clone it and run there:\n"
            "  make bench\n"
            "or\n"
            "  diffcore bench ops"
        )
    script = folder / f"bench_{name}.py"
    if not script.exists():
        known = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
        raise _fail(f"diffcore bench: name must be one of {', '.join(known)}, got {name!r}", 2)
    raise typer.Exit(subprocess.call([sys.executable, str(script), *context.args]))
