"""Builds the table of a solver, row by row or all at once; and the moves that rows consist of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore._checks import as_int, as_real, check_choice
from diffcore.coefficients.step import (
    HISTORY_READ,
    HISTORY_WRITTEN,
    PREDICTION_TYPES,
    STEP_COLUMNS,
    parse_clip_range,
)
from diffcore.schedules.tensors import as_float64
from diffcore.solvers.levels import Level, NoiseLevels
from diffcore.solvers.table import SolverTable


class Rows:
    """A table under construction.

    Args:
        name: Name of the solver.
        levels: The noise levels it visits.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of x_0, see ``parse_clip_range``.
    """

    def __init__(
        self,
        name: str,
        levels: NoiseLevels,
        prediction_type: str,
        clip_range: float | tuple[float, float] | None,
    ) -> None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        levels.check_start(prediction_type)
        self._name = name
        self._levels = levels
        self._ratios: list[float] = (levels.sigma / levels.alpha).tolist()
        self._prediction_type = prediction_type
        self._clip = parse_clip_range(clip_range)
        # With x_0 as the output, epsilon is a quotient by sigma anyway.
        self._by_epsilon = levels.rising and clip_range is None and prediction_type != "sample"
        self._rows: list[dict[str, float]] = []
        self._called: list[Level] = []
        self._steps: list[int] = []
        self._noise: list[tuple[float, float]] = []

    def add(
        self,
        step: int,
        level: Level,
        noise: tuple[float, float] | None = None,
        /,
        **columns: float,
    ) -> None:
        """Append the row of a model call.

        Args:
            step: Index of the step it belongs to.
            level: Where the model is called.
            noise: sigma / alpha before and after the row's noise; from ``level`` to the end of the
                step if not given.
            **columns: Those that are not 0, of ``STEP_COLUMNS``, c_u and e_u, or c_eps and e_eps,
                factors of the noise that the model predicts; a_x, a_m and the clip bounds are
                filled in.
        """
        if self._by_epsilon and "c_u" not in columns:
            columns = _by_epsilon(level, columns)
        if "c_eps" in columns or "e_eps" in columns:
            e_x, e_m = self._levels.epsilon(level, self._prediction_type)
            columns = _of_output(e_x, e_m, columns)
        a_x, a_m = self._levels.x0(level, self._prediction_type)
        low, high = self._clip
        row = {"a_x": a_x, "a_m": a_m, "clip_min": low, "clip_max": high, **columns}
        for column, value in row.items():
            if not abs(value) <= _LARGEST and column not in _BOUNDS:
                raise _not_finite(column, step, self._name, value)
        self._rows.append(row)
        self._called.append(level)
        self._steps.append(step)
        if noise is None:
            noise = (level.ratio, self._ratios[step + 1])
        self._noise.append(noise)

    def table(
        self,
        order: int,
        *,
        start: tuple[float, float] = (1.0, 0.0),
        variance: Tensor | None = None,
    ) -> SolverTable:
        """The rows as a table; what no later row reads is not written.

        Args:
            order: Order of convergence of the solver.
            start: start_scale and start_noise.
            variance: s_0 and s_v of each row, where the model predicts its variance.

        Returns:
            The table.
        """
        rows = [[row.get(name, 0.0) for name in STEP_COLUMNS] for row in self._rows]
        coefficients = as_float64(rows)
        read = coefficients[:, HISTORY_READ] != 0
        later = torch.zeros_like(read[:, 0])  # whether a later row reads what the row writes
        for k in (1, 2, 3):
            later[:-k] |= read[k:, k - 1]
        coefficients[~later, HISTORY_WRITTEN] = 0
        uncond = None
        if any("c_u" in row for row in self._rows):
            of_uncond = [[row.get(name, 0.0) for name in ("c_u", "e_u")] for row in self._rows]
            uncond = as_float64(of_uncond)
            uncond[~later, 1] = 0
        history = max((k for k in (1, 2, 3) if bool(read[:, k - 1].any())), default=0)
        times = as_float64([level.timestep for level in self._called])
        if self._levels.timesteps.dtype == torch.int64 and bool((times == times.round()).all()):
            times = times.long()
        return SolverTable(
            name=self._name,
            coefficients=coefficients,
            timesteps=times,
            alpha=as_float64([level.alpha for level in self._called]),
            sigma=as_float64([level.sigma for level in self._called]),
            input_scale=as_float64([level.input_scale for level in self._called]),
            step_index=torch.tensor(self._steps, device="cpu"),
            noise_levels=as_float64(self._noise),
            history=history,
            order=order,
            init_noise_sigma=self._levels.init_noise_sigma,
            uncond=uncond,
            start_scale=start[0],
            start_noise=start[1],
            final_alpha=float(self._levels.alpha[-1]),
            final_sigma=float(self._levels.sigma[-1]),
            variance=variance,
        )


# The largest float32, in which kernels compute for most samples.
_LARGEST = torch.finfo(torch.float32).max
_BOUNDS = ("clip_min", "clip_max")


def one_call_coefficients(
    name: str,
    levels: NoiseLevels,
    prediction_type: str,
    clip_range: float | tuple[float, float] | None,
    **moves: Tensor,
) -> Tensor:
    """The coefficients of a solver with one model call a step and no history, as vectors.

    Args:
        name: Name of the solver.
        levels: The noise levels it visits.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of x_0, see ``parse_clip_range``.
        **moves: The columns that are not 0, float64 ``[N]``; a_x, a_m and the clip bounds are
            filled in.

    Returns:
        float64 ``[N, 14]``.

    Raises:
        ValueError: A coefficient that is not finite.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    a_x, a_m = levels.x0_columns(prediction_type)
    known = {"a_x": a_x, "a_m": a_m, **moves}
    zero = torch.zeros_like(a_x)
    wrong = {column: ~(values.abs() <= _LARGEST) for column, values in known.items()}
    for column, where in wrong.items():
        if bool(where.any()):
            step = int(where.nonzero()[0])
            raise _not_finite(column, step, name, known[column][step].item())
    for column, bound in zip(_BOUNDS, parse_clip_range(clip_range), strict=True):
        known[column] = torch.full_like(zero, bound)
    return torch.stack([known.get(column, zero) for column in STEP_COLUMNS], dim=1)


def one_call_table(
    name: str,
    levels: NoiseLevels,
    coefficients: Tensor,
    *,
    variance: Tensor | None = None,
    target_timesteps: Tensor | None = None,
    target_name: str = "r",
) -> SolverTable:
    """The table of a solver of order 1 that calls the model once at every level but the last.

    Args:
        name: Name of the solver.
        levels: The noise levels it visits.
        coefficients: See ``one_call_coefficients``.
        variance: s_0 and s_v of each row, where the model predicts its variance.
        target_timesteps: See ``SolverTable``.
        target_name: See ``SolverTable``.

    Returns:
        The table.
    """
    ratios = levels.sigma / levels.alpha
    return SolverTable(
        name=name,
        coefficients=coefficients,
        timesteps=levels.timesteps.clone(),
        alpha=levels.alpha[:-1].clone(),
        sigma=levels.sigma[:-1].clone(),
        input_scale=as_float64([level.input_scale for level in levels.levels()[:-1]]),
        step_index=torch.arange(len(levels), device="cpu"),
        noise_levels=torch.stack([ratios[:-1], ratios[1:]], dim=1),
        history=0,
        order=1,
        init_noise_sigma=levels.init_noise_sigma,
        final_alpha=float(levels.alpha[-1]),
        final_sigma=float(levels.sigma[-1]),
        variance=variance,
        target_timesteps=target_timesteps,
        target_name=target_name,
    )


def _not_finite(column: str, step: int, name: str, value: float) -> ValueError:
    return ValueError(
        f"{column} of step {step} of {name} must be finite in float32, got {value:.6g}"
    )


def _by_epsilon(level: Level, columns: dict[str, float]) -> dict[str, float]:
    """The same x' and h' with x = alpha x_0 + sigma epsilon put in.

    Up the noise levels the factors of x and x_0 grow like sigma' / sigma and cancel; those of x_0
    and epsilon are alpha' and sigma'. Without a clip the two are equal but for rounding.
    """
    found = dict(columns)
    for of_x, of_x0, of_epsilon in (("c_x", "c_0", "c_eps"), ("e_x", "e_0", "e_eps")):
        by_x = found.pop(of_x, 0.0)
        found[of_x0] = found.get(of_x0, 0.0) + by_x * level.alpha
        found[of_epsilon] = found.get(of_epsilon, 0.0) + by_x * level.sigma
    return found


def _of_output(e_x: float, e_m: float, columns: dict[str, float]) -> dict[str, float]:
    """The same with epsilon = e_x x + e_m m put in."""
    found = dict(columns)
    for part in ("c", "e"):
        factor = found.pop(f"{part}_eps", 0.0)
        for name, value in ((f"{part}_x", e_x), (f"{part}_m", e_m)):
            found[name] = found.get(name, 0.0) + factor * value
    return found


def move(level: Level, alpha: float, sigma: float) -> dict[str, float]:
    """The columns of the straight move of ``toward``, also from a clean sample.

    There epsilon is what the model predicts: no x and x_0 determine it.

    Args:
        level: The level of x.
        alpha: Signal coefficient to end at.
        sigma: Noise coefficient to end at.

    Returns:
        Columns for ``Rows.add``.
    """
    if level.sigma == 0:
        return {"c_0": alpha, "c_eps": sigma}
    c_x, c_0 = toward(level, alpha, sigma)
    return {"c_x": c_x, "c_0": c_0}


def toward(level: Level, alpha: float, sigma: float) -> tuple[float, float]:
    """(c_x, c_0) of the straight move to (alpha, sigma): x' = alpha x0 + sigma noise.

    With noise = (x - level.alpha x0) / level.sigma. Exact for a constant x_0. It needs no logarithm
    and no division by alpha, so both ends may be infinite in lambda.

    Args:
        level: The level of x.
        alpha: Signal coefficient to end at.
        sigma: Noise coefficient to end at.

    Returns:
        The two coefficients.
    """
    keep = sigma / level.sigma
    return keep, alpha - level.alpha * keep


def jump(level: Level, end: Level) -> tuple[float, float]:
    """(r, variance) of the jump to a noisier level: x' = r x + sqrt(variance) z.

    r = alpha' / alpha, and variance = sigma'^2 - r^2 sigma^2, written as a product so that nothing
    cancels where the two levels are close.

    Args:
        level: The level of x.
        end: The level to jump to, at least as noisy, with sigma > 0.

    Returns:
        The factor of x, and the variance of the noise to add.
    """
    r = end.alpha / level.alpha
    kept = r * level.sigma / end.sigma  # of the deviation at the end, the part that is there before
    return r, end.sigma**2 * (1 - kept) * (1 + kept)


def ancestral(level: Level, after: Level, eta: float) -> tuple[float, float]:
    """(sigma_down, sigma_up) with sigma_down^2 + sigma_up^2 = after.sigma^2.

    sigma_up = eta sqrt(beta_tilde), at most after.sigma; eta = 1 is the ancestral sampler. Written
    with q = (sigma'/alpha') / (sigma/alpha), so that nothing cancels at eta = 1.

    Args:
        level: The level of x.
        after: The level to step to.
        eta: At least 0.

    Returns:
        The noise to step down to, and the noise to add.
    """
    if eta == 0 or after.sigma == 0:
        return after.sigma, 0.0
    q = level.alpha * after.sigma / (after.alpha * level.sigma)
    left = (1 - eta * eta) + (eta * q) ** 2
    if left <= 0:
        return 0.0, after.sigma
    return after.sigma * math.sqrt(left), after.sigma * eta * math.sqrt((1 - q) * (1 + q))


def at_least_zero(name: str, value: float) -> float:
    """A finite number of at least 0, as a Python float.

    Args:
        name: Name of the argument.
        value: The argument to check.

    Returns:
        The float.

    Raises:
        TypeError: Not a number.
        ValueError: Below 0, infinite or nan.
    """
    value = as_real(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    return value


def check_order(order: int, highest: int, name: str = "order") -> int:
    """The order of a solver, checked.

    Args:
        order: The argument to check.
        highest: The largest order of the solver.
        name: Name of the argument.

    Returns:
        ``order``.

    Raises:
        TypeError: Not an int.
        ValueError: Outside 1 .. ``highest``.
    """
    order = as_int(name, order)
    if not 1 <= order <= highest:
        raise ValueError(f"{name} must be in 1 .. {highest}, got {order}")
    return order
