"""Denoising losses, which make their gradient in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore._engine.autograd import last_use
from diffcore._engine.dispatch import plain_eager, run
from diffcore._engine.kernel import Call, Grads, Kernel, NoisyKernel
from diffcore._engine.library import define, define_noisy
from diffcore._kernels.noise import Needs
from diffcore._types import Coef, Tensors
from diffcore.reference import loss as formulas


def expected_gradient(model_output: Tensor, summed: bool = False) -> float:
    """The upstream gradient of each sample's loss for which its gradient is made beforehand.

    That of the mean over the batch, or of the sum; in float16 none (0), because it would leave few
    digits of a small gradient before the loss scale comes.
    """
    batch = model_output.shape[0] if model_output.ndim and not summed else 1
    return 0.0 if model_output.dtype == torch.float16 else 1.0 / max(batch, 1)


def _assumed_gradient(inverse_n: Coef, slope: Coef) -> Coef:
    """The upstream gradient that a gradient was made for, exactly as ``expected_gradient`` gave it.

    The batch of the tensors at hand does not tell: they may be a shard of it.
    """
    if isinstance(inverse_n, float) and isinstance(slope, float):
        batch = round(inverse_n / slope) if slope else 0
        if batch and slope == inverse_n * (1.0 / batch):
            return 1.0 / batch
        return slope / inverse_n if inverse_n else 0.0
    return slope / inverse_n


def _loss_backward(inputs: Tensors, call: Call, grads: Grads, needs: Needs) -> Grads | None:
    if any(needs[1:]):
        return None  # a target that is trained too: through the reference
    _, (weight, inverse_n, *_, slope), step, _, _ = call
    g, made = grads[1], inputs[-1]
    assert g is not None
    # In the last backward pass the gradient made is rescaled in place; most often the ratio is 1.
    # (One that requires grad is the visible output of a registered operator, not ours to change.)
    out = made if plain_eager() and last_use() and not made.requires_grad else None
    coefs = (weight, inverse_n, g, _assumed_gradient(inverse_n, slope))
    at = step if isinstance(weight, Tensor) and weight.ndim == 2 else None
    return [run(RESCALE, (made,), coefs, at, False, out)] + [None] * (len(needs) - 1)


def _without_backward(*_: Any) -> None:
    return None  # the reference's: the kernel of a gradient is with_gradient


def _made_loss(plain: Kernel, formula: Callable[..., tuple[Tensor, Tensor]]) -> Kernel:
    """The kernel that also makes the gradient of the model output."""
    return replace(
        plain,
        name=f"{plain.name}_gradient",
        coefs=(*plain.coefs, "slope"),
        outputs=1,
        reference=formula,
        backward=_loss_backward,
        makes_gradient=True,
    )


# These have no kernels of their own for calls that need no gradient, which write it all the same.
MASKED_LOSS = define(
    Kernel(
        "masked_loss_gradient",
        ("model_output", "x0", "noise", "mask"),
        ("weight", "inverse_n", "a", "b", "slope"),
        outputs=1,
        sums=1,
        reference=formulas.masked_loss,
        backward=_loss_backward,
        makes_gradient=True,
    )
)
ROBUST_LOSS = define(  # of any target and either kind
    Kernel(
        "robust_loss_gradient",
        ("model_output", "x0", "noise"),
        ("weight", "inverse_n", "a", "b", "delta", "smooth", "slope"),
        outputs=1,
        sums=1,
        reference=formulas.robust_loss_gradient,
        backward=_loss_backward,
        makes_gradient=True,
    )
)


class Loss(NamedTuple):
    """A loss, and the kernels that also make the gradient of the model output in the same pass.

    The masked and the robust ones read a target of one tensor as two that are the same.
    """

    plain: NoisyKernel
    with_gradient: NoisyKernel
    masked: Kernel = MASKED_LOSS
    robust: Kernel = ROBUST_LOSS

    def renamed(self, inputs: tuple[str, ...], coefs: tuple[str, ...]) -> Loss:
        """The same loss under the argument names of a public function, for its errors."""
        target = inputs[1:] if len(inputs) == 3 else inputs[1:] * 2
        of_mask = (inputs[0], *target, "mask")
        columns = (*coefs, "a", "b")[:4]
        return Loss(
            self.plain.renamed(inputs, coefs),
            self.with_gradient.renamed(inputs, (*coefs, "slope")),
            self.masked.renamed(of_mask, (*columns, "slope")),
            self.robust.renamed((inputs[0], *target), (*columns, "delta", "smooth", "slope")),
        )


def _loss(
    name: str,
    inputs: tuple[str, ...],
    coefs: tuple[str, ...],
    formula: Callable[..., tuple[Tensor, Tensor]],
) -> Loss:
    plain = Kernel(
        name,
        inputs,
        coefs,
        outputs=0,
        sums=1,
        reference=lambda *args, reduce_all: formula(*args)[1],
        backward=_without_backward,
        samples=len(inputs) - 2,
    )
    return Loss(define_noisy(plain), define_noisy(_made_loss(plain, formula)))


RESCALE = define(Kernel("rescale", ("grad",), ("weight", "inverse_n", "g", "expected")))
TARGET_LOSS = _loss(
    "target_loss", ("model_output", "target"), ("weight", "inverse_n"), formulas.target_loss
)
MIXED_TARGET_LOSS = _loss(
    "mixed_target_loss",
    ("model_output", "x0", "noise"),
    ("weight", "inverse_n", "a", "b"),
    formulas.mixed_target_loss,
)
