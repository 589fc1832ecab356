"""Forward diffusion, targets and conversions between predictions: linear maps of two tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from diffcore._checks import check_choice, check_dense
from diffcore._devices import beside
from diffcore._engine.dispatch import run
from diffcore._kernels import linear as k
from diffcore._types import Coef, Step
from diffcore.coefficients import step as formulas
from diffcore.noise import Noise
from diffcore.ops._arguments import (
    as_coef,
    as_table,
    columns_of,
    converted,
    in_float64,
    negated,
)
from diffcore.ops._groups import in_groups
from diffcore.ops._noise import run_noisy

__all__ = [
    "add_noise",
    "classifier_guidance",
    "linear_combination",
    "predict_epsilon",
    "predict_x0",
    "q_sample",
    "velocity",
]


# One kernel, under the names of the arguments of each op.
_PAIR, _LEVELS = ("x0", "noise"), ("alpha", "sigma")
_ADD_NOISE = k.LINEAR_COMBINATION.renamed(_PAIR, _LEVELS)
_Q_SAMPLE = k.LINEAR_COMBINATION.renamed(_PAIR, _LEVELS, table="table")
_WITH_TARGET = k.LINEAR_PAIR.renamed(_PAIR, (*_LEVELS, "target's x0", "target's noise"))
_Q_SAMPLE_TARGET = _WITH_TARGET.renamed(_PAIR, table="table")
_VELOCITY = k.LINEAR_COMBINATION.renamed(_PAIR, ("sigma", "alpha"))
_GUIDED = k.LINEAR_COMBINATION.reading.renamed(
    ("model_output", "gradient"), ("1", "alpha, sigma and scale")
)
_CONVERSION = k.LINEAR_COMBINATION.reading.renamed(("x_t", "model_output"), _LEVELS)


Target = Literal["epsilon", "v_prediction", "flow_prediction"]


def _target(name: str, alpha: Coef, sigma: Coef) -> tuple[Coef, Coef]:
    """The target as a combination of x_0 and the noise."""
    if not isinstance(name, str):
        check_choice("return_target", name, ("epsilon", "v_prediction", "flow_prediction"))
    if name == "v_prediction":
        return negated("sigma", sigma), alpha
    if name == "sample":
        raise ValueError(
            "return_target must be one of 'epsilon', 'v_prediction', 'flow_prediction', got "
            "'sample'; its target is x0 itself"
        )
    check_choice("return_target", name, ("epsilon", "v_prediction", "flow_prediction"))
    return (0.0 if name == "epsilon" else -1.0), 1.0


def _in_groups(
    op: Callable[..., Any],
    group_dim: int,
    samples: dict[str, Any],
    alpha: Coef,
    sigma: Coef,
    t: Step,
    **rest: Any,
) -> Any:
    """``in_groups`` for alpha and sigma, which are tables where there is a t."""
    levels: dict[str, Any] = {"alpha": alpha, "sigma": sigma}
    if t is None:
        return in_groups(op, group_dim, samples, levels, **rest)
    return in_groups(op, group_dim, samples, {"t": t}, **levels, **rest)


def _refuse_out(out: Tensor | None) -> None:
    if out is not None:
        raise ValueError("out must be None where return_target is given, got both")


@overload
def add_noise(
    x0: Tensor,
    noise: Noise,
    alpha: Coef,
    sigma: Coef,
    *,
    t: Step = None,
    return_target: None = None,
    group_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def add_noise(
    x0: Tensor,
    noise: Noise,
    alpha: Coef,
    sigma: Coef,
    *,
    t: Step = None,
    return_target: Target,
    group_dim: int | None = None,
) -> tuple[Tensor, Tensor]: ...
def add_noise(
    x0: Tensor,
    noise: Noise,
    alpha: Coef,
    sigma: Coef,
    *,
    t: Step = None,
    return_target: Target | None = None,
    group_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds noise to clean samples: ``x_t = alpha x_0 + sigma noise``.

    Variance preserving: alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod); variance
    exploding: alpha = 1; rectified flow: alpha = 1 - t, sigma = t.

    Args:
        x0: Clean samples ``[B, ...]``.
        noise: Standard normal noise ``[B, ...]``, or a noise key: it is generated in the kernel.
        alpha: Signal coefficient. A number, 0-dim, ``[B]``, or a table ``[T]`` with ``t``.
        sigma: Noise coefficient. A number, 0-dim, ``[B]``, or a table ``[T]`` with ``t``.
        t: The step at which the tables are read: an int, ``[B]`` or a one-element counter.
        return_target: A target to return as well, computed in the same launch: "epsilon" (the
            noise), "v_prediction" (alpha noise - sigma x_0) or "flow_prediction" (noise - x_0).
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: alpha, sigma and t may then be ``[B, G]``.
        out: Tensor to write to. Not with ``return_target``, nor where a gradient is needed.

    Returns:
        ``x_t`` ``[B, ...]``; with ``return_target``, ``x_t`` and the target.

    Source:
        Ho et al. 2020, eq. 4; Song et al. 2021 for the families.
    """
    if group_dim is not None:
        of_samples = {"x0": x0, "noise": noise}
        return _in_groups(  # type: ignore[no-any-return]
            add_noise, group_dim, of_samples, alpha, sigma, t, return_target=return_target, out=out
        )
    coefs = (as_coef("alpha", alpha, t), as_coef("sigma", sigma, t))
    if return_target is None:
        x_t: Tensor = run_noisy(_ADD_NOISE, (x0,), noise, coefs, t, out)
        return x_t
    _refuse_out(out)
    of_x0, of_noise = _target(return_target, alpha, sigma)
    target = (as_coef("sigma", of_x0, t), as_coef("alpha", of_noise, t))
    both: tuple[Tensor, Tensor] = run_noisy(_WITH_TARGET, (x0,), noise, (*coefs, *target), t)
    return both


@overload
def q_sample(
    x0: Tensor,
    t: int | Tensor,
    noise: Noise,
    table: Tensor,
    *,
    return_target: None = None,
    group_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor: ...
@overload
def q_sample(
    x0: Tensor,
    t: int | Tensor,
    noise: Noise,
    table: Tensor,
    *,
    return_target: Target,
    group_dim: int | None = None,
) -> tuple[Tensor, Tensor]: ...
def q_sample(
    x0: Tensor,
    t: int | Tensor,
    noise: Noise,
    table: Tensor,
    *,
    return_target: Target | None = None,
    group_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Adds the noise of step ``t`` of a schedule: ``x_t = alpha_t x_0 + sigma_t noise``.

    The kernel gathers the coefficients, and generates the noise where ``noise`` is a key: one
    launch, which reads x_0 and writes x_t.

    Args:
        x0: Clean samples ``[B, ...]``.
        t: An int, ``[B]`` or a one-element counter, with 0 <= t < T.
        noise: Standard normal noise ``[B, ...]``, or a noise key.
        table: ``[T, 2]``, float64 or float32: the columns alpha and sigma.
        return_target: A target to return as well, as in :func:`add_noise`.
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: t may then be ``[B, G]``.
        out: Tensor to write to. Not with ``return_target``, nor where a gradient is needed.

    Returns:
        ``x_t`` ``[B, ...]``; with ``return_target``, ``x_t`` and the target.

    Source:
        Ho et al. 2020, eq. 4.
    """
    if t is None:
        raise TypeError("t must be an int or an int64 or int32 tensor, got NoneType")
    if group_dim is not None:
        of_samples = {"x0": x0, "noise": noise}
        return in_groups(  # type: ignore[no-any-return]
            q_sample,
            group_dim,
            of_samples,
            {"t": t},
            table=table,
            return_target=return_target,
            out=out,
        )
    table = as_table("table", table, 2)
    if return_target is None:
        x_t: Tensor = run_noisy(_Q_SAMPLE, (x0,), noise, (table,), t, out)
        return x_t
    _refuse_out(out)
    if table.is_quantized:
        check_dense("table", table)
    alpha, sigma = columns_of("table", table, 0, 1), columns_of("table", table, 1, 2)
    target = _target(return_target, alpha, sigma)
    both: tuple[Tensor, Tensor] = run_noisy(_Q_SAMPLE_TARGET, (x0,), noise, (table, *target), t)
    return both


def linear_combination(
    x: Tensor,
    y: Tensor,
    coefficients: tuple[Coef, Coef] | Tensor,
    *,
    t: Step = None,
    out: Tensor | None = None,
) -> Tensor:
    """``a x + b y``, the map behind forward diffusion, targets, posteriors and conversions.

    Args:
        x: ``[B, ...]``.
        y: ``[B, ...]``.
        coefficients: The pair (a, b), or a table ``[T, 2]`` read at ``t``.
        t: The step at which tables are read: an int, ``[B]`` or a one-element counter.
        out: Tensor to write to. Not where a gradient is needed.

    Returns:
        ``[B, ...]``.
    """
    if isinstance(coefficients, Tensor):
        coefs: tuple[Coef, ...] = (as_table("coefficients", coefficients, 2),)
    else:
        try:
            a, b = coefficients
        except (TypeError, ValueError):
            kind = type(coefficients).__name__
            raise TypeError(
                f"coefficients must be a pair (a, b) or a table [T, 2], got {kind}"
            ) from None
        coefs = (as_coef("a", a, t), as_coef("b", b, t))
    kernel = k.LINEAR_COMBINATION.reading
    try:
        return run(kernel, (x, y), coefs, t, False, out)
    except TypeError as error:
        coefs, t = converted(error, coefs, t, x)
    return run(kernel, (x, y), coefs, t, False, out)


def velocity(
    x0: Tensor,
    noise: Noise,
    alpha: Coef,
    sigma: Coef,
    *,
    t: Step = None,
    group_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The v target: ``v = alpha noise - sigma x_0``.

    Args:
        x0: Clean samples ``[B, ...]``.
        noise: The noise that was added ``[B, ...]``, or its noise key.
        alpha: Signal coefficient. A number, 0-dim, ``[B]``, or a table ``[T]`` with ``t``.
        sigma: Noise coefficient. A number, 0-dim, ``[B]``, or a table ``[T]`` with ``t``.
        t: The step at which the tables are read: an int, ``[B]`` or a one-element counter.
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: alpha, sigma and t may then be ``[B, G]``.
        out: Tensor to write to. Not where a gradient is needed.

    Returns:
        ``v`` ``[B, ...]``.

    Source:
        Salimans & Ho 2022, appendix D.
    """
    if group_dim is not None:
        of_samples = {"x0": x0, "noise": noise}
        return _in_groups(velocity, group_dim, of_samples, alpha, sigma, t, out=out)  # type: ignore[no-any-return]
    coefs = (as_coef("sigma", negated("sigma", sigma), t), as_coef("alpha", alpha, t))
    v: Tensor = run_noisy(_VELOCITY, (x0,), noise, coefs, t, out)
    return v


def predict_x0(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    *,
    prediction_type: str = "epsilon",
    group_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Converts a prediction to the clean sample x_0.

    ``epsilon``: (x_t - sigma m) / alpha; ``sample``: m; ``v_prediction``: alpha x_t - sigma m;
    ``flow_prediction`` (m = noise - x_0 and alpha + sigma = 1): x_t - sigma m.

    Args:
        model_output: m, ``[B, ...]``.
        x_t: The noisy samples ``[B, ...]``.
        alpha: Signal coefficient. A number, 0-dim or ``[B]``.
        sigma: Noise coefficient. A number, 0-dim or ``[B]``.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: alpha and sigma may then be ``[B, G]``.
        out: Tensor to write to. Not where a gradient is needed.

    Returns:
        The estimate of ``x_0`` ``[B, ...]``.

    Source:
        Ho et al. 2020, eq. 15; Salimans & Ho 2022; Lipman et al. 2023.
    """
    if group_dim is not None:
        of_samples = {"model_output": model_output, "x_t": x_t}
        how = {"prediction_type": prediction_type, "out": out}
        return _in_groups(predict_x0, group_dim, of_samples, alpha, sigma, None, **how)  # type: ignore[no-any-return]
    pair = formulas.x0_coefficients(
        in_float64("alpha", alpha), in_float64("sigma", sigma), prediction_type
    )
    a, b = (as_coef("alpha and sigma", beside(c, x_t), None) for c in pair)
    return run(_CONVERSION, (x_t, model_output), (a, b), None, False, out)


def predict_epsilon(
    model_output: Tensor,
    x_t: Tensor,
    alpha: Coef,
    sigma: Coef,
    *,
    prediction_type: str = "epsilon",
    group_dim: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Converts a prediction to the noise epsilon.

    ``epsilon``: m; ``sample``: (x_t - alpha m) / sigma; ``v_prediction``: sigma x_t + alpha m;
    ``flow_prediction``: x_t + (1 - sigma) m.

    Args:
        model_output: m, ``[B, ...]``.
        x_t: The noisy samples ``[B, ...]``.
        alpha: Signal coefficient. A number, 0-dim or ``[B]``.
        sigma: Noise coefficient. A number, 0-dim or ``[B]``.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
            frames of ``[B, C, F, H, W]``: alpha and sigma may then be ``[B, G]``.
        out: Tensor to write to. Not where a gradient is needed.

    Returns:
        The estimate of the noise ``[B, ...]``.

    Source:
        Salimans & Ho 2022; Lipman et al. 2023.
    """
    if group_dim is not None:
        of_samples = {"model_output": model_output, "x_t": x_t}
        how = {"prediction_type": prediction_type, "out": out}
        return _in_groups(predict_epsilon, group_dim, of_samples, alpha, sigma, None, **how)  # type: ignore[no-any-return]
    pair = formulas.epsilon_coefficients(
        in_float64("alpha", alpha), in_float64("sigma", sigma), prediction_type
    )
    a, b = (as_coef("alpha and sigma", beside(c, x_t), None) for c in pair)
    return run(_CONVERSION, (x_t, model_output), (a, b), None, False, out)


def classifier_guidance(
    model_output: Tensor,
    gradient: Tensor,
    alpha: Coef,
    sigma: Coef,
    *,
    prediction_type: str = "epsilon",
    scale: Coef = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Moves a prediction by the gradient of a classifier: x_0 by ``scale sigma² / alpha gradient``.

    ``epsilon``: m - scale sigma g; ``sample``: m + scale sigma² / alpha g; ``v_prediction``:
    m - scale sigma / alpha g; ``flow_prediction`` (alpha + sigma = 1): m - scale sigma / alpha g.
    Where alpha = 0, x_t holds nothing of x_0, the gradient is 0, and m is returned.

    ``diffcore.sample(cond_fn=)`` does this in every row of a solver.

    Args:
        model_output: m, ``[B, ...]``.
        gradient: g, the gradient of log p(y | x_t) by x_t, ``[B, ...]``.
        alpha: Signal coefficient of x_t. A number, 0-dim or ``[B]``.
        sigma: Noise coefficient of x_t. A number, 0-dim or ``[B]``.
        prediction_type: "epsilon", "sample", "v_prediction" or "flow_prediction".
        scale: Strength of the guidance. A number, 0-dim or ``[B]``.
        out: Tensor to write to. Not where a gradient is needed.

    Returns:
        The guided prediction ``[B, ...]``.

    Source:
        Dhariwal & Nichol 2021, algorithm 2.
    """
    levels = (in_float64("alpha", alpha), in_float64("sigma", sigma))
    factor = formulas.classifier_coefficient(*levels, prediction_type, in_float64("scale", scale))
    coefs = (1.0, as_coef("alpha, sigma and scale", beside(factor, model_output), None))
    return run(_GUIDED, (model_output, gradient), coefs, None, False, out)
