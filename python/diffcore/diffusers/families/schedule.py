"""What the schedulers share that look their coefficients up by the timestep: DDPM, DDIM."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore.diffusers.rows import float64
from diffcore.diffusers.scheduler import FusedScheduler
from diffcore.diffusers.walk import Unsupported, Walk
from diffcore.solvers import NoiseLevels
from diffcore.solvers.paths import TimeOf


class Stateless(FusedScheduler):
    """Steps that do not depend on those before: a walk may start and go on anywhere."""

    def _row(self, walk: Walk, timestep: Any) -> int:
        walk.start = 0
        return super()._row(walk, timestep)


class Noising(FusedScheduler):
    """A scheduler with ``alphas_cumprod`` that adds noise."""

    _schedule: tuple[Tensor, Tensor, Tensor] | None = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) noise, in one launch.

        The square roots are those of the float64 values, also for 16-bit samples.
        """
        alpha, sigma, t = self._at(original_samples, timesteps)
        return ops.add_noise(original_samples, noise, alpha, sigma, t=t)

    def _at(self, like: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Alpha and sigma of the schedule on a device, and the timesteps there, one a sample."""
        held: Any = self.alphas_cumprod  # type: ignore[attr-defined]
        kept = self._schedule
        if kept is None or kept[0] is not held or kept[1].device != like.device:
            signal = float64(held)
            alpha, sigma = (x.sqrt().to(like.device) for x in (signal, 1 - signal))
            kept = self._schedule = (held, alpha, sigma)
        t = timesteps.to(like.device).flatten()
        return kept[1], kept[2], t.expand(like.shape[0]) if t.numel() == 1 else t


class WithVelocity(Noising):
    """One that also knows the target of v-prediction."""

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return sqrt(a_t) noise - sqrt(1 - a_t) x_0, a = alphas_cumprod, in one launch."""
        alpha, sigma, t = self._at(sample, timesteps)
        return ops.velocity(sample, noise, alpha, sigma, t=t)


class Counted(Stateless, WithVelocity):
    """One with a count of steps, whose coefficients are those of the timestep of the call."""

    def _row(self, walk: Walk, timestep: Any) -> int:
        row = super()._row(walk, timestep)
        if row < len(walk) and walk.value_of(timestep) != walk.times[row]:
            raise Unsupported(f"a timestep that is not that of step {row}, {walk.times[row]:g}")
        return row


class Uncounted(FusedScheduler):
    """A scheduler without a count of steps: the timestep of a call says which row it takes."""

    def _row(self, walk: Walk, timestep: Any) -> int:
        walk.start = 0
        return walk.places(timestep)[0]

    def _done(self, row: int) -> None:
        """Nothing is counted."""


class ByTimestep(WithVelocity, Uncounted):
    """Both, as DDPM and DDIM are."""


def levels_of(scheduler: Any, *, end: float = 1.0, timesteps: Tensor | None = None) -> NoiseLevels:
    """The levels at the timesteps of a scheduler with ``alphas_cumprod``, and one after them.

    Args:
        scheduler: With ``timesteps`` that fall.
        end: ``alphas_cumprod`` after the last; 1 for the clean sample.
        timesteps: Instead of its own.

    Returns:
        The levels, variance preserving.

    Raises:
        Unsupported: Timesteps that the schedule does not have.
    """
    signal = float64(scheduler.alphas_cumprod)
    times = schedule_times(scheduler) if timesteps is None else timesteps
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    known = TimeOf(sigma / alpha, torch.arange(len(signal), device="cpu"))
    visited = torch.cat([signal[times], signal.new_tensor([end])])
    return NoiseLevels(visited.sqrt(), (1 - visited).sqrt(), times, "vp", known)


def schedule_times(scheduler: Any) -> Tensor:
    """The timesteps of a scheduler, int64 on the CPU, checked.

    Args:
        scheduler: With ``timesteps`` and ``alphas_cumprod``.

    Returns:
        ``[N]``.

    Raises:
        Unsupported: Timesteps that the schedule does not have.
    """
    times: Tensor = scheduler.timesteps.detach().to("cpu")
    count = len(scheduler.alphas_cumprod)
    if times.is_floating_point() or bool((times < 0).any()) or bool((times >= count).any()):
        raise Unsupported("timesteps that are not those of the schedule")
    return times.long()


def signal_before(scheduler: Any, times: Tensor) -> Tensor:
    """``alphas_cumprod`` where DDIM steps to: t - T // n, whatever the next timestep is.

    Args:
        scheduler: With ``num_inference_steps`` set.
        times: t, int64 ``[N]``.

    Returns:
        float64 ``[N]``; ``final_alpha_cumprod`` before the first timestep of the schedule.

    Raises:
        Unsupported: ``set_timesteps`` has not been called.
    """
    if scheduler.num_inference_steps is None:
        raise Unsupported("a step before set_timesteps")
    before = times - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    signal = float64(scheduler.alphas_cumprod)
    last = float64(scheduler.final_alpha_cumprod.reshape(1))
    return torch.where(before >= 0, signal[before.clamp(min=0)], last)


def clip_of(config: Any) -> float | None:
    """The largest abs(x_0) of a configuration; its threshold is a bound of its own."""
    clips = config.get("clip_sample") and not config.get("thresholding")
    return float(config.clip_sample_range) if clips else None


def prediction_of(config: Any) -> str:
    """What the model predicts, by our name."""
    name: str = config.prediction_type
    return "sample" if name == "original_sample" else name
