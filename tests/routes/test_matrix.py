"""The matrix of routes: every public call gives the same answer however torch runs it.

Routes that take long are checked on some cases; with ``--all-routes`` on all of them.
"""

from __future__ import annotations

import pytest

from diffcore._engine import native
from support.routes.matrix import CASES, KINDS, ROUTES, problems
from support.routes.route import Route

pytestmark = pytest.mark.skipif(native._C is None, reason="needs the compiled module")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_cells(route: Route, kind: str, request: pytest.FixtureRequest) -> None:
    every = request.config.getoption("--all-routes")
    cases = [c for c in CASES if c.kind == kind and (every or route.in_usual_runs(c))]
    found = problems(cases, route)
    assert not found, "\n".join(found)
