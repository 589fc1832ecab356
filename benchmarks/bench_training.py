"""Times a training step: its diffusion part alone, and the complete step with the demo's U-Net.

The diffusion part is what surrounds the network: noise, x_t, the loss and the gradient that the
network receives. With "noise drawn", eager PyTorch and ``torch.compile`` write the noise to memory,
and diffcore generates it inside its kernels. Next to the complete step is the time of the network
alone, which no library of diffusion ops can reduce.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from diffcore.diffusion import GaussianDiffusion
from diffcore.schedules import make_betas

from .bench_memory import peak_bytes
from .contest import check_outputs
from .suite import Job, Row, Run, Shape, times, timings_of
from .timing import Call, Timing, interleave

STEPS = 1000
PART_SHAPES = {"cpu": [(64, 3, 32, 32), (64, 3, 128, 128)], "cuda": [(256, 3, 64, 64)]}
PART_SHAPES["cuda"].append((256, 3, 256, 256))
KINDS = ("epsilon", "v_prediction")

Noise = Tensor | PhiloxNoise | None
Part = Callable[[Tensor, Tensor, Any, Tensor], tuple[Tensor, Tensor]]


def eager_part(
    kind: str, tables: Sequence[Tensor], m: Tensor, x0: Tensor, noise: Tensor | None, t: Tensor
) -> tuple[Tensor, Tensor]:
    """What one writes by hand: tables gathered at t, x_t, and the mean squared error.

    Args:
        kind: "epsilon" or "v_prediction".
        tables: alpha and sigma, `[T]`, in the dtype of the samples.
        m: the network's output, which does not wait for x_t here.
        x0: clean samples.
        noise: standard normal; None to draw it.
        t: timesteps `[B]`.

    Returns:
        x_t, and the loss.
    """
    if noise is None:
        noise = torch.randn_like(x0)
    alpha, sigma = (table[t].reshape(-1, 1, 1, 1) for table in tables)
    x_t = alpha * x0 + sigma * noise
    target = noise if kind == "epsilon" else alpha * noise - sigma * x0
    return x_t, torch.nn.functional.mse_loss(m, target)


def diffcore_part(
    kind: str,
    table: Tensor,
    levels: Mapping[str, Tensor],
    m: Tensor,
    x0: Tensor,
    noise: Noise,
    t: Tensor,
) -> tuple[Tensor, Tensor]:
    """The same through diffcore: two launches forward, none backward.

    Args:
        kind: "epsilon" or "v_prediction".
        table: `[T, 2]` float64.
        levels: alpha and sigma, its columns, where the target needs them.
        m: the network's output.
        x0: clean samples.
        noise: standard normal, or a noise key; None for one seeded by torch's generator, whose
            noise is drawn in both launches and never stored.
        t: timesteps `[B]`.

    Returns:
        x_t, and the loss.
    """
    if noise is None:
        noise = PhiloxNoise.from_generator(device=x0.device)
    x_t = ops.q_sample(x0, t, noise, table)
    return x_t, ops.denoising_loss(m, x0, noise, prediction_type=kind, t=t, **levels).mean()


def gradient(
    part: Part, m: Tensor, x0: Tensor, noise: Noise, t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, the loss, and its gradient in the network's output."""
    x_t, loss = part(m, x0, noise, t)
    (g,) = torch.autograd.grad(loss, m)
    return x_t, loss, g


def time_part(shape: Shape, kind: str, run: Run) -> list[Row]:
    """Two rows: the diffusion part with its noise given, and drawn.

    Args:
        shape: of the samples.
        kind: "epsilon" or "v_prediction".
        run: where and how long, for each row.

    Raises:
        WrongResultError: diffcore's result is wrong.
    """
    device = run.device
    diffusion = GaussianDiffusion(make_betas("linear", STEPS))
    table = diffusion.schedule.table.to(device)
    tables = [column.float().contiguous() for column in table.unbind(1)]
    key = PhiloxNoise(2026)
    m, x0 = (torch.randn(shape, device=device) for _ in range(2))
    noise = key.tensor(shape, dtype=x0.dtype, device=device)
    m.requires_grad_()
    t = torch.randint(STEPS, shape[:1], device=device)
    eager = partial(eager_part, kind, tables)
    columns = [c.contiguous() for c in table.unbind(1)]
    levels = {} if kind == "epsilon" else dict(zip(("alpha", "sigma"), columns, strict=True))
    ours = partial(diffcore_part, kind, table, levels)
    parts: dict[str, Part] = {"diffcore": ours, "eager": eager}
    if run.compiles:
        torch.compiler.reset()
        whole = torch.compile(eager_part, fullgraph=True, dynamic=False)
        parts["compile"] = partial(whole, kind, tables)

    wide = partial(eager_part, kind, columns)
    leaf = m.detach().double().requires_grad_()
    truth = gradient(wide, leaf, x0.double(), noise.double(), t)
    by_hand = gradient(eager, m, x0, noise, t)
    # With the noise drawn as well: it is this very noise.
    for source in (noise, key):
        check_outputs("diffcore", gradient(ours, m, x0, source, t), by_hand, truth)
    rows = []
    for given, text in ((noise, "noise given"), (None, "noise drawn")):
        calls = {n: [partial(gradient, p, m, x0, given, t)] for n, p in parts.items()}
        what = f"diffusion part, {kind}, {text}, {times(shape)}"
        timings = interleave(calls, device, run.budget(2.0))
        rows.append(row(what, timings, calls, device))
    return rows


def row(
    what: str,
    timings: Mapping[str, Timing],
    calls: Mapping[str, Sequence[Call]],
    device: torch.device,
) -> Row:
    """One row as JSON holds it, with the peak memory of each call."""
    peaks = {name: peak_bytes(some[0], device) for name, some in calls.items()}
    return {"what": what, "timings": timings_of(dict(timings)), "peak_bytes": peaks}


def time_unet(run: Run) -> Row:
    """One row: a whole training step of the demo's U-Net, AdamW included.

    Args:
        run: where and how long; a small network and batch if quick.

    Raises:
        WrongResultError: diffcore's loss is wrong.
    """
    from diffcore.demo.networks import UNet

    device = run.device
    batch, width, steps = (8, 16, 200) if run.quick else (64, 32, 200)
    diffusion = GaussianDiffusion(make_betas("linear", steps, scale_to_1000=True))
    table = diffusion.schedule.table.to(device)
    tables = [column.float().contiguous() for column in table.unbind(1)]
    x0 = torch.rand(batch, 1, 28, 28, device=device) * 2 - 1
    first: torch.nn.Module = UNet(width=width, num_timesteps=steps).to(device)
    first = first.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    # Its last layer starts at zero, which would leave nothing to check.
    torch.nn.init.normal_(first.get_parameter("out.weight"), std=0.1)

    def eager_loss(
        model: torch.nn.Module, x0: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        noise = torch.randn_like(x0) if noise is None else noise
        alpha, sigma = (c.to(x0.dtype)[t].reshape(-1, 1, 1, 1) for c in tables)
        output: Tensor = model(alpha * x0 + sigma * noise, t)
        return torch.nn.functional.mse_loss(output, noise)

    def diffcore_loss(
        model: torch.nn.Module, x0: Tensor, t: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        return diffusion.training_losses(model, x0, t, noise=noise)["loss"].mean()

    def network_loss(model: torch.nn.Module, x0: Tensor, t: Tensor) -> Tensor:
        # A sum is the cheapest loss there is: its gradient is one number.
        total: Tensor = model(x0, t).sum()
        return total

    t, noise = torch.randint(steps, (batch,), device=device), torch.randn_like(x0)
    _check_unet(first, eager_loss, diffcore_loss, x0, t, noise=noise)

    def step(loss: Callable[..., Tensor], model: torch.nn.Module, optimizer: Any) -> None:
        t = torch.randint(steps, (batch,), device=device)
        optimizer.zero_grad()
        loss(model, x0, t).backward()
        optimizer.step()

    losses = {"diffcore": diffcore_loss, "eager": eager_loss, "network alone": network_loss}
    calls: dict[str, list[Call]] = {}
    for name, loss in losses.items():
        model = copy.deepcopy(first)
        # No learning, or "network alone" would run off to infinity.
        calls[name] = [partial(step, loss, model, torch.optim.AdamW(model.parameters(), lr=0.0))]
    what = f"training step, U-Net, {batch}×1×28×28"
    timings = interleave(calls, device, run.budget(8.0), wall=True)
    eager, network = (timings[name].median for name in ("eager", "network alone"))
    run.note(
        f"U-Net step: all that is not the network is {100 * (1 - network / eager):.1f} % of the "
        f"eager step, which bounds any gain at {eager / network:.3f}×"
    )
    return row(what, timings, calls, device)


def _check_unet(
    model: torch.nn.Module,
    eager: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
) -> None:
    """Checks the loss, and its gradient in every parameter taken together, against float64."""
    wide = copy.deepcopy(model).double()
    # Timesteps are embedded in float32 whatever the network's dtype.
    wide.get_submodule("time_mlp").register_forward_pre_hook(lambda _, x: (x[0].double(),))
    found = []
    for loss, net, dtype in (
        (ours, model, torch.float32),
        (eager, model, torch.float32),
        (eager, wide, torch.float64),
    ):
        value = loss(net, x0.to(dtype), t, noise.to(dtype))
        gradients = torch.autograd.grad(value, list(net.parameters()))
        found.append([value, torch.cat([g.flatten() for g in gradients])])
    check_outputs("diffcore's U-Net", *found, whole=True)


def jobs(run: Run) -> Iterator[Job]:
    """The "training" section."""
    for shape in run.shapes(PART_SHAPES[run.device.type], (8, 3, 16, 16)):
        for kind in KINDS:
            what = f"diffusion part, {kind}, {times(shape)}"
            yield Job(kind, what, partial(time_part, shape, kind, run))
    yield Job("U-Net", "training step, U-Net", partial(time_unet, run))
