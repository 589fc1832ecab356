"""What the op tests share: judging the outputs of a case, and lists of what to judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise
from diffcore.testing import assert_within_bound
from support.cases import CASES, Arguments, OpCase, as_tuple

LOW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIXTEEN = (torch.bfloat16, torch.float16)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
each_elementwise_case = pytest.mark.parametrize(
    "case",
    # the others write sums only
    [case for case in CASES if case.elementwise],
    ids=lambda case: case.name,
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
each_low_dtype = pytest.mark.parametrize("dtype", LOW, ids=lambda d: str(d).split(".")[1])
each_16_bit = pytest.mark.parametrize("dtype", SIXTEEN, ids=lambda d: str(d).split(".")[1])


def check(
    case: OpCase, args: Arguments, actual: Any = None, *, run: Callable[..., Any] | None = None
) -> None:
    """The outputs of a case (or `actual`, or those of `run`) are within the bound."""
    if actual is None:
        actual = (run or case.native)(args)
    sides = (as_tuple(actual), as_tuple(case.eager(args)), as_tuple(case.truth(args)))
    for i, (a, e, t) in enumerate(zip(*sides, strict=True)):
        assert_within_bound(a, e, np.asarray(t), name=f"{case.name}, output {i}")


def with_noise(args: Arguments, noise: Tensor | PhiloxNoise) -> Arguments:
    """The same call with another noise, or a noise key for one."""
    return Arguments({**args.tensors, "noise": noise}, args.options)


def assert_law(case: OpCase, args: Arguments, key: PhiloxNoise) -> None:
    """An op gives the same bits for a noise key and for the tensor that it stands for."""
    like = args.tensors["noise"]
    noise = key.tensor(like.shape, dtype=like.dtype, device=like.device)
    drawn, read = (case.native(with_noise(args, n)) for n in (key, noise))
    assert_same_bits(drawn, read, f"{case.name}, {tuple(like.shape)}, {like.dtype}")


def check_stacked(trials: Sequence[tuple[Tensor, Tensor, Any]], name: str) -> None:
    """Judges many small results as one, so that eager's largest error is not one lucky number."""
    actual, eager, truth = zip(*trials, strict=True)
    assert_within_bound(
        torch.stack(actual), torch.stack(eager), np.stack([np.asarray(t) for t in truth]), name=name
    )


def outputs_and_gradients(
    case: OpCase,
    run: Callable[..., Any],
    args: Arguments,
    noise: Tensor | PhiloxNoise,
) -> tuple[Tensor, ...]:
    """What a case gives, and its gradient in every tensor but the noise, for a random upstream."""
    leaves = {
        n: x.detach().requires_grad_(n in case.differentiable) for n, x in args.tensors.items()
    }
    outputs = as_tuple(run(with_noise(Arguments(leaves, args.options), noise)))
    generator = torch.Generator().manual_seed(5)
    pairs = [(y, torch.randn(y.shape, generator=generator).to(y)) for y in outputs]
    pairs = [(y, g) for y, g in pairs if y.requires_grad]
    torch.autograd.backward(*zip(*pairs, strict=True))
    found = [x.grad for n, x in leaves.items() if n != "noise" and x.grad is not None]
    assert found
    return (*(y.detach() for y in outputs), *found)


def assert_same_bits(a: Any, b: Any, what: str = "") -> None:
    """Equal values, nan where nan, and zeros of the same sign."""
    for x, y in zip(as_tuple(a), as_tuple(b), strict=True):
        assert x.shape == y.shape, what
        assert x.dtype == y.dtype, what
        x, y = x.detach().cpu(), y.detach().cpu()
        same = (x == y) & (torch.signbit(x) == torch.signbit(y)) | (x.isnan() & y.isnan())
        assert same.all(), f"{what}: {int((~same).sum())} of {x.numel()} elements differ"
