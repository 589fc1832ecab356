"""normal_kl of numbers and of shapes that broadcast, as guided-diffusion's normal_kl takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import ops
from diffcore.testing import assert_within_bound
from support import emulated, formulas
from support.bounds import assert_same_bits

NAMES = ("mean1", "logvar1", "mean2", "logvar2")
SHAPES: dict[str, tuple[Any, ...]] = {
    "standard normal": ((4, 3, 5), (4, 3, 5), 0.0, 0.0),
    "standard normal, ints": ((4, 3, 5), (4, 3, 5), 0, 0),
    "one number": ((4, 3, 5), (4, 3, 5), (4, 3, 5), -0.7),
    "numbers first": (0.25, -1, (4, 3, 5), (4, 3, 5)),
    "one tensor": (0.25, (4, 3), 0.5, 0.1),
    "0-dim": ((4, 3, 5), (), (4, 3, 5), ()),
    "channels": ((4, 3, 5), (3, 1), (4, 1, 1), (1, 3, 5)),
    "first is smaller": ((5,), (4, 3, 5), (4, 3, 5), (4, 3, 5)),
    "ranks": ((3, 5), (4, 3, 5), 0.0, 0.0),
    "transposed": ("t", "t", (3,), 0.0),
}


def textbook(mean1: Any, logvar1: Any, mean2: Any, logvar2: Any) -> Tensor:
    numbers = [torch.as_tensor(x, dtype=torch.float64) for x in (logvar1, logvar2)]
    l1, l2 = numbers
    return 0.5 * (-1.0 + l2 - l1 + torch.exp(l1 - l2) + (mean1 - mean2) ** 2 * torch.exp(-l2))


def arguments(shapes: tuple[Any, ...], dtype: torch.dtype = torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(3)

    def make(shape: Any) -> Any:
        if shape == "t":
            return torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype).t()
        if not isinstance(shape, tuple):
            return shape
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [make(s) for s in shapes]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_of_the_textbook(shapes: tuple[Any, ...]) -> None:
    found, wanted = arguments(shapes), arguments(shapes)
    results = []
    for args, f in ((found, ops.normal_kl), (wanted, textbook)):
        for x in args:
            if isinstance(x, Tensor):
                x.requires_grad_()
        y = f(*args)
        (y * torch.arange(1.0, y.numel() + 1, dtype=y.dtype).reshape(y.shape)).sum().backward()
        results.append(y)
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)
    for x, w in zip(found, wanted, strict=True):
        if isinstance(x, Tensor):
            assert x.grad.shape == x.shape
            torch.testing.assert_close(x.grad, w.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "sample", "batchmean", "mean", "sum"])
def test_broadcasting_gives_the_bits_of_expanded_tensors(
    shapes: tuple[Any, ...], dtype: torch.dtype, reduction: str
) -> None:
    args = arguments(shapes, dtype)
    full = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=dtype) for x in args))
    full = [x.contiguous() for x in full]
    found = ops.normal_kl(*args, reduction=reduction)
    if not any(isinstance(x, Tensor) or x for x in args[2:]):
        wanted = ops.standard_normal_kl(*full[:2], reduction=reduction)
    else:
        wanted = ops.normal_kl(*full, reduction=reduction)
    if emulated.ACTIVE and found.ndim == 0:  # CUDA adds in the order of memory
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    else:
        assert_same_bits(found, wanted)


def test_numbers_are_within_the_bound_in_float32() -> None:
    mean, logvar = arguments(((64, 65), (64, 65)), torch.float32)
    truth = textbook(mean.double(), logvar.double(), 0.5, -0.3)
    eager = formulas.normal_kl(torch, mean, logvar, torch.tensor(0.5), torch.tensor(-0.3))
    assert_within_bound(ops.normal_kl(mean, logvar, 0.5, -0.3), eager, truth)


def test_equal_shapes_take_one_launch_and_the_standard_normal_another(launched: list[str]) -> None:
    x, y = torch.randn(2, 4, 3)
    ops.normal_kl(x, y, y, x)
    ops.normal_kl(x, y, 0.0, 0.0, reduction="sample")
    assert launched == ["normal_kl", "standard_normal_kl_sum"]


def test_compile_with_numbers() -> None:
    torch._dynamo.reset()
    x, y = torch.randn(2, 4, 3)
    f = torch.compile(lambda m, v: ops.normal_kl(m, v, 0.5, v[:1]), fullgraph=True, backend="eager")
    assert_same_bits(f(x, y), ops.normal_kl(x, y, 0.5, y[:1]))


@pytest.mark.parametrize("place", range(4))
def test_the_wrong_argument_is_named(place: int) -> None:
    x = torch.randn(4, 3)
    name = NAMES[place]
    for bad in ([1.0], "0", None, True):
        args: list[Any] = [x] * 4
        args[place] = bad
        with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor or a number, got"):
            ops.normal_kl(*args)
    args = [0.0] * 4
    with pytest.raises(TypeError, match="got only numbers"):
        ops.normal_kl(*args)
    if place:
        for kind, bad in (
            (ValueError, torch.randn(4, 2)),
            (TypeError, torch.ones(4, 1, dtype=torch.int64)),
            (ValueError, torch.randn(4, 1, device="meta")),
        ):
            args = [x] * 4
            args[place] = bad
            with pytest.raises(kind, match=f"^{name} must"):
                ops.normal_kl(*args)
