"""Noise that a kernel reads or generates: the choice between a kernel and its twin."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore._engine import execute
from diffcore._engine.dispatch import Call, Kernel, Noise, run
from diffcore._types import Coefs, Step, Tensors

Needs = Any


def noised(
    kernel: execute.Kernel,
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
