"""Noise, and every op that generates it, have the bits of `tests/cuda/bits.json`, on CUDA too."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import pytest
import torch

from diffcore import PhiloxNoise, ops
from diffcore.reference import philox
from support.subprocess import OTHER_ISAS, run_python

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import gpu_bits  # noqa: E402


def test_every_result_has_the_committed_bits(device: str) -> None:
    count, different = gpu_bits.differences(device)
    assert different == []
    assert count > 100


@pytest.mark.parametrize("isa", OTHER_ISAS)
def test_on_every_instruction_set(isa: str) -> None:
    code = "from tools import gpu_bits; raise SystemExit(gpu_bits.main())"
    found = run_python(code, DIFFCORE_ISA=isa, PYTHONPATH=f"{ROOT}/python:{ROOT}:{ROOT}/tests")
    assert found.endswith("results on cpu have the committed bits")


@pytest.mark.parametrize(("name", "dtype"), gpu_bits.DTYPES.items())
def test_the_file_has_the_noise_of_the_specification(name: str, dtype: torch.dtype) -> None:
    committed = json.loads(gpu_bits.BITS.read_text(encoding="utf-8"))["randn"][name]
    parts = PhiloxNoise(gpu_bits.SEED, sample_ids=gpu_bits.FIRST_ID, stream=gpu_bits.STREAM)._parts
    assert len(committed) == len(gpu_bits.SHAPES)
    for shape in gpu_bits.SHAPES:
        noise = philox.normals(parts, shape, torch.float32, "cpu").to(dtype)
        assert gpu_bits.digest((noise,)) == committed["x".join(map(str, shape))]


def test_every_op_that_takes_noise_is_compared() -> None:
    functions = [getattr(ops, name) for name in ops.__all__ if name != "PhiloxNoise"]
    noisy = {
        f.__name__ for f in functions if callable(f) and "noise" in inspect.signature(f).parameters
    }
    assert len(noisy) > 8
    assert noisy - {name.split(",")[0].split(" ")[0] for name in gpu_bits.OPS} == set()


def test_one_other_bit_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_off(x: gpu_bits.Inputs, noise: PhiloxNoise) -> tuple[torch.Tensor, ...]:
        z = ops.randn(x.shape, noise, dtype=x.dtype, device=x.device)
        if x.shape == (3, 5) and x.dtype == torch.bfloat16:
            z.view(torch.int16)[2, 4] ^= 1
        return (z,)

    monkeypatch.setattr(gpu_bits, "OPS", {"randn": one_off})
    monkeypatch.setattr(gpu_bits, "UNFUSED", ("randn",))
    _, different = gpu_bits.differences("cpu")
    assert {line.split(" (")[0] for line in different} == {
        "DIFFERENT randn bf16 3x5",
        "DIFFERENT randn, offset bf16 3x5",
        "DIFFERENT randn, box bf16 3x5",
    }
