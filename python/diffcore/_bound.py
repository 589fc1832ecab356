"""The kernels of the variational bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore._kernels import Needs, Tensors
from diffcore._registry import Call, Grads, Kernel, drawing
from diffcore.bound_coefficients import FIXED, VLB_COLUMNS
from diffcore.reference import bound


def _vlb_term(learned: bool) -> Kernel:
    columns = VLB_COLUMNS if learned else VLB_COLUMNS[:FIXED]

    def plain(*args: Any, whole: bool) -> Tensor:
        x0, m, *rest = args[: 3 + learned]
        scale, *coefs = args[3 + learned :]
        v = rest[0] if learned else None
        return bound.vlb_term(x0, rest[-1], m, coefs, scale, variance_output=v)

    def backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
        return None

    variance = ("variance_output",) * learned
    return drawing(
        Kernel(
            "vlb_term" + "_learned" * learned,
            ("x0", "model_output", *variance, "x_t"),
            ("scale", *columns),
            outputs=0,
            sums=1,
            reference=plain,
            backward=backward,
        )
    )


VLB_TERM = {learned: _vlb_term(learned) for learned in (False, True)}
