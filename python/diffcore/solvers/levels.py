"""The noise levels that a sampler visits, and the inputs of the model there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffcore._checks import as_int, as_positive, check_choice
from diffcore.coefficients.step import epsilon_coefficients, tensors, x0_coefficients
from diffcore.schedules import NoiseSchedule
from diffcore.schedules.schedule import check_schedule
from diffcore.schedules.tensors import as_float64, float64_vector
from diffcore.schedules.timesteps import sigmas_to_timesteps, timesteps_to_sigmas
from diffcore.solvers.paths import (
    PATHS,
    FlowTime,
    TimeOf,
    all_on_path,
    level_vector,
    on_path,
    path_of,
    quarter_log,
    timestep_vector,
)

FINAL_SIGMAS_TYPES = ("zero", "sigma_min")


class Level(NamedTuple):
    """One noise level, x = alpha * x_0 + sigma * noise, and the inputs of the model there."""

    alpha: float
    sigma: float
    timestep: float
    input_scale: float

    @property
    def ratio(self) -> float:
        """Sigma / alpha; infinite where alpha = 0."""
        return self.sigma / self.alpha if self.alpha > 0 else math.inf

    @property
    def lam(self) -> float:
        """Lambda = log(alpha / sigma), half the log signal-to-noise ratio; may be infinite."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha) - math.log(self.sigma) if self.sigma > 0 else math.inf


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """The noise levels (alpha, sigma) that a sampler visits, from noisy to clean.

    Made by ``from_sigmas`` (variance exploding, k-diffusion's convention), ``from_flow``,
    ``from_schedule`` (a discrete schedule at some of its timesteps) and ``from_edm``. Every solver
    takes these; N steps have N + 1 levels, the last one included.

    Args:
        alpha: Signal coefficients ``[N + 1]``, a tensor, an array or a list; kept as float64.
        sigma: Noise coefficients ``[N + 1]``; the last is 0 for steps to a clean sample.
        timesteps: Timestep input of the model at all levels but the last, ``[N]``; int64 or
            float64.
        path: Where levels between these lie: "vp" (alpha^2 + sigma^2 = 1), "ve" (alpha = 1) or
            "flow" (alpha + sigma = 1).
        time_of: Function from sigma / alpha to the timestep there; picklable, if the levels are to
            be pickled.
        input_std: The model input is x / sqrt((sigma / alpha)^2 + input_std^2); ``None`` for x.
        preconditioned: Whether the model is EDM's F, with x_0 = c_skip x + c_out F and
            sigma_data = ``input_std``.
        init_noise_sigma: Standard deviation of the sample to start from.

    Raises:
        ValueError: Fewer than two levels, a level noisier than the one before, alpha = 0 after the
            first level, sigma = 0 before the last.
    """

    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor
    path: str
    time_of: Callable[[float], float]
    input_std: float | None = None
    preconditioned: bool = False
    init_noise_sigma: float = 1.0

    def __post_init__(self) -> None:
        check_choice("path", self.path, PATHS)
        for name, vector in (
            ("alpha", float64_vector("alpha", self.alpha)),
            ("sigma", float64_vector("sigma", self.sigma)),
            ("timesteps", timestep_vector(self.timesteps)),
        ):
            object.__setattr__(self, name, vector)
        if len(self.alpha) != len(self.sigma) or len(self.alpha) < 2:
            raise ValueError(
                "alpha and sigma must have the same length, at least 2, got "
                f"{len(self.alpha)} and {len(self.sigma)}"
            )
        if len(self.timesteps) != len(self.alpha) - 1:
            raise ValueError(
                f"timesteps must hold one for each of the {len(self.alpha) - 1} steps, got "
                f"{len(self.timesteps)}"
            )
        if self.sigma[0] * self.alpha[-1] < self.sigma[-1] * self.alpha[0]:
            first, last = self.sigma[0] / self.alpha[0], self.sigma[-1] / self.alpha[-1]
            raise ValueError(
                "sigmas must fall, from noise to the clean sample, got levels that rise from "
                f"sigma / alpha = {first:.6g} to {last:.6g}; reverse them, or for inversion use "
                "ddim_step in a loop of your own"
            )
        _refuse_first(
            "sigma must be above 0 before the last level", self.sigma, self.sigma[:-1] <= 0
        )
        _refuse_first("sigma must be at least 0", self.sigma, self.sigma < 0)
        _refuse_first("alpha must be at least 0", self.alpha, self.alpha < 0)
        later = self.alpha[1:]
        _refuse_first("alpha must be above 0 after the first level", later, later <= 0, 1)
        # sigma' alpha <= sigma alpha' means that sigma / alpha falls, without a division by 0.
        before, after = self.alpha[:-1] * self.sigma[1:], self.alpha[1:] * self.sigma[:-1]
        wrong = after < before
        wrong[:-1] |= (after == before)[:-1]  # the last step may keep its level (DDIM's t = 0)
        if bool(wrong.any()):
            step = int(wrong.nonzero()[0])
            raise ValueError(
                f"sigmas must fall at every step, got step {step} from (alpha, sigma) = "
                f"({self.alpha[step]:.6g}, {self.sigma[step]:.6g}) to "
                f"({self.alpha[step + 1]:.6g}, {self.sigma[step + 1]:.6g})"
            )

    @classmethod
    def from_sigmas(
        cls, sigmas: Tensor | Sequence[float], timesteps: Tensor | None = None
    ) -> NoiseLevels:
        """Variance exploding, alpha = 1: the convention of k-diffusion's samplers.

        Args:
            sigmas: ``[N + 1]``, falling, usually to a 0 (which the ``get_sigmas_*`` append).
            timesteps: Timestep input of the model ``[N]``; sigma by default.

        Returns:
            The levels; init_noise_sigma is the first sigma.
        """
        sigma = level_vector("sigmas", sigmas)
        times = sigma[:-1]
        time_of: Callable[[float], float] = float
        if timesteps is not None:
            times = timestep_vector(timesteps)
            time_of = TimeOf(sigma[:-1].flip(0), times.flip(0))
        first = float(sigma[0])
        return cls(torch.ones_like(sigma), sigma, times, "ve", time_of, init_noise_sigma=first)

    @classmethod
    def from_edm(cls, sigmas: Tensor | Sequence[float], *, sigma_data: float = 0.5) -> NoiseLevels:
        """Variance exploding, for a network with EDM's preconditioning.

        The inputs of the network are c_in x, c_in = 1 / sqrt(sigma^2 + sigma_data^2), and
        log(sigma) / 4; its output F gives x_0 = c_skip x + c_out F with c_skip = sigma_data^2
        c_in^2 and c_out = sigma sigma_data c_in for prediction_type "epsilon" (the convention of
        EDM) or minus that for "v_prediction"; with "sample" the output is x_0 itself.

        Args:
            sigmas: As for ``from_sigmas``.
            sigma_data: Standard deviation of the data.

        Returns:
            The levels; init_noise_sigma is sqrt(sigma[0]^2 + 1), as in diffusers.

        Source:
            Karras et al. 2022 (arXiv 2206.00364) table 1 and eq. 7.
        """
        sigma = level_vector("sigmas", sigmas)
        sigma_data = as_positive("sigma_data", sigma_data, finite=True)
        return cls(
            torch.ones_like(sigma),
            sigma,
            _quarter_log_of(sigma[:-1]),
            "ve",
            quarter_log,
            input_std=sigma_data,
            preconditioned=True,
            init_noise_sigma=math.hypot(float(sigma[0]), 1),
        )

    @classmethod
    def from_flow(
        cls, sigmas: Tensor | Sequence[float], *, num_train_timesteps: float = 1000.0
    ) -> NoiseLevels:
        """Rectified flow, alpha = 1 - sigma.

        Args:
            sigmas: ``[N + 1]``, falling, in [0, 1], already shifted (``shift_sigmas``).
            num_train_timesteps: The timestep input is sigma times this.

        Returns:
            The levels; init_noise_sigma is 1.
        """
        sigma = level_vector("sigmas", sigmas)
        _refuse_first("sigmas must lie in [0, 1] for a flow", sigma, sigma > 1)
        scale = as_positive("num_train_timesteps", num_train_timesteps, finite=True)
        return cls(1 - sigma, sigma, sigma[:-1] * scale, "flow", FlowTime(scale))

    @classmethod
    def from_schedule(
        cls,
        schedule: NoiseSchedule,
        timesteps: Tensor | Sequence[float] | None = None,
        *,
        sigmas: Tensor | Sequence[float] | None = None,
        final_sigmas_type: str = "zero",
        round_timesteps: bool = False,
    ) -> NoiseLevels:
        """A discrete schedule, at given timesteps or at given values of sigma / alpha.

        For timesteps between two of the schedule, sigma / alpha is interpolated linearly; for
        sigmas between two of the schedule, the timestep is interpolated linearly in log sigma (both
        as in diffusers).

        Args:
            schedule: The training schedule.
            timesteps: ``[N]``, falling, int or float, in 0 .. T - 1.
            sigmas: Instead of timesteps, values of sigma / alpha ``[N + 1]``, the last one included
                (Karras' for instance).
            final_sigmas_type: With timesteps: the last level is the clean sample ("zero") or that
                of timestep 0 ("sigma_min"; diffusers' DDIM with ``set_alpha_to_one=False``).
            round_timesteps: With sigmas: round the timestep input to integers.

        Returns:
            The levels; init_noise_sigma is 1, or the first sigma where alpha = 1.

        Raises:
            ValueError: Both or neither of timesteps and sigmas, timesteps outside the schedule or
                not falling, or a schedule that is on none of the paths.
        """
        if (timesteps is None) == (sigmas is None):
            came = "neither" if sigmas is None else "both"
            raise ValueError(f"timesteps or sigmas must be given, and not both, got {came}")
        check_choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS_TYPES)
        check_schedule(schedule)
        path = path_of(schedule)
        time_of = TimeOf(schedule.sigma / schedule.alpha, torch.arange(len(schedule), device="cpu"))

        if sigmas is not None:
            ratio = level_vector("sigmas", sigmas)
            times = sigmas_to_timesteps(schedule, ratio[:-1])
            times = times.round().long() if round_timesteps else times
            alpha, sigma = all_on_path(path, ratio)
        else:
            assert timesteps is not None
            times = timestep_vector(timesteps)
            rising = times[1:] >= times[:-1]
            _refuse_first("timesteps must fall at every step", times[1:], rising, 1)
            if times.dtype == torch.int64:
                _refuse_first(
                    f"timesteps must lie in 0 .. {len(schedule) - 1}",
                    times,
                    (times < 0) | (times >= len(schedule)),
                )
                alpha, sigma = schedule.alpha[times], schedule.sigma[times]
            else:
                alpha, sigma = all_on_path(path, timesteps_to_sigmas(schedule, times))
            clean = final_sigmas_type == "zero"
            alpha = torch.cat([alpha, alpha.new_ones(1) if clean else schedule.alpha[:1]])
            sigma = torch.cat([sigma, sigma.new_zeros(1) if clean else schedule.sigma[:1]])
        first = float(sigma[0]) if path == "ve" else 1.0
        return cls(alpha, sigma, times, path, time_of, init_noise_sigma=first)

    def sigma_space(self, *, init_noise_sigma: float | None = None) -> NoiseLevels:
        """The same levels for x / alpha: variance exploding, with alpha x as the model input.

        This is the space of diffusers' Euler family and of k-diffusion's wrappers of discrete
        models, which call sigma / alpha "sigma".

        Args:
            init_noise_sigma: By default the first sigma / alpha; diffusers takes the root of its
                square plus 1 for "leading" timesteps.

        Returns:
            Levels with alpha = 1.

        Raises:
            ValueError: The levels are not variance preserving, or the first alpha is 0.
        """
        if self.path != "vp":
            raise ValueError(
                f"path must be 'vp' for sigma_space (variance preserving), got {self.path!r}"
            )
        self.check_signal("sigma_space")
        ratio = self.sigma / self.alpha
        first = float(ratio[0]) if init_noise_sigma is None else init_noise_sigma
        return replace(
            self,
            alpha=torch.ones_like(ratio),
            sigma=ratio,
            path="ve",
            input_std=1.0,
            init_noise_sigma=as_positive("init_noise_sigma", first, finite=True),
        )

    def skip(self, steps: int) -> NoiseLevels:
        """The levels without the first steps, for a sample that has that much noise already.

        Args:
            steps: Number of steps to leave out, less than ``len(self)``.

        Returns:
            The levels; init_noise_sigma is the first sigma that remains.

        Raises:
            ValueError: No step remains.
        """
        steps = as_int("steps", steps)
        if not 0 <= steps < len(self):
            raise ValueError(f"steps must lie in 0 .. {len(self) - 1}, got {steps}")
        return replace(
            self,
            alpha=self.alpha[steps:],
            sigma=self.sigma[steps:],
            timesteps=self.timesteps[steps:],
            init_noise_sigma=float(self.sigma[steps]),
        )

    def __len__(self) -> int:
        """The number of steps, one less than there are levels."""
        return len(self.timesteps)

    def __repr__(self) -> str:
        """One line: the path, the number of steps, and sigma / alpha at both ends."""
        first, last = (Level(float(self.alpha[i]), float(self.sigma[i]), 0, 1) for i in (0, -1))
        return (
            f"NoiseLevels(path={self.path!r}, {len(self)} steps, sigma / alpha from "
            f"{first.ratio:.4g} to {last.ratio:.4g})"
        )

    def levels(self) -> list[Level]:
        """All N + 1 levels; a clean last one has the timestep nan, as no model is called there."""
        alpha, sigma = float(self.alpha[-1]), float(self.sigma[-1])
        last = self.time_of(sigma / alpha) if sigma > 0 else math.nan
        times = [*self.timesteps.tolist(), last]
        pairs = zip(self.alpha.tolist(), self.sigma.tolist(), times, strict=True)
        return [Level(a, s, t, self._scale(a, s)) for a, s, t in pairs]

    def at(self, ratio: float) -> Level:
        """The level on this path with the given sigma / alpha."""
        alpha, sigma = on_path(self.path, ratio)
        return Level(alpha, sigma, self.time_of(ratio), self._scale(alpha, sigma))

    def x0(self, level: Level, prediction_type: str) -> tuple[float, float]:
        """(a_x, a_m) with x_0 = a_x x + a_m m, for the model output m at the scaled x."""
        scale = level.input_scale
        if self.preconditioned and prediction_type in ("epsilon", "v_prediction"):
            assert self.input_std is not None
            out = level.sigma * self.input_std * scale
            skip = (self.input_std * scale) ** 2
            return skip, out if prediction_type == "epsilon" else -out
        a_x, a_m = x0_coefficients(level.alpha * scale, level.sigma * scale, prediction_type)
        return float(a_x) * scale, float(a_m)

    def epsilon(self, level: Level, prediction_type: str) -> tuple[float, float]:
        """(e_x, e_m) with epsilon = e_x x + e_m m, without clipping."""
        scale = level.input_scale
        if self.preconditioned:
            a_x, a_m = self.x0(level, prediction_type)
            return (1 - level.alpha * a_x) / level.sigma, -level.alpha * a_m / level.sigma
        e_x, e_m = epsilon_coefficients(level.alpha * scale, level.sigma * scale, prediction_type)
        return float(e_x) * scale, float(e_m)

    def x0_columns(self, prediction_type: str) -> tuple[Tensor, Tensor]:
        """``x0`` at all levels but the last, float64 ``[N]`` each."""
        if self.input_std is None:
            alpha, sigma = self.alpha[:-1], self.sigma[:-1]
            a_x, a_m = tensors(x0_coefficients(alpha, sigma, prediction_type))
            return a_x, a_m
        pairs = as_float64([self.x0(level, prediction_type) for level in self.levels()[:-1]])
        return pairs[:, 0], pairs[:, 1]

    def epsilon_columns(self, prediction_type: str) -> tuple[Tensor, Tensor]:
        """``epsilon`` at all levels but the last, float64 ``[N]`` each."""
        if self.input_std is None:
            alpha, sigma = self.alpha[:-1], self.sigma[:-1]
            e_x, e_m = tensors(epsilon_coefficients(alpha, sigma, prediction_type))
            return e_x, e_m
        pairs = as_float64([self.epsilon(level, prediction_type) for level in self.levels()[:-1]])
        return pairs[:, 0], pairs[:, 1]

    def check_signal(self, name: str) -> None:
        """Refuse levels that start at alpha = 0, for a solver that cannot.

        Args:
            name: Name of the solver function.

        Raises:
            ValueError: The first alpha is 0.
        """
        if self.alpha[0] == 0:
            raise ValueError(
                f"levels must start at alpha > 0 for {name}, got alpha = 0 (pure noise, sigma / "
                "alpha infinite); start at a lower level, or use euler_table, ddim_table, "
                "dpmpp_table or unipc_table"
            )

    def _scale(self, alpha: float, sigma: float) -> float:
        if self.input_std is None:
            return 1.0
        return 1 / math.hypot(sigma / alpha, self.input_std)


Levels: TypeAlias = NoiseLevels | Tensor | Sequence[float]
"""Where a solver steps: noise levels, or sigmas of a variance exploding process."""


def as_levels(levels: Levels, prediction_type: str) -> NoiseLevels:
    """Noise levels unchanged, and sigmas ``[N + 1]`` as levels with alpha = 1.

    Args:
        levels: Noise levels, or sigmas.
        prediction_type: What the model predicts.

    Returns:
        Noise levels.

    Raises:
        ValueError: Sigmas for a velocity of a flow, whose alpha is not 1.
    """
    if isinstance(levels, NoiseLevels):
        return levels
    if isinstance(prediction_type, str) and prediction_type == "flow_prediction":
        raise ValueError(
            "levels must be NoiseLevels with prediction_type='flow_prediction', got "
            f"{type(levels).__name__}: sigmas alone mean alpha = 1, and the alpha of a flow is "
            "1 - sigma; pass NoiseLevels.from_flow(sigmas), or NoiseLevels.from_sigmas(sigmas) if "
            "alpha = 1 is meant"
        )
    return NoiseLevels.from_sigmas(level_vector("levels", levels))


def _quarter_log_of(sigma: Tensor) -> Tensor:
    _refuse_first("sigmas must be above 0 before the last", sigma, sigma <= 0)
    return sigma.log() / 4


def _refuse_first(what: str, values: Tensor, wrong: Tensor, offset: int = 0) -> None:
    """Raises for the first wrong value of a vector, by its index."""
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        raise ValueError(f"{what}, got {values[i].item():.6g} at index {i + offset}")
