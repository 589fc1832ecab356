"""Times the mathematics of a training step of a flow and of EDM, up to the network's gradient.

A step draws its noise levels, adds noise, and computes the weighted loss and its gradient in the
output of a network that costs nothing. The flow has logit-normal times, shifted; EDM scales the
input of the network and predicts its preconditioned output. With "noise drawn", eager PyTorch and
``torch.compile`` write the noise to memory, and diffcore generates it inside its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore import EDM, FlowMatching, PhiloxNoise

from .contest import check_outputs
from .suite import Job, Row, Run, Shape, times, timings_of
from .timing import interleave

SHAPES = {"cpu": [(64, 16, 64, 64), (8, 16, 32, 32)], "cuda": [(64, 16, 64, 64)]}
SHIFT = 3.0
FLOW = FlowMatching(timestep_density="logit_normal", shift=SHIFT, weighting="cosmap")
EDM_ = EDM()

Outputs = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Any, Any], Outputs]


class Training(NamedTuple):
    """A training step, and the same by hand.

    Args:
        name: for the rows.
        model: diffcore's class.
        levels: ``levels(batch, key, device=)``, what it draws.
        eager: ``eager(m, x0, noise, levels)`` with the network's output m, clean samples, noise and
            levels `[B]`, or None to draw them. Returns the network's input, for which no network
            waits, and the loss.
    """

    name: str
    model: Any
    levels: Callable[..., Tensor]
    eager: Step

    def ours(self, m: Tensor, x0: Tensor, noise: Any, levels: Tensor | None) -> Outputs:
        """The same through the class: two launches beside those of the levels."""
        inputs = []

        def network(x: Tensor, _: Tensor) -> Tensor:
            inputs.append(x)
            return m

        loss = self.model.training_losses(network, x0, levels, noise=noise)["loss"].mean()
        return inputs[0], loss


def eager_flow(m: Tensor, x0: Tensor, noise: Tensor | None, t: Tensor | None) -> Outputs:
    """x_t and the loss of a rectified flow."""
    noise = torch.randn_like(x0) if noise is None else noise
    if t is None:
        t = torch.sigmoid(torch.randn(len(x0), device=x0.device))
        t = SHIFT * t / (1 + (SHIFT - 1) * t)
    at = t.reshape(-1, 1, 1, 1)
    x_t = (1 - at) * x0 + at * noise
    weight = 2 / (torch.pi * (1 - 2 * t + 2 * t * t))
    error = (m - (noise - x0)).square().flatten(1).mean(1)
    return x_t, (weight * error).mean()


def eager_edm(m: Tensor, x0: Tensor, noise: Tensor | None, sigma: Tensor | None) -> Outputs:
    """The scaled input and the loss of EDM, as its paper writes them."""
    noise = torch.randn_like(x0) if noise is None else noise
    if sigma is None:
        sigma = torch.exp(1.2 * torch.randn(len(x0), device=x0.device) - 1.2)
    at = sigma.reshape(-1, 1, 1, 1)
    total = at**2 + 0.25
    x = x0 + at * noise
    denoised = 0.25 / total * x + at * 0.5 / total.sqrt() * m
    weight = total / (at * 0.5) ** 2
    return x / total.sqrt(), (weight * (denoised - x0) ** 2).mean()


TRAININGS = (
    Training("flow", FLOW, FLOW.sample_timesteps, eager_flow),
    Training("EDM", EDM_, EDM_.sample_sigmas, eager_edm),
)


def gradient(step: Step, m: Tensor, x0: Tensor, noise: Any, levels: Any) -> tuple[Tensor, ...]:
    """The network's input, the loss, and its gradient in the network's output."""
    x, loss = step(m, x0, noise, levels)
    (slope,) = torch.autograd.grad(loss, m)
    return x, loss, slope


def time_shape(of: Training, shape: Shape, run: Run) -> list[Row]:
    """Two rows: a step with its noise and levels given, and drawn.

    Args:
        of: the training step.
        shape: of the samples.
        run: where and how long, for each row.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    device = run.device
    m, x0 = (torch.randn(shape, device=device) for _ in range(2))
    m.requires_grad_()
    key = PhiloxNoise(2026)
    noise = key.tensor(shape, dtype=x0.dtype, device=device)
    levels = of.levels(shape[0], key, device=device)
    steps: dict[str, Step] = {"diffcore": of.ours, "eager": of.eager}
    if run.compiles:
        torch.compiler.reset()
        steps["compile"] = torch.compile(of.eager, fullgraph=True, dynamic=False)
    wide = m.detach().double().requires_grad_()
    truth = gradient(of.eager, wide, x0.double(), noise.double(), levels.double())
    by_hand = gradient(of.eager, m, x0, noise, levels)
    for given, at in ((noise, levels), (key, None)):  # the key gives this noise and these levels
        check_outputs("diffcore", gradient(of.ours, m, x0, given, at), by_hand, truth)
    rows = []
    for given, at, text in ((noise, levels, "noise given"), (None, None, "noise drawn")):
        calls = {n: [partial(gradient, step, m, x0, given, at)] for n, step in steps.items()}
        what = f"{of.name} training step, {text}, {times(shape)}"
        timings = interleave(calls, device, run.budget(4.0))
        rows.append({"what": what, "timings": timings_of(timings)})
    return rows


def jobs(run: Run) -> Iterator[Job]:
    """The "flow" section."""
    for shape in run.shapes(SHAPES[run.device.type], (8, 3, 16, 16)):
        for of in TRAININGS:
            yield Job(of.name, f"{of.name} {times(shape)}", partial(time_shape, of, shape, run))
