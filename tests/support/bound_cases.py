"""The cases of the terms of the variational bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore import ops
from diffcore.coefficients.bound import vlb_coefficients
from support import formulas
from support.op_case import NOISE_TABLE, STEPS, OpCase, ramp, steps_of

ALPHA, SIGMA = NOISE_TABLE.unbind(1)


def vlb_table(**options: Any) -> Tensor:
    """`[T, 12 or 15]` rows of `vlb_term`."""
    return vlb_coefficients(ALPHA, SIGMA, **{"decoder": "gaussian", **options})


def _vlb(name: str, tensors: tuple[str, ...], differentiable: tuple[str, ...], **table: Any) -> Any:
    given = "x_t" if "x_t" in tensors else "noise"
    return OpCase(
        name,
        ops.vlb_term,
        tensors,
        formulas.vlb_term,
        lambda b: {
            "coefficients": vlb_table(given=given, **table),
            "t": steps_of(b),
            "scale": ramp(0.5, 2, b),
        },
        differentiable,
        has_exp="variance_output" in tensors,
    )


_OUTPUT = ("model_output",)
_OUTPUTS = ("model_output", "variance_output")

BOUND_CASES: list[OpCase] = [
    _vlb(
        "vlb_term",
        ("x0", "model_output", "x_t"),
        _OUTPUT,
        variance_type="fixed_large",
        clip_range=(-1.5, 1.2),
    ),
    _vlb(
        "vlb_term_noise",
        ("x0", "model_output", "noise"),
        _OUTPUT,
        prediction_type="v_prediction",
    ),
    _vlb(
        "vlb_term_learned",
        ("x0", "model_output", "x_t", "variance_output"),
        _OUTPUTS,
        prediction_type="sample",
        variance_type="learned",
        clip_range=1.0,
    ),
    _vlb(
        "vlb_term_learned_range",
        ("x0", "model_output", "noise", "variance_output"),
        _OUTPUTS,
        variance_type="learned_range",
    ),
    OpCase(
        "prior_kl",
        ops.prior_kl,
        ("x0",),
        formulas.prior_kl,
        lambda b: {
            "alpha": float(ALPHA[STEPS // 2]),
            "sigma": float(SIGMA[STEPS // 2]),
        },
        ("x0",),
    ),
]
