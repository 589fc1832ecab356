"""The cells of the matrix that are refused, each with the error and the reason."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch._subclasses.fake_tensor import DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from support.routes.case import Case
from support.routes.route import Route


@dataclass(frozen=True)
class Refusal:
    """Cells in which a call raises: it says so, and the documentation says why."""

    routes: tuple[str, ...]  # patterns of names of routes
    cases: tuple[str, ...]  # patterns of names of cases
    kind: type[BaseException] | tuple[type[BaseException], ...]
    match: str
    reason: str

    def covers(self, case: Case, route: Route) -> bool:
        of_route = any(fnmatchcase(route.name, pattern) for pattern in self.routes)
        return of_route and any(fnmatchcase(case.name, pattern) for pattern in self.cases)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        ("torch.save, weights_only",),
        (
            *("GaussianDiffusion.*", "SolverTable.*", "sample, *", "bits_per_dim, *"),
            *("EDM.*", "ContinuousTimeGaussianDiffusion.*", "FlowMatching.*"),
        ),
        pickle.UnpicklingError,
        "Weights only load failed",
        "`torch.load` with `weights_only=True` refuses classes that it has not been told of. "
        "Save the betas, or the arguments of the table, and make the object again; or load with "
        "`weights_only=False` what you trust",
    ),
    Refusal(
        ("vmap", "fake tensors", "meta tensors", "make_fx*"),
        ("bits_per_dim, key",),
        (RuntimeError, DynamicOutputShapeException, GuardOnDataDependentSymNode),
        "vmap|aten.nonzero|meta tensor|tracing tensor|data-dependent",
        "`bits_per_dim` returns numbers, which batched and traced tensors do not have",
    ),
    Refusal(
        ("compile", "compile, *", "export*", "AOTInductor"),
        ("bits_per_dim, key", "sampling.*"),
        RuntimeError,
        "must be called outside of torch.compile and torch.export",
        "`bits_per_dim` returns numbers, and the samplers with k-diffusion's signatures read their "
        "sigmas. Compile the model that `bits_per_dim` gets; make the table of a sampler outside, "
        "with `diffcore.solvers`, and compile `diffcore.sample`",
    ),
    Refusal(
        ("compile", "compile*", "export*", "AOTInductor"),
        ("sample, schedule",),
        RuntimeError,
        "must be called outside of torch.compile and torch.export",
        "A `schedule` is read as numbers. Compile the model, or a loop of your own on "
        "`SolverTable.step(group_dim=)`",
    ),
    Refusal(
        ("compile", "compile*", "export*", "AOTInductor"),
        ("GaussianDiffusion.respace, key",),
        RuntimeError,
        "respace must be called outside of torch.compile and torch.export",
        "`respace` makes tables: call it before, and compile what uses the result",
    ),
)


def refused(case: Case, route: Route) -> Refusal | None:
    return next((r for r in REFUSALS if r.covers(case, route)), None)


OPEN: tuple[Refusal, ...] = ()
"""Cells that are not right yet. A test fails when one becomes right, to be taken from here."""


def is_open(case: Case, route: Route) -> bool:
    return any(r.covers(case, route) for r in OPEN) and refused(case, route) is None
