"""A row of a table with more than a step: a level for each group, its density, a known part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._types import Coef
from diffcore.noise import Noise
from diffcore.ops._density import step_of_row, wants_log_prob
from diffcore.ops._groups import in_groups
from diffcore.ops._launch import GivenGuidance, RowLauncher, guidance_of_row, history_of
from diffcore.ops._masks import blended_in_groups, step_blended


def step_with_more(
    table: Any,
    i: int | Tensor,
    x: Tensor,
    model_output: Tensor,
    history: Sequence[Tensor],
    *,
    noise: Noise | None,
    given: GivenGuidance,
    threshold: Coef | None,
    variance_output: Tensor | None,
    scored: tuple[bool, str],
    blend: tuple[Tensor | None, Tensor | None, Noise | None],
    group_dim: int | None,
) -> tuple[Any, ...]:
    """``SolverTable.step``, which describes the arguments.

    Args:
        table: The table.
        i: The row.
        x: The samples.
        model_output: m.
        history: What the step before returned.
        noise: z, or a noise key.
        given: m_u, the guidance scale and the rule.
        threshold: Bound of x_0.
        variance_output: v.
        scored: ``return_log_prob`` and ``reduction``.
        blend: The mask, the known samples and their noise.
        group_dim: The dimension of the groups, or ``None``.

    Returns:
        x', the history, and the log-probability where it is asked for.
    """
    launcher: RowLauncher = table._launcher
    scores = wants_log_prob(*scored)
    blends = any(part is not None for part in blend)
    if blends and scores:
        raise ValueError(
            "mask must be None with return_log_prob, got a tensor; what is put in has no density"
        )

    def row(
        i: int | Tensor,
        x: Tensor,
        model_output: Tensor,
        history: Sequence[Tensor],
        noise: Noise | None,
        model_output_uncond: Tensor | None,
        variance_output: Tensor | None,
        threshold: Coef | None,
        guidance_scale: Coef | None = None,
        guidance: Any = None,
    ) -> tuple[Any, ...]:
        rule = (model_output_uncond, guidance_scale, guidance)
        before = (i, x, model_output, history, noise)
        if scores:
            given_too = (rule, threshold, variance_output, scored[1])
            return step_of_row(launcher, *before, *given_too)
        uncond, scale, guidance = rule
        return launcher.step(*before, uncond, scale, threshold, variance_output, guidance)

    if group_dim is None:
        uncond, scale, rule = given
        of_row = (uncond, variance_output, threshold, scale, rule)
        x, *others = row(i, x, model_output, history, noise, *of_row)
    else:
        model_output, uncond, rule = guidance_of_row(launcher, i, x, model_output, *given)
        samples = {
            "x": x,
            "model_output": model_output,
            "history": history_of(history),
            "noise": noise,
            "model_output_uncond": uncond,
            "variance_output": variance_output,
        }
        levels = {"i": i, "guidance": rule, "threshold": threshold}
        x, *others = in_groups(row, group_dim, samples, levels, mean=scored[1] == "mean")
    if blends:
        level, t = _reached(table, i, x)
        if group_dim is None:
            x = step_blended(x, *blend, *level, t)
        else:
            x = blended_in_groups(x, *blend, level, t, group_dim)
    return x, *others


def _reached(table: Any, i: int | Tensor, x: Tensor) -> tuple[tuple[Coef, Coef], Tensor | None]:
    """The level of x' at row i: alpha and sigma, numbers or tables that ``i`` selects from."""
    if not isinstance(i, Tensor):
        row = table.rows[table._launcher.index(i)]
        return (row.next_alpha, row.next_sigma), None
    there = table.to(x.device)
    ends = ((there.alpha, table.final_alpha), (there.sigma, table.final_sigma))
    alpha, sigma = (torch.cat([c[1:], c.new_full((1,), end)]) for c, end in ends)
    return (alpha, sigma), i
