"""Training of consistency models: the ladder of levels, pairs of adjacent ones, and the loss.

A consistency model f(x, sigma) = c_skip x + c_out F maps every point of the probability flow to its
end at sigma_min. Training takes a sample at two adjacent levels with the same noise, and moves f at
the upper one toward f of the target model, often an average of the weights, at the lower one.
alpha is 1, as in EDM. The network F gets x / sqrt(sigma^2 + sigma_data^2) and the timestep input
``time_scale`` log(sigma) / 4, which are those of ``solvers.consistency_table``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffcore import ops, timesteps
from diffcore._checks import (
    as_int,
    as_positive,
    as_real,
    as_tensor,
    check_choice,
    check_float_tensor,
)
from diffcore._devices import to_device, wide_dtype, widened
from diffcore._engine import messages
from diffcore._types import Coef, Model
from diffcore.coefficients.consistency import consistency_coefficients
from diffcore.noise import Noise, PhiloxNoise
from diffcore.sampling.model import call_model, check_samples
from diffcore.schedules import get_sigmas_karras

__all__ = [
    "LOSSES",
    "ConsistencyModel",
    "draw_pair",
    "ladder",
    "level_weights",
    "num_levels",
]

LOSSES = ("pseudo_huber_norm", "pseudo_huber", "mse")

# delta of improved consistency training, times the root of the number of elements.
_DELTA = 0.00054


def num_levels(step: int, total_steps: int, *, first: int = 10, last: int = 1280) -> int:
    """N, how many levels the ladder has at a training step: it doubles at equal intervals.

    N = min(``first`` 2^floor(k / K'), ``last``) + 1, with K' = floor(K / (log2 floor(last / first)
    + 1)), k the step and K ``total_steps``.

    Args:
        step: k, from 0.
        total_steps: K, how many steps the training takes.
        first: Intervals at the start.
        last: The most intervals.

    Returns:
        N.

    Raises:
        TypeError: An argument is not an int.
        ValueError: ``step`` below 0, another one below 1, ``last`` below ``first``, or fewer steps
            than the doublings need.

    Source:
        Song and Dhariwal 2023 (arXiv 2310.14189) section 3.4.
    """
    step, total_steps = as_int("step", step, 0), as_int("total_steps", total_steps, 1)
    first, last = as_int("first", first, 1), as_int("last", last, 1)
    if last < first:
        raise ValueError(f"last must be at least first, {first}, got {last}")
    stages = math.log2(last // first) + 1
    length = math.floor(total_steps / stages)
    if length < 1:
        raise ValueError(f"total_steps must be at least {math.ceil(stages)}, got {total_steps}")
    doublings = min(step // length, last.bit_length())  # more than enough, and no huge power
    return int(min(first << doublings, last)) + 1


def ladder(
    count: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """The levels of a training step, from low to high: sigma^(1 / rho) in equal steps.

    Args:
        count: N, at least 2, such as ``num_levels``.
        sigma_min: The lowest level, above 0.
        sigma_max: The highest.
        rho: How strongly levels crowd at the low end.

    Returns:
        float64 ``[N]``, rising.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: N below 2, or as ``sigmas.get_sigmas_karras``.

    Source:
        Song et al. 2023 (arXiv 2303.01469) section 5; Karras et al. 2022 (arXiv 2206.00364) eq. 5.
    """
    count = as_int("count", count, 2)
    return get_sigmas_karras(count, sigma_min, sigma_max, rho)[:-1].flip(0)


def level_weights(sigmas: Tensor, *, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """The probability of each pair of adjacent levels, if log sigma is normal.

    Proportional to the normal distribution's part between log sigma_i and log sigma_{i+1}.

    Args:
        sigmas: The ladder ``[N]``, rising, above 0.
        mean: Mean of log sigma.
        std: Its standard deviation, above 0.

    Returns:
        float64 ``[N - 1]``, with sum 1.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: ``sigmas`` that do not rise or are not above 0, ``std`` that is not positive, or
            levels so far from ``mean`` that every part is 0.

    Source:
        Song and Dhariwal 2023 (arXiv 2310.14189) eq. 10.
    """
    logs = _ladder(sigmas).log()
    mean, std = as_real("mean", mean), as_positive("std", std, finite=True)
    z = (logs - mean) / std
    below, above = z[:-1], z[1:]
    # Above the mean by the upper tails, where the lower ones are near 1 and would cancel.
    flip = below > 0
    a, b = torch.where(flip, -above, below), torch.where(flip, -below, above)
    parts = torch.erfc(-b * math.sqrt(0.5)) - torch.erfc(-a * math.sqrt(0.5))
    total = float(parts.sum())
    if total == 0:
        raise ValueError(f"mean must be near log(sigmas), got {mean} with std={std}")
    shares: Tensor = parts / total
    return shares


def draw_pair(
    sigmas: Tensor,
    batch: int,
    noise: PhiloxNoise | None = None,
    *,
    weights: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Two adjacent levels of the ladder for each sample of a training step.

    From a noise key it is a function of (seed, sample id, stream), independent of the key's noise,
    so one key gives a training step its levels and its noise, and the step can be replayed.

    Args:
        sigmas: The ladder ``[N]``, rising, such as ``ladder``.
        batch: B.
        noise: A noise key; ``None`` for one seeded by torch's generator.
        weights: Probabilities of the N - 1 pairs, such as ``level_weights``, in any unit; ``None``
            for equal ones.
        dtype: Of the result, to which the float64 levels are rounded.
        device: ``None`` for that of the key's tensors, else torch's default.

    Returns:
        The lower and the higher levels, ``[B]`` each.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: ``sigmas`` that do not rise, or ``weights`` that are not N - 1 numbers of at
            least 0, with one above 0.
    """
    messages.check_dtype(dtype)
    levels = _ladder(sigmas)
    u, at = timesteps.drawn("uniform", batch, noise, device=device)
    edges = _cumulative(weights, len(levels) - 1).to(u.device)
    i = torch.searchsorted(edges, u, right=True)
    levels = levels.to(u.device)
    return to_device(levels[i].to(dtype), at), to_device(levels[i + 1].to(dtype), at)


@dataclass(frozen=True)
class ConsistencyModel:
    """A consistency model's settings, and what is computed with a network F.

    Args:
        sigma_data: Standard deviation of the data.
        sigma_min: The lowest noise level, at least 0.
        time_scale: Factor of the timestep input.
        loss: How far f is from its target, with e = f - target: "pseudo_huber_norm" for sqrt(|e|² +
            delta²) - delta, with |e|² the sum over the sample; "pseudo_huber" for the mean of 2
            delta (sqrt(e² + delta²) - delta); "mse" for the mean of e².
        delta: Where a pseudo-Huber loss turns from squared to linear, above 0. ``None`` for 0.00054
            sqrt(n), n the number of elements of a sample, with "pseudo_huber_norm", and 0.001 with
            "pseudo_huber".

    Raises:
        TypeError: A setting of the wrong type.
        ValueError: An unknown ``loss``, ``delta`` with "mse", or a number out of its range.

    Source:
        Song et al. 2023 (arXiv 2303.01469); Song and Dhariwal 2023 (arXiv 2310.14189) section 3.3
        for "pseudo_huber_norm".
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    time_scale: float = 1000.0
    loss: str = "pseudo_huber_norm"
    delta: float | None = None

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        as_positive("time_scale", self.time_scale, finite=True)
        consistency_coefficients(1.0, sigma_data=self.sigma_data, sigma_min=self.sigma_min)
        if self.delta is not None:
            if self.loss == "mse":
                raise ValueError(f"delta must be None with loss='mse', got {self.delta}")
            as_positive("delta", self.delta, finite=True)

    def denoise(
        self,
        model: Model,
        x: Tensor,
        sigma: Coef,
        *,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """f(x, sigma) = c_skip x + c_out F: the end of the probability flow through x.

        Args:
            model: F, ``model(c_in x, t, **model_kwargs)`` with t ``[B]``.
            x: Samples at the noise level sigma, with alpha = 1, ``[B, ...]``.
            sigma: A number or ``[B]``, at least ``sigma_min``.
            model_kwargs: More arguments for the model.

        Returns:
            f, ``[B, ...]``.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        wide = wide_dtype(x.device)
        sigma = torch.as_tensor(sigma, dtype=wide, device=x.device).expand(x.shape[:1])
        scaled = ops.linear_combination(x, x, (1 / self._norm(sigma), 0.0))
        output = call_model(model, scaled, self._timestep(sigma, x), model_kwargs)
        return self._f(scaled, output, sigma)

    def distance(
        self,
        model_output: Tensor,
        x: Tensor,
        sigma: Tensor,
        target: Tensor,
        *,
        weight: Coef | None = None,
    ) -> Tensor:
        """The loss of f = c_skip x + c_out F against a target; f is never written to memory.

        For distillation, ``target`` is f of the target model at a point that a solver reached from
        x.

        Args:
            model_output: F, ``[B, ...]``.
            x: The model's input, x / sqrt(sigma² + sigma_data²), ``[B, ...]``.
            sigma: Its noise level, ``[B]``, above ``sigma_min``.
            target: What f is compared with, ``[B, ...]``; it gets no gradient.
            weight: Factor of each sample's loss, a number or ``[B]``; ``None`` for 1.

        Returns:
            ``[B]``, float32 (float64 for float64 inputs).

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: As ``denoising_loss``.
        """
        for name, value in (("model_output", model_output), ("x", x), ("target", target)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        x, target = x.detach(), target.detach()
        count = max(model_output.shape[1:].numel(), 1)
        skip, out = self._boundary(sigma)
        # e / c_out = F - (target - skip x) / c_out: a target that is linear in two tensors.
        pair, squared = (1 / out, -skip / out), out * out
        if self.loss == "mse":
            scaled = squared if weight is None else squared * weight
            return ops.denoising_loss(model_output, target, x, target=pair, weight=scaled)
        if self.loss == "pseudo_huber":
            delta = 0.001 if self.delta is None else self.delta
            found = ops.denoising_loss(
                model_output,
                target,
                x,
                target=pair,
                weight=squared,
                loss="pseudo_huber",
                delta=delta / out,
            )
        else:
            delta = _DELTA * math.sqrt(count) if self.delta is None else self.delta
            total = ops.denoising_loss(model_output, target, x, target=pair, weight=count * squared)
            # Not sqrt(|e|² + delta²) - delta, which cancels where e is small.
            found = total / ((total + delta * delta).sqrt() + delta)
        if isinstance(weight, Tensor):
            weight = weight.to(found)
        return found if weight is None else found * weight

    def training_losses(
        self,
        model: Model,
        target_model: Model,
        x_start: Tensor,
        pair: tuple[Tensor, Tensor],
        noise: Noise | None = None,
        *,
        weight: Coef | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Consistency training: f at the higher level against the target's f at the lower one.

        Both samples have the same noise. Four launches: two that add noise, one that makes the
        target and one for the loss with its gradient.

        Args:
            model: F, ``model(c_in x, t, **model_kwargs)`` with t ``[B]``.
            target_model: The same with the target's weights, called without gradients; ``model``
                itself in improved consistency training.
            x_start: Clean samples ``[B, ...]``.
            pair: Adjacent levels (low, high), ``[B]`` each, such as ``draw_pair``; at least
                ``sigma_min``.
            noise: Like ``x_start``, or a noise key; ``None`` for one seeded by torch's generator.
            weight: Factor of each sample's loss, a number or ``[B]``; ``None`` for 1 / (high -
                low).
            model_kwargs: More arguments for both models.

        Returns:
            The loss of each sample, ``[B]``.

        Raises:
            TypeError: An argument of the wrong type.
            ValueError: ``pair`` is not two tensors ``[B]``, or as ``denoising_loss``.

        Source:
            Song et al. 2023 (arXiv 2303.01469) algorithm 3; Song and Dhariwal 2023 (arXiv
            2310.14189).
        """
        check_samples(x_start, "x_start")
        low, high = _checked_pair(pair, len(x_start))
        if noise is None:
            noise = PhiloxNoise.from_generator(device=x_start.device)
        x = self._noised(x_start, noise, high)
        output = call_model(model, x, self._timestep(high, x), model_kwargs)
        with torch.no_grad():
            x_low = self._noised(x_start, noise, low)
            found = call_model(target_model, x_low, self._timestep(low, x), model_kwargs)
            target = self._f(x_low, found, low)
        weight = 1 / (high - low) if weight is None else weight
        return self.distance(output, x, high, target, weight=weight)

    def _norm(self, sigma: Tensor) -> Tensor:
        """1 / c_in = sqrt(sigma² + sigma_data²), in float64."""
        sigma = widened(sigma)
        return torch.hypot(sigma, sigma.new_full((), self.sigma_data))

    def _noised(self, x_start: Tensor, noise: Noise, sigma: Tensor) -> Tensor:
        c_in = 1 / self._norm(sigma)
        x: Tensor = ops.add_noise(x_start, noise, c_in, c_in * sigma)
        return x

    def _timestep(self, sigma: Tensor, x: Tensor) -> Tensor:
        t = self.time_scale * widened(sigma).log() / 4
        return t if x.dtype == torch.float64 else t.float()

    def _boundary(self, sigma: Tensor) -> tuple[Any, Any]:
        """The factors of the scaled x and of F in f."""
        skip, out = consistency_coefficients(
            sigma, sigma_data=self.sigma_data, sigma_min=self.sigma_min
        )
        return skip * self._norm(sigma), out

    def _f(self, x: Tensor, output: Tensor, sigma: Tensor) -> Tensor:
        return ops.linear_combination(x, output, self._boundary(sigma))


def _checked_pair(pair: Any, batch: int) -> tuple[Tensor, Tensor]:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"pair must be two tensors (low, high), got {type(pair).__name__}")
    for name, sigma in zip(("pair[0]", "pair[1]"), pair, strict=True):
        check_float_tensor(name, sigma)
        if sigma.shape != (batch,):
            raise ValueError(f"{name} must have shape ({batch},), got {tuple(sigma.shape)}")
    low, high = map(widened, pair)
    return low, high


def _ladder(sigmas: Tensor) -> Tensor:
    sigmas = as_tensor("sigmas", sigmas, "a floating-point tensor")
    check_float_tensor("sigmas", sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas must have shape [N], N at least 2, got {tuple(sigmas.shape)}")
    levels = sigmas.detach().cpu().double()
    if not bool((levels > 0).all()) or not bool((levels[1:] > levels[:-1]).all()):
        raise ValueError("sigmas must rise and be above 0, got others")
    return levels


def _cumulative(weights: Tensor | None, count: int) -> Tensor:
    """The distribution function at the inner edges of ``count`` intervals, float64 on the CPU."""
    if weights is None:
        return torch.arange(1, count, dtype=torch.float64, device="cpu") / count
    weights = as_tensor("weights", weights, "a floating-point tensor")
    check_float_tensor("weights", weights)
    if weights.shape != (count,):
        raise ValueError(
            f"weights must have one number for each of the {count} pairs, got shape "
            f"{tuple(weights.shape)}"
        )
    known = weights.detach().cpu().double()
    total = known.sum()
    if not bool((known >= 0).all()) or not 0 < float(total) < math.inf:
        raise ValueError("weights must be at least 0 and finite, with one above 0, got others")
    edges: Tensor = known.cumsum(0) / total
    return edges[:-1]
