"""Batches and samples without elements, and samples of no dimension: shapes on every route."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from diffcore._types import StepColumns
from support.bounds import each_case
from support.cases import CASES, NOISE_TABLE, OpCase, as_tuple, step_table

EMPTY = [(0,), (0, 3), (2, 0), (2, 3, 0), (2, 3, 0, 5), (1, 3, 0, 5), (0, 3, 0)]
TERMS = (
    (ops.normal_kl, 4),
    (ops.standard_normal_kl, 2),
    (ops.gaussian_nll, 3),
    (
        lambda x, means, scales, **options: ops.discretized_gaussian_log_likelihood(
            x, means=means, log_scales=scales, **options
        ),
        3,
    ),
)
REDUCTIONS = ("none", "sample", "batchmean", "mean", "sum")


@each_case
def test_results_and_gradients_of_nothing(case: OpCase) -> None:
    for shape in EMPTY[:5]:
        args = case.make(shape, torch.float32)
        leaves = args.map(lambda x: x.requires_grad_())
        found, plain = as_tuple(case.native(leaves)), as_tuple(case.reference(args))
        with torch.no_grad():
            assert [y.shape for y in as_tuple(case.native(args))] == [y.shape for y in found]
        for y, w in zip(found, plain, strict=True):
            assert (y.shape, y.dtype) == (w.shape, w.dtype), shape
            assert torch.equal(y, w)  # zeros of either sign
        for reduce in (
            Tensor.sum,
            Tensor.mean,
            lambda y: y.double().sum(),
            lambda y: y.sum(0).sum(),
        ):
            for y in found:
                if y.requires_grad:
                    reduce(y).backward(retain_graph=True)
        for name in case.differentiable:
            grad = leaves.tensors[name].grad
            assert grad is None or grad.shape == shape


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_of_nothing(reduction: str) -> None:
    for shape in EMPTY:
        x = torch.zeros(shape, requires_grad=True)
        for term, count in TERMS:
            y = term(*(x,) * count, reduction=reduction)
            if reduction in ("sum", "sample"):
                assert not y.any()
            y.double().sum().backward()
            assert x.grad is not None
            assert x.grad.shape == shape


@pytest.mark.parametrize("shape", EMPTY)
def test_noise_of_nothing(shape: tuple[int, ...]) -> None:
    for key in (PhiloxNoise(0), PhiloxNoise(0, sample_ids=torch.arange(shape[0]))):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert key.tensor(shape, dtype=dtype).shape == shape
            out = torch.empty(shape, dtype=dtype).mT if len(shape) > 1 else torch.empty(shape)
            assert ops.randn(out.shape, PhiloxNoise(0), out=out) is out


def test_a_step_out_of_range_is_refused_for_an_empty_batch_too() -> None:
    x, rows = torch.zeros(0, 3), step_table()
    for wrong in (len(rows), -1, torch.tensor([len(rows)]), torch.tensor([-1]), 99):
        for call in (
            lambda t=wrong: ops.reverse_step(x, x, rows, t=t),
            lambda t=wrong: ops.step_log_prob(x, x, x, rows, t=t),
            lambda t=wrong: ops.q_sample(x, t, x, NOISE_TABLE),
            lambda t=wrong: ops.denoising_loss(x, x, x, weight=rows[:, 0].contiguous(), t=t),
        ):
            with pytest.raises(ValueError, match=r"^t must"):
                call()
    for right in (0, torch.tensor([2]), torch.zeros(0, dtype=torch.int64)):
        assert ops.reverse_step(x, x, rows, t=right).shape == (0, 3)


def test_a_learned_row_of_an_empty_batch() -> None:
    rows = torch.rand(3, 8, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(0, 3)
    t = torch.zeros(0, dtype=torch.int64)
    ops.step_log_prob(x, x, x, rows, t=t).sum().backward()
    assert rows.grad is not None
    assert not rows.grad.any()


# ---- samples of no dimension ---------------------------------------------------------------------


def routes(call: Any, x: Tensor) -> dict[str, tuple[Tensor, ...]]:
    """The results of a function of x by every route in this process."""
    leaf = x.clone().requires_grad_()
    with torch.overrides.BaseTorchFunctionMode():
        in_mode = as_tuple(call(x))
    return {
        "plain": as_tuple(call(x)),
        "function mode": in_mode,
        "backward": as_tuple(call(leaf)),
        "jvp": as_tuple(torch.func.jvp(call, (x,), (torch.ones_like(x),))[0]),
        "tangent": as_tuple(torch.func.jvp(call, (x,), (torch.ones_like(x),))[1]),
        "gradient": tuple(
            torch.autograd.grad(y, leaf, retain_graph=True, allow_unused=True)[0]
            for y in as_tuple(call(leaf))
            if y.requires_grad
        ),
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_sample_of_no_dimension_keeps_its_shape(case: OpCase) -> None:
    if not case.differentiable:
        pytest.skip("no gradient")
    args = case.make((), torch.float32)
    name = case.differentiable[0]

    def call(x: Tensor) -> Any:
        return case.op(**{**args.tensors, name: x}, **args.options)

    for route, found in routes(call, args.tensors[name]).items():
        assert all(y is None or y.shape == () for y in found), route


def test_one_number_in_a_vector_keeps_a_sample_of_no_dimension() -> None:
    x, m, one = torch.tensor(0.3), torch.tensor(0.2), torch.tensor([0.5])
    table = torch.rand(1, 12, dtype=torch.float64)
    row = torch.rand(1, len(StepColumns._fields)).double()[:, :8]
    calls = {
        "vlb_term": lambda v: ops.vlb_term(m, v, table, x_t=m, scale=one),
        "denoising_loss": lambda v: ops.denoising_loss(v, m, m, weight=one),
        "v_prediction": lambda v: ops.denoising_loss(
            v, m, m, weight=one, prediction_type="v_prediction", alpha=one, sigma=one
        ),
        "add_noise": lambda v: ops.add_noise(v, m, one, one),
        "predict_x0": lambda v: ops.predict_x0(v, m, one, one),
        "step": lambda v: ops.reverse_step(v, m, row),
        "guided": lambda v: ops.reverse_step(
            v, m, row, model_output_uncond=m, guidance_scale=one, threshold=one
        ),
        "log_prob": lambda v: ops.step_log_prob(v, m, m, row),
        "ddim": lambda v: ops.ddim_step(m, v, one, one, one, one),
    }
    for name, call in calls.items():
        for route, found in routes(call, x).items():
            assert all(y is None or y.shape == () for y in found), (name, route)
