"""The discretized Gaussian log-likelihood."""

from __future__ import annotations

from diffcore._kernels.term import Term
from diffcore.reference import likelihood as formulas

DISCRETIZED = Term(
    "discretized_gaussian_log_likelihood",
    ("x", "means", "log_scales"),
    formulas.discretized_term,
    {"": (0, 1, 2), "_parameters": (1, 2)},
)
