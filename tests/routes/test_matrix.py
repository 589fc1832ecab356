"""The matrix of routes: every public call gives the same answer however torch runs it."""

from __future__ import annotations

import pytest

from diffcore._engine import native
from support.routes.matrix import (
    CASES,
    COMPILED_ROUTES,
    EAGER_ROUTES,
    KINDS,
    REPRESENTATIVES,
    problems,
)
from support.routes.route import Route

pytestmark = pytest.mark.skipif(native._C is None, reason="needs the compiled module")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", EAGER_ROUTES, ids=lambda route: route.name)
def test_eager(route: Route, kind: str) -> None:
    found = problems([case for case in CASES if case.kind == kind], route)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", COMPILED_ROUTES, ids=lambda route: route.name)
def test_compiled(route: Route, kind: str, request: pytest.FixtureRequest) -> None:
    every = request.config.getoption("--all-routes")
    found = problems(
        [c for c in CASES if c.kind == kind and (every or c.name in REPRESENTATIVES)], route
    )
    assert not found, "\n".join(found)
