"""Every instruction set this CPU has, and any number of threads.

An instruction set is chosen once a process, so each gets a process of its own: it computes every
case and saves the results, which are judged here.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import support.subprocess
from diffcore import PhiloxNoise, ops
from diffcore._engine import native
from support.bounds import LOW, assert_law, assert_same_bits, check, with_noise
from support.cases import CASES, NOISED, as_tuple, without_kernels
from support.subprocess import ALL_ISAS, ISAS, run_python

pytestmark = pytest.mark.skipif(native._C is None, reason="needs the compiled module")

SHAPE = (21, 203)
DTYPES = (*LOW, torch.float64)

COMPUTE = """
import sys, torch
from support.cases import CASES, as_tuple
from diffcore import info
from native.test_instruction_sets import DTYPES, SHAPE, draws, unlawful
torch.set_num_threads(1)
found = {"instruction_set": info()["instruction_set"]}
for case in CASES:
    for dtype in DTYPES:
        found[case.name, dtype] = as_tuple(case.native(case.make(SHAPE, dtype)))
found["draws"], found["unlawful"] = draws(), unlawful()
torch.save(found, sys.argv[1])
"""

KEY = PhiloxNoise(2**63 + 5, sample_ids=-3, stream=2**32 - 1, first_element=2**33)
DRAWN = ((37, 3), SHAPE, (2, 2049), (1, 16_387), (3, 6, 5, 7))


def draws() -> list[Tensor]:
    """Noise of every dtype, where the last dimensions are rows and where channels are."""
    found = []
    for shape, dtype in itertools.product(DRAWN, DTYPES):
        found.append(KEY.tensor(shape, dtype=dtype))
        if len(shape) == 4:
            last = found[-1].contiguous(memory_format=torch.channels_last).zero_()
            found.append(ops.randn(shape, KEY, out=last))
    return found


def unlawful() -> list[str]:
    """What differs between noise that is drawn and the same noise, read."""
    wrong = []
    for case, dtype in itertools.product(NOISED, DTYPES):
        try:
            assert_law(case, case.make(SHAPE, dtype), KEY)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of every case, by the instruction set that gave them."""
    found = {}
    for isa in ISAS:
        path = tmp_path_factory.mktemp(isa) / "results.pt"
        run_python(COMPUTE, str(path), DIFFCORE_ISA=isa)
        found[isa] = torch.load(path)
        assert found[isa].pop("instruction_set") == isa
    return found


@pytest.mark.parametrize("isa", ISAS)
def test_each_instruction_set_is_within_the_bound(isa: str, results: dict[str, Any]) -> None:
    for case in CASES:
        for dtype in DTYPES:
            found = results[isa][case.name, dtype]
            check(case, case.make(SHAPE, dtype), found if len(found) > 1 else found[0])


def test_instruction_sets_with_fused_multiply_add_agree_to_the_bit(results: dict[str, Any]) -> None:
    if not {"v3", "v4"} <= results.keys():
        pytest.skip("this processor has no v4")
    for case in CASES:
        for dtype in LOW:
            assert_same_bits(results["v3"][case.name, dtype], results["v4"][case.name, dtype])


@pytest.mark.parametrize("isa", ISAS)
def test_each_instruction_set_draws_the_same_bits(isa: str, results: dict[str, Any]) -> None:
    with without_kernels():
        wanted = draws()
    for z, w in zip(results[isa]["draws"], wanted, strict=True):
        assert_same_bits(z, w, f"{tuple(w.shape)}, {w.dtype}")
    assert results[isa]["unlawful"] == []


@pytest.mark.parametrize("best", [*ALL_ISAS, None])
def test_no_process_is_started_with_a_set_that_the_processor_lacks(
    best: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {"backend": "reference"} if best is None else {"best_instruction_set": best}
    monkeypatch.setattr(support.subprocess, "info", lambda: found)
    wanted = {"v2": ("v2",), "v3": ("v2", "v3"), "v4": ("v2", "v3", "v4"), "neon": ("neon",)}
    assert support.subprocess.instruction_sets() == wanted.get(str(best), ())


def test_an_unknown_instruction_set_is_refused() -> None:
    environment = {**os.environ, "DIFFCORE_ISA": "v9"}
    result = subprocess.run(
        [sys.executable, "-c", "import diffcore"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 1
    allowed = "'neon'" if ALL_ISAS == ("neon",) else "one of 'v2', 'v3', 'v4'"
    assert f"ValueError: DIFFCORE_ISA must be {allowed}" in result.stderr


def test_the_best_instruction_set_is_chosen() -> None:
    code = "from diffcore import info; print(info()['instruction_set'])"
    assert run_python(code, DIFFCORE_ISA="") == ISAS[-1]


# Rows and chunks of 8,192 columns are what threads share: few long rows, many short ones, one row.
@pytest.mark.parametrize("shape", [(3, 40_003), (513, 401), (1, 100_003)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_number_of_threads_gives_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    threads = torch.get_num_threads()
    names = ("q_sample", "ddpm_step_guided", "normal_kl_sample", "reparameterize_kl")
    names = (*names, "denoising_loss_v_prediction")
    cases = [case for case in CASES if case.name in names]
    drawing = [case for case in cases if "noise" in case.tensors]
    try:
        for case, key in (*((c, None) for c in cases), *((c, KEY) for c in drawing)):
            args = case.make(shape, dtype)
            if key is not None:
                args = with_noise(args, key)
            found = []
            for n in (1, 2, 7):
                torch.set_num_threads(n)
                found.append(as_tuple(case.native(args)))
            assert_same_bits(found[0], found[1], case.name)
            assert_same_bits(found[0], found[2], case.name)
    finally:
        torch.set_num_threads(threads)


def test_sums_over_everything_with_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    mean, logvar = torch.randn(2, 7, 50_021)
    try:
        found = []
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            found.append(ops.standard_normal_kl(mean, logvar, reduction="sum"))
        assert_same_bits(found[0], found[1])
        assert_same_bits(found[0], found[2])
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_python_threads() -> None:
    code = """
import concurrent.futures as futures
import torch
from diffcore import ops
mean, logvar = torch.randn(2, 9, 20_011)
wanted = ops.standard_normal_kl(mean, logvar, reduction="sample")
with futures.ThreadPoolExecutor(4) as pool:
    kl = ops.standard_normal_kl
    calls = [pool.submit(kl, mean, logvar, reduction="sample") for _ in range(64)]
    print(all(torch.equal(call.result(), wanted) for call in calls))
"""
    assert run_python(code, OMP_NUM_THREADS="2") == "True"
