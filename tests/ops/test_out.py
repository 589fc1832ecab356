"""``out=`` over what is read: the result is that of a fresh tensor. Over itself: refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from support.bounds import assert_same_bits
from support.cases import CASES, OpCase, step_table

SHAPE = (8, 2)
WRITING = pytest.mark.parametrize("case", [c for c in CASES if c.out], ids=lambda c: c.name)


def roomy(value: Tensor, item: int) -> tuple[Tensor, Tensor]:
    """A copy of a small tensor inside memory for the samples, and that memory as floats."""
    n = 8 * SHAPE[0] * SHAPE[1] + 16 * value.numel() + 64
    memory = torch.zeros(n, dtype=torch.float64)
    inner = memory.view(value.dtype)[item : item + value.numel()].view(value.shape)
    inner.copy_(value)
    return inner, memory.view(torch.float32)


def check_over(call: Callable[..., Any], value: Tensor) -> None:
    """``call(value, out)``, with ``out`` in all places over the memory of ``value``."""
    wanted = call(value, None)
    n = SHAPE[0] * SHAPE[1]
    for shift in range(-5, 6):
        inner, floats = roomy(value, 12)
        begin = inner.storage_offset() * inner.element_size() // 4
        out = floats[begin + 2 * shift :][:n].view(SHAPE)
        call(inner, out)
        assert_same_bits(out, wanted, f"out {2 * shift} floats after the argument")


@WRITING
def test_out_over_coefficients_tables_and_steps(case: OpCase) -> None:
    args = case.make(SHAPE, torch.float32)
    for name, value in args.options.items():
        if isinstance(value, Tensor):

            def call(x: Tensor, out: Tensor | None, name: str = name) -> Any:
                return case.op(**args.tensors, **{**args.options, name: x}, out=out)

            check_over(call, value)


@pytest.mark.parametrize("op", [ops.add_noise, ops.velocity])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_out_over_numbers_of_each_sample(op: Any, dtype: torch.dtype) -> None:
    x, z, numbers = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(8, dtype=dtype)
    check_over(lambda c, out: op(x, z, c, 0.3, out=out), numbers)
    check_over(lambda c, out: op(x, z, 0.3, c, out=out), numbers)


@pytest.mark.parametrize("op", [ops.predict_x0, ops.predict_epsilon])
def test_out_over_levels(op: Any) -> None:
    x, m, numbers = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(8).double() + 0.1
    for kind in ops.PREDICTION_TYPES:
        check_over(lambda c, out, k=kind: op(m, x, c, 0.3, prediction_type=k, out=out), numbers)


def test_out_over_guidance_scale_threshold_rows_and_counter() -> None:
    x, m, u = torch.randn(3, *SHAPE)
    rows = step_table()
    scale, bound = torch.rand(8) + 1, torch.rand(8) + 0.5

    def step(w: Any = 2.0, s: Any = 1.5, row: Tensor = rows, t: Any = 3, out: Any = None) -> Any:
        guided = {"model_output_uncond": u, "guidance_scale": w}
        return ops.reverse_step(x, m, row, t=t, **guided, threshold=s, out=out)

    check_over(lambda v, out: step(w=v, out=out), scale)
    check_over(lambda v, out: step(s=v, out=out), bound)
    check_over(lambda v, out: step(row=v, out=out), rows[:, :8])
    check_over(lambda v, out: step(t=v, out=out), torch.arange(8).flip(0))
    check_over(lambda v, out: step(t=v, out=out), torch.tensor([3]))
    check_over(lambda v, out: step(t=v, out=out), torch.arange(8, dtype=torch.int32))


@WRITING
def test_out_over_the_parts_of_a_noise_key(case: OpCase) -> None:
    if "noise" not in case.tensors:
        pytest.skip("the op takes no noise")
    args = case.make(SHAPE, torch.float32)
    args.tensors.pop("noise")
    for name, part in (("seed", [9, 4]), ("sample_ids", range(8, 0, -1)), ("stream", [3])):

        def call(x: Tensor, out: Tensor | None, name: str = name) -> Any:
            parts = {"seed": 5, name: x}
            key = PhiloxNoise(parts.pop("seed"), **parts)  # type: ignore[arg-type]
            return case.op(**args.tensors, **args.options, noise=key, out=out)

        check_over(call, torch.tensor(list(part)))


def test_randn_over_its_own_key() -> None:
    ids = torch.arange(8).flip(0)

    def call(x: Tensor, out: Tensor | None) -> Tensor:
        key = PhiloxNoise(1, sample_ids=x)
        return key.tensor(SHAPE) if out is None else ops.randn(SHAPE, key, out=out)

    check_over(call, ids)


# ---- out= whose elements share memory ------------------------------------------------------------

SHARED = [
    ((5, 40), (39, 1)),
    ((4, 4), (1, 1)),
    ((3, 2, 4), (4, 0, 1)),
    ((3, 4), (3, 2)),
    ((2, 3), (4, 2)),
]
APART = [
    ((5, 40), (40, 1)),
    ((2, 3), (3, 2)),
    ((3, 2), (2, 3)),
    ((3, 1, 4), (4, 0, 1)),
    ((2, 2), (1, 2)),
]


@pytest.mark.parametrize("route", ["kernel", "contiguous inputs", "function mode"])
def test_out_whose_elements_share_memory(route: str) -> None:
    for shape, strides in SHARED + APART:
        x, memory = torch.randn(shape), torch.zeros(400)
        out = memory.as_strided(shape, strides, 3)
        x = x if route == "kernel" else x.mT.contiguous().mT
        shared = (shape, strides) in SHARED
        distinct = {
            sum(i * s for i, s in zip(at, strides, strict=True))
            for at in torch.ones(shape).nonzero().tolist()
        }
        assert (len(distinct) < x.numel()) == shared  # by definition

        def call(x: Tensor = x, out: Tensor = out) -> Tensor:
            return ops.add_noise(x, x, 1.0, 0.5, out=out)

        if route == "function mode":
            inner = call

            def call(inner: Any = inner) -> Tensor:
                with torch.overrides.BaseTorchFunctionMode():
                    return inner()  # type: ignore[no-any-return]

        if shared:
            with pytest.raises(ValueError, match=r"^out must have memory for each element"):
                call()
            assert not memory.any()
        else:
            assert_same_bits(call(), ops.add_noise(x, x, 1.0, 0.5))
