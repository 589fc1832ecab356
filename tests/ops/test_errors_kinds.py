"""Kinds of tensors and numbers that no op takes: an error that names the argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from support.cases import CASES, OpCase, step_table
from support.refusals import no_kernel_runs, read_by, refused  # noqa: F401


def nested(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        return torch.nested.nested_tensor([x.reshape(-1), x.reshape(-1)[:1]])


def quantized(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def csr(x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # beta, says torch
        return x.to_sparse_csr() if x.ndim == 2 else x.to_sparse()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "nested": nested,
    "quantized": quantized,
    "sparse": Tensor.to_sparse,
    "csr": csr,
    "mkldnn": lambda x: x.float().to_mkldnn(),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inputs(case: OpCase, kind: str) -> None:
    for name in read_by(case):
        args = case.make((4, 3), torch.float32)
        call = {**args.tensors, **args.options}
        call[name] = KINDS[kind](call[name])
        refused(TypeError, rf"^{name} must be a dense, strided tensor, got", case.op, **call)


@each_kind
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_coefficients_tables_and_steps(case: OpCase, kind: str) -> None:
    for name, value in case.options(4).items():
        if not isinstance(value, Tensor) or (name == "t" and kind in ("quantized", "mkldnn")):
            continue
        args = case.make((4, 3), torch.float32)
        call = {**args.tensors, **args.options, name: KINDS[kind](value)}
        refused((TypeError, ValueError), rf"^{name} must ", case.op, **call)  # type: ignore[arg-type]


@each_kind
def test_out_and_the_parts_of_a_key(kind: str) -> None:
    x, change = torch.randn(4, 3), KINDS[kind]
    refused(TypeError, "^out must be", ops.add_noise, x, x, 0.5, 0.5, out=change(x))
    refused(TypeError, "^out must be", ops.randn, (4, 3), PhiloxNoise(1), out=change(x))
    if kind in ("quantized", "mkldnn"):
        return
    ids = change(torch.arange(4))
    refused(
        (TypeError, ValueError),  # type: ignore[arg-type]
        "^sample_ids must",
        lambda: ops.add_noise(x, PhiloxNoise(1, sample_ids=ids), 0.5, 0.5),
    )


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (10**400, ValueError),
        (-(10**400), ValueError),
        (np.complex64(1 + 5j), TypeError),
        (np.complex128(1 + 5j), TypeError),
        (1 + 5j, TypeError),
        (torch.ones(2, dtype=torch.complex64), TypeError),
        (torch.ones(2, dtype=torch.int64), TypeError),
        ("0.5", TypeError),
    ],
    ids=repr,
)
def test_numbers(value: Any, error: type[Exception]) -> None:
    x = torch.randn(2, 3)
    for name, call in {
        "alpha": lambda: ops.add_noise(x, x, value, 0.5),
        "sigma": lambda: ops.velocity(x, x, 0.5, value),
        "a": lambda: ops.linear_combination(x, x, (value, 0.5)),
        "alpha_prev": lambda: ops.ddpm_step(x, x, 0.5, 0.5, value, 0.5),
        "sigma_prev": lambda: ops.ddim_step(x, x, 0.5, 0.5, 0.5, value),
        "weight": lambda: ops.denoising_loss(x, x, x, weight=value),
        "guidance_scale": lambda: ops.reverse_step(
            x, x, step_table(), t=0, model_output_uncond=x, guidance_scale=value
        ),
        "threshold": lambda: ops.reverse_step(x, x, step_table(), t=0, threshold=value),
    }.items():
        refused(error, f"^{name} must ", call)
    if not isinstance(value, Tensor):
        refused(error, "^alpha must ", ops.prior_kl, x, value, 1.0)
        refused(error, "^ratio must ", ops.dynamic_threshold, x, x, step_table(), t=0, ratio=value)
        refused(error, "^logvar2 must ", ops.normal_kl, x, x, x, value)


def test_a_square_beyond_float64() -> None:
    refused(ValueError, "^alpha must have a square", ops.prior_kl, torch.ones(2, 3), 1e200, 1.0)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_coefficients_of_few_bits_are_converted(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # kernels may run
    x, z = torch.randn(2, 4, 3)
    few = torch.tensor([0.5, 1.0, 2.0, 0.25]).to(dtype)
    exact = few.float()
    for op in (
        lambda c: ops.add_noise(x, z, c, 0.5),
        lambda c: ops.velocity(x, z, 0.5, c),
        lambda c: ops.predict_x0(x, z, c, 0.5),
        lambda c: ops.ddim_step(x, z, c, 0.5, 0.5, 0.5),
        lambda c: ops.denoising_loss(
            x, x, z, prediction_type="v_prediction", alpha=0.5, sigma=c, weight=c
        ),
    ):
        assert torch.equal(op(few), op(exact))


def test_levels_of_different_lengths() -> None:
    x, two, five = torch.randn(2, 3), torch.rand(2), torch.rand(5)
    for name, call in {
        "sigma": lambda: ops.predict_x0(x, x, two, five),
        "sigma ": lambda: ops.predict_epsilon(x, x, two, five),
        "alpha_prev": lambda: ops.ddpm_step(x, x, two, 0.5, five, 0.5),
        "sigma_prev": lambda: ops.ddim_step(x, x, 0.5, two, 0.5, five),
    }.items():
        refused(ValueError, f"^{name.strip()} must have the shape of", call)
    refused(ValueError, "^alpha must have 1 or 2 entries", ops.predict_x0, x, x, five, five)
    refused(ValueError, "must have 1 or 2 entries", ops.ddpm_step, x, x, five, five, five, five)


def test_history_that_is_no_sequence() -> None:
    x = torch.randn(2, 3)
    for bad in (np.int64(3), 3, object()):
        refused(TypeError, "^history must be", ops.reverse_step, x, x, (0.1,) * 14, history=bad)
