"""The contestants of a benchmark, their inputs, and the check that comes before the timing."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffcore import testing
from support.cases import BY_NAME, Arguments, OpCase, as_tuple

from .machine import last_level_cache
from .timing import Call

__all__ = [
    "BY_NAME",
    "Arguments",
    "Compiler",
    "Contest",
    "OpCase",
    "WrongResultError",
    "as_tuple",
    "check_outputs",
    "copy_calls",
    "make_inputs",
]

MODES = ("forward", "forward+backward")

# The gradient of a clip jumps: where rounding alone decides the side, no bound on the error holds.
_UNDECIDED = 2e-6

_MAX_SETS = 8
_MAX_FAILURES = 3
_DRAWN = 8


class WrongResultError(AssertionError):
    """A contestant's output is further from the truth than rounding explains: it is not timed."""


def make_inputs(
    case: OpCase, shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Arguments:
    """Random arguments; a large batch repeats its first samples, for the host draws slowly.

    Args:
        case: what is called.
        shape: of the elementwise tensors.
        dtype: of the same tensors.
        device: of the same tensors.
        seed: of the draw.
    """
    batch, *rest = shape
    drawn = min(batch, _DRAWN)
    some = case.make((drawn, *rest), dtype, device, seed=seed)
    copies = math.ceil(batch / drawn)
    tensors = {
        name: x.repeat(copies, *(1 for _ in rest))[:batch].contiguous()
        for name, x in some.tensors.items()
    }
    return Arguments(tensors, Arguments({}, case.options(batch)).to(device).options)


def input_sets(case: OpCase, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> int:
    """How many sets of inputs keep a CPU's cache cold; one on CUDA, where the cache is flushed."""
    if device.type != "cpu":
        return 1
    size = math.prod(shape) * dtype.itemsize * len(case.tensors)
    return max(1, min(_MAX_SETS, math.ceil(4 * last_level_cache() / max(size, 1))))


# ---- the contestants ------------------------------------------------------------------------


def bound(function: Callable[..., Any], *leading: Any, **given: Any) -> Call:
    """A call without arguments left, made of positional arguments, which cost the least."""
    call = inspect.signature(function).bind(*leading, **given)
    return partial(function, *call.args, **call.kwargs)


def _mean(forward: Call) -> Tensor:
    """What is done with a number for each sample: its mean over the batch is what one minimises."""
    numbers: Any = forward()
    mean: Tensor = numbers.mean()
    return mean


def _step(forward: Call, leaves: Sequence[Tensor], upstream: Sequence[Tensor]) -> Any:
    """Forward and backward; gradients are returned, not accumulated; None for an unused input."""
    return torch.autograd.grad(as_tuple(forward()), leaves, upstream, allow_unused=True)


@dataclass
class Contest:
    """One op on some sets of inputs, forward or forward and backward."""

    case: OpCase
    mode: str
    sets: list[Arguments]
    eager: list[Call] = field(init=False)
    diffcore: list[Call] = field(init=False)

    def __post_init__(self) -> None:
        if self.mode != "forward":
            for args in self.sets:
                for name in self.case.differentiable:
                    args.tensors[name].requires_grad_()
        given = [{**args.tensors, **args.options} for args in self.sets]
        self.diffcore = self.calls([bound(self.case.op, **g) for g in given])
        self.eager = self.calls([bound(self.case.formula, torch, **g) for g in given])

    def calls(self, forwards: Sequence[Call]) -> list[Call]:
        """One forward call for each set of inputs, made into what is timed."""
        if self.mode == "forward":
            return list(forwards)
        found: list[Call] = []
        for forward, args in zip(forwards, self.sets, strict=True):
            leaves = [args.tensors[name] for name in self.case.differentiable]
            outputs = as_tuple(forward())
            whole = forward
            if len(outputs) == 1 and outputs[0].ndim == 1 < leaves[0].ndim:
                whole = partial(_mean, forward)
                outputs = (whole(),)
            found.append(partial(_step, whole, leaves, _upstream(outputs)))
        return found

    def into(self) -> list[Call]:
        """The diffcore calls with ``out=``: what is left of them without allocating."""
        given = [{**args.tensors, **args.options} for args in self.sets]
        outs = [torch.empty_like(next(iter(args.tensors.values()))) for args in self.sets]
        return [bound(self.case.op, **g, out=out) for g, out in zip(given, outs, strict=True)]

    def truth(self) -> tuple[Tensor, ...]:
        """The eager formula in float64 on the first set of inputs: what is checked against."""
        args = self.sets[0].map(lambda x: x.detach().double())
        outputs: tuple[Tensor, ...] = as_tuple(Contest(self.case, self.mode, [args]).eager[0]())
        return outputs


def _upstream(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients from above: the same numbers for every contestant, in the dtype of its outputs.

    One number is what ``.backward()`` is called on: its gradient is 1.
    """
    found = []
    for output in outputs:
        if output.ndim == 0:
            found.append(torch.ones_like(output))
            continue
        generator = torch.Generator(device=output.device).manual_seed(1)
        g = torch.randn(output.shape, generator=generator, device=output.device)
        # Rounded to bfloat16, so that every dtype gets exactly the same.
        found.append(g.bfloat16().to(output.dtype))
    return found


class Compiler:
    """``torch.compile`` of the eager formula, as long as a budget of seconds lasts.

    Args:
        seconds: Of compiling; 0 for no such baseline.
        note: Takes what the tables have to say.
    """

    def __init__(self, seconds: float, note: Callable[[str], None]) -> None:
        self.seconds = self.left = seconds
        self.note = note
        self.failures = 0

    def calls(self, contest: Contest) -> list[Call] | None:
        """The compiled calls, compiled and called once; None when there is no such baseline.

        Args:
            contest: whose formula; forward and backward are compiled for exactly its shapes.
        """
        if self.left <= 0 or self.failures >= _MAX_FAILURES:
            if self.seconds > 0 >= self.left:
                limit = f"its {self.seconds:g} s were over (--compile-seconds)"
                self.note(f"torch.compile takes part in the first rows only: {limit}")
            return None
        torch.compiler.reset()
        case = contest.case
        given = [{**args.tensors, **args.options} for args in contest.sets]
        # Tensors are inputs of the graph, everything else is a constant in it.
        constants = {k: v for k, v in given[0].items() if not isinstance(v, Tensor)}

        def formula(**tensors: Tensor) -> Any:
            return case.formula(torch, **tensors, **constants)

        compiled = torch.compile(formula, fullgraph=True, dynamic=False)
        start = time.perf_counter()
        try:
            tensors = [{k: v for k, v in g.items() if isinstance(v, Tensor)} for g in given]
            calls = contest.calls([partial(compiled, **t) for t in tensors])
            calls[0]()
        except Exception as error:  # whatever the compiler dies of, the others go on
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            self.note(f"torch.compile failed on {case.name}, {contest.mode}: {reason}")
            self.failures += 1
            return None
        finally:
            self.left -= time.perf_counter() - start
        return calls


def copy_calls(nbytes: int, sets: int, device: torch.device) -> list[Call]:
    """Copies that read and write `nbytes` in total: the roof for whatever memory bounds."""
    n = max(1, nbytes // 8)
    pairs = [(torch.zeros(n, device=device), torch.ones(n, device=device)) for _ in range(sets)]
    return [partial(target.copy_, source) for target, source in pairs]


# ---- the check ------------------------------------------------------------------------------


def _ulp(true: Tensor, dtype: torch.dtype) -> Tensor:
    """As diffcore.testing has it, but on the device: its longdouble takes minutes at this size."""
    limits = torch.finfo(dtype)
    _, exponent = torch.frexp(true)
    ulp = torch.ldexp(torch.full_like(true, limits.eps), exponent - 1)
    return ulp.clamp(min=limits.smallest_normal * limits.eps)


def check_outputs(
    name: str,
    found: Sequence[Tensor | None],
    eager: Sequence[Tensor | None],
    truth: Sequence[Tensor | None],
    *,
    undecided: float = 0.0,
    whole: bool = False,
) -> float:
    """Refuses a result further from float64 than twice eager torch is, plus one ulp.

    Of a single number eager torch is taken to be an ulp off at least.

    Args:
        name: of the contestant, for the message.
        found: its outputs.
        eager: eager torch's, in the dtype of the inputs.
        truth: the same in float64.
        undecided: the share of elements allowed outside, for gradients of a clip.
        whole: judge the root mean square of a tensor, not each element: for what has been through
            many steps or layers, where eager is now and then exact by luck.

    Returns:
        The largest error over what is allowed, 1 at the bound.

    Raises:
        WrongResultError: beyond the bound, not finite where the truth is, or of another shape.
    """
    worst = 0.0
    for i, outputs in enumerate(zip(found, eager, truth, strict=True)):
        known = next((x for x in outputs if x is not None), None)
        if known is None:
            continue
        # No gradient is a gradient of zero.
        got, plain, true = (torch.zeros_like(known) if x is None else x for x in outputs)
        if got.shape != true.shape:
            raise WrongResultError(f"{name}: output {i} is {[*got.shape]}, not {[*true.shape]}")
        true = true.detach().double()
        error = (got.detach().double() - true).abs().nan_to_num(math.inf)
        eager_error = (plain.detach().double() - true).abs()
        eager_error = eager_error[eager_error.isfinite()]
        if not eager_error.numel():  # eager's float16 sum overflowed: an ulp is the least it is off
            eager_error = _ulp(true, plain.dtype)
        ulp = _ulp(true, got.dtype)
        if whole:
            error, eager_error, ulp = (x.square().mean().sqrt() for x in (error, eager_error, ulp))
        if got.numel() == 1:  # eager may be right by luck
            eager_error = torch.maximum(eager_error, ulp)
        allowed = testing.FACTOR * eager_error.max()
        ratio = error / (allowed + ulp)
        outside = int((ratio > 1).sum())
        if outside > undecided * ratio.numel():
            raise WrongResultError(
                f"{name}: output {i} is wrong at {outside} of {ratio.numel()} elements, by up to "
                f"{float(error.max()):.3g}; twice eager torch's largest error: {float(allowed):.3g}"
            )
        worst = max(worst, float(ratio.max()) if outside == 0 else 1.0)
    return worst


def check_contest(contest: Contest, others: Mapping[str, Call]) -> dict[str, float]:
    """Checks the first call of diffcore and of others against the truth, see `check_outputs`.

    Args:
        contest: whose truth.
        others: more contestants, by name.

    Returns:
        For each, its largest error over what is allowed.
    """
    truth = contest.truth()
    eager = as_tuple(contest.eager[0]())
    clips = any(name in contest.sets[0].options for name in ("clip_range", "coefficients"))
    undecided = _UNDECIDED if clips and contest.mode != "forward" else 0.0
    return {
        name: check_outputs(name, as_tuple(call()), eager, truth, undecided=undecided)
        for name, call in {"diffcore": contest.diffcore[0], **others}.items()
    }
