"""The cases of one reverse step, its log-probability and its KL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from support import formulas
from support.op_case import NOISE_TABLE, STEPS, OpCase, Options, ramp, steps_of


def _level_pair(batch: int) -> dict[str, Tensor]:
    """The levels now and after a step of about a tenth of the schedule, `[B]` float64."""
    now = steps_of(batch).clamp(min=6)
    alpha, sigma = NOISE_TABLE[now].unbind(1)
    alpha_prev, sigma_prev = NOISE_TABLE[now - 5].unbind(1)
    return {
        "alpha": alpha.clone(),
        "sigma": sigma.clone(),
        "alpha_prev": alpha_prev.clone(),
        "sigma_prev": sigma_prev.clone(),
    }


def _one_step() -> dict[str, float]:
    return {k: float(v[0]) for k, v in _level_pair(1).items()}


def step_table() -> Tensor:
    """`[T, 8]` reverse-step rows in which every term takes part."""
    k = torch.arange(STEPS, dtype=torch.float64) / STEPS
    columns = (0.3 + k, 0.2 - k, 0.5 + 0.3 * k, 0.1 + k, 1.2 - 0.4 * k, -0.3 - k, -0.8 - k, 0.9 + k)
    return torch.stack(columns, 1)


def history_table() -> Tensor:
    """`[T, 14]`: those, and what history takes."""
    k = torch.arange(STEPS, dtype=torch.float64) / STEPS
    more = (0.4 - k, 0.3 + k, -0.6 - k, 0.7 + k, -0.9 + k, 0.5 - 0.2 * k)
    return torch.cat([step_table(), torch.stack(more, 1)], 1)


def _step(
    name: str,
    op: Callable[..., Any],
    formula: Callable[..., Any],
    options: Options,
    tensors: tuple[str, ...],
    *,
    benchmarked: bool = False,
) -> OpCase:
    return OpCase(name, op, tensors, formula, options, tensors, out=True, benchmarked=benchmarked)


def _with_history(
    *,
    history_1: Any = None,
    history_2: Any = None,
    history_3: Any = None,
    x: Any,
    model_output: Any,
    **options: Any,
) -> Any:
    """`reverse_step`, h by h."""
    history = [h for h in (history_1, history_2, history_3) if h is not None]
    return ops.reverse_step(x, model_output, history=history, **options)


def _multistep(
    name: str, options: Options, tensors: tuple[str, ...], differentiable: tuple[str, ...] = ()
) -> OpCase:
    step: Options = lambda b: {"coefficients": history_table(), "t": steps_of(b), **options(b)}  # noqa: E731
    return OpCase(
        name,
        _with_history,
        tensors,
        formulas.reverse_step,
        step,
        differentiable or tensors,
    )


def _log_prob_with_history(*, history_1: Any, history_2: Any, **given: Any) -> Any:
    """`step_log_prob`, h by h."""
    return ops.step_log_prob(**given, history=(history_1, history_2))


def _density(
    name: str,
    options: Options,
    tensors: tuple[str, ...],
    differentiable: tuple[str, ...] = (),
    op: Callable[..., Any] = ops.step_log_prob,
) -> OpCase:
    kl = op is ops.step_kl
    return OpCase(
        name,
        op,
        tensors,
        formulas.step_kl if kl else formulas.step_log_prob,
        lambda b: {"coefficients": history_table(), "t": steps_of(b), **options(b)},
        differentiable or tensors,
    )


_STEP = ("model_output", "x_t")
_NOISY = ("model_output", "x_t", "noise")

STEP_CASES: list[OpCase] = [
    _step(
        "reverse_step",
        ops.reverse_step,
        formulas.reverse_step,
        lambda b: {"coefficients": step_table(), "t": steps_of(b)},
        ("x", "model_output", "noise"),
        benchmarked=True,
    ),
    _step(
        "reverse_step_rows",
        ops.reverse_step,
        formulas.reverse_step,
        lambda b: {"coefficients": step_table()[steps_of(b)]},
        ("x", "model_output"),
    ),
    _step(
        "reverse_step_guided",
        ops.reverse_step,
        formulas.reverse_step,
        lambda b: {"coefficients": step_table(), "t": 7, "guidance_scale": ramp(1.5, 7.5, b)},
        ("x", "model_output", "model_output_uncond"),
    ),
    _multistep(
        "reverse_step_first",
        lambda b: {"return_history": True, "guidance_scale": 2.5},
        ("x", "model_output", "model_output_uncond"),
    ),
    _multistep("reverse_step_second", lambda b: {}, ("x", "model_output", "history_1", "noise")),
    _multistep(
        "reverse_step_threshold",
        lambda b: {"return_history": True, "threshold": ramp(0.5, 2, b)},
        ("x", "model_output", "history_1", "noise"),
    ),
    _multistep(
        "reverse_step_h2_guided",
        lambda b: {"return_history": True, "guidance_scale": ramp(1.5, 7.5, b)},
        ("x", "model_output", "model_output_uncond", "history_1", "history_2"),
    ),
    _multistep(
        "reverse_step_h3",
        lambda b: {"return_history": True},
        ("x", "model_output", "history_1", "history_2", "history_3", "noise"),
    ),
    _multistep(
        "reverse_step_learned",
        lambda b: {"variance_coefficients": (-0.7, 0.2)},
        ("x", "model_output", "variance_output", "noise"),
        ("x", "model_output"),
    ),
    _density("step_log_prob", lambda b: {}, ("x", "model_output", "x_next")),
    _density(
        "step_log_prob_guided",
        lambda b: {"guidance_scale": ramp(1.5, 7.5, b)},
        ("x", "model_output", "x_next", "model_output_uncond"),
        ("model_output", "model_output_uncond"),
    ),
    _density(
        "step_log_prob_h2",
        lambda b: {},
        ("x", "model_output", "x_next", "history_1", "history_2"),
        op=_log_prob_with_history,
    ),
    _density(
        "step_log_prob_learned",
        lambda b: {"variance_coefficients": (-0.7, 0.2)},
        ("x", "model_output", "x_next", "variance_output"),
        ("model_output", "variance_output"),
    ),
    _density(
        "step_kl",
        lambda b: {},
        ("x", "model_output", "reference_output"),
        ("model_output", "reference_output"),
        ops.step_kl,
    ),
    _density(
        "step_kl_guided",
        lambda b: {"guidance_scale": ramp(1.5, 7.5, b)},
        (
            *("x", "model_output", "reference_output"),
            *("model_output_uncond", "reference_output_uncond"),
        ),
        op=ops.step_kl,
    ),
    _step(
        "ddpm_step",
        ops.ddpm_step,
        formulas.ddpm_step,
        lambda b: {**_one_step(), "clip_range": 1.0},
        _NOISY,
        benchmarked=True,
    ),
    _step(
        "ddpm_step_guided",
        ops.ddpm_step,
        formulas.ddpm_step,
        lambda b: {
            **_one_step(),
            "clip_range": (-1.2, 0.9),
            "prediction_type": "v_prediction",
            "variance_type": "fixed_large",
            "guidance_scale": 3.0,
        },
        (*_NOISY, "model_output_uncond"),
        benchmarked=True,
    ),
    _step(
        "ddpm_step_per_sample",
        ops.ddpm_step,
        formulas.ddpm_step,
        lambda b: {**_level_pair(b), "prediction_type": "sample"},
        _STEP,
    ),
    _step(
        "ddim_step",
        ops.ddim_step,
        formulas.ddim_step,
        lambda b: {**_one_step(), "clip_range": 1.0},
        _STEP,
        benchmarked=True,
    ),
    _step(
        "ddim_step_noisy",
        ops.ddim_step,
        formulas.ddim_step,
        lambda b: {**_level_pair(b), "eta": 0.7, "clip_range": 0.8, "rederive_epsilon": False},
        _NOISY,
    ),
]
