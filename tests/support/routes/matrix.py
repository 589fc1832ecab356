"""All cases and all routes, and what becomes of a cell."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterable

from support.routes.case import Case
from support.routes.compiled_routes import COMPILED_ROUTES
from support.routes.density_cases import DENSITY_CASES
from support.routes.eager_routes import EAGER_ROUTES
from support.routes.edm_cases import EDM_CASES
from support.routes.flow_cases import FLOW_CASES
from support.routes.group_cases import GROUP_CASES
from support.routes.guided_cases import GUIDED_CASES
from support.routes.method_cases import METHOD_CASES
from support.routes.op_cases import OP_CASES
from support.routes.refusals import is_open, refused
from support.routes.route import Route

CASES: list[Case] = [
    *OP_CASES,
    *METHOD_CASES,
    *GUIDED_CASES,
    *FLOW_CASES,
    *DENSITY_CASES,
    *GROUP_CASES,
    *EDM_CASES,
]
ROUTES: list[Route] = [*EAGER_ROUTES, *COMPILED_ROUTES]
KINDS = tuple(dict.fromkeys(case.kind for case in CASES))
_BITS, _ROUNDING = "the same bits", "equal up to rounding, in float64"
COLUMNS = {
    "plain": f"{_BITS}; second derivatives {_ROUNDING}",
    "transforms": _ROUNDING,
    "modes": f"{_BITS}; transforms under a mode {_ROUNDING}",
    "dtypes": f"{_BITS}; of mixed dtypes, those of the widest dtype",
    "tracing": f"{_BITS}; of fake and meta tensors shape, dtype and (fake) strides",
    "copies, threads": _BITS,
    "compile": f"{_BITS}, in one graph; Inductor and transforms equal up to rounding",
    "export": f"{_BITS}; AOTInductor equal up to rounding",
}
"""The columns of docs/routes.md, and how their results are compared with those of plain eager."""


def problem(case: Case, route: Route) -> str | None:
    """What is wrong with a cell: another result than in plain eager, or than the documented one."""
    found = _problem(case, route)
    if not is_open(case, route):
        return found
    return None if found else f"{case.name} on {route.name} is right now: take it from OPEN"


def _problem(case: Case, route: Route) -> str | None:
    refusal = refused(case, route)
    try:
        with warnings.catch_warnings():
            _ignore_torchs_own()
            route.check(case)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if refusal is None:
            return f"{case.name} on {route.name}: {text}\n{_where(error)}"
        if isinstance(error, refusal.kind) and re.search(refusal.match, str(error)):
            return None
        return f"{case.name} on {route.name}: refused by another error than documented: {text}"
    return f"{case.name} on {route.name}: documented as refused, but runs" if refusal else None


def problems(cases: Iterable[Case], route: Route) -> list[str]:
    found = (problem(case, route) for case in cases if route.applies(case))
    return [text for text in found if text is not None]


def _where(error: BaseException) -> str:
    return "".join(traceback.format_tb(error.__traceback__)[-4:])


def _ignore_torchs_own() -> None:
    """Torch's tracers and compiler warn about their own deprecations."""
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
