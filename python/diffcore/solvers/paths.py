"""Paths between noise levels, and checks of what describes them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from diffcore.schedules import NoiseSchedule

PATHS = ("vp", "ve", "flow")

# A schedule is on a path if its levels are to this; tables rounded to float32 still count.
_ON_PATH = 1e-6


class TimeOf:
    """The timestep where sigma / alpha has a value, linear in its logarithm between known ones.

    Args:
        ratios: Known values of sigma / alpha, rising.
        times: The timesteps there.
    """

    def __init__(self, ratios: Tensor, times: Tensor) -> None:
        self._logs: list[float] = ratios.log().tolist()
        self._times: list[float] = times.double().tolist()

    def __call__(self, ratio: float) -> float:
        """The timestep; that of the first or last known value for one beyond it."""
        logs, times, log = self._logs, self._times, math.log(ratio)
        high = bisect_left(logs, log)
        if high in (0, len(logs)):
            return times[max(high - 1, 0)]
        share = (logs[high] - log) / (logs[high] - logs[high - 1])
        return times[high] - share * (times[high] - times[high - 1])


class FlowTime:
    """The timestep of a rectified flow: a factor times sigma, from sigma / alpha.

    Args:
        scale: The factor.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, ratio: float) -> float:
        """The timestep; the factor itself where there is no signal."""
        return self._scale * (ratio / (1 + ratio) if math.isfinite(ratio) else 1.0)


def quarter_log(ratio: float) -> float:
    """EDM's timestep input, log(sigma) / 4, from sigma / alpha with alpha = 1."""
    return math.log(ratio) / 4


def on_path(path: str, ratio: float) -> tuple[float, float]:
    """(alpha, sigma) from a finite sigma / alpha.

    Args:
        path: One of ``PATHS``.
        ratio: sigma / alpha.

    Returns:
        The two.
    """
    if path == "ve":
        return 1.0, ratio
    if path == "vp":
        size = math.hypot(ratio, 1)
        return 1 / size, ratio / size
    return 1 / (1 + ratio), ratio / (1 + ratio)


def all_on_path(path: str, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a vector of them.

    Args:
        path: One of ``PATHS``.
        ratios: ``[N]``, finite.

    Returns:
        alpha and sigma, float64 ``[N]``.
    """
    pairs = [on_path(path, ratio) for ratio in ratios.tolist()]
    both = torch.tensor(pairs, dtype=torch.float64)
    return both[:, 0], both[:, 1]


def path_of(schedule: NoiseSchedule) -> str:
    """Which path a schedule is on.

    Args:
        schedule: Any.

    Returns:
        One of ``PATHS``.

    Raises:
        ValueError: It is on none.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    for path, total in (("vp", alpha**2 + sigma**2), ("ve", alpha), ("flow", alpha + sigma)):
        if bool(((total - 1).abs() <= _ON_PATH).all()):
            return path
    raise ValueError(
        "the schedule is neither variance preserving (alpha^2 + sigma^2 = 1) nor exploding "
        "(alpha = 1) nor a rectified flow (alpha + sigma = 1)"
    )


def level_vector(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """Noise levels as a float64 vector on the CPU, or what is wrong with them.

    Args:
        name: What to call them.
        values: ``[N + 1]``, N >= 1, finite.

    Returns:
        float64 ``[N + 1]``.

    Raises:
        TypeError: No real numbers.
        ValueError: Another shape, or not finite.
    """
    try:
        vector = torch.as_tensor(values, dtype=None if isinstance(values, Tensor) else torch.double)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a tensor of real numbers: {error}") from None
    if vector.is_complex() or vector.dtype == torch.bool:
        raise TypeError(f"{name} must be a tensor of real numbers, got {vector.dtype}")
    if vector.dim() != 1 or len(vector) < 2:
        raise ValueError(
            f"{name} must have shape [N + 1], the level to end at included, N >= 1, "
            f"got {list(vector.shape)}"
        )
    vector = vector.detach().to("cpu", torch.float64)
    if not bool(vector.isfinite().all()):
        raise ValueError(f"{name} must be finite, got {vector.tolist()}")
    return vector


def timestep_vector(values: Tensor | Sequence[float]) -> Tensor:
    """Timesteps as an int64 or float64 vector on the CPU, or what is wrong with them.

    Args:
        values: ``[N]``.

    Returns:
        int64 for integers, else float64.

    Raises:
        ValueError: No real numbers, or of another shape.
    """
    if not isinstance(values, Tensor):  # Python floats are float64, whatever torch's default is
        whole = all(isinstance(value, int) for value in values)
        values = torch.tensor(values, dtype=torch.int64 if whole else torch.float64)
    told = values.detach().cpu()
    if told.dim() != 1 or len(told) == 0 or told.is_complex() or told.dtype == torch.bool:
        raise ValueError(
            f"timesteps must be numbers of shape [N], got {told.dtype} {list(told.shape)}"
        )
    return told.to(torch.float64 if told.is_floating_point() else torch.int64)
