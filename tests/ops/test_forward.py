"""Values: every op, dtype and device against the error bound, at odd sizes and with odd values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from diffcore.testing import assert_within_bound
from support import emulated
from support.bounds import (
    assert_same_bits,
    check,
    check_stacked,
    each_16_bit,
    each_case,
    each_dtype,
    each_elementwise_case,
)
from support.cases import BY_NAME, NOISE_TABLE, STEPS, OpCase, as_tuple, step_table, steps_of

# Around vector widths (4 ... 16), groups of them, lanes of a sum (64), tiles (512), chunks (8192).
COLUMNS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 19, 35, 63, 64, 65, 67, 131, 511, 512, 513, 1023)
GAUSSIANS = [
    "normal_kl",
    "standard_normal_kl",
    "gaussian_nll",
    "discretized_gaussian_log_likelihood",
]
LONG_COLUMNS = (8191, 8192, 8193, 16385)


@each_case
@each_dtype
def test_values_are_within_the_bound(case: OpCase, dtype: torch.dtype, device: str) -> None:
    args = case.make((41, 401), dtype, device)
    result = case.native(args)
    check(case, args, result)
    for y in as_tuple(result):
        assert y.device.type == device
        if y.ndim == 2:
            assert y.dtype == dtype
        else:
            assert y.shape == (41,)
            assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@each_case
@each_dtype
def test_reference_is_within_the_bound(case: OpCase, dtype: torch.dtype) -> None:
    args = case.make((41, 401), dtype)
    check(case, args, run=case.reference)


@each_case
@each_16_bit
def test_16_bit_results_are_float32_results_rounded_once(case: OpCase, dtype: torch.dtype) -> None:
    args = case.make((5, 1031), dtype)
    wide = as_tuple(case.native(args.map(lambda x: x.float())))
    for y, w in zip(as_tuple(case.native(args)), wide, strict=True):
        if y.ndim == 1 and emulated.ACTIVE:  # a CUDA thread adds eight neighbors instead of four
            torch.testing.assert_close(y, w, rtol=1e-6, atol=1e-5)
        else:
            assert_same_bits(y, w.to(y.dtype), case.name)


@each_elementwise_case
@each_dtype
def test_every_size_gives_the_same_elements(case: OpCase, dtype: torch.dtype, device: str) -> None:
    args = case.make((3, max(COLUMNS)), dtype, device)
    full = as_tuple(case.native(args))[0]
    for n in COLUMNS:
        part = as_tuple(case.native(args.map(lambda x, n=n: x[:, :n].contiguous())))[0]
        assert_same_bits(part, full[:, :n], f"{n} columns")


@pytest.mark.parametrize(
    "name", ["normal_kl_sample", "reparameterize_kl", "denoising_loss_v_prediction"]
)
@each_dtype
def test_sums_of_every_size(name: str, dtype: torch.dtype, device: str) -> None:
    case = BY_NAME[name]
    for n in (*COLUMNS, *LONG_COLUMNS):
        check(case, case.make((48 if n < 5000 else 8, n), dtype, device))


@each_case
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)], ids=str)
def test_no_elements(case: OpCase, shape: tuple[int, ...], device: str) -> None:
    result = as_tuple(case.native(case.make(shape, torch.float32, device)))
    wanted = as_tuple(case.eager(case.make(shape, torch.float32, device)))
    assert_same_bits(tuple(y.double() for y in result), tuple(y.double() for y in wanted))


@each_case
@pytest.mark.parametrize("shape", [(), (1,), (7,), (1, 1), (2, 1, 3, 1, 5)], ids=str)
def test_any_number_of_dimensions(case: OpCase, shape: tuple[int, ...], device: str) -> None:
    args = case.make(shape, torch.float32, device)
    rows = shape[0] if shape else 1
    flat = as_tuple(case.native(args.map(lambda x: x.reshape(rows, -1))))
    for y, f in zip(as_tuple(case.native(args)), flat, strict=True):
        assert y.shape == (shape if f.ndim == 2 else shape[:1])
        assert_same_bits(y.reshape(-1), f.reshape(-1))


@each_case
def test_more_rows_than_a_cuda_grid_is_high(case: OpCase, device: str) -> None:
    check(case, case.make((65_537, 3), torch.float32, device))


@pytest.mark.parametrize("reduction", ["none", "sample", "batchmean", "mean", "sum"])
@pytest.mark.parametrize("name", GAUSSIANS)
@each_dtype
def test_reductions(name: str, reduction: str, dtype: torch.dtype, device: str) -> None:
    case = BY_NAME[name]
    trials = []
    for seed in range(24):
        args = case.make((3, 5, 41), dtype, device, seed=seed)
        args.options["reduction"] = reduction
        trials.append((case.native(args), case.eager(args), case.truth(args)))
    check_stacked(trials, f"{name}, {reduction}")


@pytest.mark.parametrize("name", GAUSSIANS)
def test_reductions_of_nothing_are_those_of_torch(name: str, device: str) -> None:
    args = BY_NAME[name].make((0, 3), torch.float32, device)
    empty = torch.zeros(0, 3)
    assert math.isnan(BY_NAME[name].op(**args.tensors, reduction="mean"))
    assert math.isnan(empty.mean())
    assert BY_NAME[name].op(**args.tensors, reduction="sum") == empty.sum()


@pytest.mark.parametrize("low", [-30.0, -3.0, 20.0])
@pytest.mark.parametrize(
    "case", ["normal_kl", "standard_normal_kl", "gaussian_nll", "reparameterize"]
)
@each_dtype
def test_extreme_log_variances(case: str, low: float, dtype: torch.dtype, device: str) -> None:
    op = BY_NAME[case]
    args = op.make((17, 61), dtype, device)
    for name, x in args.tensors.items():
        if name.startswith("logvar"):
            x.mul_(0.1).add_(low)
    check(op, args)


SPECIAL = (math.inf, -math.inf, math.nan, -0.0, 0.0, 1e-40, 3e38, -3e38, 88.5, -87.5, -104.0)
# A step is a row of coefficients; a term with coefficient 0 is computed all the same (0 · inf).
WITH_ZEROS = ("predict_x0_sample", "predict_epsilon_epsilon", "ddpm_step", "ddim_step")


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_special_values(case: OpCase, dtype: torch.dtype, device: str) -> None:
    for name in case.tensors:
        args = case.make((2, len(SPECIAL)), dtype, device)
        args.tensors[name][1] = torch.tensor(SPECIAL, dtype=torch.float64).to(dtype)
        found = as_tuple(case.native(args))
        _assert_same_kinds(found, [case.reference(args)], name)
        if not case.name.startswith(WITH_ZEROS):
            wanted = [case.eager(args), case.truth(args)]
            if case.name.endswith("normal_kl") and name.startswith("logvar"):
                # The naive formula has inf - inf where the limit, infinity, is asked of ours.
                assert (found[0][1, :2] == math.inf).all()
                found, wanted = (found[0][:, 2:],), [w[:, 2:] for w in wanted]
            _assert_same_kinds(found, wanted, name)


def _assert_same_kinds(found: tuple[Tensor, ...], wanted: list[Any], name: str) -> None:
    """Nan, an infinity, a zero of either sign, or none of these: as one of `wanted` has it."""
    for i, y in enumerate(found):
        kinds = []
        for result in wanted:
            w = as_tuple(result)[i]
            if not isinstance(w, Tensor):
                with np.errstate(over="ignore"):
                    w = torch.as_tensor(np.asarray(w).astype(np.float64))
            kinds.append(_kinds(w.to(y.dtype).cpu()))
        agrees = torch.stack([_kinds(y.cpu()) == k for k in kinds]).any(0)
        assert agrees.all(), f"{name}: {y}, wanted the kinds of {wanted}"


def _kinds(x: Tensor) -> Tensor:
    signed = torch.where(x.isinf() | (x == 0), torch.signbit(x) + 1, 0)
    return signed + 4 * x.isinf() + 8 * (x == 0) + 16 * x.isnan()


def test_clip_bounds_are_met_exactly(device: str) -> None:
    below, above = -0.75, 0.5
    row = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0, below, above], dtype=torch.float64)
    edge = torch.tensor([below, above])
    away = torch.tensor([-3e38, 3e38])
    x = torch.cat([edge, torch.nextafter(edge, away), torch.nextafter(edge, -away), away])
    x = torch.cat([x, torch.tensor([math.nan])]).to(device).requires_grad_()
    y = ops.reverse_step(x[None], torch.zeros_like(x)[None], row.to(device))
    y.sum().backward()
    assert_same_bits(y[0], x.detach().clamp(below, above))
    assert x.grad is not None
    assert x.grad.tolist()[:8] == [1, 1, 0, 0, 1, 1, 0, 0]


def test_infinite_clip_bounds_clip_nothing(device: str) -> None:
    inf = math.inf
    row = torch.tensor([0.5, 0.0, 0.5, 0.0, 1.0, 0.0, -inf, inf], dtype=torch.float64).to(device)
    x = torch.tensor([[3e38, -3e38, inf, -inf]], device=device)
    assert_same_bits(ops.reverse_step(x, torch.zeros_like(x), row), x)


@each_16_bit
def test_q_sample_never_loses_sigma_at_small_t(dtype: torch.dtype, device: str) -> None:
    # alphas_cumprod cast to bfloat16 makes sigma exactly 0 at the first steps of this schedule.
    alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    table = torch.stack([alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()], 1).to(device)
    t = torch.arange(1000, device=device)
    one, zero = (torch.full((1000, 1), v, dtype=dtype, device=device) for v in (1.0, 0.0))
    for x0, noise, exact in ((one, zero, table[:, :1]), (zero, one, table[:, 1:])):
        coefficient = ops.q_sample(x0, t, noise, table)
        assert_same_bits(coefficient, exact.float().to(dtype))
        assert (coefficient > 0).all()


@pytest.mark.parametrize(
    "form", ["float", "0-dim", "float32", "float64", "[B,1,1]", "table", "int32"]
)
def test_every_form_of_coefficient(form: str, device: str) -> None:
    x0, noise = torch.randn(2, 6, 4, 3, device=device)
    steps = torch.full((6,), 7) if form in ("float", "0-dim") else steps_of(6)
    alpha, sigma = NOISE_TABLE[steps].unbind(1)
    wanted = alpha.view(6, 1, 1) * x0.double().cpu() + sigma.view(6, 1, 1) * noise.double().cpu()
    table = NOISE_TABLE.to(device)
    alpha, sigma, steps = alpha.to(device), sigma.to(device), steps.to(device)
    y = {
        "float": lambda: ops.add_noise(x0, noise, float(alpha[0]), float(sigma[0])),
        "0-dim": lambda: ops.add_noise(x0, noise, alpha[0], sigma[0]),
        "float32": lambda: ops.add_noise(x0, noise, alpha.float(), sigma.float()),
        "float64": lambda: ops.add_noise(x0, noise, alpha, sigma),
        "[B,1,1]": lambda: ops.add_noise(x0, noise, alpha.view(6, 1, 1), sigma.view(6, 1, 1)),
        "table": lambda: ops.add_noise(x0, noise, table[:, 0], table[:, 1], t=steps),
        "int32": lambda: ops.q_sample(x0, steps.int(), noise, table),
    }[form]()
    a, s = (c.float().view(6, 1, 1) for c in (alpha, sigma))
    assert_within_bound(y, a * x0 + s * noise, wanted)


@pytest.mark.parametrize("t", [0, 7, STEPS - 1])
def test_every_form_of_step(t: int, device: str) -> None:
    x, m, z = torch.randn(3, 5, 9, device=device)
    table = step_table().to(device)
    by_int = ops.reverse_step(x, m, table, t=t, noise=z)
    for step in (
        torch.full((5,), t, device=device),
        torch.full((5,), t, dtype=torch.int32, device=device),
        torch.tensor([t], device=device),
        torch.tensor(t, device=device),
        torch.full((10,), t, device=device)[::2],
    ):
        assert_same_bits(ops.reverse_step(x, m, table, t=step, noise=z), by_int)
    assert_same_bits(ops.reverse_step(x, m, table[t], noise=z), by_int)
    assert_same_bits(ops.reverse_step(x, m, table[t].expand(5, 8), noise=z), by_int)
    strided = torch.randn(STEPS, 16, dtype=torch.float64, device=device)
    strided[:, ::2] = table
    assert_same_bits(ops.reverse_step(x, m, strided[:, ::2], t=t, noise=z), by_int)


@pytest.mark.parametrize(
    "op", [ops.reparameterize, lambda *x, **o: ops.reparameterize_kl(*x, **o)[0]]
)
def test_noise_is_drawn_from_torchs_generator(op: Callable[..., Tensor], device: str) -> None:
    mean, logvar = torch.randn(2, 3, 5, device=device)
    torch.manual_seed(3)
    drawn = [op(mean, logvar) for _ in range(2)]
    assert not torch.equal(*drawn)
    torch.manual_seed(3)
    for z in drawn:
        noise = PhiloxNoise.from_generator(device=device).tensor((3, 5))
        assert_same_bits(z, op(mean, logvar, noise.to(device)))
    generator = torch.Generator(device).manual_seed(4)
    z = op(mean, logvar, generator=generator)
    key = PhiloxNoise.from_generator(generator.manual_seed(4), device=device)
    assert_same_bits(z, op(mean, logvar, key.tensor((3, 5), device=device)))


@pytest.mark.parametrize("prediction_type", ops.PREDICTION_TYPES)
def test_predictions_invert_the_noising(prediction_type: str) -> None:
    x0, noise = torch.randn(2, 4, 33, dtype=torch.float64)
    alpha = 0.35 if prediction_type == "flow_prediction" else 0.6
    sigma = 0.65 if prediction_type == "flow_prediction" else 0.8
    x_t = ops.add_noise(x0, noise, alpha, sigma)
    output = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": ops.velocity(x0, noise, alpha, sigma),
        "flow_prediction": noise - x0,
    }[prediction_type]
    found = ops.predict_x0(output, x_t, alpha, sigma, prediction_type=prediction_type)
    rounding = 4 * torch.finfo(torch.float64).eps * float(x_t.abs().max() + output.abs().max())
    torch.testing.assert_close(found, x0, rtol=0, atol=rounding / alpha)
    found = ops.predict_epsilon(output, x_t, alpha, sigma, prediction_type=prediction_type)
    torch.testing.assert_close(found, noise, rtol=0, atol=rounding / sigma)
