"""Coordinates in which the probability flow is straight where the model is constant.

The derivative is taken in coordinates where it is constant on a straight path: of x by sigma with
alpha = 1 (x / alpha by sigma / alpha for a variance preserving process), and of x by sigma in a
rectified flow, where it is the velocity noise - x0.
"""

from __future__ import annotations

from diffcore.solvers.levels import Level, NoiseLevels


class Straight:
    """(scale, s) of a level, such that d(x / scale) / ds is constant on a straight path.

    The derivative is epsilon - lost x_0: in a flow the signal falls while the noise rises.

    Args:
        path: The path of the levels, one of ``PATHS``.
    """

    def __init__(self, path: str) -> None:
        self._vp = path == "vp"
        self.lost = 1.0 if path == "flow" else 0.0

    def __call__(self, level: Level) -> tuple[float, float]:
        """(scale, s) of this level."""
        return (level.alpha, level.ratio) if self._vp else (1.0, level.sigma)


def straight_of(levels: NoiseLevels, name: str) -> Straight:
    """The coordinates for levels, which are infinite at alpha = 0 on the path "vp".

    Args:
        levels: Where the solver steps.
        name: Name of the solver function.

    Returns:
        The coordinates.

    Raises:
        ValueError: Variance preserving levels that start or end at alpha = 0.
    """
    if levels.path == "vp":
        levels.check_signal(name)
    return Straight(levels.path)
