"""The ``diffcore`` command. It needs typer and rich: ``pip install "diffcore[cli]"``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from diffcore._usage import ABOUT, COMMANDS, OPTIONS, benchmarks

_DEMO = OPTIONS["demo"]

app = typer.Typer(
    name="diffcore",
    help=ABOUT,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _fail(message: str, code: int = 1) -> typer.Exit:
    # rich would read "[demo]" as a style and wrap long paths.
    print(message, file=sys.stderr)
    return typer.Exit(code)


def _show_version(wanted: bool) -> None:
    if wanted:
        from diffcore._engine.info import version

        print(f"diffcore {version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help=OPTIONS[""]["--version"]
        ),
    ] = False,
) -> None:
    """Hold the options of the command itself."""


@app.command(help=COMMANDS["info"])
def info(
    as_json: Annotated[bool, typer.Option("--json", help=OPTIONS["info"]["--json"])] = False,
) -> None:
    """Print ``collect_info``.

    Args:
        as_json: Print JSON instead of a table.
    """
    from rich.markup import escape

    from diffcore._engine.info import as_text, collect_info, report

    facts = collect_info()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title="diffcore", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in as_text(facts).items():
        table.add_row(name, escape(text))
    Console().print(table, markup=False)
    print(report(facts))


@app.command(help=COMMANDS["demo"])
def demo(
    out: Annotated[Path, typer.Option(help=_DEMO["--out"], show_default=False)] = Path(
        "demo-output"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help=_DEMO["--steps"])] = None,
    vae_steps: Annotated[int | None, typer.Option(min=1, help=_DEMO["--vae-steps"])] = None,
    flow_steps: Annotated[int | None, typer.Option(min=1, help=_DEMO["--flow-steps"])] = None,
    only: Annotated[str | None, typer.Option(help=_DEMO["--only"])] = None,
    data: Annotated[str | None, typer.Option(help=_DEMO["--data"])] = None,
    seed: Annotated[int | None, typer.Option(help=_DEMO["--seed"])] = None,
    resume: Annotated[bool, typer.Option("--resume", help=_DEMO["--resume"])] = False,
    device: Annotated[str, typer.Option(help=_DEMO["--device"], show_default=False)] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help=_DEMO["--quick"])] = False,
) -> None:
    """Run the demo. ``OPTIONS`` in ``diffcore._usage`` explains the arguments."""
    from diffcore.demo import MissingExtraError, check_extra

    try:
        check_extra()
    except MissingExtraError as error:
        raise _fail(str(error)) from None
    from diffcore.demo.checkpoint import DamagedFileError
    from diffcore.demo.run import run_demo
    from diffcore.demo.training import Interrupted

    command = f"diffcore demo --resume --out {shlex.quote(str(out))}"
    if device != "auto":
        command += f" --device {device}"
    if only is not None:
        command += f" --only {only}"
    try:
        run_demo(
            out,
            data=data,
            steps=steps,
            vae_steps=vae_steps,
            flow_steps=flow_steps,
            only=only,
            seed=seed,
            quick=quick,
            resume=resume,
            device=device,
            log=print,
        )
    except (MissingExtraError, DamagedFileError) as error:
        raise _fail(f"diffcore demo: {error}") from None
    except (ValueError, FileNotFoundError) as error:
        raise _fail(f"diffcore demo: {error}", 2) from None
    except OSError as error:
        raise _fail(f"diffcore demo: {error}; what was saved before is kept") from None
    except Interrupted as stop:
        raise _fail(f"\n{stop}. Continue with:\n  {command}", 130) from None
    except KeyboardInterrupt:
        if not os.path.isfile(out / "config.json"):
            raise _fail("\nStopped before anything was saved.", 130) from None
        raise _fail(
            f"\nStopped. Continue from the last checkpoint in {out} with:\n  {command}", 130
        ) from None


@app.command(
    help=COMMANDS["bench"],
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Pass the arguments on: the benchmarks read them, and work without typer too.

    Args:
        context: Holds the arguments.
    """
    raise typer.Exit(benchmarks().main(context.args))
