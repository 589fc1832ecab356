"""The noise levels that a sampler visits, and the inputs of the model there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffcore._checks import as_flag, as_int, as_positive, check_choice
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
    check_levels,
    level_vector,
    on_path,
    path_of,
    quarter_log,
    refuse_first,
    rises,
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
    """The noise levels (alpha, sigma) that a solver visits: from noisy to clean, or upward.

    Made by ``from_sigmas`` (variance exploding, k-diffusion's convention), ``from_flow``,
    ``from_schedule`` (a discrete schedule at some of its timesteps) and ``from_edm``. Every solver
    takes levels that fall, and every solver without noise takes levels that rise (inversion: from a
    sample to the noise that leads to it). N steps have N + 1 levels, the last one included.

    Args:
        alpha: Signal coefficients ``[N + 1]``, a tensor, an array or a list; kept as float64.
        sigma: Noise coefficients ``[N + 1]``; 0 at the clean sample, the last level if they fall
            and the first if they rise.
        timesteps: Timestep input of the model at all levels but the last, ``[N]``; int64 or
            float64.
        path: Where levels between these lie: "vp" (alpha^2 + sigma^2 = 1), "ve" (alpha = 1) or
            "flow" (alpha + sigma = 1).
        time_of: Function from sigma / alpha to the timestep there; picklable, if the levels are to
            be pickled.
        input_std: The model input is x / sqrt((sigma / alpha)^2 + input_std^2); ``None`` for x.
        preconditioned: Whether the model is EDM's F, with x_0 = c_skip x + c_out F and
            sigma_data = ``input_std``.
        init_noise_sigma: Standard deviation of the sample at the noisiest level, where sampling
            starts and inversion ends.

    Raises:
        ValueError: Fewer than two levels, levels that do not all fall or all rise, alpha = 0
            elsewhere than at the noisiest level, sigma = 0 elsewhere than at the cleanest.
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
        self._check_count(self.timesteps)
        check_levels(self.alpha, self.sigma)

    @classmethod
    def from_sigmas(
        cls, sigmas: Tensor | Sequence[float], timesteps: Tensor | None = None
    ) -> NoiseLevels:
        """Variance exploding, alpha = 1: the convention of k-diffusion's samplers.

        Args:
            sigmas: ``[N + 1]``, falling, usually to a 0 (which the ``get_sigmas_*`` append), or
                rising, usually from a 0.
            timesteps: Timestep input of the model ``[N]``; sigma by default. See
                ``with_timesteps``.

        Returns:
            The levels; init_noise_sigma is the largest sigma.
        """
        sigma = level_vector("sigmas", sigmas)
        largest = float(max(sigma[0], sigma[-1]))
        levels = cls(
            torch.ones_like(sigma), sigma, sigma[:-1], "ve", float, init_noise_sigma=largest
        )
        return levels._labeled(timesteps)

    @classmethod
    def from_edm(cls, sigmas: Tensor | Sequence[float], *, sigma_data: float = 0.5) -> NoiseLevels:
        """Variance exploding, for a network with EDM's preconditioning.

        The inputs of the network are c_in x, c_in = 1 / sqrt(sigma^2 + sigma_data^2), and
        log(sigma) / 4; its output F gives x_0 = c_skip x + c_out F with c_skip = sigma_data^2
        c_in^2 and c_out = sigma sigma_data c_in for prediction_type "epsilon" (the convention of
        EDM) or minus that for "v_prediction"; with "sample" the output is x_0 itself.

        Args:
            sigmas: As for ``from_sigmas``, but rising ones start above 0, because log(sigma) is
                a timestep input.
            sigma_data: Standard deviation of the data.

        Returns:
            The levels; init_noise_sigma is sqrt(sigma^2 + 1) of the largest sigma, as in diffusers.

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
            init_noise_sigma=math.hypot(float(max(sigma[0], sigma[-1])), 1),
        )

    @classmethod
    def from_flow(
        cls,
        sigmas: Tensor | Sequence[float],
        *,
        num_train_timesteps: float = 1000.0,
        timesteps: Tensor | Sequence[float] | None = None,
    ) -> NoiseLevels:
        """Rectified flow, alpha = 1 - sigma.

        Args:
            sigmas: ``[N + 1]``, falling or rising, in [0, 1], already shifted (``shift_sigmas``).
            num_train_timesteps: The timestep input is sigma times this.
            timesteps: Instead, the timestep input of the model ``[N]``. See ``with_timesteps``.

        Returns:
            The levels; init_noise_sigma is 1.
        """
        sigma = level_vector("sigmas", sigmas)
        refuse_first("sigmas must lie in [0, 1] for a flow", sigma, sigma > 1)
        scale = as_positive("num_train_timesteps", num_train_timesteps, finite=True)
        levels = cls(1 - sigma, sigma, sigma[:-1] * scale, "flow", FlowTime(scale))
        return levels._labeled(timesteps)

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
            timesteps: Timesteps to visit ``[N]``, falling, int or float, in 0 .. T - 1. Two or more
                that rise give the levels of the falling ones, ``reversed``: the first is the clean
                one. With sigmas: the timestep input of the model there; see ``with_timesteps``.
            sigmas: Values of sigma / alpha to visit ``[N + 1]``, the last one included (Karras' for
                instance).
            final_sigmas_type: Without sigmas: the cleanest level is the clean sample ("zero") or
                that of timestep 0 ("sigma_min"; diffusers' DDIM with ``set_alpha_to_one=False``).
            round_timesteps: With sigmas alone: round the timestep input to integers.

        Returns:
            The levels; init_noise_sigma is 1, or the largest sigma where alpha = 1.

        Raises:
            ValueError: Neither timesteps nor sigmas, timesteps outside the schedule or neither
                falling nor rising, ``round_timesteps`` with both, or a schedule that is on none of
                the paths.
        """
        if timesteps is None and sigmas is None:
            raise ValueError("timesteps or sigmas must be given, got neither")
        if (
            as_flag("round_timesteps", round_timesteps)
            and timesteps is not None
            and sigmas is not None
        ):
            raise ValueError("round_timesteps must be False with timesteps and sigmas, got True")
        check_choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS_TYPES)
        check_schedule(schedule)
        path = path_of(schedule)
        time_of = TimeOf(schedule.sigma / schedule.alpha, torch.arange(len(schedule), device="cpu"))

        if sigmas is not None:
            ratio = level_vector("sigmas", sigmas)
            clean = int(ratio[0] == 0)  # a clean first level has the timestep of the lowest noise
            noisy = sigmas_to_timesteps(schedule, ratio[clean:-1])
            times = torch.cat([noisy.new_zeros(clean), noisy])
            times = times.round().long() if round_timesteps else times
            alpha, sigma = all_on_path(path, ratio)
        else:
            assert timesteps is not None
            times = timestep_vector(timesteps)
            rising = bool(times[-1] > times[0])
            wrong = times[1:] <= times[:-1] if rising else times[1:] >= times[:-1]
            direction = "rise" if rising else "fall"
            refuse_first(f"timesteps must {direction} at every step", times[1:], wrong, 1)
            if rising:
                falling = times.flip(0)
                down = cls.from_schedule(schedule, falling, final_sigmas_type=final_sigmas_type)
                return down.reversed()
            if times.dtype == torch.int64:
                refuse_first(
                    f"timesteps must lie in 0 .. {len(schedule) - 1}",
                    times,
                    (times < 0) | (times >= len(schedule)),
                )
                alpha, sigma = schedule.alpha[times], schedule.sigma[times]
            else:
                alpha, sigma = all_on_path(path, timesteps_to_sigmas(schedule, times))
            to_zero = final_sigmas_type == "zero"
            alpha = torch.cat([alpha, alpha.new_ones(1) if to_zero else schedule.alpha[:1]])
            sigma = torch.cat([sigma, sigma.new_zeros(1) if to_zero else schedule.sigma[:1]])
        largest = float(max(sigma[0], sigma[-1])) if path == "ve" else 1.0
        levels = cls(alpha, sigma, times, path, time_of, init_noise_sigma=largest)
        return levels if sigmas is None else levels._labeled(timesteps)

    def with_timesteps(self, timesteps: Tensor | Sequence[float]) -> NoiseLevels:
        """The same levels with other timestep inputs of the model.

        For a model that is called with other labels than those of its noise levels: a pipeline that
        shifts its sigmas and not its timesteps, or an inversion that gives each step the label of
        its noisier end.

        Args:
            timesteps: ``[N]``, one for each step, float or int, in any order. Where a solver calls
                the model between two levels, the label is interpolated linearly in log(sigma /
                alpha); beyond the first N levels it is that of the nearest of them.

        Returns:
            The levels, with everything else unchanged.

        Raises:
            ValueError: Not one timestep for each step.
        """
        times = timestep_vector(timesteps)
        self._check_count(times)
        ratios = (self.sigma / self.alpha)[:-1]
        if not self.rising:
            ratios, ordered = ratios.flip(0), times.flip(0)
        else:
            ordered = times
        return replace(self, timesteps=times, time_of=TimeOf(ratios, ordered))

    def reversed(self) -> NoiseLevels:
        """The same levels in the opposite order: upward for inversion, or down again.

        Every level keeps its timestep input. A clean level that comes first has that of the lowest
        noise: 0 for ``from_flow`` and sigmas, else the lowest timestep that is known. A last step
        that keeps its level is left out.

        Returns:
            The levels; init_noise_sigma is kept.

        Raises:
            ValueError: The last level has no timestep input (sigma = 0 for ``from_edm``).
        """
        *_, before, last = self.levels()
        end = self.time_of(last.ratio)
        if not math.isfinite(end):
            raise ValueError(
                "sigma must be above 0 at the last level of what is reversed, got 0, where EDM's "
                "timestep input log(sigma) / 4 is infinite; end the sigmas at a small one"
            )
        keeps = before.ratio == last.ratio
        integers = self.timesteps.dtype == torch.int64
        times = torch.tensor(
            [*self.timesteps.tolist(), round(end) if integers else end],
            dtype=self.timesteps.dtype,
            device="cpu",
        )
        count = len(self) + 1 - keeps
        if count < 2:
            raise ValueError("levels must hold two different ones to be reversed, got one")
        return replace(
            self,
            alpha=self.alpha[:count].flip(0),
            sigma=self.sigma[:count].flip(0),
            timesteps=times[1:count].flip(0),
        )

    def sigma_space(self, *, init_noise_sigma: float | None = None) -> NoiseLevels:
        """The same levels for x / alpha: variance exploding, with alpha x as the model input.

        This is the space of diffusers' Euler family and of k-diffusion's wrappers of discrete
        models, which call sigma / alpha "sigma".

        Args:
            init_noise_sigma: By default the largest sigma / alpha; diffusers takes the root of its
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
        largest = float(max(ratio[0], ratio[-1]))
        first = largest if init_noise_sigma is None else init_noise_sigma
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
            The levels; init_noise_sigma is the first sigma that remains, or unchanged where the
            levels rise.

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
            init_noise_sigma=self.init_noise_sigma if self.rising else float(self.sigma[steps]),
        )

    @property
    def rising(self) -> bool:
        """Whether sigma / alpha rises from level to level, as for inversion."""
        return rises(self.alpha, self.sigma)

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
        end = Level(float(self.alpha[-1]), float(self.sigma[-1]), math.nan, 1.0)
        last = self.time_of(end.ratio) if end.sigma > 0 else math.nan
        if self.rising and self.timesteps.dtype == torch.int64 and abs(last - round(last)) < 1e-6:
            last = float(round(last))  # a known timestep, but for the rounding of a logarithm
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
        if self.preconditioned and level.sigma == 0 and prediction_type != "flow_prediction":
            self.check_start(prediction_type)
            # The limit of the quotients below: c_skip is 1 and c_out / sigma is 1 there.
            return 0.0, -1.0 if prediction_type == "epsilon" else 1.0
        if self.preconditioned and level.sigma > 0:
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
            ValueError: The first alpha is 0, or that of the last level where levels rise.
        """
        if self.rising and self.alpha[-1] == 0:
            raise ValueError(
                f"levels must end at alpha > 0 for {name}, got alpha = 0 (pure noise, sigma / "
                "alpha infinite); end at a lower level, or use euler_table, ddim_table, "
                "dpmpp_table or unipc_table"
            )
        if self.alpha[0] == 0:
            raise ValueError(
                f"levels must start at alpha > 0 for {name}, got alpha = 0 (pure noise, sigma / "
                "alpha infinite); start at a lower level, or use euler_table, ddim_table, "
                "dpmpp_table or unipc_table"
            )

    def check_falls(self, name: str, argument: str = "levels") -> None:
        """Refuse levels that rise, for a solver that adds noise.

        Args:
            name: Name of the solver function, with the option that does not rise.
            argument: Name of the levels there.

        Raises:
            ValueError: They rise.
        """
        if self.rising:
            first, *_, last = (level.ratio for level in self.levels())
            raise ValueError(
                f"{argument} must fall for {name}, got levels that rise from sigma / alpha = "
                f"{first:.6g} to {last:.6g}; solvers without noise can rise, such as ddim_table, "
                "heun_table and dpmpp_2m_table"
            )

    def check_start(self, prediction_type: str) -> None:
        """Refuse a prediction that does not determine the noise of a clean sample, if one is first.

        Args:
            prediction_type: What the model predicts.

        Raises:
            ValueError: It predicts x_0, and the first sigma is 0.
        """
        if self.sigma[0] == 0 and prediction_type == "sample":
            raise ValueError(
                "prediction_type must not be 'sample' for levels that start at sigma = 0, got "
                "'sample': a prediction of x_0 does not determine the noise of a clean sample; "
                "start above 0, such as with levels.skip(1)"
            )

    def _labeled(self, timesteps: Tensor | Sequence[float] | None) -> NoiseLevels:
        return self if timesteps is None else self.with_timesteps(timesteps)

    def _check_count(self, timesteps: Tensor) -> None:
        if len(timesteps) != len(self.alpha) - 1:
            raise ValueError(
                f"timesteps must hold one for each of the {len(self.alpha) - 1} steps, got "
                f"{len(timesteps)}"
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
    what = "sigmas must be above 0 before the last, for the timestep input log(sigma) / 4"
    refuse_first(what, sigma, sigma <= 0)
    return sigma.log() / 4
