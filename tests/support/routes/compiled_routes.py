"""The routes of the compiler: one graph, no second compilation, export with and without Python."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from support.routes.case import Call, Case, Function
from support.routes.route import (
    FEW,
    KERNELS,
    SMALL,
    WIDE,
    Compare,
    Measure,
    Route,
    Tensors,
    after_route,
    by_backward,
    by_func_grad,
    close,
    gradients,
    same_bits,
    seed,
    slope,
    slope_by_duals,
    slope_by_jvp,
    truth_of,
    values,
)

COMPILE = "compile"
EXPORT = "export"
BATCHES = (3, 5, 7)


def _measures(case: Case) -> Measure:
    return gradients if case.differentiable else values


def compiled(backend: str, compare: Compare = same_bits) -> Callable[[Case], None]:
    """One graph; the second call compiles nothing."""

    def check(case: Case) -> None:
        torch._dynamo.reset()
        call = case.make(WIDE, torch.float32)
        subject, measure = case.subject(), _measures(case)
        counter = CompileCounterWithBackend(backend)
        f = torch.compile(call.of_tensors(subject), fullgraph=True, backend=counter)
        wanted = truth_of(case, measure, WIDE, torch.float32)
        compare(measure(f, call), wanted, f"{case.name}, first call")
        graphs = counter.frame_count
        compare(measure(f, call), wanted, f"{case.name}, second call")
        assert counter.frame_count == graphs > 0, "the second call compiles again"
        if case.stateful:
            after_route(case, call, subject)

    return check


def check_dynamic(case: Case) -> None:
    """``dynamic=True``: the first batch compiles for every batch size, with gradients."""
    _check_batches(case, 0, dynamic=True)


def check_automatic(case: Case) -> None:
    """By default the second batch size compiles a dynamic graph, and no other does."""
    _check_batches(case, 1)


def _check_batches(case: Case, more: int, **options: Any) -> None:
    """Checks that batches of other sizes compile so many more graphs, at the second one.

    The first may take two: torch compiles again where it took a number for a dynamic one.
    """
    torch._dynamo.reset()
    subject, measure = case.subject(), _measures(case)
    counter = CompileCounterWithBackend("aot_eager")
    first = case.make(WIDE, torch.float32)
    f = torch.compile(first.of_all(subject), fullgraph=True, backend=counter, **options)
    most = 0
    for batch in BATCHES:
        call = case.make((batch, *WIDE[1:]), torch.float32)
        others = tuple(call.others.values())

        def on_route(*tensors: Tensor, others: Tensors = others) -> Tensors:
            return f(*tensors, *others)

        found = measure(on_route, call)
        same_bits(found, measure(call.of_tensors(subject), call), f"{case.name}, batch {batch}")
        most = most or counter.frame_count + more
        assert counter.frame_count <= most, f"batch {batch} compiles again"


def compiled_transform(measure: Measure, truth: Measure) -> Callable[[Case], None]:
    """A transform inside of the compiled function."""

    def check(case: Case) -> None:
        torch._dynamo.reset()
        call = case.make(SMALL, torch.float64)
        names, f = tuple(call.tensors), call.of_tensors(case.subject())

        def transformed(*tensors: Tensor) -> Tensors:
            given = Call(case, dict(zip(names, tensors, strict=True)), call.others)
            return measure(f, given)

        run = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        seed()
        found = run(*call.values)
        close(found, truth_of(case, truth, SMALL, torch.float64), f"{case.name}, compiled")

    return check


class Program(nn.Module):
    """A call as a module, which is what is exported."""

    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f

    def forward(self, *given: Tensor) -> Tensors:
        return self.f(*given)


def exported(*, strict: bool, dynamic: bool) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        torch._dynamo.reset()
        call = case.make(WIDE, torch.float32)
        subject = case.subject()
        program = export(call, subject, strict=strict, dynamic=dynamic)
        for batch in BATCHES[: 1 + dynamic]:
            again = case.make((batch, *WIDE[1:]), torch.float32)
            wanted = truth_of(case, values, (batch, *WIDE[1:]), torch.float32)
            seed()
            same_bits(program.module()(*_all(again)), wanted, f"{case.name}, batch {batch}")
        if case.stateful:
            after_route(case, call, subject)

    return check


def export(call: Call, subject: Any, *, strict: bool, dynamic: bool = False) -> Any:
    given = _all(call)
    batch = torch.export.Dim("batch", min=2, max=1024)
    sizes = [{0: batch} if x.ndim and x.shape[0] == BATCHES[0] else None for x in given]
    shapes = (tuple(sizes),) if dynamic else None
    program = Program(call.of_all(subject))
    return torch.export.export(program, given, strict=strict, dynamic_shapes=shapes)


def _all(call: Call) -> Tensors:
    return (*call.values, *call.others.values())


def check_package(case: Case) -> None:
    """AOTInductor: compiled ahead of time, written to a file, loaded and run."""
    torch._dynamo.reset()
    call = case.make(WIDE, torch.float32)
    program = export(call, case.subject(), strict=False)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        path = str(Path(folder) / "call.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        found = torch._inductor.aoti_load_package(path)(*_all(call))
    close(tuple(found), truth_of(case, values, WIDE, torch.float32), case.name)


def _differentiable(case: Case) -> bool:
    return bool(case.differentiable)


def _seeded(case: Case) -> bool:
    """Inductor has a generator of its own, so what torch's seeds is another noise there."""
    return "default noise" not in case.name


def _routes() -> Iterator[Route]:
    yield Route("compile", COMPILE, compiled("aot_eager"), usual=KERNELS)
    yield Route("compile, dynamic", COMPILE, check_dynamic, usual=KERNELS)
    yield Route("compile, automatic dynamic", COMPILE, check_automatic, usual=FEW)
    yield Route("compile, inductor", COMPILE, compiled("inductor", close), _seeded, FEW)
    for name, pair in {
        "func.grad": (by_func_grad, by_backward),
        "func.jvp": (slope_by_jvp, slope),
        "forward-mode AD": (slope_by_duals, slope),
    }.items():
        check = compiled_transform(*pair)
        yield Route(f"compile of {name}", COMPILE, check, _differentiable, FEW[1:2])
    for strict in (True, False):
        for dynamic in (False, True):
            name = "export" + ", strict" * strict + ", dynamic" * dynamic
            check, usual = exported(strict=strict, dynamic=dynamic), FEW if strict else KERNELS
            yield Route(name, EXPORT, check, usual=usual)
    # Seconds a case: tests/ops/test_compiled_ops.py has one package in each run.
    yield Route("AOTInductor", EXPORT, check_package, _seeded, usual=())


COMPILED_ROUTES: list[Route] = list(_routes())
