"""Noise that a kernel reads or generates: the choice between the two kernels of a pair."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from diffcore._engine.dispatch import run
from diffcore._engine.kernel import Call, Kernel, NoisyKernel
from diffcore._engine.library import define
from diffcore._types import Coefs, NoiseParts, Step, Tensors

Needs = Any


def run_noisy(
    kernel: NoisyKernel,
    inputs: Tensors,
    noise: Tensor | NoiseParts,
    coefs: Coefs = (),
    step: Step = None,
    out: Tensor | None = None,
) -> Any:
    """Runs the kernel that reads ``noise``, or the one that generates it."""
    if isinstance(noise, Tensor):
        return run(kernel.reading, (*inputs, noise), coefs, step, False, out)
    return run(kernel.generating, inputs, coefs, step, False, out, noise)


def with_noise(inputs: Tensors, call: Call) -> tuple[Tensors, Tensor | NoiseParts]:
    """The inputs without the noise, and the noise: a tensor, or the parts of its key."""
    parts = call[-1]
    return (inputs[:-1], inputs[-1]) if parts is None else (inputs, parts)


RANDN = define(
    Kernel(
        "randn",
        ("out",),
        reference=lambda like, noise: noise,
        reads_inputs=False,
        generates_noise=True,
    )
)
