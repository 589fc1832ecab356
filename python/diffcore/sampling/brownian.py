"""Noise of steps as increments of one Brownian path, which does not depend on the steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_int, as_real
from diffcore.noise import PhiloxNoise
from diffcore.solvers import SolverTable

_DEEPEST = 30  # streams are 32 bits, and a path of depth D takes 2^D of them

Level: TypeAlias = float | Tensor
_Kind: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device]


class BrownianNoise:
    """A Brownian path W on [0, 1], from a noise key: W(b) - W(a) for any a and b, in any order.

    An SDE solver with twice the steps then gets the same path, and its samples converge as the
    steps get shorter, where independent noise makes other samples for every number of steps. The
    increments are additive, W(a, b) + W(b, c) = W(a, c), and a pure function of (key, a, b): no
    tree is kept.

    W is the sum of Levy and Ciesielski: ``W(t) = t z + sum over d < depth and k of 2^(-d/2 - 1)
    hat(2^d t - k) z_dk``, where hat(u) = 1 - |2 u - 1| on [0, 1]. z_dk decides the midpoint of the
    k-th interval of length 2^-d; it is the key's noise at the stream 1 + 2^d + k after its own, and
    z that at the stream 1 after its own, so the key may also have generated x. An increment takes
    one launch for each z in which its ends differ: about twice ``depth``.

    A noise level has the time alpha / (alpha + sigma): 0 for pure noise, 1 for clean samples, and
    1 - sigma in a rectified flow. Any other clock would give noise of the same law.

    Args:
        key: The noise key.
        depth: D, how often intervals are halved, 1 to 30. Within an interval of length 2^-D the
            path is a line.

    Raises:
        TypeError: The key is no ``PhiloxNoise``, or depth no int.
        ValueError: depth outside 1 .. 30.

    Source:
        Levy 1948; Li et al. 2020 (arXiv 2001.01328) for samplers; k-diffusion's
        ``BrownianTreeNoiseSampler`` has the same use, on sigma itself.
    """

    __slots__ = ("_depth", "_key")

    def __init__(self, key: PhiloxNoise, *, depth: int = 24) -> None:
        if not isinstance(key, PhiloxNoise):
            raise TypeError(f"key must be a PhiloxNoise, got {type(key).__name__}")
        depth = as_int("depth", depth, 1)
        if depth > _DEEPEST:
            raise ValueError(f"depth must be at most {_DEEPEST}, got {depth}")
        self._key, self._depth = key, depth

    @property
    def key(self) -> PhiloxNoise:
        """The noise key."""
        return self._key

    @property
    def depth(self) -> int:
        """How often intervals are halved."""
        return self._depth

    def __repr__(self) -> str:
        """The key and the depth."""
        return f"BrownianNoise({self._key!r}, depth={self._depth})"

    def increment(self, start: float, end: float, like: Tensor) -> Tensor:
        """W(end) - W(start).

        Args:
            start: A time in [0, 1].
            end: Another one, before or after it.
            like: A tensor of the shape ``[B, ...]``, dtype and device of the increment.

        Returns:
            The increment, of variance ``|end - start|`` (up to 2^-depth): of float64 additive to
            rounding, of 16 bits summed in float32.

        Raises:
            ValueError: A time outside [0, 1].
        """
        times = []
        for name, time in (("start", start), ("end", end)):
            value = as_real(name, time)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
            times.append(value)
        return self._sum(self._weights(*times), (tuple(like.shape), like.dtype, like.device))

    def between(self, sigma: Level, sigma_next: Level, like: Tensor) -> Tensor:
        """The standard normal noise of a step: the increment, divided by its standard deviation.

        Args:
            sigma: sigma / alpha before the noise, at least 0, infinite for pure noise.
            sigma_next: sigma / alpha after it.
            like: As for ``increment``.

        Returns:
            Like ``like``, of variance 1.

        Raises:
            ValueError: Two equal levels, or one below 0.
        """
        return self._between(sigma, sigma_next, (tuple(like.shape), like.dtype, like.device))

    def for_table(self, table: SolverTable) -> Callable[[int, Tensor], Tensor]:
        """The noise of the rows of a table, for ``noise=`` of ``diffcore.sample``.

        Args:
            table: The solver. Its noise must be of steps down: churn and jumps back up go over an
                interval more than once.

        Returns:
            A function ``(row, x) -> noise``.

        Raises:
            TypeError: Not a ``SolverTable``.
            ValueError: A row of the table adds noise from a level to a noisier one, or to the same.
        """
        if not isinstance(table, SolverTable):
            raise TypeError(f"table must be a SolverTable, got {type(table).__name__}")
        intervals: list[list[float]] = table.noise_levels.tolist()
        for i, row in enumerate(table.rows):
            if row.noisy and not intervals[i][0] > intervals[i][1]:
                raise ValueError(
                    f"table must add noise on steps down only, got {table.name}, whose row {i} "
                    f"goes from sigma / alpha = {intervals[i][0]:.6g} to {intervals[i][1]:.6g}"
                )
        if table.start_noise:
            raise ValueError(f"table must not raise the start by churn, got {table.name}")

        def noise_of_row(row: int, x: Tensor) -> Tensor:
            before, after = intervals[row]
            return self.between(before, after, x)

        return noise_of_row

    def sampler(self, x: Tensor) -> Callable[[Level, Level], Tensor]:
        """The noise of intervals, for ``noise_sampler=`` of ``diffcore.sampling.sample_*``.

        Args:
            x: A tensor of the shape, dtype and device of the samples.

        Returns:
            A function ``(sigma, sigma_next) -> noise``. It reads both on the host: on a GPU it
            waits for them.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        kind = tuple(x.shape), x.dtype, x.device

        def noise_of_interval(sigma: Level, sigma_next: Level) -> Tensor:
            return self._between(sigma, sigma_next, kind)

        return noise_of_interval

    def _between(self, sigma: Level, sigma_next: Level, kind: _Kind) -> Tensor:
        times = _time("sigma", sigma), _time("sigma_next", sigma_next)
        weights = self._weights(*times)
        size = math.sqrt(math.fsum(w * w for w in weights.values()))
        if size == 0:
            raise ValueError(f"sigma_next must differ from sigma, {sigma}, got {sigma_next}")
        return self._sum({stream: w / size for stream, w in weights.items()}, kind)

    def _weights(self, start: float, end: float) -> dict[int, float]:
        """The factor of each z in W(end) - W(start), by its stream after the key's."""
        weights = {1: end - start} if end != start else {}
        for d in range(self._depth):
            count = 2**d
            for time, sign in ((start, -1.0), (end, 1.0)):
                place = time * count
                k = min(int(place), count - 1)
                height = 1 - abs(2 * (place - k) - 1)
                stream = 1 + count + k
                weights[stream] = weights.get(stream, 0.0) + sign * 2 ** (-d / 2 - 1) * height
        return {stream: weight for stream, weight in weights.items() if weight}

    def _sum(self, weights: dict[int, float], kind: _Kind) -> Tensor:
        """The sum of these multiples of the key's noise."""
        shape, dtype, device = kind
        wide = torch.promote_types(dtype, torch.float32)
        total = torch.zeros(shape, dtype=wide, device=device)
        for stream, weight in weights.items():
            key = self._key.at(self._key.stream + stream)
            total = ops.add_noise(total, key, 1.0, weight)
        return total.to(dtype)


def _time(name: str, ratio: Level) -> float:
    """The time of a level, from sigma / alpha."""
    value = as_real(name, ratio)
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return 1 / (1 + value)
