"""Linear maps. Their gradients are linear maps, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore._engine.dispatch import run, run_tuple
from diffcore._engine.execute import split_coefs
from diffcore._engine.kernel import Call, Grads, Kernel
from diffcore._engine.library import define, define_noisy
from diffcore._kernels.noise import Needs
from diffcore._types import Coef, Step, Tensors
from diffcore.reference import linear as formulas


def step_for(step: Step, *coefs: Coef) -> Step:
    """The step, if there is a table among the coefficients to read at it."""
    return step if any(isinstance(c, Tensor) and c.ndim == 2 for c in coefs) else None


def _linear_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
    _, coefs, step, _, _ = call
    (g,) = grads
    assert g is not None
    if len(needs) == 2 and all(needs):
        return run_tuple(SCALE_TWICE, (g,), coefs, step)
    each = split_coefs(coefs)
    return [
        run(SCALE, (g,), (c,), step_for(step, c)) if n else None
        for c, n in zip(each, needs, strict=False)
    ]


def _scale_twice_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
    return [_combined(grads, split_coefs(call[1]), call[2])]


def _linear_pair_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
    a, b, c, d = split_coefs(call[1])
    each = [(a, c), (b, d)]
    return [_combined(grads, e, call[2]) if n else None for e, n in zip(each, needs, strict=False)]


def _combined(grads: Grads, coefs: Sequence[Coef], step: Step) -> Tensor:
    """The sum of c g over the upstream gradients that there are."""
    there = [(g, c) for g, c in zip(grads, coefs, strict=True) if g is not None]
    kernel = LINEAR_COMBINATION.reading if len(there) == 2 else SCALE
    tables = tuple(c for _, c in there)
    return run(kernel, tuple(g for g, _ in there), tables, step_for(step, *tables))


def _blend_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
    if needs[1]:
        return None  # no public function passes a mask that requires grad
    (g,), (_, mask, *_) = grads, inputs
    assert g is not None
    none = torch.zeros_like(g)

    def part(x: Tensor, known: Tensor, coef: Coef) -> Tensor:
        at = call[2] if isinstance(coef, Tensor) and coef.ndim == 2 else None
        return run(BLEND, (x, mask, known, none), (coef, 0.0), at)

    alpha, sigma = split_coefs(call[1])
    return [
        part(g, none, 0.0) if needs[0] else None,
        None,
        part(none, g, alpha) if needs[2] else None,
        part(none, g, sigma) if needs[3] else None,
    ]


SCALE = define(
    Kernel(
        "scale",
        ("x",),
        ("a",),
        reference=formulas.scale,
        backward=_linear_backward,
        saves_inputs=False,
    )
)
SCALE_TWICE = define(
    Kernel(
        "scale_twice",
        ("x",),
        ("a", "b"),
        outputs=2,
        reference=formulas.scale_twice,
        backward=_scale_twice_backward,
        saves_inputs=False,
    )
)
LINEAR_COMBINATION = define_noisy(
    Kernel(
        "linear_combination",
        ("x", "y"),
        ("a", "b"),
        reference=formulas.linear_combination,
        backward=_linear_backward,
        saves_inputs=False,
    )
)
LINEAR_PAIR = define_noisy(
    Kernel(
        "linear_pair",
        ("x", "y"),
        ("a", "b", "c", "d"),
        outputs=2,
        reference=formulas.linear_pair,
        backward=_linear_pair_backward,
        saves_inputs=False,
    )
)
BLEND = define(
    Kernel(
        "blend",
        ("x", "mask", "known", "known_noise"),
        ("alpha", "sigma"),
        reference=formulas.blend,
        backward=_blend_backward,
    )
)
