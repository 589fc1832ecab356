"""One `OpCase` for each way of calling an op: inputs, the diffcore call, and the plain formula.

Tests and benchmarks both read `CASES`. `formula` is what a user would write, generic over `xp`: with
`xp=torch` in the dtype of the inputs it is the eager baseline, with `xp=numpy` in extended precision
(80-bit `longdouble`) it is the truth.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcore import _native, _registry, ops

Shape = tuple[int, ...]
Draw = Callable[[Tensor], Tensor]

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
    tensors: dict[str, Draw]  # elementwise arguments, and how each is made from normal numbers
    formula: Callable[..., Any]  # (xp, **tensors, **options), naive plain code
    options: Callable[[int], dict[str, Any]] = lambda batch: {}
    differentiable: tuple[str, ...] = ()
    reads: int = 0  # elements read and written for each element, forward ...
    writes: int = 1
    backward_reads: int = 0  # ... and backward, upstream gradient included, to all `differentiable`
    backward_writes: int = 0
    has_exp: bool = False  # bound by arithmetic as well as by memory
    out: bool = False  # takes out=

    def make(
        self, shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu", *, seed: int = 0
    ) -> Arguments:
        """Random arguments, the same values for every dtype (up to rounding) and device."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {
            name: shift(torch.randn(shape, generator=generator, dtype=draw)).to(dtype)
            for name, shift in self.tensors.items()
        }
        return Arguments(tensors, self.options(shape[0] if shape else 1)).to(device)

    def native(self, args: Arguments) -> Any:
        """The diffcore call."""
        return self.op(**args.tensors, **args.options)

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
        moved = self.backward_reads + self.backward_writes if backward else self.reads + self.writes
        return moved * dtype.itemsize


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Runs the public ops on `diffcore.reference`, as an install without the module does."""
    native, registry = _native._C, _registry._C
    _native._C = _registry._C = None
    try:
        yield
    finally:
        _native._C, _registry._C = native, registry


def as_tuple(result: Any) -> tuple[Any, ...]:
    """The outputs of a call, always as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def extended(x: Tensor) -> np.ndarray:
    """The values of a tensor in `longdouble`, exactly."""
    x = x.detach().cpu()
    return (x.double() if x.is_floating_point() else x).numpy().astype(np.longdouble)


def _extended(value: Any) -> Any:
    if isinstance(value, Tensor):
        return extended(value) if value.is_floating_point() else value.cpu().numpy()
    return np.longdouble(value) if isinstance(value, float) else value


# ---- the formulas, for torch tensors and numpy arrays alike ------------------------------------


def _column(c: Any, like: Any) -> Any:
    """A coefficient `[B]` as `[B, 1, ...]` in the dtype of `like`; numbers pass."""
    if not getattr(c, "ndim", 0):
        return c
    c = c.reshape((-1,) + (1,) * (like.ndim - 1))
    return c.to(like.dtype) if isinstance(c, Tensor) else c


def _per_sample(terms: Any) -> Any:
    return terms.sum(tuple(range(1, terms.ndim))) if terms.ndim > 1 else terms


def _reduced(terms: Any, reduction: str) -> Any:
    if reduction == "none":
        return terms
    if reduction == "sample":
        return _per_sample(terms)
    return {
        "sum": terms.sum,
        "mean": terms.mean,
        "batchmean": lambda: terms.sum() / (terms.shape[0] if terms.ndim else 1),
    }[reduction]()


def _at(c: Any, t: Any) -> Any:
    return c if t is None or not getattr(c, "ndim", 0) else c[t]


def _add_noise(xp: Any, x0: Any, noise: Any, alpha: Any, sigma: Any, t: Any = None) -> Any:
    return _column(_at(alpha, t), x0) * x0 + _column(_at(sigma, t), x0) * noise


def _q_sample(xp: Any, x0: Any, noise: Any, t: Any, table: Any) -> Any:
    return _add_noise(xp, x0, noise, table[t, 0], table[t, 1])


def _velocity(xp: Any, x0: Any, noise: Any, alpha: Any, sigma: Any, t: Any = None) -> Any:
    return _column(_at(alpha, t), x0) * noise - _column(_at(sigma, t), x0) * x0


def _linear(xp: Any, x: Any, y: Any, coefficients: Any, t: Any = None) -> Any:
    a, b = (coefficients[t, 0], coefficients[t, 1]) if t is not None else coefficients
    return _column(a, x) * x + _column(b, x) * y


def _predict_x0(
    xp: Any, model_output: Any, x_t: Any, alpha: Any, sigma: Any, prediction_type: str = "epsilon"
) -> Any:
    a, s, m = _column(alpha, x_t), _column(sigma, x_t), model_output
    return {
        "epsilon": lambda: (x_t - s * m) / a,
        "sample": lambda: m,
        "v_prediction": lambda: a * x_t - s * m,
        "flow_prediction": lambda: x_t - s * m,
    }[prediction_type]()


def _predict_epsilon(
    xp: Any, model_output: Any, x_t: Any, alpha: Any, sigma: Any, prediction_type: str = "epsilon"
) -> Any:
    a, s, m = _column(alpha, x_t), _column(sigma, x_t), model_output
    return {
        "epsilon": lambda: m,
        "sample": lambda: (x_t - a * m) / s,
        "v_prediction": lambda: s * x_t + a * m,
        "flow_prediction": lambda: x_t + (1 - s) * m,
    }[prediction_type]()


def _guided(m: Any, uncond: Any, scale: Any) -> Any:
    return m if uncond is None else uncond + _column(scale, m) * (m - uncond)


def _clipped(x: Any, clip_range: Any) -> Any:
    if clip_range is None:
        return x
    low, high = clip_range if isinstance(clip_range, tuple) else (-clip_range, clip_range)
    return x.clip(low, high)


def _reverse_step(
    xp: Any,
    x: Any,
    model_output: Any,
    coefficients: Any,
    t: Any = None,
    noise: Any = None,
    model_output_uncond: Any = None,
    guidance_scale: Any = None,
) -> Any:
    rows = coefficients if t is None else coefficients[t]
    c_x, c_m, c_0, c_z, a_x, a_m, low, high = (_column(rows[..., k], x) for k in range(8))
    m = _guided(model_output, model_output_uncond, guidance_scale)
    x0 = (a_x * x + a_m * m).clip(low, high)
    step = c_x * x + c_m * m + c_0 * x0
    return step if noise is None else step + c_z * noise


def _ddpm_step(
    xp: Any,
    model_output: Any,
    x_t: Any,
    alpha: Any,
    sigma: Any,
    alpha_prev: Any,
    sigma_prev: Any,
    noise: Any = None,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_small",
    clip_range: Any = None,
    model_output_uncond: Any = None,
    guidance_scale: Any = None,
) -> Any:
    m = _guided(model_output, model_output_uncond, guidance_scale)
    x0 = _clipped(_predict_x0(xp, m, x_t, alpha, sigma, prediction_type), clip_range)
    ratio = alpha / alpha_prev
    beta = sigma**2 - ratio**2 * sigma_prev**2
    posterior_variance = beta * sigma_prev**2 / sigma**2
    mean = _column(alpha_prev * beta / sigma**2, x_t) * x0
    mean = mean + _column(ratio * sigma_prev**2 / sigma**2, x_t) * x_t
    if noise is None:
        return mean
    variance = posterior_variance if variance_type == "fixed_small" else beta
    return mean + _column(variance**0.5, x_t) * noise


def _ddim_step(
    xp: Any,
    model_output: Any,
    x_t: Any,
    alpha: Any,
    sigma: Any,
    alpha_prev: Any,
    sigma_prev: Any,
    eta: float = 0.0,
    noise: Any = None,
    prediction_type: str = "epsilon",
    rederive_epsilon: bool = True,
    clip_range: Any = None,
    model_output_uncond: Any = None,
    guidance_scale: Any = None,
) -> Any:
    m = _guided(model_output, model_output_uncond, guidance_scale)
    x0 = _clipped(_predict_x0(xp, m, x_t, alpha, sigma, prediction_type), clip_range)
    if rederive_epsilon:
        epsilon = (x_t - _column(alpha, x_t) * x0) / _column(sigma, x_t)
    else:
        epsilon = _predict_epsilon(xp, m, x_t, alpha, sigma, prediction_type)
    beta = sigma**2 - (alpha / alpha_prev) ** 2 * sigma_prev**2
    s = eta * (beta * sigma_prev**2 / sigma**2) ** 0.5
    direction = (sigma_prev**2 - s**2) ** 0.5
    mean = _column(alpha_prev, x_t) * x0 + _column(direction, x_t) * epsilon
    return mean if noise is None else mean + _column(s, x_t) * noise


def _normal_kl(
    xp: Any, mean1: Any, logvar1: Any, mean2: Any, logvar2: Any, reduction: str = "none"
) -> Any:
    terms = 0.5 * (
        -1 + logvar2 - logvar1 + xp.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * xp.exp(-logvar2)
    )
    return _reduced(terms, reduction)


def _standard_normal_kl(xp: Any, mean: Any, logvar: Any, reduction: str = "none") -> Any:
    return _reduced(0.5 * (mean**2 + xp.exp(logvar) - 1 - logvar), reduction)


def _gaussian_nll(xp: Any, x: Any, mean: Any, logvar: Any, reduction: str = "none") -> Any:
    log_two_pi = math.log(2 * math.pi) if xp is torch else np.log(8 * np.arctan(np.longdouble(1)))
    return _reduced(0.5 * (log_two_pi + logvar + (x - mean) ** 2 * xp.exp(-logvar)), reduction)


def _reparameterize(xp: Any, mean: Any, logvar: Any, noise: Any) -> Any:
    return mean + xp.exp(0.5 * logvar) * noise


def _reparameterize_kl(xp: Any, mean: Any, logvar: Any, noise: Any) -> Any:
    kl = _standard_normal_kl(xp, mean, logvar, reduction="sample")
    return _reparameterize(xp, mean, logvar, noise), kl


def _denoising_loss(
    xp: Any,
    model_output: Any,
    x0: Any,
    noise: Any,
    prediction_type: str = "epsilon",
    alpha: Any = None,
    sigma: Any = None,
    weight: Any = None,
    t: Any = None,
) -> Any:
    target = {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: _velocity(xp, x0, noise, alpha, sigma, t),
        "flow_prediction": lambda: noise - x0,
    }[prediction_type]()
    loss = _per_sample((model_output - target) ** 2) / max(math.prod(model_output.shape[1:]), 1)
    if weight is None:
        return loss
    weight = _at(weight, t)
    return loss * (weight.to(loss.dtype) if isinstance(weight, Tensor) else weight)


# ---- their arguments ----------------------------------------------------------------------------


def _plain(x: Tensor) -> Tensor:
    return x


def _logvar(x: Tensor) -> Tensor:
    return 0.7 * x - 0.5


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


_PAIR: dict[str, Draw] = {"x0": _plain, "noise": _plain}
_MODEL: dict[str, Draw] = {"model_output": _plain, "x_t": _plain}
_PARAMETERS: dict[str, Draw] = {"mean": _plain, "logvar": _logvar, "noise": _plain}
_TWO: dict[str, Draw] = {"mean1": _plain, "logvar1": _logvar, "mean2": _plain, "logvar2": _logvar}
_POINT: dict[str, Draw] = {"x": _plain, "mean": _plain, "logvar": _logvar}
_LOSS: dict[str, Draw] = {"model_output": _plain, "x0": _plain, "noise": _plain}
_GUIDED: dict[str, Draw] = {**_MODEL, "noise": _plain, "model_output_uncond": _plain}


def _linear_case(
    name: str,
    op: Callable[..., Any],
    formula: Callable[..., Any],
    options: Callable[[int], dict[str, Any]],
    tensors: dict[str, Draw] = _PAIR,
    used: int = 2,
) -> OpCase:
    return OpCase(
        name, op, tensors, formula, options, tuple(tensors), 2, 1, used, used, out=True
    )  # backward: each launch reads the gradient and writes one scaled copy


def _reduced_case(
    name: str, op: Callable[..., Any], tensors: dict[str, Draw], formula: Callable[..., Any]
) -> list[OpCase]:
    """An elementwise term, and its sum over each sample."""
    n = len(tensors)
    none = OpCase(
        name, op, tensors, formula, lambda b: {}, tuple(tensors), n, 1, n + 1, n, has_exp=True
    )
    sample = replace(
        none,
        name=f"{name}_sample",
        options=lambda b: {"reduction": "sample"},
        writes=0,
        backward_reads=n,
    )
    return [none, sample]


def _loss_case(name: str, options: Callable[[int], dict[str, Any]], reads: int) -> OpCase:
    return OpCase(
        name,
        ops.denoising_loss,
        _LOSS,
        _denoising_loss,
        options,
        ("model_output",),
        reads,
        0,
        reads,
        1,
    )


CASES: list[OpCase] = [
    _linear_case("add_noise", ops.add_noise, _add_noise, lambda b: {"alpha": 0.8, "sigma": 0.6}),
    _linear_case("add_noise_per_sample", ops.add_noise, _add_noise, _levels),
    _linear_case(
        "q_sample", ops.q_sample, _q_sample, lambda b: {"t": steps_of(b), "table": NOISE_TABLE}
    ),
    _linear_case("velocity", ops.velocity, _velocity, _levels),
    _linear_case(
        "velocity_table",
        ops.velocity,
        _velocity,
        lambda b: {
            "alpha": NOISE_TABLE[:, 0].float(),
            "sigma": NOISE_TABLE[:, 1].float(),
            "t": steps_of(b),
        },
    ),
    _linear_case(
        "linear_combination",
        ops.linear_combination,
        _linear,
        lambda b: {"coefficients": (0.7, -1.3)},
        {"x": _plain, "y": _plain},
    ),
    *(
        _linear_case(
            f"predict_x0_{kind}",
            ops.predict_x0,
            _predict_x0,
            lambda b, kind=kind: {
                "alpha": 0.6,
                "sigma": 0.4 if kind == "flow_prediction" else 0.8,
                "prediction_type": kind,
            },
            _MODEL,
        )
        for kind in ops.PREDICTION_TYPES
    ),
    *(
        _linear_case(
            f"predict_epsilon_{kind}",
            ops.predict_epsilon,
            _predict_epsilon,
            lambda b, kind=kind: {
                "alpha": 0.6,
                "sigma": 0.4 if kind == "flow_prediction" else 0.8,
                "prediction_type": kind,
            },
            _MODEL,
        )
        for kind in ops.PREDICTION_TYPES
    ),
    OpCase(
        "reverse_step",
        ops.reverse_step,
        {"x": _plain, "model_output": _plain, "noise": _plain},
        _reverse_step,
        lambda b: {"coefficients": step_table(), "t": steps_of(b)},
        ("x", "model_output", "noise"),
        3,
        1,
        4,
        3,
        out=True,
    ),
    OpCase(
        "reverse_step_rows",
        ops.reverse_step,
        {"x": _plain, "model_output": _plain},
        _reverse_step,
        lambda b: {"coefficients": step_table()[steps_of(b)]},
        ("x", "model_output"),
        2,
        1,
        3,
        2,
        out=True,
    ),
    OpCase(
        "reverse_step_guided",
        ops.reverse_step,
        {"x": _plain, "model_output": _plain, "model_output_uncond": _plain},
        _reverse_step,
        lambda b: {
            "coefficients": step_table(),
            "t": 7,
            "guidance_scale": torch.linspace(1.5, 7.5, max(b, 1), dtype=torch.float64)[:b],
        },
        ("x", "model_output", "model_output_uncond"),
        3,
        1,
        4,
        3,
        out=True,
    ),
    OpCase(
        "ddpm_step",
        ops.ddpm_step,
        {**_MODEL, "noise": _plain},
        _ddpm_step,
        lambda b: {**_one_step(), "clip_range": 1.0},
        ("model_output", "x_t", "noise"),
        3,
        1,
        4,
        3,
        out=True,
    ),
    OpCase(
        "ddpm_step_guided",
        ops.ddpm_step,
        _GUIDED,
        _ddpm_step,
        lambda b: {
            **_one_step(),
            "clip_range": (-1.2, 0.9),
            "prediction_type": "v_prediction",
            "variance_type": "fixed_large",
            "guidance_scale": 3.0,
        },
        ("model_output", "x_t", "noise", "model_output_uncond"),
        4,
        1,
        5,
        4,
        out=True,
    ),
    OpCase(
        "ddpm_step_per_sample",
        ops.ddpm_step,
        _MODEL,
        _ddpm_step,
        lambda b: {**_level_pair(b), "prediction_type": "sample"},
        ("model_output", "x_t"),
        2,
        1,
        3,
        2,
        out=True,
    ),
    OpCase(
        "ddim_step",
        ops.ddim_step,
        _MODEL,
        _ddim_step,
        lambda b: {**_one_step(), "clip_range": 1.0},
        ("model_output", "x_t"),
        2,
        1,
        3,
        2,
        out=True,
    ),
    OpCase(
        "ddim_step_noisy",
        ops.ddim_step,
        {**_MODEL, "noise": _plain},
        _ddim_step,
        lambda b: {**_level_pair(b), "eta": 0.7, "clip_range": 0.8, "rederive_epsilon": False},
        ("model_output", "x_t", "noise"),
        3,
        1,
        4,
        3,
        out=True,
    ),
    *_reduced_case("normal_kl", ops.normal_kl, _TWO, _normal_kl),
    *_reduced_case(
        "standard_normal_kl",
        ops.standard_normal_kl,
        {"mean": _plain, "logvar": _logvar},
        _standard_normal_kl,
    ),
    *_reduced_case("gaussian_nll", ops.gaussian_nll, _POINT, _gaussian_nll),
    OpCase(
        "reparameterize",
        ops.reparameterize,
        _PARAMETERS,
        _reparameterize,
        differentiable=("mean", "logvar"),
        reads=3,
        backward_reads=3,
        backward_writes=1,  # the gradient of mean is the upstream gradient itself
        has_exp=True,
    ),
    OpCase(
        "reparameterize_kl",
        ops.reparameterize_kl,
        _PARAMETERS,
        _reparameterize_kl,
        differentiable=("mean", "logvar"),
        reads=3,
        backward_reads=4,
        backward_writes=2,
        has_exp=True,
    ),
    _loss_case("denoising_loss_epsilon", lambda b: {}, 2),
    _loss_case(
        "denoising_loss_sample",
        lambda b: {
            "prediction_type": "sample",
            "weight": torch.linspace(0.5, 2, STEPS, dtype=torch.float64),
            "t": steps_of(b),
        },
        2,
    ),
    _loss_case(
        "denoising_loss_v",
        lambda b: {
            **_levels(b),
            "prediction_type": "v_prediction",
            "weight": torch.linspace(0.5, 2, max(b, 1))[:b],
        },
        3,
    ),
    _loss_case(
        "denoising_loss_flow", lambda b: {"prediction_type": "flow_prediction", "weight": 1.5}, 3
    ),
]

BY_NAME: dict[str, OpCase] = {case.name: case for case in CASES}
