"""The sampling loop in which each group of a sample has a row of its own: rolling windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffcore._checks import as_int, check_not_compiling
from diffcore._engine.dispatch import run
from diffcore._engine.kept import made_plainly
from diffcore._kernels.linear import SCALE
from diffcore._types import Model, Tensors
from diffcore.coefficients.step import HISTORY_READ
from diffcore.guidance import Guidance
from diffcore.noise import Noise, StepNoise
from diffcore.ops._groups import Groups, in_groups
from diffcore.sampling.model import check_model_kwargs, predict
from diffcore.sampling.noise import noise_of_row
from diffcore.sampling.progress import progress_bar
from diffcore.solvers import SolverTable
from diffcore.solvers.table import COLUMNS


def pyramid_schedule(rows: int, groups: int, delay: int = 1) -> Tensor:
    """The schedule in which each group starts ``delay`` model calls after the one before it.

    With a delay of 0 all groups have the same row, as without a schedule; with one of ``rows`` a
    group is finished before the next one starts; between them a group is denoised while the groups
    before it are cleaner.

    Args:
        rows: S, the rows of the solver table: ``len(table)``.
        groups: G.
        delay: Model calls from the start of a group to that of the next.

    Returns:
        int64 ``[M, 1, G]``, M = S + (G - 1) delay, for the ``schedule`` of ``diffcore.sample``.

    Raises:
        TypeError: An argument is no int.
        ValueError: ``rows`` or ``groups`` is less than 1, or ``delay`` less than 0.

    Source:
        Chen et al. 2024, "Diffusion Forcing" (arXiv 2407.01392), section 3.
    """
    rows, groups = as_int("rows", rows, 1), as_int("groups", groups, 1)
    delay = as_int("delay", delay, 0)
    return made_plainly(lambda: _pyramid(rows, groups, delay))


def _pyramid(rows: int, groups: int, delay: int) -> Tensor:
    call = torch.arange(rows + (groups - 1) * delay, device="cpu").view(-1, 1, 1)
    row = call - delay * torch.arange(groups, device="cpu")
    return torch.where((row >= 0) & (row < rows), row, -1)


class _Schedule(NamedTuple):
    """A schedule, checked: int64 ``[M, B, G]`` on the CPU.

    ``rows`` has S where a group waits. ``labels`` is the row whose timestep the model gets: of a
    group that waits the next one that it takes, and S, the clean level, after its last.
    """

    rows: Tensor
    labels: Tensor
    numbers: list[list[int]]  # the rows that each model call takes


def _checked(schedule: Any, table: SolverTable, groups: Groups) -> _Schedule:
    try:
        given = torch.as_tensor(schedule)
    except (TypeError, ValueError, RuntimeError):
        kind = type(schedule).__name__
        raise TypeError(f"schedule must be a tensor of ints [M, B, G], got {kind}") from None
    if given.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"schedule must be an int64 or int32 tensor, got {given.dtype}")
    batch, _, count = (int(n) for n in groups.counts)
    wanted = (batch, count)
    if given.ndim != 3 or tuple(given.shape[1:]) not in (wanted, (1, count)) or not len(given):
        raise ValueError(
            f"schedule must have shape [M, B, G], (M, {batch}, {count}), or (M, 1, {count}), got "
            f"{tuple(given.shape)}"
        )
    rows = given.to("cpu", torch.int64).expand(-1, batch, -1)
    last = len(table)
    if rows.numel() and (int(rows.min()) < -1 or int(rows.max()) >= last):
        raise ValueError(
            f"schedule must hold rows 0 .. {last - 1} of {table.name}, or -1 for a group that "
            f"waits, got values from {int(rows.min())} to {int(rows.max())}"
        )
    labels = torch.full_like(rows, last)
    upcoming = torch.full(wanted, -1, device="cpu")  # the row after this call, -1 for none
    paused = False
    for m in range(len(rows) - 1, -1, -1):
        here = rows[m]
        active = here >= 0
        wrong = active & (upcoming >= 0) & (here + 1 != upcoming)
        if bool(wrong.any()):
            b, g = (int(x) for x in wrong.nonzero()[0])
            raise ValueError(
                "schedule must take the rows of a group one after the other, got row "
                f"{int(upcoming[b, g])} after row {int(here[b, g])} for sample {b}, group {g}"
            )
        later = m + 1 < len(rows) and bool((active & (upcoming >= 0) & (rows[m + 1] < 0)).any())
        paused = paused or later
        labels[m] = torch.where(active, here, upcoming)
        upcoming = torch.where(active, here, upcoming)
    if paused and table.history:
        raise ValueError(
            f"schedule must not pause a group between two rows of {table.name}, whose rows read "
            "earlier ones"
        )
    firsts = {int(r) for r in upcoming.flatten() if r >= 0}
    reads = [r for r in firsts if any(table.rows[r].coefficients[HISTORY_READ])]
    if reads:
        raise ValueError(
            f"schedule must start each group of {table.name} at a row that reads no earlier one, "
            f"such as 0, got {min(reads)}"
        )
    # After its last row a group is at the level that this row reached.
    reached = torch.full(wanted, last, device="cpu")
    for m in range(len(rows)):
        labels[m] = torch.where(labels[m] < 0, reached, labels[m])
        reached = torch.where(rows[m] >= 0, rows[m] + 1, reached)
    rows = torch.where(rows < 0, last, rows)
    return _Schedule(rows, labels, rows.flatten(1).tolist())


def _with_clean_row(table: SolverTable) -> SolverTable:
    """The table with a last row that changes nothing, at the clean level and timestep 0."""
    still = torch.zeros(len(COLUMNS), dtype=torch.float64, device="cpu")
    still[COLUMNS.index("c_x")] = 1
    still[COLUMNS.index("clip_min")], still[COLUMNS.index("clip_max")] = -torch.inf, torch.inf
    last: dict[str, Any] = {
        "coefficients": still,
        "alpha": 1.0,
        "input_scale": 1.0,
        "step_index": table.num_steps,
    }
    added: dict[str, Any] = {}
    for field in fields(table):
        x = getattr(table, field.name) if field.init else None
        if isinstance(x, Tensor):
            row = torch.as_tensor(last.get(field.name, 0), dtype=x.dtype, device=x.device)
            added[field.name] = torch.cat((x, row.expand(1, *x.shape[1:])))
    return replace(table, rows=(), **added)


def run_schedule(
    model: Model,
    x: Tensor,
    table: SolverTable,
    schedule: Tensor | Sequence[Any],
    group_dim: int,
    noise: StepNoise,
    *,
    guidance: Guidance | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    progress: bool | None = False,
    differentiable: bool = False,
) -> Tensor:
    """Run the rows of a schedule: see ``diffcore.sample``, also for the arguments.

    Args:
        model: ``model(x, t, **model_kwargs)`` with t ``[B, G]``.
        x: Samples to start from.
        table: The solver.
        schedule: The row of each group in each model call, ``[M, B, G]``.
        group_dim: The dimension of the groups.
        noise: The noise of the steps; that of model call m takes the stream 1 + m.
        guidance: A rule of guidance.
        model_kwargs: More arguments for the model.
        uncond_kwargs: The same for its unconditional call.
        progress: Show a bar; ``None`` for one on terminals only.
        differentiable: Whether autograd records the loop.

    Returns:
        The samples.
    """
    instead = "compile the model, or write the loop with SolverTable.step(group_dim=)"
    check_not_compiling("sample with a schedule", instead)
    check_model_kwargs(model_kwargs)
    check_model_kwargs(uncond_kwargs, "uncond_kwargs")
    table._launcher.check_guidance(guidance)
    if table.start_noise:
        raise ValueError(f"schedule must be None with churn at the start of {table.name}")
    if table.target_timesteps is not None:
        raise ValueError(f"schedule must be None with the target timesteps of {table.name}")
    groups = Groups.of("x", x, group_dim)
    known = made_plainly(lambda: _checked(schedule, table, groups))
    noisy = [*(row.noisy for row in table.rows), False]
    adds_noise = [any(noisy[r] for r in set(call)) for call in known.numbers]
    scaled = any(row.input_scale != 1 for row in table.rows)
    table = made_plainly(lambda: _with_clean_row(table))
    on_device = table.to(x.device)
    rows, labels = (y.to(x.device) for y in known[:2])
    timesteps = on_device.timesteps
    if timesteps.is_floating_point() and x.dtype != torch.float64:
        timesteps = timesteps.float()
    learned = table.variance is not None
    history: Tensors = ()
    rule = None if guidance is None else guidance.begin()
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        for m in progress_bar(range(len(rows)), table.name, progress):
            scale = on_device.input_scale[labels[m]] if scaled else None
            output, uncond, variance = predict(
                model,
                x if scale is None else _scaled(x, scale, group_dim),
                timesteps[labels[m]],
                model_kwargs,
                uncond_kwargs,
                rule is not None,
                learned,
            )
            z: Noise | None = None
            if adds_noise[m]:
                z = noise_of_row(noise, m, x, "noise")
            elif table.stochastic:
                z = torch.zeros_like(x)  # the kernel of the table reads it, times 0
            x, history = table.step(
                rows[m],
                x,
                output,
                history,
                noise=z,
                model_output_uncond=uncond,
                guidance=rule,
                variance_output=variance if learned else None,
                group_dim=group_dim,
            )
    return x


def _scaled(x: Tensor, scale: Tensor, group_dim: int) -> Tensor:
    """The scaled model input, with a scale for each group."""
    found: Tensor = in_groups(
        lambda x, a: run(SCALE, (x,), (a,)), group_dim, {"x": x}, {"a": scale}
    )
    return found
