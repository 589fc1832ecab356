"""The checkpoint file of bits_per_dim: damaged files, several processes, full disks, Ctrl-C."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from diffcore import bits_per_dim
from support.bits import DIFFUSION, KEY, T, data, model, same_bits
from support.subprocess import run_python

STRATA = 5  # t = 0 and 4 more
D = 71  # digits of an exact sum
BATCHES = 2


def run(path: Any, predict=model, *, noise=KEY, count=12, **options):
    return bits_per_dim(
        DIFFUSION,
        predict,
        data(count),
        timesteps=STRATA - 1,
        noise=noise,
        batch_size=6,
        checkpoint=path,
        **options,
    )


@pytest.fixture(scope="module")
def states(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The content of a complete checkpoint, of a run with noise and of a run with a seed."""
    found = {}
    for name, noise in (("noise", KEY), ("seed", None)):
        path = tmp_path_factory.mktemp("states") / "bits.json"
        run(path, noise=noise)
        found[name] = json.loads(path.read_text())
    return found


# ---- damaged and foreign files ------------------------------------------------------------------


def _bytes(name: str, state: dict[str, Any]) -> bytes:
    good = json.dumps(state).encode()
    return {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "last byte lost": good[:-1],
        "zeros": bytes(len(good)),
        "zeros at the end": good[:-20] + bytes(20),
        "text": b"loss 0.3\n",
        "list": b"[1, 2]",
        "null": b"null",
        "object": b"{}",
        "not UTF-8": good.replace(b"torch", b"\xff\xfe\xff\xfe\xff"),
        "pickle": pickle.dumps(state),
        "torch": b"PK\x03\x04" + bytes(100),
        "safetensors": b"{\0\0\0\0\0\0\0" + good,
        "JSON of another program": b'{"loss": [0.5], "step": 3}',
        "deep nesting": b'{"format": ' + b"[" * 200_000,
        "deep nesting of settings": good.replace(b'"betas": ', b'"betas": ' + b"[" * 200_000),
        "an int with 5000 digits": good.replace(b'"batches": 2', b'"batches": ' + b"2" * 5000),
        "two checkpoints": good + good,
    }[name]


FILES = {
    "empty": "content must be JSON, got an empty file",
    "truncated": "content must be JSON",
    "last byte lost": "content must be JSON",
    "zeros": "content must be JSON",
    "zeros at the end": "content must be JSON",
    "text": "content must be JSON",
    "list": "content must be JSON",
    "null": "content must be JSON",
    "object": "format must be 2, got None",
    "not UTF-8": "content must be JSON",
    "pickle": "content must be JSON",
    "torch": "content must be JSON",
    "safetensors": "content must be JSON",
    "JSON of another program": "format must be 2, got None",
    "deep nesting": "content must be JSON",
    "deep nesting of settings": "content must be JSON",
    "an int with 5000 digits": "content must be JSON",
    "two checkpoints": "content must be JSON",
}


def _refused(path: Path, content: bytes, message: str, noise: Any = KEY) -> None:
    path.write_bytes(content)
    prefix = re.escape(f"checkpoint must be a file written by bits_per_dim, got {path}, where ")
    fix = "; delete it, or pass another path"
    with pytest.raises(ValueError, match=f"^{prefix}{message}.*{fix}$"):
        run(path, noise=noise)
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("kind", FILES)
def test_another_file_is_refused(tmp_path, states, kind):
    _refused(tmp_path / "bits.json", _bytes(kind, states["noise"]), FILES[kind])


LACKING = object()
ENTRIES = [
    ("format", "2", "format must be 2, got '2'"),
    ("format", 1, "format must be 2, got 1"),
    ("format", True, "format must be 2, got True"),
    ("format", LACKING, "format must be 2, got None"),
    ("settings", None, "settings must be an object, got NoneType"),
    ("settings", [1], "settings must be an object, got list"),
    ("settings", "x", "settings must be an object, got str"),
    ("settings", LACKING, "entries must be format, .*, got no settings"),
    ("sums", LACKING, "entries must be format, .*, got no sums"),
    ("kind", LACKING, "entries must be format, .*, got no kind"),
    ("seen", LACKING, "entries must be format, .*, got no seen"),
    ("seed", LACKING, "entries must be format, .*, got no seed"),
    ("more", 1, "entries must be format, .*, got 'more'"),
    ("seed", 3, "seed must be null for a run with noise=, got 3"),
    ("kind", [], "kind must be the shape and the dtype of a sample, got list"),
    ("kind", [[1, 3, -3], "torch.float32"], "kind must be the shape and the dtype"),
    ("kind", [[1, 3, 3], 32], "kind must be the shape and the dtype"),
    ("batches", -1, "batches must be an int of at least 1, got -1"),
    ("batches", 0, "batches must be an int of at least 1, got 0"),
    ("batches", "2", "batches must be an int of at least 1, got '2'"),
    ("batches", 2.0, r"batches must be an int of at least 1, got 2\.0"),
    ("batches", True, "batches must be an int of at least 1, got True"),
    ("batches", 1, r"sums\.visits must sum to 120, got 60"),
    ("calls", None, "calls must be an int of at least 1, got None"),
    ("calls", 9, "calls must be a multiple of 10, got 9"),
    ("calls", 10**30, "calls must be an int of at least 1, got 1000"),
    ("calls", 20, r"sums\.visits must sum to 120, got 60"),
    ("samples", -1, "samples must be an int of at least 0, got -1"),
    ("samples", 0, "sums.visits must sum to 0, got 60.0"),
    ("samples", 11, r"sums\.visits must sum to 55, got 60"),
    ("seen", "", "seen must be 64 hexadecimal digits, got ''"),
    ("seen", 5, "seen must be 64 hexadecimal digits, got 5"),
    ("sums", [], "sums must be an object, got list"),
    ("sums.terms", LACKING, "sums must be .*, got no terms"),
    ("sums.more", [1.0], "sums must be .*, got 'more'"),
    ("sums.terms", [1.0], f"sums.terms must have {D * T} numbers, got 1"),
    ("sums.terms", [1.0] * T, f"sums.terms must have {D * T} numbers, got {T}"),
    ("sums.parts.sums", [0.5] * STRATA, f"sums.parts.sums must have {D * STRATA} numbers, got 5"),
    ("sums.within", 0.0, "sums.within must be a list, got float"),
    ("sums.mse", ["0.5"] * (D * T), "sums.mse must be a list of floats, got '0.5' in it"),
    ("sums.mse", [[0.5]] * (D * T), "sums.mse must be a list of floats, got list in it"),
    ("sums.mse", [None] * (D * T), "sums.mse must be a list of floats, got None in it"),
    ("sums.mse", [True] * (D * T), "sums.mse must be a list of floats, got True in it"),
    ("sums.mse", [0.5] * (D * T), r"sums.mse must be the digits of exact sums, got 0\.5"),
    ("sums.visits", [-1.0] * T, r"sums.visits must be counts, got -1\.0"),
    ("sums.visits", [2.4] * T, r"sums.visits must be counts, got 2\.4"),
    ("sums.visits", [float("nan")] * T, "sums.visits must be counts, got nan"),
    ("sums.visits", [2.0] * T, "sums.visits must sum to 60, got 50"),
]


@pytest.mark.parametrize(("entry", "value", "message"), ENTRIES)
def test_a_wrong_entry_is_refused_by_name(tmp_path, states, entry, value, message):
    state = copy.deepcopy(states["noise"])
    at, name = (state["sums"], entry[5:]) if entry.startswith("sums.") else (state, entry)
    if value is LACKING:
        del at[name]
    else:
        at[name] = value
    _refused(tmp_path / "bits.json", json.dumps(state).encode(), message)


@pytest.mark.parametrize("seed", [None, "3", 2**63, 1.0, True, [1]])
def test_the_seed_of_a_run_without_noise_must_be_there(tmp_path, states, seed):
    state = {**states["seed"], "seed": seed}
    message = "seed must be an int of 64 bits, got "
    _refused(tmp_path / "bits.json", json.dumps(state).encode(), message, noise=None)


def test_the_samples_of_a_checkpoint_keep_their_shape(tmp_path, states):
    path = tmp_path / "bits.json"
    state = {**states["noise"], "kind": [[1, 9], "torch.float32"]}
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"data must have one shape and dtype .* \[\[1, 9\]"):
        run(path)


@pytest.mark.parametrize(
    "path", ["", ".", "no/such/folder/x", "/dev/null", "/dev/null/x", "x" * 300, "a\0b"]
)
def test_a_path_that_cannot_be_a_file_is_refused_before_the_model_runs(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    message = "^checkpoint must be a file in a folder that can be written, got "
    with pytest.raises(ValueError, match=message):
        run(path, lambda x, t: pytest.fail("called"))
    with pytest.raises(TypeError, match=r"^checkpoint must be a path, got int$"):
        run(3)
    assert not list(tmp_path.iterdir())


# ---- how the file is written --------------------------------------------------------------------


def test_the_file_follows_links_and_the_umask(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "bits.json"
    link.symlink_to(tmp_path / "there" / "bits.json")
    before = os.umask(0o027)
    try:
        run(link)
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert (tmp_path / "there" / "bits.json").stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["bits.json", "bits.json", "there"]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "bits.json"
    whole = run(None)
    calls = 0

    def filling(x, t):
        nonlocal calls
        calls += 1
        if calls == STRATA + 1:  # after the first batch was saved
            _limit_file_size(100)
        return model(x, t)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OSError, match="File too large"):
            run(path, filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == [path.name]
    assert json.loads(path.read_text())["samples"] == 6
    same_bits(run(path), whole)


def _limit_file_size(size: int) -> None:
    # The kernel then fails a write in its middle, as it does when the disk is full.
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))


def test_content_and_move_are_flushed_in_that_order(tmp_path, monkeypatch):
    path = tmp_path / "bits.json"
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushing(descriptor: int) -> None:
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append("folder" if target == tmp_path else f"{target.stat().st_size} bytes")
        fsync(descriptor)

    def moving(source: Path, target: Path) -> None:
        done.append("move")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", moving)
    run(path, count=6)
    assert done == [f"{path.stat().st_size} bytes", "move", "folder"]


def test_processes_may_share_one_file(tmp_path):
    """Each starts alone, saves 20 times, and finds the file of another one complete."""
    code = """
import json, os, sys, torch
from pathlib import Path
from diffcore import bits_per_dim
from support.bits import DIFFUSION, KEY, data, model

torch.set_num_threads(1)
path = Path(sys.argv[1])
read, write = os.pipe()

def run(checkpoint):
    return bits_per_dim(DIFFUSION, model, data(20), timesteps=1, noise=KEY, batch_size=1,
                        checkpoint=checkpoint).total

def child():
    os.close(write)
    os.read(read, 1)  # until all have started
    assert run(path) == expected
    for _ in range(20):
        assert json.loads(path.read_text())["format"] == 2

expected = run(None)
children = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            child()
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    children.append(pid)
os.close(read)
os.close(write)
print([os.waitpid(pid, 0)[1] for pid in children], run(path) == expected, os.listdir(path.parent))
"""
    printed = run_python(code, str(tmp_path / "bits.json"), OMP_NUM_THREADS="1")
    assert printed == "[0, 0, 0] True ['bits.json']"


# ---- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [0, 1])
def test_ctrl_c_says_where_the_sums_are(tmp_path, batches):
    path = tmp_path / "bits.json"
    calls = 0

    def stopping(x, t):
        nonlocal calls
        calls += 1
        if calls == batches * STRATA + 2:
            signal.raise_signal(signal.SIGINT)
        return model(x, t)

    with pytest.raises(KeyboardInterrupt) as stop:
        run(path, stopping)
    assert calls == batches * STRATA + 2
    if batches == 0:
        assert str(stop.value) == f"bits_per_dim stopped before {path} was written"
        assert not os.listdir(tmp_path)
    else:
        assert f"the sums of all completed batches are in {path}, " in str(stop.value)
        assert os.listdir(tmp_path) == [path.name]
    same_bits(run(path), run(None))


def test_ctrl_c_without_a_checkpoint_is_as_usual():
    def stopping(x, t):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run(None, stopping)


def test_ctrl_c_while_the_file_is_written_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "bits.json"
    fsync, flushed = os.fsync, []

    def interrupted(descriptor: int) -> None:
        fsync(descriptor)
        flushed.append(descriptor)
        if len(flushed) == 3:  # after file and folder of the first batch
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt, match=r"the sums of all completed batches are in"):
            run(path)
    assert os.listdir(tmp_path) == [path.name]
    assert json.loads(path.read_text())["samples"] == 6
    same_bits(run(path), run(None))


def test_a_default_device_does_not_change_the_seed_of_a_checkpoint(tmp_path):
    path = tmp_path / "bits.json"
    with torch.device("cpu"):
        first = run(path, noise=None)
    same_bits(run(path, noise=None), first)
