"""The files of a demo run: damaged ones, those of other programs, full disks, shared folders."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

for _package in ("matplotlib", "PIL", "safetensors", "tqdm", "sklearn"):
    pytest.importorskip(_package)

from safetensors.torch import save  # noqa: E402

from diffcore.demo import checkpoint, data, run  # noqa: E402
from diffcore.demo.checkpoint import DamagedFileError  # noqa: E402
from diffcore.demo.config import DemoConfig, quick_config  # noqa: E402
from diffcore.demo.run import build_trainers, choose_device, run_demo  # noqa: E402
from diffcore.demo.training import Trainer  # noqa: E402

STEPS = 6
CONFIG = quick_config("digits").replace(
    {"steps": STEPS, "vae_steps": STEPS, "flow_steps": STEPS, "batch_size": 8}
)
WEIGHT = "model.encoder.0.weight"
MOMENT = "optimizer.encoder.0.weight/exp_avg"


def trainer(folder: Path) -> Trainer:
    images = data.load_images("digits")
    return build_trainers(CONFIG, images, folder, torch.device("cpu"))["vae"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The training state of the VAE after all steps."""
    vae = trainer(tmp_path_factory.mktemp("saved"))
    images = data.load_images("digits")
    vae.fit(images.train[:32], images.train_labels[:32], name="VAE", progress=False)
    return vae.path.read_bytes()


# ---- training states ----------------------------------------------------------------------------


def _header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda good: b"",
    "5 bytes": lambda good: good[:5],
    "header only": lambda good: good[: 8 + struct.unpack("<Q", good[:8])[0]],
    "truncated": lambda good: good[: len(good) // 2],
    "last byte lost": lambda good: good[:-1],
    "a byte more": lambda good: good + b"\0",
    "zeros": lambda good: bytes(len(good)),
    "text": lambda good: b"step 3, loss 0.25\n",
    "pickle": lambda good: pickle.dumps({"step": 3}),
    "torch": lambda good: b"PK\x03\x04" + bytes(1000),
    "JSON": lambda good: b'{"step": 3}',
    "header of no JSON": lambda good: _header(b"{" * 50),
    "deep nesting": lambda good: _header(b'{"a":' * 5000),
    "a header of an exabyte": lambda good: struct.pack("<Q", 2**60) + good[8:],
    "foreign": lambda good: save({"weight": torch.ones(2)}),
    "foreign with metadata": lambda good: save({"weight": torch.ones(2)}, {"format": "pt"}),
    "a dtype that torch lacks": lambda good: (
        _header(b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}') + b"123"
    ),
    "metadata no JSON": lambda good: save({}, {"diffcore": "step 3"}),
    "metadata a list": lambda good: save({}, {"diffcore": "[3]"}),
    "metadata nested": lambda good: save({}, {"diffcore": "[" * 200_000}),
    "metadata {}": lambda good: save({}, {"diffcore": "{}"}),
}

CHANGES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "no step": (lambda t, s: s.pop("step"), "step must be in 0 .. 6, got None"),
    "step text": (lambda t, s: s.update(step="6"), "step must be in 0 .. 6, got '6'"),
    "step float": (lambda t, s: s.update(step=6.0), r"step must be in 0 .. 6, got 6\.0"),
    "step true": (lambda t, s: s.update(step=True), "step must be in 0 .. 6, got True"),
    "step -1": (lambda t, s: s.update(step=-1), "step must be in 0 .. 6, got -1"),
    "step 7": (lambda t, s: s.update(step=7), "step must be in 0 .. 6, got 7"),
    "no steps": (lambda t, s: s.pop("steps"), "steps must be 6, .*, got None"),
    "steps 7": (lambda t, s: s.update(steps=7), "steps must be 6, .*, got 7"),
    "no seconds": (lambda t, s: s.pop("seconds"), "seconds must be a float .*, got None"),
    "seconds nan": (lambda t, s: s.update(seconds=float("nan")), "seconds must .*, got nan"),
    "seconds -1": (lambda t, s: s.update(seconds=-1.0), r"seconds must .*, got -1\.0"),
    "no history": (lambda t, s: t.pop("history"), "got no history"),
    "no generator": (lambda t, s: t.pop("generator"), "got no generator"),
    "no weight": (lambda t, s: t.pop(WEIGHT), f"got no {WEIGHT}"),
    "no moment": (lambda t, s: t.pop(MOMENT), f"got no {MOMENT}"),
    "no optimizer": (
        lambda t, s: [t.pop(name) for name in list(t) if name.startswith("optimizer.")],
        "got no optimizer.",
    ),
    "a tensor more": (lambda t, s: t.update(other=torch.ones(1)), "got also other"),
    "history short": (
        lambda t, s: t.update(history=t["history"][:-1]),
        r"history must have shape \[6, 3\] .*, got \[5, 3\]",
    ),
    "history float64": (
        lambda t, s: t.update(history=t["history"].double()),
        r"history must have .* torch.float32, got \[6, 3\] and torch.float64",
    ),
    "weight flat": (
        lambda t, s: t.update({WEIGHT: t[WEIGHT].flatten()}),
        f"{WEIGHT} must have shape ",
    ),
    "moment of one number": (
        lambda t, s: t.update({MOMENT: torch.ones(1)}),  # would be broadcast
        f"{MOMENT} must have shape ",
    ),
    "generator short": (
        lambda t, s: t.update(generator=t["generator"][:100]),
        "generator must have shape ",
    ),
    "generator zero": (
        lambda t, s: t.update(generator=torch.zeros_like(t["generator"])),
        "generator must be the state of a CPU generator",
    ),
}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    return trainer(tmp_path_factory.mktemp("trainer"))


def _refused(vae: Trainer, content: bytes, message: str) -> None:
    vae.path.write_bytes(content)
    before = [p.clone() for p in vae.model.parameters()]
    prefix = re.escape(f"{vae.path} must be a checkpoint of the demo, got a damaged or other file")
    fix = "; delete it, or start a new run without --resume$"
    with pytest.raises(DamagedFileError, match=f"(?s)^{prefix}: .*{message}.*{fix}"):
        vae.load()
    assert all(map(torch.equal, before, vae.model.parameters()))
    assert (vae.step, vae.seconds) == (0, 0.0)


@pytest.mark.parametrize("kind", FILES)
def test_another_file_is_refused(untouched: Trainer, saved: bytes, kind: str) -> None:
    _refused(untouched, FILES[kind](saved), "")


@pytest.mark.parametrize("kind", CHANGES)
def test_a_wrong_entry_is_refused_by_name(untouched: Trainer, saved: bytes, kind: str) -> None:
    untouched.path.write_bytes(saved)
    tensors, scalars = checkpoint.load_checkpoint(untouched.path)
    change, message = CHANGES[kind]
    change(tensors, scalars)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _refused(untouched, save(tensors, {"diffcore": json.dumps(scalars)}), message)


def test_a_folder_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(DamagedFileError, match="it is no file"):
        checkpoint.load_checkpoint(tmp_path / "x.safetensors")


def test_the_undamaged_state_is_loaded(tmp_path: Path, saved: bytes) -> None:
    vae = trainer(tmp_path)
    vae.path.write_bytes(saved)
    vae.load()
    assert vae.step == STEPS
    vae.save()
    assert vae.path.read_bytes() == saved


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"\x80\x04", "invalid start byte"),
        (b"[" * 200_000, "recursion"),
        (b"null", "must be a mapping"),
        (b"[1]", "must be a mapping"),
        (b"{}", "data"),
        ({"color": 3}, "color"),
        ({"data": 3}, "data must be a string, got int"),
        ({"data": "cifar"}, "data must be one of 'mnist', 'fashion', 'digits', got 'cifar'"),
        ({"steps": "3"}, "steps must be an int, got str"),
        ({"steps": 2.5}, "steps must be an int, got float"),
        ({"steps": True}, "steps must be an int, got bool"),
        ({"steps": None}, "steps must be an int, got NoneType"),
        ({"steps": 0}, "steps must be in 1 .. 10000000, got 0"),
        ({"steps": 10**18}, "steps must be in 1 .. 10000000, got 1000000000000000000"),
        ({"seed": 2**64}, "seed must be in -9223372036854775808 .. 9223372036854775807, got"),
        ({"samples": 10**18}, "samples must be in 1 .. 4096, got"),
        ({"num_timesteps": 20}, "num_timesteps must be in 21 .. 100000, got 20"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"learning_rate": [1]}, "learning_rate must be a number, got list"),
        ({"ema_decay": 2}, "ema_decay must be less than 1, got 2"),
        ({"ddim_steps": 51}, "ddim_steps must be at most num_timesteps, got 51"),
        ({"width": 12}, "width must be a multiple of 8, got 12"),
        ({"patch": 3}, "patch must be a divisor of 4, got 3"),
    ],
)
def test_damaged_settings_are_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "config.json"
    CONFIG.save(path)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content}).encode()
    path.write_bytes(content)
    prefix = re.escape(f"{path} must be the settings of a demo run, got a damaged or other file: ")
    with pytest.raises(DamagedFileError, match=f"^{prefix}.*{message}.*; delete it, or start "):
        DemoConfig.load(path)


# ---- a run in a folder with damaged files -------------------------------------------------------


def test_a_new_run_does_not_read_what_it_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bytes
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, damage in (("vae", "truncated"), ("ddpm", "pickle")):
        (folder / f"{name}.training.safetensors").write_bytes(FILES[damage](saved))
    (tmp_path / "config.json").write_text("{")

    def stop(*args: object) -> None:
        raise KeyboardInterrupt  # before the training

    monkeypatch.setattr(run, "build_trainers", stop)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_demo(tmp_path, quick=True, device="cpu", log=lines.append)
    assert not list(folder.iterdir())
    assert lines[1:] == [
        f"New run: discarding {name}.training.safetensors of the run before"
        for name in ("ddpm", "vae")
    ]
    assert DemoConfig.load(tmp_path / "config.json") == quick_config("digits")


NO_FOLDERS = ["file", "file/below", "/dev/null/x", "x" * 300, "a\0b"]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("out", NO_FOLDERS)
def test_out_must_be_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, resume: bool
) -> None:
    monkeypatch.setattr(run, "load_images", lambda name: pytest.fail("loaded the data"))
    (tmp_path / "file").touch()
    what = "hold a run to resume" if resume else "be a folder that can be written"
    with pytest.raises((ValueError, FileNotFoundError), match=f"^out must {what}, got"):
        run_demo(tmp_path / out, quick=not resume, resume=resume)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": "meta"}, "device must be one that can hold values here, got 'meta': "),
        ({"device": "xla"}, "device must be one that can hold values here, got 'xla': "),
        ({"seed": 2**64}, "seed must be in -9223372036854775808 .. 9223372036854775807, got"),
        ({"seed": -(2**63) - 1}, "seed must be in -9223372036854775808 .. "),
        ({"steps": 10**18}, "steps must be in 1 .. 10000000, got 1000000000000000000"),
    ],
)
def test_settings_are_refused_before_data_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(run, "load_images", lambda name: pytest.fail("loaded the data"))
    with pytest.raises(ValueError, match=f"^{message}"):
        run_demo(tmp_path / "out", quick=True, **setting)
    assert not (tmp_path / "out").exists()


def test_the_limits_of_the_seed_work(tmp_path: Path) -> None:
    for seed in (-(2**63), 2**63 - 1):
        config = CONFIG.replace({"seed": seed})
        build_trainers(config, data.load_images("digits"), tmp_path, torch.device("cpu"))
        torch.Generator().manual_seed(seed + run._STREAM_EVALUATION)
        run.ddpm.initial_noise((1, 1, 2, 2), seed + run._STREAM_SAMPLES, torch.device("cpu"))
    assert choose_device("cpu") == torch.device("cpu")


# ---- how files are written ----------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_files(tmp_path: Path) -> None:
    state, settings = tmp_path / "x.safetensors", tmp_path / "config.json"
    checkpoint.save_checkpoint(state, {"a": torch.ones(2)}, {"step": 1})
    CONFIG.save(settings)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save_checkpoint(state, {"a": torch.zeros(2)}, {"step": 2})
        with pytest.raises(OSError, match="File too large"):
            CONFIG.replace({"seed": 1}).save(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    tensors, scalars = checkpoint.load_checkpoint(state)
    assert scalars == {"step": 1}
    assert torch.equal(tensors["a"], torch.ones(2))
    assert DemoConfig.load(settings) == CONFIG
    assert sorted(os.listdir(tmp_path)) == ["config.json", "x.safetensors"]


def test_several_writers_may_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    errors: list[BaseException] = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                tensors = {"a": torch.full((1000,), float(number))}
                checkpoint.save_checkpoint(path, tensors, {"step": number})
                found, scalars = checkpoint.load_checkpoint(path)
                assert found["a"].unique().tolist() == [scalars["step"]]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == [path.name]
