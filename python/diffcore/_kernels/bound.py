"""The kernels of the variational bound."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore._engine.dispatch import run
from diffcore._engine.execute import expand_coefs
from diffcore._engine.kernel import Call, Grads, Kernel, NoisyKernel
from diffcore._engine.library import define, define_noisy
from diffcore._kernels.linear import SCALE
from diffcore._kernels.noise import Needs, run_noisy, with_noise
from diffcore._types import Tensors
from diffcore.coefficients.bound import FIXED, VLB_COLUMNS
from diffcore.reference import bound as formulas


def _vlb_term(learned: bool) -> NoisyKernel:
    columns = VLB_COLUMNS if learned else VLB_COLUMNS[:FIXED]

    def plain(*args: Any, reduce_all: bool) -> Tensor:
        x0, m, *rest = args[: 3 + learned]
        scale, *coefs = args[3 + learned :]
        v = rest[0] if learned else None
        return formulas.vlb_term(x0, rest[-1], m, coefs, scale, variance_output=v)

    def backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
        (g,) = grads
        assert g is not None
        read, given = with_noise(inputs, call)
        if needs[0] or any(needs[2 + learned :]):
            return None  # x_0 or x_t that are trained too: through the reference
        _, coefs, step, _, _ = call
        found: Any = run_noisy(VLB_TERM_BACKWARD[learned], read, given, (*coefs, g), step)
        made = found if learned else (found,)
        return [None, *made, *[None] * (len(needs) - 2 - learned)]

    variance = ("variance_output",) * learned
    return define_noisy(
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


def _vlb_term_backward(learned: bool) -> NoisyKernel:
    forward = VLB_TERM[learned].reading
    return define_noisy(
        Kernel(f"{forward.name}_backward", forward.inputs, (*forward.coefs, "grad"), 1 + learned)
    )


def _prior_kl_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
    (g,) = grads
    assert g is not None
    factor = expand_coefs(call[1], call[2])[0]
    return [run(SCALE, inputs, (2 * factor * g,))]


VLB_TERM = {learned: _vlb_term(learned) for learned in (False, True)}
VLB_TERM_BACKWARD = {learned: _vlb_term_backward(learned) for learned in (False, True)}
PRIOR_KL = define(
    Kernel(
        "prior_kl",
        ("x0",),
        ("factor", "offset"),
        outputs=0,
        sums=1,
        reference=lambda *args, reduce_all: formulas.prior_kl(*args),
        backward=_prior_kl_backward,
    )
)
