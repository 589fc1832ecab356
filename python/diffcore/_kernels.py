"""The kernels by name: the meaning in plain torch, the gradient as calls of other kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore import reference
from diffcore._registry import Backward, Coef, Grads, Kernel, Step, run, run_tuple, split_coefs

Tensors = tuple[Tensor, ...]
Coefs = tuple[Coef, ...]
Needs = Any

STEP_COEFS = ("c_x", "c_m", "c_0", "c_z", "a_x", "a_m", "clip_min", "clip_max", "guidance_scale")


# ---- linear maps: their gradients are linear maps, differentiable as often as one likes --------


def _linear_backward(
    inputs: Tensors, coefs: Coefs, step: Step, whole: bool, grads: Grads, needs: Needs
) -> Grads:
    (g,) = grads
    assert g is not None
    if len(needs) == 2 and all(needs):
        return run_tuple(SCALE_TWICE, (g,), coefs, step)
    each = split_coefs(coefs)
    return [run(SCALE, (g,), (c,), step) if n else None for c, n in zip(each, needs, strict=True)]


def _scale_twice_backward(
    inputs: Tensors, coefs: Coefs, step: Step, whole: bool, grads: Grads, needs: Needs
) -> Grads:
    g, h = grads
    if g is not None and h is not None:
        return [run(LINEAR_COMBINATION, (g, h), coefs, step)]
    only, coef = (g, 0) if g is not None else (h, 1)
    assert only is not None
    return [run(SCALE, (only,), (split_coefs(coefs)[coef],), step)]


SCALE = Kernel(
    "scale",
    ("x",),
    ("a",),
    reference=reference.scale,
    backward=_linear_backward,
    saves_inputs=False,
)
SCALE_TWICE = Kernel(
    "scale_twice",
    ("x",),
    ("a", "b"),
    outputs=2,
    reference=reference.scale_twice,
    backward=_scale_twice_backward,
    saves_inputs=False,
)
LINEAR_COMBINATION = Kernel(
    "linear_combination",
    ("x", "y"),
    ("a", "b"),
    reference=reference.linear_combination,
    backward=_linear_backward,
    saves_inputs=False,
)


# ---- reverse steps -----------------------------------------------------------------------------


def _step_kernel(name: str, guided: bool, noisy: bool) -> Kernel:
    def plain(*args: Any) -> Tensor:
        tensors, coefs = args[: 2 + guided + noisy], args[2 + guided + noisy :]
        x, m, *rest = tensors
        noise, uncond = rest[-1] if noisy else None, rest[0] if guided else None
        return reference.reverse_step(x, m, noise, uncond, *coefs)

    def backward(
        inputs: Tensors, coefs: Coefs, step: Step, whole: bool, grads: Grads, needs: Needs
    ) -> Grads:
        (g,) = grads
        assert g is not None
        found: list[Tensor | None] = [None] * len(needs)
        if any(needs[: 2 + guided]):
            kernel = STEP_GUIDED_BACKWARD if guided else STEP_BACKWARD
            found[: 2 + guided] = run_tuple(kernel, (g, *inputs[: 2 + guided]), coefs, step)
        if noisy and needs[-1]:
            found[-1] = run(SCALE, (g,), (split_coefs(coefs)[3],), step)
        return found

    names = ("x", "model_output") + ("model_output_uncond",) * guided + ("noise",) * noisy
    return Kernel(name, names, STEP_COEFS, reference=plain, backward=backward)


REVERSE_STEP = {
    (guided, noisy): _step_kernel(
        "reverse_step" + "_guided" * guided + "_noise" * noisy, guided, noisy
    )
    for guided in (False, True)
    for noisy in (False, True)
}
SOLVER_STEP = {
    key: kernel.named(("x_t", *kernel.inputs[1:])) for key, kernel in REVERSE_STEP.items()
}
STEP_BACKWARD = Kernel(
    "reverse_step_backward", ("grad", "x", "model_output"), STEP_COEFS, outputs=2
)
STEP_GUIDED_BACKWARD = Kernel(
    "reverse_step_guided_backward",
    ("grad", "x", "model_output", "model_output_uncond"),
    STEP_COEFS,
    outputs=3,
)


# ---- Gaussians: an elementwise term, its sum, and the gradients of both ------------------------


class Term:
    """An elementwise term, its sum over samples, and the kernels of their gradients."""

    def __init__(
        self, name: str, inputs: tuple[str, ...], gradients: dict[str, tuple[int, ...]]
    ) -> None:
        formula = getattr(reference, f"_{name}")
        self.gradients = gradients
        self.elementwise = Kernel(
            name,
            inputs,
            reference=lambda *x: reference._elementwise(formula, x),
            backward=self._elementwise_backward,
        )
        self.sum = Kernel(
            f"{name}_sum",
            inputs,
            ("scale",),
            outputs=0,
            sums=1,
            reference=lambda *args, whole: _sum_of(formula, args[:-1], args[-1], whole),
            backward=self._sum_backward,
        )
        self.of_elementwise = {
            suffix: Kernel(f"{name}_backward{suffix}", (*inputs, "grad"), outputs=len(covered))
            for suffix, covered in gradients.items()
        }
        self.of_sum = {
            suffix: Kernel(
                f"{name}_sum_backward{suffix}", inputs, ("grad", "scale"), outputs=len(covered)
            )
            for suffix, covered in gradients.items()
        }

    def _smallest(self, needs: Needs) -> str:
        fits = [
            s for s, c in self.gradients.items() if all(i in c for i, n in enumerate(needs) if n)
        ]
        return min(fits, key=lambda s: len(self.gradients[s]))

    def _spread(self, suffix: str, found: Tensors, needs: Needs) -> Grads:
        by_input = dict(zip(self.gradients[suffix], found, strict=True))
        return [by_input[i] if n else None for i, n in enumerate(needs)]

    def _elementwise_backward(
        self, inputs: Tensors, coefs: Coefs, step: Step, whole: bool, grads: Grads, needs: Needs
    ) -> Grads:
        (g,) = grads
        assert g is not None
        suffix = self._smallest(needs)
        if not torch.compiler.is_compiling() and g.ndim and not any(g.stride()):
            # The gradient of .sum() or .mean(): one number, expanded. Read it as one number.
            number = g.as_strided((), ()).to(reference.compute_dtype(g.dtype))
            found = run_tuple(self.of_sum[suffix], inputs, (number, 1.0), None)
        else:
            found = run_tuple(self.of_elementwise[suffix], (*inputs, g), (), None)
        return self._spread(suffix, found, needs)

    def _sum_backward(
        self, inputs: Tensors, coefs: Coefs, step: Step, whole: bool, grads: Grads, needs: Needs
    ) -> Grads:
        (g,) = grads
        assert g is not None
        suffix = self._smallest(needs)
        return self._spread(
            suffix, run_tuple(self.of_sum[suffix], inputs, (g, *coefs), step), needs
        )


def _sum_of(formula: Any, inputs: Tensors, scale: Coef, whole: bool) -> Tensor:
    compute = reference.compute_dtype(inputs[0].dtype)
    return reference._row_sum(formula(*(x.to(compute) for x in inputs)), scale, whole)


NORMAL_KL = Term(
    "normal_kl",
    ("mean1", "logvar1", "mean2", "logvar2"),
    {"": (0, 1, 2, 3), "_first": (0, 1), "_second": (2, 3)},
)
STANDARD_NORMAL_KL = Term("standard_normal_kl", ("mean", "logvar"), {"": (0, 1)})
GAUSSIAN_NLL = Term("gaussian_nll", ("x", "mean", "logvar"), {"": (0, 1, 2), "_parameters": (1, 2)})


# ---- reparameterisation ------------------------------------------------------------------------


def _reparameterize_backward(
    inputs: Tensors, coefs: Coefs, step: Step, whole: bool, grads: Grads, needs: Needs
) -> Grads | None:
    (g,) = grads
    _, logvar, noise = inputs
    if needs[2] or g is None:
        return None  # rare: through the reference
    return [g, run(REPARAMETERIZE_BACKWARD, (g, logvar, noise)) if needs[1] else None, None]


def _reparameterize_kl_backward(
    inputs: Tensors, coefs: Coefs, step: Step, whole: bool, grads: Grads, needs: Needs
) -> Grads | None:
    g_z, g_kl = grads
    if needs[2]:
        return None
    if g_z is None:
        assert g_kl is not None
        g_mean, g_logvar = run_tuple(STANDARD_NORMAL_KL.of_sum[""], inputs[:2], (g_kl, 1.0))
    elif g_kl is None:
        return _reparameterize_backward(inputs, coefs, step, whole, (g_z,), needs)
    else:
        g_mean, g_logvar = run_tuple(REPARAMETERIZE_KL_BACKWARD, (*inputs, g_z), (g_kl,))
    return [g_mean, g_logvar, None]


_PARAMETERS = ("mean", "logvar", "noise")
REPARAMETERIZE = Kernel(
    "reparameterize",
    _PARAMETERS,
    reference=reference.reparameterize,
    backward=_reparameterize_backward,
)
REPARAMETERIZE_BACKWARD = Kernel("reparameterize_backward", ("grad", "logvar", "noise"))
REPARAMETERIZE_KL = Kernel(
    "reparameterize_kl",
    _PARAMETERS,
    sums=1,
    reference=reference.reparameterize_kl,
    backward=_reparameterize_kl_backward,
)
REPARAMETERIZE_KL_BACKWARD = Kernel(
    "reparameterize_kl_backward", (*_PARAMETERS, "grad_z"), ("grad_kl",), outputs=2
)


# ---- losses ------------------------------------------------------------------------------------


def _loss_backward(backward_kernel: str) -> Backward:
    def backward(
        inputs: Tensors, coefs: Coefs, step: Step, whole: bool, grads: Grads, needs: Needs
    ) -> Grads | None:
        (g,) = grads
        if any(needs[1:]) or g is None:
            return None  # a target that is trained too: through the reference
        kernel = _LOSS_BACKWARD[backward_kernel]
        return [run(kernel, inputs, (*coefs, g), step)] + [None] * (len(inputs) - 1)

    return backward


_MIXED = ("model_output", "x0", "noise")
TARGET_LOSS = Kernel(
    "target_loss",
    ("model_output", "target"),
    ("weight", "inverse_n"),
    outputs=0,
    sums=1,
    reference=lambda m, target, weight, n, whole: reference.target_loss(m, target, weight),
    backward=_loss_backward("target"),
)
MIXED_TARGET_LOSS = Kernel(
    "mixed_target_loss",
    _MIXED,
    ("weight", "inverse_n", "a", "b"),
    outputs=0,
    sums=1,
    reference=lambda m, x0, e, weight, n, a, b, whole: reference.mixed_target_loss(
        m, x0, e, a, b, weight
    ),
    backward=_loss_backward("mixed"),
)
_LOSS_BACKWARD = {
    "target": Kernel(
        "target_loss_backward", ("model_output", "target"), ("weight", "inverse_n", "grad")
    ),
    "mixed": Kernel(
        "mixed_target_loss_backward", _MIXED, ("weight", "inverse_n", "a", "b", "grad")
    ),
}
