"""Linear maps and prediction conversions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffcore._types import Coef
from diffcore.reference.common import elementwise

__all__ = [
    "add_noise",
    "blend",
    "classifier_guidance",
    "linear_combination",
    "linear_pair",
    "predict_epsilon",
    "predict_x0",
    "scale",
    "scale_twice",
    "velocity",
]


def scale(x: Tensor, a: Coef) -> Tensor:
    """``a x``."""
    return elementwise(lambda x, a: a * x, (x,), (a,))


def scale_twice(x: Tensor, a: Coef, b: Coef) -> tuple[Tensor, Tensor]:
    """``(a x, b x)``."""
    return scale(x, a), scale(x, b)


def linear_combination(x: Tensor, y: Tensor, a: Coef, b: Coef) -> Tensor:
    """``a x + b y``."""
    return elementwise(lambda x, y, a, b: a * x + b * y, (x, y), (a, b))


def linear_pair(x: Tensor, y: Tensor, a: Coef, b: Coef, c: Coef, d: Coef) -> tuple[Tensor, Tensor]:
    """``(a x + b y, c x + d y)``; where c is 0, x has no part in the second."""

    def second(x: Tensor, y: Tensor, c: Coef, d: Coef) -> Tensor:
        absent = torch.as_tensor(c, device=x.device) == 0
        return torch.where(absent, torch.zeros_like(x), c * x) + d * y

    return linear_combination(x, y, a, b), elementwise(second, (x, y), (c, d))


def blend(
    x: Tensor, mask: Tensor, known: Tensor, noise: Tensor, alpha: Coef, sigma: Coef
) -> Tensor:
    """``q x + (1 - q) (alpha known + sigma noise)`` with the mask q; its 0 and 1 select."""

    def formula(x: Tensor, q: Tensor, known: Tensor, z: Tensor, a: Coef, s: Coef) -> Tensor:
        # What is dropped must not reach a gradient either, as 0 times an infinite number.
        ours, theirs = q == 1, q == 0
        known, z = (y.masked_fill(ours, 0.0) for y in (known, z))
        noised = a * known + s * z
        mixed = q * x.masked_fill(theirs, 0.0) + (1 - q) * noised
        return torch.where(ours, x, torch.where(theirs, noised, mixed))

    return elementwise(formula, (x, mask, known, noise), (alpha, sigma))


def add_noise(x0: Tensor, noise: Tensor, alpha: Coef, sigma: Coef) -> Tensor:
    """``x_t = alpha x_0 + sigma noise``."""
    return linear_combination(x0, noise, alpha, sigma)


def velocity(x0: Tensor, noise: Tensor, alpha: Coef, sigma: Coef) -> Tensor:
    """``v = alpha noise - sigma x_0``."""
    return elementwise(lambda x, e, a, s: a * e - s * x, (x0, noise), (alpha, sigma))


_X0: dict[str, Callable[..., Tensor]] = {
    "epsilon": lambda m, x, a, s: (x - s * m) / a,
    "sample": lambda m, x, a, s: m * 1.0,
    "v_prediction": lambda m, x, a, s: a * x - s * m,
    "flow_prediction": lambda m, x, a, s: x - s * m,
}

_EPSILON: dict[str, Callable[..., Tensor]] = {
    "epsilon": lambda m, x, a, s: m * 1.0,
    "sample": lambda m, x, a, s: (x - a * m) / s,
    "v_prediction": lambda m, x, a, s: s * x + a * m,
    "flow_prediction": lambda m, x, a, s: x + (1 - s) * m,
}

_CLASSIFIER: dict[str, Callable[..., Tensor]] = {
    "epsilon": lambda m, g, a, s: m - s * g,
    "sample": lambda m, g, a, s: m + s * s / a * g,
    "v_prediction": lambda m, g, a, s: m - s * (a * a + s * s) / a * g,
    "flow_prediction": lambda m, g, a, s: m - s * (a + s) / a * g,
}


def predict_x0(
    model_output: Tensor, x_t: Tensor, alpha: Coef, sigma: Coef, *, prediction_type: str = "epsilon"
) -> Tensor:
    """The clean sample that a prediction implies."""
    return elementwise(_X0[prediction_type], (model_output, x_t), (alpha, sigma))


def predict_epsilon(
    model_output: Tensor, x_t: Tensor, alpha: Coef, sigma: Coef, *, prediction_type: str = "epsilon"
) -> Tensor:
    """The noise that a prediction implies."""
    return elementwise(_EPSILON[prediction_type], (model_output, x_t), (alpha, sigma))


def classifier_guidance(
    model_output: Tensor,
    gradient: Tensor,
    alpha: Coef,
    sigma: Coef,
    *,
    prediction_type: str = "epsilon",
) -> Tensor:
    """The prediction, moved by the gradient of a classifier."""
    return elementwise(_CLASSIFIER[prediction_type], (model_output, gradient), (alpha, sigma))
