"""Walks of diffusers' schedulers: stock, fused, and stock in float64 for the truth."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
# Held by schedulers in float32: the levels, which are what the two have in common.
_LEVELS = (
    "sigmas",
    "sigmas_interpol",
    "sigmas_down",
    "sigmas_up",
    "alphas_cumprod",
    "final_alpha_cumprod",
    "one",
    "alphas",
    "betas",
)


_OPTIONS = {"PNDMScheduler": {"skip_prk_steps": True}}


def configured(stock: Any, **options: Any) -> Any:
    """A scheduler with options that have a table.

    Args:
        stock: Its class.
        **options: Others.
    """
    return stock(**{**_OPTIONS.get(stock.__name__, {}), **options})


def make_steps(scheduler: Any, count: int) -> Tensor:
    """``set_timesteps``, and the timesteps to take: the last one of sCM is the end of its walk."""
    if "intermediate_timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(count, intermediate_timesteps=None)
        ends: Tensor = scheduler.timesteps[:-1]
        return ends
    scheduler.set_timesteps(count)
    times: Tensor = scheduler.timesteps
    return times


class Taken(NamedTuple):
    """What a step returned."""

    x: Tensor
    x0: Tensor | None


def bent(x: Tensor, t: Any) -> Tensor:
    """A model that is neither linear nor even, so that every coefficient shows."""
    return torch.tanh(x) * 0.7 + 0.2 * torch.cos(3 * x) * (float(t) + 1) / (float(t) + 300)


class _Torch64:
    """The module torch with float64 under the name of float32."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_float64(scheduler: Any, drawn_in: torch.dtype) -> Iterator[None]:
    """Makes the steps of a stock scheduler compute in float64, with noise rounded as it would be.

    Args:
        scheduler: With its timesteps set; its levels become float64 tensors of the same values.
        drawn_in: The dtype in which noise is drawn.
    """
    module = sys.modules[type(scheduler).__module__]
    draw = getattr(module, "randn_tensor", None)
    for name in _LEVELS:
        value = getattr(scheduler, name, None)
        if isinstance(value, Tensor):
            setattr(scheduler, name, value.double())

    def drawn(*args: Any, **kwargs: Any) -> Tensor:
        noise: Tensor = draw(*args, **{**kwargs, "dtype": drawn_in})
        return noise.double()

    original = module.torch
    module.torch = _Torch64()
    if draw is not None:
        module.randn_tensor = drawn
    try:
        yield
    finally:
        module.torch = original
        if draw is not None:
            module.randn_tensor = draw


def walk(
    scheduler: Any,
    x: Tensor,
    model: Callable[[Tensor, Any], Tensor] = bent,
    timesteps: Tensor | None = None,
    **options: Any,
) -> list[Taken]:
    """All steps of a scheduler, as a pipeline takes them.

    Args:
        scheduler: With its timesteps set.
        x: What to start from, before ``init_noise_sigma``.
        model: Predicts from the scaled sample and the timestep.
        timesteps: Those to take; all by default.
        **options: Of ``step``.

    Returns:
        What each step returned.
    """
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    taken = []
    for t in scheduler.timesteps if timesteps is None else timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        result = scheduler.step(model(seen, t), t, x, **options)
        taken.append(_taken(result))
        x = taken[-1].x
    return taken


class Errors(NamedTuple):
    """Largest distances to float64 over a walk, in units of the bound's parts.

    Attributes:
        ours: Of the fused steps.
        stock: Of the stock ones.
        largest: The largest value of a step.
        given: The largest value that it was given, of which little may be left.
    """

    ours: float
    stock: float
    largest: float
    given: float


def step_errors(
    make: Callable[[], Any],
    steps: Any,
    *,
    dtype: torch.dtype = torch.float32,
    drawn_in: torch.dtype | None = None,
    start: int = 0,
    stop: int | None = None,
    shape: tuple[int, ...] = (4, 4, 16, 16),
    fused: Callable[[Any], Any] | None = None,
    **options: Any,
) -> list[tuple[Errors, Errors | None]]:
    """Errors of the stock and of the fused steps, each from the same samples.

    A scheduler in float64 walks; at every step the other two get its sample and its model output,
    rounded to their dtype, and so does it.

    Args:
        make: Makes the stock scheduler.
        steps: How many steps, or the keyword arguments of ``set_timesteps``.
        dtype: Of samples and model outputs.
        drawn_in: The dtype of the noise; ``dtype`` by default.
        start: The first step to take, as img2img does.
        stop: Before which step to end, as for a slice; by default after the last.
        shape: Of the samples: many, for the largest of few errors is a matter of luck.
        fused: Makes the fused scheduler of a stock one; ``fuse`` by default.
        **options: Of ``step``.

    Returns:
        For each step the errors of ``prev_sample``, and of ``pred_original_sample`` or ``None``.
    """
    from diffcore.diffusers import fuse

    schedulers = [make() for _ in range(3)]
    (fused or fuse)(schedulers[2])
    counts = steps if isinstance(steps, dict) else {"num_inference_steps": steps}
    for scheduler in schedulers:
        scheduler.set_timesteps(**counts)
        if start and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
    draws = [torch.Generator().manual_seed(3) for _ in schedulers]
    generators = [{"generator": g} if "generator" in _names(schedulers[0]) else {} for g in draws]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x * float(getattr(schedulers[0], "init_noise_sigma", 1.0))
    found = []
    for i in range(len(schedulers[0].timesteps))[start:stop]:
        given = x.to(dtype)
        seen = given.double()
        for scheduler in schedulers:
            if hasattr(scheduler, "scale_model_input"):
                scaled = scheduler.scale_model_input(given.double(), scheduler.timesteps[i])
                seen = scaled if scheduler is schedulers[0] else seen
        output = bent(seen, schedulers[0].timesteps[i]).to(dtype)
        with in_float64(schedulers[0], drawn_in or dtype):
            truth, *_ = _take(
                schedulers[:1], i, output.double(), given.double(), generators, options
            )
        stock, ours = _take(schedulers[1:], i, output, given, generators[1:], options)
        size = float(given.abs().max())
        pairs = ((truth.x, stock.x, ours.x), (truth.x0, stock.x0, ours.x0))
        of_x, of_x0 = (_errors(*pair, size) for pair in pairs)
        found.append((of_x, of_x0))
        x = truth.x
    states = [g.get_state() for g in draws]
    assert torch.equal(states[1], states[2]), "the fused steps drew other noise"
    assert not schedulers[2].fallbacks, schedulers[2].fallbacks
    return found


def within_bound(
    errors: list[tuple[Errors, Errors | None]],
    dtype: torch.dtype,
    sizes: Sequence[float] = (),
    stock_sizes: Sequence[float] = (),
) -> None:
    """No step is further from float64 than twice the stock error and one rounding.

    Args:
        errors: Of ``step_errors``.
        dtype: Of the samples.
        sizes: For each step, how large the terms are that its row adds, in units of their sum.
        stock_sizes: The same for the sum that diffusers takes.
    """
    unit = torch.finfo(dtype).eps
    for i, step in enumerate(errors):
        for name, found in zip(("prev_sample", "pred_original_sample"), step, strict=True):
            if found is not None:
                size = sizes[i] if sizes else 1.0
                limit = 2 * found.stock + unit * found.largest * size
                assert found.ours <= limit, f"{name} of step {i}: {found} over {limit:.3g}"
                # Steps that follow another rule would widen the bound: the stock error is rounding.
                most = 64 * unit * max(found.largest, found.given, 1)
                assert found.ours <= most * size, f"{name}, step {i}: {found}"
                known = stock_sizes[i] if stock_sizes else 1
                assert found.stock <= most * known, f"{name}, step {i}: {found}"


def _take(
    schedulers: list[Any],
    i: int,
    output: Tensor,
    sample: Tensor,
    generators: list[dict[str, Any]],
    options: dict[str, Any],
) -> list[Taken]:
    taken = []
    for scheduler, generator in zip(schedulers, generators, strict=False):
        result = scheduler.step(output, scheduler.timesteps[i], sample, **options, **generator)
        taken.append(_taken(result))
    return taken


def _taken(result: Any) -> Taken:
    """``prev_sample``, and what else there is: x_0, or what a scheduler has in its place."""
    x, x0, *_ = (*result.to_tuple(), None)
    return Taken(x, x0)


def _names(scheduler: Any) -> Any:
    return inspect.signature(scheduler.step).parameters


def _errors(truth: Any, stock: Any, ours: Any, given: float) -> Any:
    if truth is None:
        return None
    far = [float((x.double() - truth).abs().max()) for x in (ours, stock)]
    return Errors(*far, float(truth.abs().max()), given)
