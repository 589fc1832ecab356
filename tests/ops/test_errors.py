"""Bad input: each kind is a TypeError or ValueError that names the argument; no kernel runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffcore import ops
from diffcore._engine import execute, native
from support.bounds import each_case
from support.cases import NOISE_TABLE, STEPS, OpCase, as_tuple, step_table
from support.refusals import any_of, no_kernel_runs, pair, read_by, refused  # noqa: F401

# ---- elementwise tensors ------------------------------------------------------------------------


@each_case
@pytest.mark.parametrize("bad", [None, 3.0, [1.0, 2.0], "x"], ids=repr)
def test_non_tensors(case: OpCase, bad: Any, device: str) -> None:
    for name in list(case.tensors):
        optional = name.startswith(("noise", "model_output_uncond", "history", "variance"))
        if bad is None and optional:
            continue  # there None means "without"
        if bad == 3.0 and case.op is ops.normal_kl:
            continue  # takes numbers
        args = case.make((4, 3), torch.float32, device)
        args.tensors[name] = bad
        refused(TypeError, f"^{name} must be .*, got {type(bad).__name__}", case.native, args)


@each_case
def test_wrong_shapes(case: OpCase, device: str) -> None:
    if case.op is ops.normal_kl:
        return  # broadcasts: test_normal_kl.py
    for name in list(case.tensors)[1:]:
        for wrong in ((4, 4), (4,), (1, 3), (4, 3, 1), (3, 4), ()):
            args = case.make((4, 3), torch.float32, device)
            args.tensors[name] = torch.randn(wrong, device=device)
            refused(ValueError, f"^{any_of(case)} must have the shape of", case.native, args)


@each_case
def test_an_integer_among_floats(case: OpCase, device: str) -> None:
    for name in read_by(case)[1:]:
        args = case.make((4, 3), torch.float32, device)
        args.tensors[name] = args.tensors[name].int()
        refused(TypeError, f"^{name} must have dtype .*, got torch.int32", case.native, args)


@each_case
@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
def test_dtypes_without_kernels(case: OpCase, dtype: torch.dtype, device: str) -> None:
    args = case.make((4, 3), torch.float32, device).map(lambda x: x.to(dtype))
    refused(TypeError, f"^{any_of(case)} must have dtype .*, got {dtype}", case.native, args)


@each_case
def test_mixed_devices(case: OpCase) -> None:
    for name in read_by(case)[1:]:
        args = case.make((4, 3), torch.float32)
        args.tensors[name] = args.tensors[name].to("meta")
        refused(ValueError, f"^{any_of(case)} must have the device of", case.native, args)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse_csr(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "csr", "quantized"],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_layouts_without_kernels(make: Callable[[Tensor], Tensor]) -> None:
    x, y = pair()
    refused(TypeError, "^x0 must (have dtype|be a dense)", ops.add_noise, make(x), y, 0.8, 0.6)
    refused(TypeError, "^noise must (have dtype|be a dense)", ops.add_noise, x, make(y), 0.8, 0.6)


# ---- tensors with no memory ---------------------------------------------------------------------


def fake(x: Tensor) -> Tensor:
    return FakeTensorMode().from_tensor(x)


def functional(x: Tensor) -> Tensor:
    return torch._to_functional_tensor(x)


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


@each_case
@pytest.mark.parametrize("make", [functional, freed], ids=["functional", "freed"])
def test_tensors_without_memory(case: OpCase, make: Callable[[Tensor], Tensor]) -> None:
    def outcome(name: str) -> str:
        # In here, because pytest shows arguments, and showing a freed tensor ends the process.
        args = case.make((4, 3), torch.float32)
        args.tensors[name] = make(args.tensors[name])
        try:
            case.native(args)
        except ValueError as error:
            return str(error)
        return "no error"

    for name in read_by(case):
        assert outcome(name).startswith(f"{name} must have memory"), outcome(name)


SEVERAL_LAUNCHES = ("step_log_prob_h2", "step_log_prob_learned", "step_kl_guided")


@each_case
def test_a_fake_tensor_among_real_ones_is_torchs_error(case: OpCase) -> None:
    names = read_by(case)
    for name in names:
        args = case.make((4, 3), torch.float32)
        args.tensors[name] = fake(args.tensors[name])
        if names == [name]:
            assert all(isinstance(y, FakeTensor) for y in as_tuple(case.native(args)))
        elif case.name not in SEVERAL_LAUNCHES:  # whose first may run: tests/ops/test_density.py
            refused(AssertionError, "convert all Tensors to FakeTensors", case.native, args)


def test_coefficients_and_steps_without_memory() -> None:
    x, y = pair()
    for name, call in {
        "alpha": lambda: ops.add_noise(x, y, freed(torch.rand(4)), 0.6),
        "t": lambda: ops.q_sample(x, freed(torch.zeros(4, dtype=torch.int64)), y, NOISE_TABLE),
        "table": lambda: ops.q_sample(x, 3, y, freed(NOISE_TABLE)),
        "out": lambda: ops.add_noise(x, y, 0.8, 0.6, out=freed(x)),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must have memory"):
            call()


# ---- coefficients -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, "0.8", [0.8, 0.7], 1j], ids=repr)
def test_coefficients_that_are_no_numbers(bad: Any, device: str) -> None:
    x, y = pair(device)
    for op in (ops.add_noise, ops.velocity, ops.predict_x0, ops.predict_epsilon):
        refused(TypeError, "alpha", op, x, y, bad, 0.6)
        refused(TypeError, "sigma", op, x, y, 0.8, bad)
    refused(TypeError, "sigma_prev", ops.ddpm_step, x, y, 0.8, 0.6, 0.9, bad)
    if bad is not None:
        refused(TypeError, "weight", ops.denoising_loss, x, y, y, weight=bad)
        rows = step_table().to(device)
        with pytest.raises(TypeError, match="guidance_scale"):
            ops.reverse_step(x, y, rows, t=0, model_output_uncond=y, guidance_scale=bad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_coefficient_dtypes(dtype: torch.dtype, device: str) -> None:
    x, y = pair(device)
    bad = torch.ones(4, device=device).to(dtype)
    for op in (ops.add_noise, ops.velocity, ops.predict_x0):
        refused(TypeError, "alpha", op, x, y, bad, 0.6)
        refused(TypeError, "sigma", op, x, y, 0.8, bad)
    refused(TypeError, "table", ops.q_sample, x, 0, y, NOISE_TABLE.to(device).to(dtype))
    refused(
        TypeError, "coefficients", ops.reverse_step, x, y, step_table().to(device).to(dtype), t=0
    )


def test_coefficient_shapes(device: str) -> None:
    x, y = pair(device)
    for wrong in ((3,), (5,), (2, 2), (4, 3), (1, 4, 3)):
        bad = torch.rand(wrong, device=device)
        for op in (ops.add_noise, ops.velocity):
            refused(ValueError, "^alpha must have", op, x, y, bad, 0.6)
            refused(ValueError, "^sigma must have", op, x, y, 0.8, bad)
    table = torch.rand(STEPS, 3, device=device)
    refused(ValueError, r"^table must have shape \[T, 2\]", ops.q_sample, x, 0, y, table)
    for bad in (torch.rand(8, STEPS), torch.rand(7), torch.rand(2, 3, 8), torch.rand(())):
        refused(
            ValueError, "^coefficients must have shape", ops.reverse_step, x, y, bad.to(device), t=0
        )
    rows = torch.rand(3, 8, device=device)
    refused(ValueError, "must have 1 or 4 entries", ops.reverse_step, x, y, rows)
    refused(TypeError, "^table must be .* got list", ops.q_sample, x, 0, y, [[1.0, 0.0]])
    refused(TypeError, "^coefficients must be .* got list", ops.reverse_step, x, y, [1.0] * 8)


def test_coefficients_on_another_device() -> None:
    x, y = pair()
    refused(
        ValueError,
        "must be on cpu, .* got meta",
        ops.add_noise,
        x,
        y,
        torch.rand(4, device="meta"),
        0.6,
    )
    refused(
        ValueError, "must be on cpu, .* got meta", ops.q_sample, x, 0, y, NOISE_TABLE.to("meta")
    )


def test_tables_of_different_lengths(device: str) -> None:
    x, y = pair(device)
    a, b = torch.rand(5, device=device), torch.rand(6, device=device)
    with pytest.raises(ValueError, match="must have 5 rows, got 6"):
        ops.add_noise(x, y, a, b, t=0)
    with pytest.raises(ValueError, match="must have at least 1 rows, got 0"):
        ops.q_sample(x, 0, y, torch.rand(0, 2, device=device))


# ---- steps --------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [-1, STEPS, 2**31, 2**40, 2**63, -(2**63) - 1], ids=str)
def test_a_step_out_of_range(t: int, device: str) -> None:
    x, y = pair(device)
    table, rows = NOISE_TABLE.to(device), step_table().to(device)
    refused(ValueError, "^t must be in 0", ops.q_sample, x, t, y, table)
    refused(ValueError, "^t must be in 0", ops.reverse_step, x, y, rows, t=t)
    refused(ValueError, "^t must be in 0", ops.add_noise, x, y, table[:, 0], table[:, 1], t=t)


@pytest.mark.parametrize("t", [-1, STEPS, 2**40], ids=str)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_step_of_one_sample_out_of_range(t: int, place: int) -> None:
    x, y = pair()
    steps = torch.zeros(4, dtype=torch.int64)
    steps[place] = t
    refused(ValueError, f"^t must hold .* got {t}$", ops.q_sample, x, steps, y, NOISE_TABLE)
    refused(ValueError, f"^t must hold .* got {t}$", ops.reverse_step, x, y, step_table(), t=steps)
    if t == STEPS:
        refused(
            ValueError, f"^t must hold .* got {t}$", ops.q_sample, x, steps.int(), y, NOISE_TABLE
        )
    counter = torch.tensor([t])
    refused(ValueError, f"^t must hold .* got {t}$", ops.q_sample, x, counter, y, NOISE_TABLE)


@pytest.mark.parametrize("bad", [1.0, "3", True, [0.5, 1.5], math.nan], ids=repr)
def test_steps_of_the_wrong_type(bad: Any, device: str) -> None:
    x, y = pair(device)
    refused(TypeError, "^t must be an int or", ops.q_sample, x, bad, y, NOISE_TABLE.to(device))
    refused(
        TypeError, "^t must be an int or", ops.reverse_step, x, y, step_table().to(device), t=bad
    )


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bool, torch.int16, torch.uint8, torch.complex64], ids=str
)
def test_steps_of_the_wrong_dtype(dtype: torch.dtype, device: str) -> None:
    x, y = pair(device)
    bad = torch.zeros(4, device=device).to(dtype)
    refused(
        TypeError,
        "^t must have dtype int64 or int32",
        ops.q_sample,
        x,
        bad,
        y,
        NOISE_TABLE.to(device),
    )


def test_steps_of_the_wrong_shape(device: str) -> None:
    x, y = pair(device)
    for shape in ((3,), (5,), (4, 1), (0,)):
        bad = torch.zeros(shape, dtype=torch.int64, device=device)
        refused(
            ValueError, "^t must be one step, or", ops.q_sample, x, bad, y, NOISE_TABLE.to(device)
        )


def test_steps_on_another_device() -> None:
    x, y = pair()
    bad = torch.zeros(4, dtype=torch.int64, device="meta")
    refused(ValueError, "^t must be on cpu, .* got meta", ops.q_sample, x, bad, y, NOISE_TABLE)


def test_a_step_without_a_table(device: str) -> None:
    x, y = pair(device)
    refused(ValueError, "^t must be None", ops.add_noise, x, y, 0.8, 0.6, t=3)
    refused(
        TypeError, "^t must be .* got NoneType", ops.q_sample, x, None, y, NOISE_TABLE.to(device)
    )


def test_debug_mode_checks_before_the_kernel_runs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On CUDA a kernel would clamp the step and run; the watched one here stands for it.
    def run(*args: Any) -> int:
        raise AssertionError("the kernel ran")

    x, y = pair(device)
    monkeypatch.setattr(native, "DEBUG", True)
    monkeypatch.setattr(execute, "_C", SimpleNamespace(call=run))
    bad = torch.full((4,), len(NOISE_TABLE), device=device)
    refused(ValueError, "^t must hold", ops.q_sample, x, bad, y, NOISE_TABLE.to(device))
