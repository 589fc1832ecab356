"""Steps that a classifier guides, and jumps of the forward process."""

from __future__ import annotations

from torch import Tensor

from support.routes.case import Case
from support.routes.method_cases import STEPS, model
from support.routes.method_cases import _method as method
from support.routes.op_cases import KEY


def gradient(x: Tensor, t: Tensor) -> Tensor:
    return -0.1 * x


GUIDED_CASES: list[Case] = [
    method(
        "q_sample_jump",
        lambda d, g: d.q_sample_jump(g["x"], g["t"], STEPS - 1, g["noise"]),
        "x noise",
        "x noise",
    ),
    method(
        "q_sample_jump",
        lambda d, g: d.q_sample_jump(g["x"], 3, 9, KEY),
        "x",
        "x",
        timesteps=False,
        suffix=", ints, key",
    ),
    method(
        "p_sample",
        lambda d, g: d.p_sample(
            model(g, learned=True), g["x"], g["t"], cond_fn=gradient, noise=KEY
        ),
        "x weight",
        "",  # the variance is not differentiated here
        suffix=", cond_fn, learned_range, key",
        variance_type="learned_range",
    ),
    method(
        "ddim_sample",
        lambda d, g: d.ddim_sample(model(g), g["x"], g["t"], cond_fn=gradient),
        "x weight",
        "x weight",
        suffix=", cond_fn",
    ),
]
