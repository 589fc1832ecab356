"""One `OpCase` for each way of calling an op. Tests and benchmarks both read `CASES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffcore import ops
from support import formulas
from support.bound_cases import BOUND_CASES
from support.mask_cases import MASK_CASES, masked_denoising_loss
from support.op_case import ALPHAS_CUMPROD as ALPHAS_CUMPROD
from support.op_case import BETAS as BETAS
from support.op_case import NOISE_TABLE as NOISE_TABLE
from support.op_case import STEPS as STEPS
from support.op_case import Arguments as Arguments
from support.op_case import OpCase as OpCase
from support.op_case import Options as Options
from support.op_case import as_tuple as as_tuple
from support.op_case import ramp as ramp
from support.op_case import steps_of as steps_of
from support.op_case import without_kernels as without_kernels
from support.step_cases import STEP_CASES
from support.step_cases import history_table as history_table
from support.step_cases import step_table as step_table


def _levels(batch: int) -> dict[str, Tensor]:
    """alpha and sigma `[B]`, float64, variance preserving."""
    alpha, sigma = NOISE_TABLE[steps_of(batch)].unbind(1)
    return {"alpha": alpha.clone(), "sigma": sigma.clone()}


def _linear(
    name: str,
    op: Callable[..., Any],
    formula: Callable[..., Any],
    options: Options,
    tensors: tuple[str, ...] = ("x0", "noise"),
    *,
    benchmarked: bool = False,
) -> OpCase:
    return OpCase(name, op, tensors, formula, options, tensors, out=True, benchmarked=benchmarked)


def _conversions(
    op: Callable[..., Any], formula: Callable[..., Any], other: str = "x_t"
) -> list[OpCase]:
    def options(kind: str) -> dict[str, Any]:
        sigma = 0.4 if kind == "flow_prediction" else 0.8
        return {"alpha": 0.6, "sigma": sigma, "prediction_type": kind}

    return [
        _linear(
            f"{op.__name__}_{kind}",
            op,
            formula,
            lambda b, kind=kind: options(kind),
            ("model_output", other),
            benchmarked=op is ops.predict_x0 and kind == "epsilon",
        )
        for kind in ops.PREDICTION_TYPES
    ]


def _reduced(
    op: Callable[..., Any],
    formula: Callable[..., Any],
    tensors: tuple[str, ...],
    benchmarked: tuple[str, ...],
) -> list[OpCase]:
    """An elementwise term, and its sum over each sample."""
    none = "none" in benchmarked
    term = OpCase(
        op.__name__, op, tensors, formula, lambda b: {}, tensors, has_exp=True, benchmarked=none
    )
    by_sample: Options = lambda b: {"reduction": "sample"}  # noqa: E731
    sample = "sample" in benchmarked
    sums = replace(term, name=f"{term.name}_sample", options=by_sample, benchmarked=sample)
    return [term, sums]


def _loss(
    kind: str, options: Options, *, name: str | None = None, benchmarked: bool = False
) -> OpCase:
    # Backward: the gradient, which is written with the loss; that of .mean() leaves it as it is.
    return OpCase(
        f"denoising_loss_{name or kind}",
        ops.denoising_loss,
        ("model_output", "x0", "noise"),
        formulas.denoising_loss,
        lambda b: {"prediction_type": kind, **options(b)},
        ("model_output",),
        backward_elements=1,
        benchmarked=benchmarked,
    )


_ALPHAS, _SIGMAS = NOISE_TABLE.float().unbind(1)
_PARAMETERS = ("mean", "logvar", "noise")

CASES: list[OpCase] = [
    _linear(
        "add_noise",
        ops.add_noise,
        formulas.add_noise,
        lambda b: {"alpha": 0.8, "sigma": 0.6},
        benchmarked=True,
    ),
    _linear("add_noise_per_sample", ops.add_noise, formulas.add_noise, _levels),
    _linear(
        "q_sample",
        ops.q_sample,
        formulas.q_sample,
        lambda b: {"t": steps_of(b), "table": NOISE_TABLE},
        benchmarked=True,
    ),
    OpCase(
        "q_sample_target",
        ops.q_sample,
        ("x0", "noise"),
        formulas.q_sample,
        lambda b: {"t": steps_of(b), "table": NOISE_TABLE, "return_target": "v_prediction"},
        ("x0", "noise"),
    ),
    _linear("velocity", ops.velocity, formulas.velocity, _levels, benchmarked=True),
    _linear(
        "velocity_table",
        ops.velocity,
        formulas.velocity,
        lambda b: {"alpha": _ALPHAS, "sigma": _SIGMAS, "t": steps_of(b)},
    ),
    _linear(
        "linear_combination",
        ops.linear_combination,
        formulas.linear,
        lambda b: {"coefficients": (0.7, -1.3)},
        ("x", "y"),
    ),
    *_conversions(ops.predict_x0, formulas.predict_x0),
    *_conversions(ops.predict_epsilon, formulas.predict_epsilon),
    *_conversions(ops.classifier_guidance, formulas.classifier_guidance, "gradient"),
    _linear(
        "classifier_guidance_scales",
        ops.classifier_guidance,
        formulas.classifier_guidance,
        lambda b: {**_levels(b), "scale": ramp(0.5, 8, b)},
        ("model_output", "gradient"),
    ),
    *STEP_CASES,
    *_reduced(
        ops.normal_kl,
        formulas.normal_kl,
        ("mean1", "logvar1", "mean2", "logvar2"),
        ("none", "sample"),
    ),
    *_reduced(ops.standard_normal_kl, formulas.standard_normal_kl, ("mean", "logvar"), ("sample",)),
    *_reduced(ops.gaussian_nll, formulas.gaussian_nll, ("x", "mean", "logvar"), ("none",)),
    *_reduced(
        ops.discretized_gaussian_log_likelihood,
        formulas.discretized_gaussian_log_likelihood,
        ("x", "means", "log_scales"),
        ("none",),
    ),
    OpCase(
        "reparameterize",
        ops.reparameterize,
        _PARAMETERS,
        formulas.reparameterize,
        lambda b: {},
        ("mean", "logvar"),
        has_exp=True,
        benchmarked=True,
    ),
    OpCase(
        "reparameterize_kl",
        ops.reparameterize_kl,
        _PARAMETERS,
        formulas.reparameterize_kl,
        lambda b: {},
        ("mean", "logvar"),
        has_exp=True,
        benchmarked=True,
    ),
    _loss("epsilon", lambda b: {}, benchmarked=True),
    _loss("sample", lambda b: {"weight": ramp(0.5, 2, STEPS), "t": steps_of(b)}),
    _loss(
        "v_prediction",
        lambda b: {**_levels(b), "weight": ramp(0.5, 2, b).float()},
        benchmarked=True,
    ),
    _loss("flow_prediction", lambda b: {"weight": 1.5}),
    _loss(
        "v_prediction",
        lambda b: {**_levels(b), "loss": "pseudo_huber", "delta": ramp(0.2, 3, b).float()},
        name="pseudo_huber",
    ),
    _loss(
        "epsilon",
        lambda b: {"loss": "smooth_l1", "delta": ramp(0.5, 2, STEPS), "t": steps_of(b)},
        name="smooth_l1",
    ),
    *MASK_CASES,
    *BOUND_CASES,
]

BY_NAME: dict[str, OpCase] = {case.name: case for case in CASES}
LOSSES = [case for case in CASES if case.op in (ops.denoising_loss, masked_denoising_loss)]
NOISED = [case for case in CASES if "noise" in case.tensors]
"""What takes a noise key in place of the noise."""
