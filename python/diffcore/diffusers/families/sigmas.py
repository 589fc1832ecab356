"""What the schedulers share that keep a list of sigmas and count their steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore.coefficients.step import tensors, x0_coefficients
from diffcore.diffusers.families.schedule import prediction_of
from diffcore.diffusers.rows import float64
from diffcore.diffusers.scheduler import Call, FusedScheduler
from diffcore.diffusers.walk import Unsupported, Walk
from diffcore.solvers import NoiseLevels
from diffcore.solvers.paths import TimeOf


class BySigma(FusedScheduler):
    """A scheduler with a list of sigmas, whose steps are counted."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """X = x_0 + sigma noise, in one launch; sigma is not rounded to 16 bits."""
        try:
            return self._noised(original_samples, noise, timesteps, lambda _: 1.0)
        except Unsupported as reason:
            self.fallbacks[str(reason)] += 1
            return super().add_noise(  # type: ignore[misc, no-any-return]
                original_samples, noise, timesteps
            )

    def _noised(
        self,
        x0: Tensor,
        noise: Tensor,
        timesteps: Any,
        signal: Callable[[float], float],
        spread: Callable[[float], float] = float,
    ) -> Tensor:
        """The noisy samples, with alpha and sigma from the sigma that diffusers takes for them."""
        sigmas = self._walk().sigmas
        rows = self._rows_of(timesteps)
        if len(set(rows)) == 1:
            held = sigmas[rows[0]]
            return ops.add_noise(x0, noise, signal(held), spread(held))
        levels = [(signal(sigmas[row]), spread(sigmas[row])) for row in rows]
        alpha, sigma_of = torch.tensor(levels, dtype=torch.float64).to(x0.device).unbind(1)
        return ops.add_noise(x0, noise, alpha, sigma_of)

    def _rows_of(self, timesteps: Tensor) -> list[int]:
        """The row of each sample: of its timestep, or where the walk is."""
        if self._begin_index is None:
            return self._rows_with(timesteps)
        row = self._begin_index if self._step_index is None else self._step_index
        return [row] * len(timesteps)

    def _rows_with(self, timesteps: Tensor) -> list[int]:
        """The row that each timestep has."""
        walk = self._walk()
        found = [walk.places(t) for t in timesteps]
        return [places[1 if len(places) > 1 else 0] for places in found]


class ScaledInput(BySigma):
    """One whose model gets x / sqrt(sigma^2 + s^2), with s = 1 or the deviation of the data."""

    is_scale_input_called: bool

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """X / sqrt(sigma^2 + s^2), with the s of the stock class."""
        try:
            walk = self._walk()
            row = self._row(walk, timestep)
            scale = self._input_scale(walk, row)
        except Unsupported as reason:
            self._count(reason)
            return super().scale_model_input(sample, timestep)  # type: ignore[misc, no-any-return]
        self._step_index = row
        self.is_scale_input_called = True
        scaled: Tensor = sample * scale
        return scaled

    def _input_scale(self, walk: Walk, row: int) -> float:
        """1 / sqrt(sigma^2 + s^2) of a row."""
        return float((walk.sigmas[row] ** 2 + self._input_std() ** 2) ** -0.5)

    def _input_std(self) -> float:
        """The s of ``scale_model_input``."""
        return 1.0

    def _refuse(self, call: Call) -> None:
        if not self.is_scale_input_called:
            raise Unsupported("step before scale_model_input")


def ends_of(scheduler: Any, start: int = 0) -> tuple[Tensor, Tensor]:
    """The sigmas before the steps of a scheduler of one model call a step, and after them.

    Args:
        scheduler: With ``sigmas`` and ``timesteps`` set.
        start: The first step.

    Returns:
        float64 ``[N - start]`` each.

    Raises:
        Unsupported: A sigma of 0 before a step.
    """
    count = len(scheduler.timesteps)
    sigma = float64(scheduler.sigmas)
    if len(sigma) <= count:
        raise Unsupported("a step before set_timesteps")
    # interpolation_type="log_linear" has one sigma too many: diffusers never reaches it.
    before, after = sigma[start:count], sigma[start + 1 : count + 1]
    if not bool((before > 0).all()):
        raise Unsupported("a sigma that is not above 0 before the last")
    return before, after


def ve_levels(scheduler: Any, input_std: float | None, start: int = 0) -> NoiseLevels:
    """The levels of a scheduler's sigmas, with alpha = 1.

    Args:
        scheduler: With ``sigmas`` and ``timesteps`` set, a model call a step.
        input_std: See ``NoiseLevels``.
        start: The first step.

    Returns:
        The levels from there on.
    """
    before, after = ends_of(scheduler, start)
    times = float64(scheduler.timesteps)[start:]
    return levels_at(scheduler, torch.cat([before, after[-1:]]), times, input_std)


def levels_at(
    scheduler: Any, sigma: Tensor, times: Tensor, input_std: float | None = 1.0
) -> NoiseLevels:
    """Levels with alpha = 1.

    Args:
        scheduler: For its ``init_noise_sigma``.
        sigma: float64 ``[N + 1]``.
        times: float64 ``[N]``.
        input_std: See ``NoiseLevels``.

    Returns:
        The levels.
    """
    return NoiseLevels(
        torch.ones_like(sigma),
        sigma,
        times,
        "ve",
        TimeOf(sigma[:-1].flip(0), times.flip(0)),
        input_std=input_std,
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )


def x0_columns(sigma: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """(a_x, a_m) with x_0 = a_x x + a_m m, for x = x_0 + sigma noise and the scaled model input.

    Args:
        sigma: float64 ``[N]``.
        prediction_type: One of ``PREDICTION_TYPES``.

    Returns:
        float64 ``[N]`` each.
    """
    scale = (sigma**2 + 1).rsqrt()
    a_x, a_m = tensors(x0_coefficients(scale, sigma * scale, prediction_type))
    return a_x * scale, a_m


def prediction_among(scheduler: Any, known: tuple[str, ...]) -> str:
    """What the model predicts, by our name.

    Args:
        scheduler: The scheduler.
        known: The names that its stock ``step`` takes.

    Returns:
        One of ``PREDICTION_TYPES``.

    Raises:
        Unsupported: The stock ``step`` refuses it.
    """
    name = scheduler.config.prediction_type
    if name not in known:
        raise Unsupported(f"prediction_type={name!r}")
    return prediction_of(scheduler.config)
