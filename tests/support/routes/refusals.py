"""The cells of the matrix that are refused, each with the error and the reason."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from fnmatch import fnmatchcase

from support.routes.case import Case
from support.routes.route import Route


@dataclass(frozen=True)
class Refusal:
    """Cells in which a call raises: it says so, and the documentation says why."""

    routes: tuple[str, ...]  # patterns of names of routes
    cases: tuple[str, ...]  # patterns of names of cases
    kind: type[BaseException]
    match: str
    reason: str

    def covers(self, case: Case, route: Route) -> bool:
        of_route = any(fnmatchcase(route.name, pattern) for pattern in self.routes)
        return of_route and any(fnmatchcase(case.name, pattern) for pattern in self.cases)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        ("torch.save, weights_only",),
        ("GaussianDiffusion.*", "SolverTable.*", "sample, *", "bits_per_dim, *"),
        pickle.UnpicklingError,
        "Weights only load failed",
        "`torch.load` with `weights_only=True` refuses classes that it has not been told of. "
        "Save the betas, or the arguments of the table, and make the object again; or load with "
        "`weights_only=False` what you trust",
    ),
)


def refused(case: Case, route: Route) -> Refusal | None:
    return next((r for r in REFUSALS if r.covers(case, route)), None)


_COLD = ("GaussianDiffusion.q_sample*", "GaussianDiffusion.q_posterior*",
         "GaussianDiffusion.training_losses*", "GaussianDiffusion.vb_terms_bpd")  # fmt: skip
_CHECKS = ("GaussianDiffusion.[!qt]*", "GaussianDiffusion.q_mean*", "sampling.*", "vdm_bound*",
           "bits_per_dim*")  # fmt: skip
_TRAINING = ("GaussianDiffusion.training_losses, learned_range",)
_COMPILED = ("compile", "compile, *", "compile of func.*", "export", "export, dynamic",
             "AOTInductor")  # fmt: skip
OPEN: tuple[Refusal, ...] = (
    Refusal(("func.*", "*, transforms"), _COLD, Exception, "", "a cold table keeps a wrapper"),
    Refusal(("fake tensors", "make_fx, symbolic"), ("GaussianDiffusion.*", *_CHECKS), Exception,
            "", "checks read values; a cold table keeps a fake tensor"),
    Refusal(("make_fx",), _CHECKS, Exception, "", "checks read values"),
    Refusal(("vmap", "meta tensors"), ("GaussianDiffusion.calc*", "bits*"), Exception, "",
            "checks read values"),
    Refusal(("meta tensors",), ("vdm_bound, steps, gamma",), Exception, "", "checks read values"),
    Refusal(("torch.save, weights_only",), ("*, key",), Exception, "", "not allow-listed"),
    Refusal(_COMPILED, _TRAINING, Exception, "", "a cold table is kept by the first trace"),
    Refusal(("compile, *dynamic",), ("denoising_loss_v*",), Exception, "", "sizes are constants"),
)  # fmt: skip
"""Cells that are not right yet. A test fails when one becomes right, to be taken from here."""


def is_open(case: Case, route: Route) -> bool:
    return any(r.covers(case, route) for r in OPEN) and refused(case, route) is None
