"""One `OpCase` for each way of calling an op: inputs, the diffcore call, and the plain formula.

Tests and benchmarks both read `CASES`. `formula` is what a user would write, generic over `xp`:
with `xp=torch` in the dtype of the inputs it is the eager baseline, with `xp=numpy` in extended
precision (80-bit `longdouble`) it is the truth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import formulas
import numpy as np
import torch
from formulas import extended
from torch import Tensor

from diffcore import _execute, _native, _registry, ops

Shape = tuple[int, ...]
Options = Callable[[int], dict[str, Any]]

STEPS = 50
BETAS = torch.linspace(1e-3, 0.2, STEPS, dtype=torch.float64)
ALPHAS_CUMPROD = torch.cumprod(1 - BETAS, 0)
NOISE_TABLE = torch.stack([ALPHAS_CUMPROD.sqrt(), (1 - ALPHAS_CUMPROD).sqrt()], 1)
"""`[T, 2]` float64: alpha, sigma."""


@dataclass(frozen=True)
class Arguments:
    """What one call gets: elementwise tensors `[B, ...]`; coefficients, steps and strings."""

    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def map(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """The same call with every elementwise tensor changed: another dtype, layout, ..."""
        return replace(self, tensors={name: change(x) for name, x in self.tensors.items()})

    def to(self, device: torch.device | str) -> Arguments:
        """The same call on another device."""
        move = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return Arguments({name: x.to(device) for name, x in self.tensors.items()}, move)


@dataclass(frozen=True)
class OpCase:
    """One way of calling an op."""

    name: str
    op: Callable[..., Any]
    tensors: tuple[str, ...]  # the elementwise arguments
    formula: Callable[..., Any]  # (xp, **tensors, **options), naive plain code
    options: Options  # everything else, for a batch
    differentiable: tuple[str, ...]
    moves: int  # elements read and written for each element, forward ...
    backward_moves: int  # ... and backward to all `differentiable`, upstream gradient included
    has_exp: bool = False  # bound by arithmetic as well as by memory
    out: bool = False  # takes out=

    def make(
        self, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> Arguments:
        """Random arguments, the same values for every dtype (up to rounding) and device."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {}
        for name in self.tensors:
            x = torch.randn(shape, generator=generator, dtype=draw)
            tensors[name] = (0.7 * x - 0.5 if "logvar" in name else x).to(dtype)
        return Arguments(tensors, self.options(shape[0] if shape else 1)).to(device)

    def native(self, args: Arguments) -> Any:
        """The diffcore call."""
        return self.op(**args.tensors, **args.options)

    def by_position(self, args: Arguments) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """The op as a function of its tensors, coefficients being closed over."""
        names = list(args.tensors)

        def f(*tensors: Tensor) -> Any:
            return self.op(**dict(zip(names, tensors, strict=True)), **args.options)

        return f, tuple(args.tensors.values())

    def reference(self, args: Arguments) -> Any:
        """The same call on `diffcore.reference`, plain torch."""
        with without_kernels():
            return self.op(**args.tensors, **args.options)

    def eager(self, args: Arguments) -> Any:
        """What a user would write: the naive formula in plain torch, in the dtype of the inputs."""
        return self.formula(torch, **args.tensors, **args.options)

    def truth(self, args: Arguments) -> Any:
        """The formula on the very values given, in `longdouble`: an array, or a tuple."""
        values = {k: _extended(v) for k, v in {**args.tensors, **args.options}.items()}
        with np.errstate(all="ignore"):
            return self.formula(np, **values)

    def bytes_per_element(self, dtype: torch.dtype, *, backward: bool = False) -> int:
        """Memory traffic of the fused kernel per element; the roof is a copy of as much."""
        return (self.backward_moves if backward else self.moves) * dtype.itemsize


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Runs the public ops on `diffcore.reference`, as an install without the module does."""
    module = _native._C
    _native._C = _execute._C = None
    _registry._survey = None
    try:
        yield
    finally:
        _native._C = _execute._C = module
        _registry._survey = None if module is None else module.survey


def as_tuple(result: Any) -> tuple[Any, ...]:
    """The outputs of a call, always as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def _extended(value: Any) -> Any:
    if isinstance(value, Tensor):
        return extended(value) if value.is_floating_point() else value.cpu().numpy()
    return np.longdouble(value) if isinstance(value, float) else value


# ---- their arguments ----------------------------------------------------------------------------


def steps_of(batch: int) -> Tensor:
    """Steps `[B]` that touch the first and the last row of the tables."""
    return (torch.arange(batch) * 17 + STEPS - 1) % STEPS


def _levels(batch: int) -> dict[str, Tensor]:
    """alpha and sigma `[B]`, float64, variance preserving."""
    alpha, sigma = NOISE_TABLE[steps_of(batch)].unbind(1)
    return {"alpha": alpha.clone(), "sigma": sigma.clone()}


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


def _linear(
    name: str,
    op: Callable[..., Any],
    formula: Callable[..., Any],
    options: Options,
    tensors: tuple[str, ...] = ("x0", "noise"),
) -> OpCase:
    # backward: a launch for each input reads the gradient and writes a scaled copy
    return OpCase(name, op, tensors, formula, options, tensors, 3, 3, out=True)


def _conversions(op: Callable[..., Any], formula: Callable[..., Any]) -> list[OpCase]:
    def options(kind: str) -> dict[str, Any]:
        sigma = 0.4 if kind == "flow_prediction" else 0.8
        return {"alpha": 0.6, "sigma": sigma, "prediction_type": kind}

    return [
        _linear(
            f"{op.__name__}_{kind}",
            op,
            formula,
            lambda b, kind=kind: options(kind),
            ("model_output", "x_t"),
        )
        for kind in ops.PREDICTION_TYPES
    ]


def _step(
    name: str,
    op: Callable[..., Any],
    formula: Callable[..., Any],
    options: Options,
    tensors: tuple[str, ...],
) -> OpCase:
    n = len(tensors)
    return OpCase(name, op, tensors, formula, options, tensors, n + 1, 2 * n + 1, out=True)


def _reduced(
    op: Callable[..., Any], formula: Callable[..., Any], tensors: tuple[str, ...]
) -> list[OpCase]:
    """An elementwise term, and its sum over each sample."""
    name, n = op.__name__, len(tensors)
    whole = OpCase(
        name, op, tensors, formula, lambda b: {}, tensors, n + 1, 2 * n + 1, has_exp=True
    )
    by_sample: Options = lambda b: {"reduction": "sample"}  # noqa: E731
    sums = replace(whole, name=f"{name}_sample", options=by_sample, moves=n, backward_moves=2 * n)
    return [whole, sums]


def _loss(kind: str, options: Options, reads: int) -> OpCase:
    # backward: the gradient, which is written with the loss; that of .mean() leaves it as it is
    return OpCase(
        f"denoising_loss_{kind}",
        ops.denoising_loss,
        ("model_output", "x0", "noise"),
        formulas.denoising_loss,
        lambda b: {"prediction_type": kind, **options(b)},
        ("model_output",),
        reads,
        1,
    )


def _ramp(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, max(n, 1), dtype=torch.float64)[:n]


_ALPHAS, _SIGMAS = NOISE_TABLE.float().unbind(1)
_STEP = ("model_output", "x_t")
_NOISY = ("model_output", "x_t", "noise")
_PARAMETERS = ("mean", "logvar", "noise")

CASES: list[OpCase] = [
    _linear("add_noise", ops.add_noise, formulas.add_noise, lambda b: {"alpha": 0.8, "sigma": 0.6}),
    _linear("add_noise_per_sample", ops.add_noise, formulas.add_noise, _levels),
    _linear(
        "q_sample",
        ops.q_sample,
        formulas.q_sample,
        lambda b: {"t": steps_of(b), "table": NOISE_TABLE},
    ),
    OpCase(
        "q_sample_target",
        ops.q_sample,
        ("x0", "noise"),
        formulas.q_sample,
        lambda b: {"t": steps_of(b), "table": NOISE_TABLE, "return_target": "v_prediction"},
        ("x0", "noise"),
        4,
        6,
    ),
    _linear("velocity", ops.velocity, formulas.velocity, _levels),
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
    _step(
        "reverse_step",
        ops.reverse_step,
        formulas.reverse_step,
        lambda b: {"coefficients": step_table(), "t": steps_of(b)},
        ("x", "model_output", "noise"),
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
        lambda b: {"coefficients": step_table(), "t": 7, "guidance_scale": _ramp(1.5, 7.5, b)},
        ("x", "model_output", "model_output_uncond"),
    ),
    _step(
        "ddpm_step",
        ops.ddpm_step,
        formulas.ddpm_step,
        lambda b: {**_one_step(), "clip_range": 1.0},
        _NOISY,
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
    ),
    _step(
        "ddim_step_noisy",
        ops.ddim_step,
        formulas.ddim_step,
        lambda b: {**_level_pair(b), "eta": 0.7, "clip_range": 0.8, "rederive_epsilon": False},
        _NOISY,
    ),
    *_reduced(ops.normal_kl, formulas.normal_kl, ("mean1", "logvar1", "mean2", "logvar2")),
    *_reduced(ops.standard_normal_kl, formulas.standard_normal_kl, ("mean", "logvar")),
    *_reduced(ops.gaussian_nll, formulas.gaussian_nll, ("x", "mean", "logvar")),
    OpCase(
        "reparameterize",
        ops.reparameterize,
        _PARAMETERS,
        formulas.reparameterize,
        lambda b: {},
        ("mean", "logvar"),
        4,
        4,  # the gradient of mean is the upstream gradient itself
        has_exp=True,
    ),
    OpCase(
        "reparameterize_kl",
        ops.reparameterize_kl,
        _PARAMETERS,
        formulas.reparameterize_kl,
        lambda b: {},
        ("mean", "logvar"),
        4,
        6,
        has_exp=True,
    ),
    _loss("epsilon", lambda b: {}, 2),
    _loss("sample", lambda b: {"weight": _ramp(0.5, 2, STEPS), "t": steps_of(b)}, 2),
    _loss("v_prediction", lambda b: {**_levels(b), "weight": _ramp(0.5, 2, b).float()}, 3),
    _loss("flow_prediction", lambda b: {"weight": 1.5}, 3),
]

BY_NAME: dict[str, OpCase] = {case.name: case for case in CASES}
LOSSES = [case for case in CASES if case.op is ops.denoising_loss]
NOISED = [case for case in CASES if "noise" in case.tensors]
"""What takes a recipe in place of the noise."""
