"""docs/routes.md is what the tests run."""

from __future__ import annotations

import runpy
from fnmatch import fnmatchcase

import diffcore
from diffcore import GaussianDiffusion, ops
from support.pages import ROOT
from support.routes.matrix import CASES, COLUMNS, ROUTES
from support.routes.refusals import REFUSALS
from support.routes.route import MANY


def test_the_page_is_up_to_date() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "routes_table.py"))
    page = (ROOT / "docs" / "routes.md").read_text(encoding="utf-8")
    assert page == tool["page"](), "run python tools/routes_table.py"


def test_names_are_names() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert set(MANY) <= set(names)
    assert {route.column for route in ROUTES} == set(COLUMNS)
    for refusal in REFUSALS:
        for pattern in refusal.cases:
            assert any(fnmatchcase(name, pattern) for name in names), pattern
        for pattern in refusal.routes:
            assert any(fnmatchcase(route.name, pattern) for route in ROUTES), pattern


def test_every_op_and_method_is_in_the_matrix() -> None:
    found = {case.public for case in CASES}
    functions = {f"ops.{n}" for n in ops.__all__ if callable(getattr(ops, n)) and n[0].islower()}
    assert functions <= found
    methods = {n for n in vars(GaussianDiffusion) if not n.startswith("_")}
    assert {f"GaussianDiffusion.{n}" for n in methods} <= found
    for name in ("elbo", "elbo_terms", "importance_weighted_bound", "vae_loss"):
        assert hasattr(diffcore, name)
        assert f"vae.{name}" in found
