"""The kernels by name: the meaning in plain torch, the gradient as calls of other kernels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffcore import _execute, reference
from diffcore._autograd import last_use
from diffcore._registry import (
    Call,
    Coef,
    Grads,
    Kernel,
    Noise,
    Step,
    drawing,
    plain_eager,
    run,
    run_tuple,
    split_coefs,
)
from diffcore.reference import bound

Tensors = tuple[Tensor, ...]
Coefs = tuple[Coef, ...]
Needs = Any


# ---- noise that is read, or drawn --------------------------------------------------------------


def noised(
    kernel: _execute.Kernel,
    inputs: Tensors,
    noise: Tensor | Noise,
    coefs: Coefs = (),
    step: Step = None,
    out: Tensor | None = None,
) -> Any:
    """Runs a kernel whose last input is `noise`, or its twin that draws it."""
    if isinstance(noise, Tensor):
        return run(kernel, (*inputs, noise), coefs, step, False, out)
    assert kernel.drawn is not None, kernel.name
    return run(kernel.drawn, inputs, coefs, step, False, out, noise)


def with_noise(inputs: Tensors, call: Call) -> tuple[Tensors, Tensor | Noise]:
    """The inputs but the noise, and the noise: the last of them, or what it was drawn from."""
    return (inputs[:-1], inputs[-1]) if call[-1] is None else (inputs, call[-1])


RANDN = Kernel(
    "randn", ("out",), reference=lambda like, noise: noise, reads_inputs=False, draws=True
)


# ---- linear maps: their gradients are linear maps, differentiable as often as one likes --------


def _linear_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
    _, coefs, step, _, _ = call
    (g,) = grads
    assert g is not None
    if len(needs) == 2 and all(needs):
        return run_tuple(SCALE_TWICE, (g,), coefs, step)
    each = split_coefs(coefs)
    return [run(SCALE, (g,), (c,), step) if n else None for c, n in zip(each, needs, strict=False)]


def _scale_twice_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
    return [_combined(grads, split_coefs(call[1]), call[2])]


def _linear_pair_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
    a, b, c, d = split_coefs(call[1])
    each = [(a, c), (b, d)]
    return [_combined(grads, e, call[2]) if n else None for e, n in zip(each, needs, strict=False)]


def _combined(grads: Grads, coefs: Sequence[Coef], step: Step) -> Tensor:
    """The sum of c g over the upstream gradients that there are."""
    there = [(g, c) for g, c in zip(grads, coefs, strict=True) if g is not None]
    kernel = LINEAR_COMBINATION if len(there) == 2 else SCALE
    tables = tuple(c for _, c in there)
    at = step if any(isinstance(c, Tensor) and c.ndim == 2 for c in tables) else None
    return run(kernel, tuple(g for g, _ in there), tables, at)


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
LINEAR_COMBINATION = drawing(
    Kernel(
        "linear_combination",
        ("x", "y"),
        ("a", "b"),
        reference=reference.linear_combination,
        backward=_linear_backward,
        saves_inputs=False,
    )
)
LINEAR_PAIR = drawing(
    Kernel(
        "linear_pair",
        ("x", "y"),
        ("a", "b", "c", "d"),
        outputs=2,
        reference=reference.linear_pair,
        backward=_linear_pair_backward,
        saves_inputs=False,
    )
)


# ---- Gaussians: an elementwise term, its sum, and the gradients of both ------------------------


class Term:
    """An elementwise term, its sum over samples, and the kernels of their gradients."""

    def __init__(
        self,
        name: str,
        inputs: tuple[str, ...],
        gradients: dict[str, tuple[int, ...]],
        home: ModuleType = reference,
    ) -> None:
        formula = getattr(home, f"_{name}")
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
        self, inputs: Tensors, call: Call, grads: Grads, needs: Needs
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

    def _sum_backward(self, inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads:
        _, coefs, step, _, _ = call
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
DISCRETIZED = Term(
    "discretized_gaussian_log_likelihood",
    ("x", "means", "log_scales"),
    {"": (0, 1, 2), "_parameters": (1, 2)},
    home=bound,
)


# ---- reparameterisation ------------------------------------------------------------------------


def _reparameterize_backward(
    inputs: Tensors, call: Call, grads: Grads, needs: Needs
) -> Grads | None:
    g = grads[0]
    (_, logvar), noise = with_noise(inputs, call)
    if any(needs[2:]) or g is None:
        return None  # rare: through the reference
    g_logvar = noised(REPARAMETERIZE_BACKWARD, (g, logvar), noise) if needs[1] else None
    return [g, g_logvar, *[None] * len(needs[2:])]


def _reparameterize_kl_backward(
    inputs: Tensors, call: Call, grads: Grads, needs: Needs
) -> Grads | None:
    g_z, g_kl = grads
    (mean, logvar), noise = with_noise(inputs, call)
    if any(needs[2:]):
        return None
    if g_kl is None:
        return _reparameterize_backward(inputs, call, (g_z,), needs)
    if g_z is None:
        found = run_tuple(STANDARD_NORMAL_KL.of_sum[""], (mean, logvar), (g_kl, 1.0))
    else:
        found = noised(REPARAMETERIZE_KL_BACKWARD, (mean, logvar, g_z), noise, (g_kl,))
    return [*found, *[None] * len(needs[2:])]


_PARAMETERS = ("mean", "logvar", "noise")
REPARAMETERIZE = drawing(
    Kernel(
        "reparameterize",
        _PARAMETERS,
        reference=reference.reparameterize,
        backward=_reparameterize_backward,
    )
)
REPARAMETERIZE_BACKWARD = drawing(Kernel("reparameterize_backward", ("grad", "logvar", "noise")))
REPARAMETERIZE_KL = drawing(
    Kernel(
        "reparameterize_kl",
        _PARAMETERS,
        sums=1,
        reference=reference.reparameterize_kl,
        backward=_reparameterize_kl_backward,
    )
)
REPARAMETERIZE_KL_BACKWARD = drawing(
    Kernel(
        "reparameterize_kl_backward",
        ("mean", "logvar", "grad_z", "noise"),
        ("grad_kl",),
        outputs=2,
    )
)


# ---- losses ------------------------------------------------------------------------------------


def expected_gradient(model_output: Tensor) -> float:
    """The upstream gradient of each sample's loss for which its gradient is made beforehand.

    That of the mean over the batch; in float16 none (0), because it would leave few digits of a
    small gradient before the loss scale comes.
    """
    batch = model_output.shape[0] if model_output.ndim else 1
    return 0.0 if model_output.dtype == torch.float16 else 1.0 / max(batch, 1)


def _loss_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
    if any(needs[1:]):
        return None  # a target that is trained too: through the reference
    _, (weight, inverse_n, *_), step, _, _ = call
    g, made = grads[1], inputs[-1]
    assert g is not None
    # Where nobody will need it again, the gradient made is the one returned; most often as it is.
    # (One that requires grad is the visible output of a registered operator, not ours to change.)
    out = made if plain_eager() and last_use() and not made.requires_grad else None
    coefs = (weight, inverse_n, g, expected_gradient(inputs[0]))
    at = step if isinstance(weight, Tensor) and weight.ndim == 2 else None
    return [run(RESCALE, (made,), coefs, at, False, out)] + [None] * (len(needs) - 1)


def _without_backward(*_: Any) -> None:
    return None  # the reference's: a gradient is asked of the twin that makes it


class Loss:
    """A loss, and its twin that makes the gradient of the model's output in the same pass."""

    def __init__(self, name: str, inputs: tuple[str, ...], coefs: tuple[str, ...]) -> None:
        formula = getattr(reference, f"_{name}")
        plain = Kernel(
            name,
            inputs,
            coefs,
            outputs=0,
            sums=1,
            reference=lambda *args, whole: formula(*args)[1],
            backward=_without_backward,
        )
        with_gradient = Kernel(
            f"{name}_gradient",
            inputs,
            (*coefs, "slope"),
            sums=1,
            reference=formula,
            backward=_loss_backward,
            makes_gradient=True,
        )
        self.plain: _execute.Kernel = drawing(plain)
        self.with_gradient: _execute.Kernel = drawing(with_gradient)

    def named(self, inputs: tuple[str, ...], coefs: tuple[str, ...]) -> Loss:
        twin = copy.copy(self)
        twin.plain = self.plain.named(inputs, coefs)
        twin.with_gradient = self.with_gradient.named(inputs, (*coefs, "slope"))
        return twin


RESCALE = Kernel("rescale", ("grad",), ("weight", "inverse_n", "g", "expected"))
TARGET_LOSS = Loss("target_loss", ("model_output", "target"), ("weight", "inverse_n"))
MIXED_TARGET_LOSS = Loss(
    "mixed_target_loss", ("model_output", "x0", "noise"), ("weight", "inverse_n", "a", "b")
)
