from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from diffcore import cli
from diffcore._engine.info import one_line
from diffcore.demo import DEMO_PACKAGES, MissingExtraError, check_extra

runner = CliRunner()


def _main_without(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a Python where some packages cannot be found."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages!r})); "
        f"sys.argv = ['diffcore', *{arguments!r}]; "
        "from diffcore.__main__ import main; main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_names_the_commands() -> None:
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("info", "demo", "bench"):
        assert command in result.output


def test_info_as_json_says_what_is_installed() -> None:
    result = runner.invoke(cli.app, ["info", "--json"])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["backend"] in ("native", "reference")
    assert facts["devices"][0] == "cpu"


def test_info_table_shows_every_fact() -> None:
    facts = json.loads(runner.invoke(cli.app, ["info", "--json"]).output)
    result = runner.invoke(cli.app, ["info"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for name in facts:
        assert name.replace("_", " ") in result.output
    assert str(torch.__version__) in result.output


def test_info_ends_with_a_line_for_a_bug_report() -> None:
    facts = json.loads(runner.invoke(cli.app, ["info", "--json"]).output)
    last = runner.invoke(cli.app, ["info"], env={"COLUMNS": "60"}).output.splitlines()[-1]
    assert last == "For a bug report: " + one_line(facts)
    for name in ("version", "torch", "python", "backend", "platform", "threads"):
        assert str(facts[name]) in last


# ---- without the extra --------------------------------------------------------------------------


def test_check_extra_names_what_is_missing() -> None:
    check_extra(("json",))
    with pytest.raises(
        MissingExtraError, match=r"no_such_package.*pip install \"diffcore\[demo\]\""
    ):
        check_extra(("json", "no_such_package"))


@pytest.mark.parametrize("missing", ["typer", "mlxtend"])
def test_demo_without_the_extra_says_what_to_install(missing: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _main_without((missing,), "demo", "--quick", "--out", str(out))
    assert result.returncode == 1
    assert missing in result.stderr
    assert 'pip install "diffcore[demo]"' in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_info_works_without_any_extra() -> None:
    result = _main_without(("typer", "rich", *DEMO_PACKAGES), "info")
    assert result.returncode == 0, result.stderr
    assert f"torch: {torch.__version__}" in result.stdout


# ---- demo: mistakes and Ctrl-C ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "cifar"], "data must be one of auto, mnist, fashion, digits, got 'cifar'"),
        (["--quick", "--data", "mnist"], "data must be digits with --quick, got mnist"),
        (["--device", "gpu"], "device must be auto or a torch device, got 'gpu'"),
        (["--resume"], "out must hold a run to resume"),
    ],
)
def test_demo_mistakes_are_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    _require_demo()
    result = runner.invoke(cli.app, ["demo", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def _require_demo() -> None:
    for package in DEMO_PACKAGES:
        pytest.importorskip(package)


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, *, hard: bool) -> None:
    from diffcore.demo.training import Trainer

    train_step = Trainer._train_step

    def interrupted(self: Trainer, images: torch.Tensor) -> None:
        if self.step == step:
            if hard:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        train_step(self, images)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)


@pytest.mark.parametrize("hard", [False, True], ids=["ctrl-c", "KeyboardInterrupt"])
def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: bool
) -> None:
    _require_demo()
    out = tmp_path / "out"
    short = ["demo", "--quick", "--steps", "6", "--vae-steps", "6", "--out", str(out)]
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 4, hard=hard)
        result = runner.invoke(cli.app, short)
    assert result.exit_code == 130
    assert f"diffcore demo --resume --out {out}" in result.stderr
    assert "Traceback" not in result.stderr
    if hard:  # only a second Ctrl-C, or a kill: the last periodic checkpoint is what remains
        assert (out / "config.json").exists()
        return
    assert "VAE: saved at step 5 of 6" in result.stderr
    result = runner.invoke(cli.app, ["demo", "--resume", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "VAE: resumed at step 5 of 6" in result.output
    assert json.loads((out / "report.json").read_text())["vae"]["steps"] == 6


# ---- bench --------------------------------------------------------------------------------------


def test_bench_without_a_checkout_says_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "benchmarks_folder", lambda start: None)
    result = runner.invoke(cli.app, ["bench"])
    assert result.exit_code == 1
    assert "make bench" in result.stderr


def test_bench_runs_the_script_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "benchmarks"
    (folder / "deeper").mkdir(parents=True)
    script = "import sys, pathlib; pathlib.Path('ran').write_text(' '.join(sys.argv[1:])); exit(3)"
    (folder / "bench_ops.py").write_text(script)
    monkeypatch.chdir(folder / "deeper")
    assert cli.benchmarks_folder(Path.cwd()) == folder
    result = runner.invoke(cli.app, ["bench", "ops", "--quick", "kl"])
    assert result.exit_code == 3
    assert (folder / "deeper" / "ran").read_text() == "--quick kl"
    result = runner.invoke(cli.app, ["bench", "speed"])
    assert result.exit_code == 2
    assert "name must be one of ops, got 'speed'" in result.stderr


def test_benchmarks_are_found_beside_an_editable_install(tmp_path: Path) -> None:
    package = tmp_path / "python" / "diffcore" / "cli.py"
    package.parent.mkdir(parents=True)
    package.touch()
    assert cli.benchmarks_folder(Path(os.sep), package) is None
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "bench_ops.py").touch()
    assert cli.benchmarks_folder(Path(os.sep), package) == tmp_path / "benchmarks"
