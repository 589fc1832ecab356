"""What a sampling loop keeps of its steps: the states, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_flag
from diffcore.ops._density import wants_log_prob


@dataclass(frozen=True, eq=False)
class Trajectory:
    """The samples of a loop, and the steps that led to them; ``sample`` returns it.

    Attributes:
        samples: The samples, like ``x``.
        states: A tuple of S + 1 tensors like ``x``, for the S rows of the table: what the loop
            started from (after churn raised it, where the table does), and x' of every row, so
            that row i went from ``states[i]`` to ``states[i + 1]``. ``None`` if not asked for.
        log_probs: ``[S, B]``, the log-probability of each row's x' in nats, 0 for rows without
            noise. ``None`` if not asked for.
    """

    samples: Tensor
    states: tuple[Tensor, ...] | None
    log_probs: Tensor | None


@dataclass(slots=True)
class Recorder:
    """Keeps the states and the log-probabilities of one loop, as far as they are asked for.

    Args:
        keeps_states: Whether the states are kept.
        options: What ``SolverTable.step`` is called with for the log-probabilities.
    """

    keeps_states: bool
    options: dict[str, Any]
    states: list[Tensor] = field(default_factory=list)
    log_probs: list[Tensor] = field(default_factory=list)

    def keep(self, x: Tensor, scored: Sequence[Tensor] = ()) -> None:
        """Keeps the state after a row, or before the first, and the row's log-probability.

        Args:
            x: The state.
            scored: Its log-probability, if there is one.
        """
        if self.keeps_states:
            self.states.append(x)
        self.log_probs.extend(scored)

    def trajectory(self, samples: Tensor) -> Trajectory:
        """What was kept.

        Args:
            samples: The result of the loop.

        Returns:
            The trajectory.
        """
        return Trajectory(
            samples,
            tuple(self.states) if self.keeps_states else None,
            torch.stack(self.log_probs) if self.log_probs else None,
        )


def recorder(return_trajectory: bool, return_log_prob: bool, reduction: str) -> Recorder | None:
    """The recorder that three arguments of ``sample`` ask for.

    Args:
        return_trajectory: Whether to keep the states.
        return_log_prob: Whether to keep the log-probabilities.
        reduction: Theirs, "sum" or "mean".

    Returns:
        A new one; ``None`` if nothing is asked for.
    """
    keeps_states = as_flag("return_trajectory", return_trajectory)
    scores = wants_log_prob(return_log_prob, reduction)
    options = {"return_log_prob": True, "reduction": reduction} if scores else {}
    return Recorder(keeps_states, options) if keeps_states or scores else None
