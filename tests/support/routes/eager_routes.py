"""The routes without a compiler: transforms, modes, dtypes, threads and copies."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from support.routes.case import Call, Case, Function
from support.routes.derivatives import (
    backward_twice,
    jacobian,
    jacobian_by_fwd,
    jacobian_by_rev,
    second_by_func,
    second_derivative,
    second_of_reference,
)
from support.routes.mixed_dtypes import (
    check_rounding_model,
    mixed,
    several_tensors,
    torchs_generator,
)
from support.routes.route import (
    MANY,
    SMALL,
    TRANSFORMS,
    WIDE,
    Route,
    Tensors,
    Through,
    by_backward,
    by_func_grad,
    close,
    differentiable,
    gradients,
    leaves,
    same_bits,
    scalar,
    seed,
    slope,
    slope_by_duals,
    slope_by_jvp,
    truth_of,
    values,
)

PLAIN = "plain"
TRANSFORM = "transforms"
MODE = "modes"
DTYPE = "dtypes"
TRACE = "tracing"
COPY = "copies, threads"


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    """A subclass without a dispatch of its own: what torch's defaults make of it."""


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast(dtype: torch.dtype) -> Callable[[], Any]:
    return lambda: torch.autocast("cpu", dtype)


MODES: dict[str, Callable[[], Any]] = {
    "function mode": Functions,
    "dispatch mode": Dispatches,
    "set_default_device": lambda: default_device("cpu"),
    "torch.device(meta)": lambda: torch.device("meta"),
}
SETTINGS: dict[str, Callable[[], Any]] = {
    "deterministic": deterministic,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "autocast bfloat16": autocast(torch.bfloat16),
    "autocast float16": autocast(torch.float16),
}


# ---- plain ------------------------------------------------------------------------------------


def check_vmap(case: Case) -> None:
    """A stack of calls, and a stack of gradients, against one call after another."""
    calls = [case.make(SMALL, torch.float64, seed=i) for i in range(3)]
    subject = case.subject()
    f = calls[0].of_tensors(subject)
    stacked = tuple(map(torch.stack, zip(*(c.values for c in calls), strict=True)))
    if not stacked:
        return
    seed()
    found = torch.vmap(f, randomness="same")(*stacked)
    for i, call in enumerate(calls):
        wanted = values(f, call)
        close(tuple(y[i] for y in found), wanted, f"{case.name}, vmap")
    if case.differentiable:
        given = tuple(map(torch.stack, zip(*map(differentiable, calls), strict=True)))
        rest = Call(case, calls[0].tensors, calls[0].others)
        grad = torch.func.grad(scalar(f, rest), tuple(range(len(given))))
        each = torch.vmap(grad, randomness="same")(*given)
        for i, call in enumerate(calls):
            tensors = dict(rest.tensors) | {
                n: call.tensors[n] for n in case.tensors if n in case.differentiable
            }
            wanted = by_backward(f, Call(case, tensors, rest.others))
            close(tuple(g[i] for g in each), wanted, f"{case.name}, vmap of grad")


# ---- modes ------------------------------------------------------------------------------------


def without_gradient(context: Callable[[], Any]) -> Callable[[Case], None]:
    """Checks that values are the same and no graph is made, and that training goes on after it."""

    def check(case: Case) -> None:
        call = case.make(WIDE, torch.float32)
        wanted = truth_of(case, values, WIDE, torch.float32)
        subject = case.subject()
        f = call.of_tensors(subject)
        given = leaves(call)
        for when in ("cold", "warm"):
            seed()
            with context():
                found = f(*given)
            assert not any(y.requires_grad for y in found)
            same_bits(found, wanted, f"{case.name}, {when}")
        measure = gradients if case.differentiable else values
        same_bits(measure(f, call)[: len(wanted)], wanted, f"{case.name}, trained afterwards")

    return check


def ended_before_backward(context: Callable[[], Any]) -> Callable[[Function], Function]:
    """The forward pass under a mode that has ended when the backward pass runs."""

    def wrap(f: Function) -> Function:
        def g(*given: Tensor) -> Tensors:
            with context():
                return f(*given)

        return g

    return wrap


SUBCLASS: dict[str, Callable[[Tensor], Tensor]] = {
    "before": lambda x: x.as_subclass(Tagged),
    "after": lambda y: y.as_subclass(Tensor),
}


def check_subclass(case: Case) -> None:
    """The same bits; and what the ops return is of the subclass."""
    Through(**SUBCLASS)(case)
    if case.public.startswith("ops.") and case.public != "ops.randn":
        call = case.make(SMALL, torch.float32)
        tagged = Call(
            case, {n: x.as_subclass(Tagged) for n, x in call.tensors.items()}, call.others
        )
        for y in values(tagged.of_tensors(case.subject()), tagged):
            assert type(y) is Tagged, case.name


# ---- tracing ----------------------------------------------------------------------------------


def check_fake(case: Case) -> None:
    """Shapes, dtypes, devices and strides of fake tensors are those of real ones."""
    shape = (3, 4, 5, 6)
    call = case.make(shape, torch.bfloat16)
    tensors = {n: x.contiguous(memory_format=torch.channels_last) for n, x in call.tensors.items()}
    call = Call(case, tensors, call.others)
    subject = case.subject()
    real = values(call.of_tensors(case.subject()), call)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        f = call.of_tensors(subject)
        found = f(*map(mode.from_tensor, call.values))
    for y, w in zip(found, real, strict=True):
        assert (y.shape, y.dtype, y.device, y.stride()) == (w.shape, w.dtype, w.device, w.stride())
    same_bits(values(call.of_tensors(subject), call), real, f"{case.name}, after fake tensors")


def check_meta(case: Case) -> None:
    """Tensors of the device "meta": shapes and dtypes."""
    call = case.make(WIDE, torch.float32)
    real = truth_of(case, values, WIDE, torch.float32)
    subject = case.subject()
    meta = Call(
        case,
        {n: x.to("meta") for n, x in call.tensors.items()},
        {n: x.to("meta") for n, x in call.others.items()},
    )
    for y, w in zip(values(meta.of_tensors(subject), meta), real, strict=True):
        assert (y.shape, y.dtype) == (w.shape, w.dtype)
    same_bits(values(call.of_tensors(subject), call), real, f"{case.name}, after meta tensors")


def traced(mode: str) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        call = case.make(WIDE, torch.float32)
        subject = case.subject()
        wanted = truth_of(case, values, WIDE, torch.float32)
        seed()
        graph = make_fx(call.of_tensors(subject), tracing_mode=mode, _allow_non_fake_inputs=True)(
            *call.values
        )
        if case.public.startswith("ops."):
            assert any("diffcore" in str(node.target) for node in graph.graph.nodes), case.name
        same_bits(tuple(values(graph, call)), wanted, f"{case.name}, make_fx")
        same_bits(values(call.of_tensors(subject), call), wanted, f"{case.name}, after make_fx")

    return check


# ---- dtypes -----------------------------------------------------------------------------------


# ---- copies, threads ----------------------------------------------------------------------------


def check_threads(case: Case) -> None:
    """One cold object, four threads: the bits of one thread."""
    call = case.make(WIDE, torch.float32)
    wanted = truth_of(case, values, WIDE, torch.float32)
    f = call.of_tensors(case.subject())
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: f(*call.values), range(8)):
            same_bits(found, wanted, f"{case.name}, threads")


def saved(subject: Any) -> Any:
    file = io.BytesIO()
    torch.save(subject, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copied(by: Callable[[Any], Any]) -> Callable[[Case], None]:
    """The object of a call, copied when it is cold and when it is warm."""

    def check(case: Case) -> None:
        call = case.make(WIDE, torch.float32)
        subject = case.subject()
        cold = by(subject)
        wanted = values(call.of_tensors(subject), call)
        for one in (cold, by(subject)):
            same_bits(values(call.of_tensors(one), call), wanted, f"{case.name}, copied")

    return check


def _has_object(case: Case) -> bool:
    return case.subject() is not None


def _differentiable(case: Case) -> bool:
    return bool(case.differentiable)


def _small(*measures: Any, **options: Any) -> Through:
    return Through(measures, shape=SMALL, dtype=torch.float64, compare=close, **options)


def _routes() -> Iterator[Route]:
    yield Route("plain", PLAIN, Through())
    yield Route("no_grad", PLAIN, without_gradient(torch.no_grad))
    yield Route("inference_mode", PLAIN, without_gradient(torch.inference_mode))
    yield Route("retain_graph", PLAIN, Through(((backward_twice, gradients),)), _differentiable)
    yield Route(
        "double backward", PLAIN, _small((second_derivative, second_of_reference)), _differentiable
    )
    for name, pair in {
        "func.grad": (by_func_grad, by_backward),
        "func.jvp": (slope_by_jvp, slope),
        "forward-mode AD": (slope_by_duals, slope),
        "func.jacrev": (jacobian_by_rev, jacobian),
        "func.jacfwd": (jacobian_by_fwd, jacobian),
        "func.jvp of func.grad": (second_by_func, second_of_reference),
    }.items():
        yield Route(name, TRANSFORM, _small(pair), _differentiable)
    yield Route("vmap", TRANSFORM, check_vmap)
    for name, context in MODES.items():
        yield Route(name, MODE, Through(context=context))
        yield Route(
            f"{name}, ended", MODE, Through(wrap=ended_before_backward(context)), _differentiable
        )
        yield Route(
            f"{name}, transforms",
            MODE,
            _small(*TRANSFORMS, context=context),
            _differentiable,
            MANY,
        )
    yield Route("deterministic", MODE, Through(context=deterministic))
    yield Route("subclass", MODE, check_subclass)
    yield Route(
        "subclass, transforms", MODE, _small(*TRANSFORMS, **SUBCLASS), _differentiable, MANY
    )
    for name in ("default dtype float64", "default dtype bfloat16"):
        yield Route(name, DTYPE, Through(context=SETTINGS[name]))
    for name in ("autocast bfloat16", "autocast float16"):
        yield Route(name, DTYPE, Through(context=SETTINGS[name]))
    yield Route("mixed dtypes", DTYPE, mixed(contextlib.nullcontext), several_tensors)
    yield Route("mixed dtypes, autocast", DTYPE, mixed(autocast(torch.bfloat16)), several_tensors)
    yield Route(
        "autocast, model", DTYPE, check_rounding_model, lambda case: "weight" in case.tensors
    )
    yield Route("fake tensors", TRACE, check_fake)
    yield Route("meta tensors", TRACE, check_meta, usual=MANY)
    yield Route("make_fx", TRACE, traced("real"))
    yield Route("make_fx, symbolic", TRACE, traced("symbolic"), usual=MANY)
    for reentrant in (False, True):
        yield Route(
            "checkpoint" + ", reentrant" * reentrant,
            COPY,
            Through(
                ((gradients, gradients),),
                wrap=lambda f, reentrant=reentrant: (
                    lambda *x: checkpoint(f, *x, use_reentrant=reentrant)
                ),
            ),
            _differentiable,
        )
    yield Route("threads", COPY, check_threads, lambda case: not torchs_generator(case))
    for name, by in {
        "deepcopy": copy.deepcopy,
        "pickle": lambda x: pickle.loads(pickle.dumps(x)),
        "torch.save, weights_only": saved,
    }.items():
        yield Route(name, COPY, copied(by), _has_object)


EAGER_ROUTES: list[Route] = list(_routes())
