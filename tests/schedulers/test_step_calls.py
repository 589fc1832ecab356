"""What surrounds a fused step: waiting for the device, the compiler, gradients."""

from __future__ import annotations

import inspect
from collections import Counter
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

diffusers = pytest.importorskip("diffusers")

from diffcore.diffusers import fuse  # noqa: E402
from diffcore.diffusers.registry import FAMILIES  # noqa: E402
from support.schedulers import configured, make_steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

each_scheduler = pytest.mark.parametrize("stock", FAMILIES, ids=lambda stock: stock.__name__)
# What reads numbers of a tensor, which is where CUDA waits.
READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"}
COPIES = {"cpu", "to", "tolist", "item", "numpy", "__array__", "nonzero"}
COPIES |= {"__bool__", "__int__", "__float__", "__index__", "__iter__"}


def start(shape: tuple[int, ...] = (2, 4, 8, 8)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def draws(scheduler: Any) -> dict[str, Any]:
    names = inspect.signature(scheduler.step).parameters
    return {"generator": torch.Generator().manual_seed(1)} if "generator" in names else {}


def seen_by_the_model(scheduler: Any, x: Tensor, t: Tensor) -> Tensor:
    scale = getattr(scheduler, "scale_model_input", None)
    return x if scale is None else scale(x, t)


class Reading(TorchDispatchMode):
    """Counts the operators that read numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        self.found.update([name] if name in READS else [])
        return func(*args, **(kwargs or {}))


class OnDevice(Tensor):
    """A tensor that stands for one on a device: it counts what would copy it to the host."""

    copied: ClassVar[Counter[str]] = Counter()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        found = super().__torch_function__(func, types, args, kwargs)
        if name not in COPIES:
            return found
        cls.copied.update([name])
        return found.as_subclass(Tensor) if isinstance(found, Tensor) else found


@pytest.mark.parametrize("noise", ["generator", "philox"])
@each_scheduler
def test_a_step_reads_no_tensor(stock: Any, noise: str) -> None:
    """From the second step on, neither do operators that the first needs for its table."""
    scheduler = fuse(configured(stock), noise=noise)
    timesteps = make_steps(scheduler, 5)
    x, given = start(), draws(scheduler)
    for i, t in enumerate(timesteps):
        output = torch.tanh(seen_by_the_model(scheduler, x, t))
        with Reading() as reading:
            x = scheduler.step(output, t, x, **given).prev_sample
        assert i == 0 or not reading.found, (i, reading.found)
    assert not scheduler.fallbacks


def test_the_count_sees_a_stock_step_read() -> None:
    scheduler = diffusers.DDPMScheduler()
    make_steps(scheduler, 5)
    with Reading() as reading:
        scheduler.step(start(), scheduler.timesteps[0], start(), **draws(scheduler))
    assert reading.found["is_nonzero"] + reading.found["_local_scalar_dense"] > 0


@each_scheduler
def test_the_first_step_copies_no_timestep_to_the_host(stock: Any) -> None:
    """The table is made of copies that ``set_timesteps`` has left there."""
    scheduler = fuse(configured(stock))
    make_steps(scheduler, 5)
    scheduler.timesteps = scheduler.timesteps.as_subclass(OnDevice)
    scheduler._fusion.walk = None
    scheduler._walk()  # what set_timesteps does
    t = scheduler.timesteps[0]
    assert isinstance(t, OnDevice)
    x = start()
    output = torch.tanh(seen_by_the_model(scheduler, x, t))
    assert OnDevice.copied
    OnDevice.copied.clear()
    scheduler.step(output, t, x, **draws(scheduler))
    assert not OnDevice.copied
    assert not scheduler.fallbacks


@each_scheduler
def test_a_compiled_loop_around_the_step(stock: Any) -> None:
    """With batches of several sizes, for which a trace of the step would have to be made anew."""
    scheduler = fuse(configured(stock))

    def loop(x: Tensor, timesteps: Tensor) -> Tensor:
        for t in timesteps:
            x = scheduler.step(torch.tanh(seen_by_the_model(scheduler, x, t)), t, x).prev_sample
        return x

    compiled = torch.compile(loop, backend="eager")
    for batch in (2, 3, 5):
        found = []
        for run in (loop, compiled):
            timesteps = make_steps(scheduler, 4)
            torch.manual_seed(0)
            found.append(run(start((batch, 4, 8, 8)), timesteps))
        torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    assert not scheduler.fallbacks


@each_scheduler
def test_a_step_is_differentiable_as_the_stock_one(stock: Any) -> None:
    def gradients(scheduler: Any) -> list[Tensor]:
        timesteps = make_steps(scheduler, 5)
        leaves = [start().requires_grad_(), torch.tanh(start()).requires_grad_()]
        # The first step of IPNDM divides by 1e-8 in diffusers, and its gradient cancels to 0.
        first = 1 if isinstance(scheduler, diffusers.IPNDMScheduler) else 0
        x, given, total = leaves[0], draws(scheduler), torch.zeros(())
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        for t in timesteps[first : first + 3]:
            output = leaves[1] * seen_by_the_model(scheduler, x, t)
            x = scheduler.step(output, t, x, **given).prev_sample
            total = total + (x * upstream).sum()
        return list(torch.autograd.grad(total, leaves))

    scheduler = fuse(configured(stock))
    for ours, theirs in zip(gradients(scheduler), gradients(configured(stock)), strict=True):
        assert float(theirs.abs().max()) > 0
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)
    assert not scheduler.fallbacks
