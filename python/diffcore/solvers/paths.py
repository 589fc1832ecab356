"""Paths between noise levels, and checks of what describes them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffcore._checks import as_tensor
from diffcore.schedules import NoiseSchedule
from diffcore.schedules.tensors import check_has_values, float64_vector

PATHS = ("vp", "ve", "flow")

# Tolerance for a schedule to be on a path; it accepts tables rounded to float32.
_ON_PATH = 1e-6


class TimeOf:
    """The timestep at a value of sigma / alpha, interpolated linearly in its logarithm.

    Args:
        ratios: Values of sigma / alpha with known timesteps, rising.
        times: The timesteps at these.
    """

    def __init__(self, ratios: Tensor, times: Tensor) -> None:
        self._logs: list[float] = ratios.log().tolist()
        self._times: list[float] = times.double().tolist()

    def __call__(self, ratio: float) -> float:
        """The timestep; beyond the known values, that of the first or last."""
        logs, times = self._logs, self._times
        log = math.log(ratio) if ratio > 0 else -math.inf
        high = bisect_left(logs, log)
        if high in (0, len(logs)):
            return times[max(high - 1, 0)]
        below, above = logs[high - 1], logs[high]
        if log == above:
            return times[high]
        if math.isinf(below) or math.isinf(above):  # an end without a logarithm: the other one
            return times[high if math.isinf(below) else high - 1]
        share = (above - log) / (above - below)
        return times[high] - share * (times[high] - times[high - 1])

    def ratio(self, time: float) -> float:
        """The other way: sigma / alpha at a timestep.

        Args:
            time: The timestep.

        Returns:
            sigma / alpha.

        Raises:
            ValueError: The timestep is outside of those known, or they do not rise.
        """
        logs, times = self._logs, self._times
        if any(after <= before for before, after in pairwise(times)):
            raise ValueError(
                "timesteps must rise with the noise level, to find the level of one, got others"
            )
        if not times[0] <= time <= times[-1]:
            raise ValueError(
                f"levels must include timestep {time:g}, got those from {times[0]:g} to "
                f"{times[-1]:g}; levels of NoiseLevels.from_schedule without with_timesteps have "
                "all of their schedule"
            )
        high = bisect_left(times, time)
        if times[high] == time:
            return math.exp(logs[high])
        share = (times[high] - time) / (times[high] - times[high - 1])
        return math.exp(logs[high] - share * (logs[high] - logs[high - 1]))


class FlowTime:
    """The timestep of a rectified flow: a factor times sigma, from sigma / alpha.

    Args:
        scale: The factor.
    """

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def __call__(self, ratio: float) -> float:
        """The timestep; the factor itself at an infinite sigma / alpha."""
        return self._scale * (ratio / (1 + ratio) if math.isfinite(ratio) else 1.0)

    def ratio(self, time: float) -> float:
        """The other way: sigma / alpha at a timestep below the factor."""
        return time / (self._scale - time)


def quarter_log(ratio: float) -> float:
    """EDM's timestep input, log(sigma) / 4, from sigma / alpha with alpha = 1; minus inf at 0."""
    return math.log(ratio) / 4 if ratio > 0 else -math.inf


def ratio_at(time_of: Callable[[float], float], time: float) -> float:
    """The sigma / alpha whose timestep is given.

    Args:
        time_of: ``NoiseLevels.time_of``: one of this module, or ``float``.
        time: The timestep.

    Returns:
        sigma / alpha.

    Raises:
        ValueError: ``time_of`` is another function, or does not know the timestep.
    """
    if isinstance(time_of, (TimeOf, FlowTime)):
        return time_of.ratio(time)
    if time_of is float:
        return time
    raise ValueError(
        "time_of must be that of NoiseLevels.from_schedule, from_flow or from_sigmas to find a "
        f"level by its timestep, got {getattr(time_of, '__name__', type(time_of).__name__)}"
    )


def on_path(path: str, ratio: float) -> tuple[float, float]:
    """(alpha, sigma) on a path, from sigma / alpha.

    Args:
        path: One of ``PATHS``.
        ratio: sigma / alpha, finite.

    Returns:
        (alpha, sigma).
    """
    if path == "ve":
        return 1.0, ratio
    if path == "vp":
        size = math.hypot(ratio, 1)
        return 1 / size, ratio / size
    return 1 / (1 + ratio), ratio / (1 + ratio)


def all_on_path(path: str, ratios: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, sigma) on a path, from a vector of sigma / alpha.

    Args:
        path: One of ``PATHS``.
        ratios: ``[N]``, finite.

    Returns:
        (alpha, sigma), each float64 ``[N]``.
    """
    pairs = [on_path(path, ratio) for ratio in ratios.tolist()]
    both = torch.tensor(pairs, dtype=torch.float64, device="cpu")
    return both[:, 0], both[:, 1]


def path_of(schedule: NoiseSchedule) -> str:
    """The path that a schedule is on.

    Args:
        schedule: The schedule.

    Returns:
        One of ``PATHS``.

    Raises:
        ValueError: It is on none of them.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    for path, total in (("vp", alpha**2 + sigma**2), ("ve", alpha), ("flow", alpha + sigma)):
        if bool(((total - 1).abs() <= _ON_PATH).all()):
            return path
    raise ValueError(
        "schedule must be variance preserving (alpha^2 + sigma^2 = 1), variance exploding "
        "(alpha = 1) or a rectified flow (alpha + sigma = 1), got another"
    )


def rises(alpha: Tensor, sigma: Tensor) -> bool:
    """Whether the last of some noise levels is noisier than the first."""
    return bool(sigma[0] * alpha[-1] < sigma[-1] * alpha[0])


def check_levels(alpha: Tensor, sigma: Tensor) -> None:
    """Refuse noise levels that neither fall nor rise from the first to the last.

    Args:
        alpha: Signal coefficients, float64 ``[N + 1]``.
        sigma: Noise coefficients, float64 ``[N + 1]``.

    Raises:
        ValueError: A level out of order, alpha = 0 elsewhere than at the noisiest level, or sigma =
            0 elsewhere than at the cleanest.
    """
    rising = rises(alpha, sigma)
    if rising:
        noisy, where, offset = sigma[1:], "after the first level", 1
    else:
        noisy, where, offset = sigma[:-1], "before the last level", 0
    refuse_first(f"sigma must be above 0 {where}", noisy, noisy <= 0, offset)
    refuse_first("sigma must be at least 0", sigma, sigma < 0)
    refuse_first("alpha must be at least 0", alpha, alpha < 0)
    if rising:
        signal, where, offset = alpha[:-1], "before the last level", 0
    else:
        signal, where, offset = alpha[1:], "after the first level", 1
    refuse_first(f"alpha must be above 0 {where}", signal, signal <= 0, offset)
    # sigma' alpha <= sigma alpha' means that sigma / alpha falls, without a division by 0.
    before, after = alpha[:-1] * sigma[1:], alpha[1:] * sigma[:-1]
    if rising:
        wrong = after >= before
    else:
        wrong = after < before
        wrong[:-1] |= (after == before)[:-1]  # the last step may keep its level (DDIM's t = 0)
    if bool(wrong.any()):
        step = int(wrong.nonzero()[0])
        raise ValueError(
            f"sigmas must {'rise' if rising else 'fall'} at every step, got step {step} from "
            f"(alpha, sigma) = ({alpha[step]:.6g}, {sigma[step]:.6g}) to ({alpha[step + 1]:.6g}, "
            f"{sigma[step + 1]:.6g})"
        )


def refuse_first(what: str, values: Tensor, wrong: Tensor, offset: int = 0) -> None:
    """Raises for the first wrong value of a vector, by its index.

    Args:
        what: The rule that it breaks.
        values: The vector.
        wrong: Which of its values are wrong.
        offset: Added to the index.

    Raises:
        ValueError: Some value is wrong.
    """
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(f"{what}, got {values[i].item():.6g} at index {i + offset}")


def level_vector(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """Noise levels as a float64 vector on the CPU, checked.

    Args:
        name: Name of the argument.
        values: ``[N + 1]``, N >= 1, finite.

    Returns:
        float64 ``[N + 1]``, a copy.

    Raises:
        TypeError: Not real numbers.
        ValueError: Another shape, not finite, or a tensor that requires grad.
    """
    return float64_vector(
        name,
        values,
        least=2,
        shape="[N + 1] with N >= 1, the last level included",
        fix="diffcore.sigmas has get_sigmas_karras(n, ...), get_sigmas_flow(n), ...",
    )


def timestep_vector(values: Tensor | Sequence[float]) -> Tensor:
    """Timesteps as an int64 or float64 vector on the CPU, checked.

    Args:
        values: ``[N]``.

    Returns:
        int64 for integers, else float64; a copy.

    Raises:
        TypeError: Not numbers.
        ValueError: Not real numbers, or of another shape.
    """
    times = as_tensor("timesteps", values).detach()
    if times.dim() != 1 or len(times) == 0 or times.is_complex() or times.dtype == torch.bool:
        raise ValueError(
            f"timesteps must be real numbers of shape [N], got {times.dtype} {tuple(times.shape)}"
        )
    check_has_values("timesteps", times)
    dtype = torch.float64 if times.is_floating_point() else torch.int64
    return times.to(device="cpu", copy=True).to(dtype)
