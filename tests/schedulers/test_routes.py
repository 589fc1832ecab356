"""A fused step under the modes that a program may be in: autocast, default devices, compilation."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse  # noqa: E402
from diffcore.diffusers.registry import FAMILIES  # noqa: E402
from support.fused import takes_generator  # noqa: E402
from support.schedulers import configured, make_steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

each_scheduler = pytest.mark.parametrize("stock", FAMILIES, ids=lambda stock: stock.__name__)
STEPS = 4


def start(batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((batch, 4, 8, 8), generator=generator, device="cpu", dtype=torch.float32)


def three_steps(scheduler: Any, x: Tensor) -> Tensor:
    given = {"generator": torch.Generator().manual_seed(1)} if takes_generator(scheduler) else {}
    for t in scheduler.timesteps[: STEPS - 1]:
        seen = x
        if hasattr(scheduler, "scale_model_input"):
            seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(torch.tanh(seen), t, x, **given).prev_sample
    return x


def walked(stock: Any, mode: AbstractContextManager[Any]) -> Tensor:
    scheduler = fuse(configured(stock))
    make_steps(scheduler, STEPS)
    with mode:
        x = three_steps(scheduler, start())
    assert not scheduler.fallbacks, scheduler.fallbacks
    return x


@contextmanager
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "default device": lambda: torch.device("meta"),
    "default dtype": double_by_default,
}


@pytest.mark.parametrize("mode", MODES)
@each_scheduler
def test_a_mode_changes_no_bit(stock: Any, mode: str) -> None:
    if (stock.__name__, mode) == ("SCMScheduler", "default dtype"):
        pytest.skip("diffusers draws its noise in the default dtype, and so does the fused step")
    wanted = walked(stock, torch.enable_grad())
    found = walked(stock, MODES[mode]())
    assert found.dtype == wanted.dtype
    assert torch.equal(found, wanted)


class Named(Tensor):
    """A subclass without rules of its own."""


@each_scheduler
def test_a_subclass_of_tensor(stock: Any) -> None:
    found = []
    for kind in (Tensor, Named):
        scheduler = fuse(configured(stock))
        make_steps(scheduler, STEPS)
        found.append(three_steps(scheduler, start().as_subclass(kind)))
        assert type(found[-1]) is kind
        assert not scheduler.fallbacks
    assert torch.equal(found[0], found[1].as_subclass(Tensor))


@each_scheduler
def test_the_next_batch_has_another_size(stock: Any) -> None:
    """The walk of one size leaves nothing to that of the next."""
    scheduler = fuse(configured(stock))
    for batch in (2, 3, 1):
        found = []
        for _ in range(2):
            make_steps(scheduler, STEPS)
            found.append(three_steps(scheduler, start(batch)))
        assert torch.equal(*found)
        assert found[0].shape[0] == batch


@each_scheduler
def test_the_signature_is_the_stock_one(stock: Any) -> None:
    fused = fuse(configured(stock))
    assert inspect.signature(fused.step) == inspect.signature(configured(stock).step)
    assert type(fused).step.__doc__ == stock.step.__doc__


@each_scheduler
def test_the_stock_step_says_what_is_wrong_with_the_arguments(stock: Any) -> None:
    def raised(scheduler: Any, *args: Any, **kwargs: Any) -> str:
        make_steps(scheduler, STEPS)
        with pytest.raises(TypeError) as caught:
            scheduler.step(*args, **kwargs)
        return str(caught.value)

    x, t = start(), 1
    many = len(inspect.signature(configured(stock).step).parameters) + 1
    for args, kwargs in (
        ((x, t), {}),
        ((x, t, x), {"sample": x}),
        ((x, t, x), {"etta": 0.5}),
        ((x,) * many, {}),
    ):
        wanted = raised(configured(stock), *args, **kwargs)
        assert raised(fuse(configured(stock)), *args, **kwargs) == wanted


@each_scheduler
def test_arguments_by_position_and_by_name(stock: Any) -> None:
    found = []
    for by_name in (False, True):
        scheduler = fuse(configured(stock))
        t, *_ = make_steps(scheduler, STEPS)
        x = start()
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        names = list(inspect.signature(scheduler.step).parameters.values())
        given = {"model_output": torch.tanh(x), "timestep": t, "sample": x}
        given |= {p.name: p.default for p in names if p.default is not p.empty}
        torch.manual_seed(1)
        result = scheduler.step(**given) if by_name else scheduler.step(*given.values())
        found.append(result.prev_sample)
        assert not scheduler.fallbacks
    assert torch.equal(*found)
