"""What must not reach a kernel of the compiled module: wild calls, freed memory."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode

from diffcore import PhiloxNoise, ops
from diffcore._engine import native
from support.bounds import assert_same_bits
from support.cases import BY_NAME, CASES, NOISED, OpCase, as_tuple, without_kernels
from support.refusals import read_by
from support.subprocess import run_python

pytestmark = pytest.mark.skipif(native._C is None, reason="without the compiled module")

UNCONNECTED = """
import datetime, torch
from diffcore import _C
api, P, f = torch.Tensor.__dlpack_c_exchange_api__, torch.nn.Parameter, lambda: 0
D, T = torch._C.DisableTorchFunction, torch.Tensor
calls = [
    lambda: _C.launch(0, (), (), None, None, False),
    lambda: _C.launch(0, (torch.ones(2),), (1.0,), None, None, True),
    lambda: _C.call(0, (torch.ones(2),), (torch.ones(2),), (1.0,), None, False, None),
    lambda: _C.connect(datetime.datetime_CAPI, T, P, f, f, f, {}, D, f, f),
    lambda: _C.connect(api, int, P, f, f, f, {}, D, f, f),
    lambda: _C.connect(api, T, int, f, f, f, {}, D, f, f),
    lambda: _C.connect(api, T, P, 3, f, f, {}, D, f, f),
    lambda: _C.connect(api, T, P, f, 3, f, {}, D, f, f),
    lambda: _C.connect(api, T, P, f, f, f, [], D, f, f),
    lambda: _C.connect(api, T, P, f, f, f, {}, int, f, f),
    lambda: _C.launch(0, (), (), None, None, False),
]
for call in calls:
    try:
        print("ran", call())
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        print(type(error).__name__)
"""


def test_nothing_runs_before_a_right_connection() -> None:
    answers = run_python(UNCONNECTED, DIFFCORE_BACKEND="reference").splitlines()
    wanted = ["RuntimeError"] * 3 + ["TypeError", "ValueError"] + ["TypeError"] * 4
    wanted += ["AttributeError"]
    assert answers == [*wanted, "RuntimeError"]


@pytest.mark.parametrize("case", NOISED, ids=lambda case: case.name)
def test_noise_for_more_dimensions_than_a_layout_has(case: OpCase) -> None:
    key = PhiloxNoise(7, sample_ids=3)
    for dims in (18, 24):
        shape = (2, *[2] * (dims // 2 - 1), *[1] * (dims - dims // 2 - 1), 3)
        args = case.make(shape, torch.float32)
        args.tensors.pop("noise")
        wanted = as_tuple(case.op(**args.tensors, noise=key, **args.options))
        order = [*range(1, dims), 0]  # the batch innermost
        inverse = [order.index(d) for d in range(dims)]
        permuted = args.map(lambda x, o=order, i=inverse: x.permute(o).contiguous().permute(i))
        found = as_tuple(case.op(**permuted.tensors, noise=key, **args.options))
        for y, w in zip(found, wanted, strict=True):
            if y.ndim == dims:
                assert_same_bits(y, w, case.name)


def test_noise_of_many_dimensions_that_all_have_elements() -> None:
    for dims in (17, 18):
        x = torch.randn([2] * dims).transpose(1, 2)
        for key in (PhiloxNoise(1), PhiloxNoise(1, sample_ids=torch.tensor([5, 3]))):
            wanted = ops.add_noise(x.contiguous(), key, 1.0, 0.5)
            assert_same_bits(ops.add_noise(x, key, 1.0, 0.5), wanted)
            out = torch.empty_like(x)
            assert_same_bits(ops.randn(x.shape, key, out=out), key.tensor(x.shape))


# ---- memory that was freed -----------------------------------------------------------------------


def freed(x: Tensor, offset: int) -> Tensor:
    """The same metadata as x, in storage that is freed, from some element on."""
    view = torch.zeros(x.numel() + offset, dtype=x.dtype)[offset:].view(x.shape)
    view.untyped_storage().resize_(0)
    return view


FREED = pytest.mark.parametrize("offset", [0, 1, 10, 900])


@FREED
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_freed_tensors_are_refused_by_name(case: OpCase, offset: int) -> None:
    def refuse(name: str, **changed: Any) -> None:
        args = case.make((4, 3), torch.float32)
        call = {**args.tensors, **args.options, **changed}
        for mode in (contextlib.nullcontext(), BaseTorchFunctionMode(), without_kernels()):
            with pytest.raises(ValueError, match=rf"^{name} must have memory"), mode:
                case.op(**call)

    args = case.make((4, 3), torch.float32)
    for name in read_by(case):
        if offset in (1, 10):
            refuse(name, **{name: freed(args.tensors[name], offset)})
    for name, value in args.options.items():
        if isinstance(value, Tensor):
            refuse(name, **{name: freed(value, offset)})
    if case.out:
        refuse("out", out=freed(torch.empty(4, 3), offset))


@FREED
def test_freed_parts_of_a_noise_key_are_refused_by_name(offset: int) -> None:
    x = torch.randn(4, 3)
    for name, part in (("seed", [1]), ("sample_ids", [1, 2, 3, 4]), ("stream", [2])):
        gone = freed(torch.tensor(part), offset)
        key = PhiloxNoise(gone) if name == "seed" else PhiloxNoise(1, **{name: gone})
        with pytest.raises(ValueError, match=f"^{name} must have memory"):
            ops.add_noise(x, key, 0.8, 0.6)


@FREED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_freed_coefficients_are_refused_before_torch_computes_with_them(
    offset: int, dtype: torch.dtype
) -> None:
    x, one = torch.randn(2, 3), torch.ones(2)
    gone = freed(torch.empty(2, dtype=dtype), offset)
    for name, call in {
        "sigma": lambda: ops.velocity(x, x, 0.7, gone),
        "alpha": lambda: ops.predict_x0(x, x, gone, one),
        "alpha_prev": lambda: ops.ddpm_step(x, x, 0.5, 0.5, gone, one),
        "sigma_prev": lambda: ops.ddim_step(x, x, 0.5, 0.5, 0.5, gone),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must have memory"):
            call()
    with pytest.raises(ValueError, match=r"^sigma must have memory"):
        ops.add_noise(x, x, 0.7, gone, return_target="v_prediction")
    with pytest.raises(ValueError, match=r"^alpha must have memory"):
        ops.add_noise(x, x, freed(torch.empty(()), offset), 0.5)
    with pytest.raises(ValueError, match=r"^sigma must have memory"):
        ops.denoising_loss(x, x, x, prediction_type="v_prediction", alpha=0.5, sigma=gone)


def test_a_tensor_that_begins_a_live_storage_is_read() -> None:
    args = BY_NAME["add_noise"].make((4, 3), torch.float32)
    x = torch.randn(40)[28:].view(4, 3)
    wanted = ops.add_noise(x.clone(), args.tensors["noise"], 0.8, 0.6)
    assert_same_bits(ops.add_noise(x, args.tensors["noise"], 0.8, 0.6), wanted)
