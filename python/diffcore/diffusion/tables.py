"""The float64 tables of GaussianDiffusion, and their cached copies on devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_int, check_choice, hint
from diffcore._devices import to_device
from diffcore._engine.dtensor import replicated
from diffcore._engine.kept import KeepsByArguments, Traced, constant_in_traces, made_plainly
from diffcore.coefficients import step as step_formulas
from diffcore.coefficients.bound import FIXED, LEARNED, VLB_COLUMNS, vlb_coefficients
from diffcore.coefficients.step import (
    classifier_coefficient,
    posterior_coefficients,
    tensors,
    x0_coefficients,
)
from diffcore.schedules.schedule import NoiseSchedule
from diffcore.schedules.timesteps import TIMESTEP_SPACINGS, respaced_timesteps
from diffcore.solvers import NoiseLevels, SolverTable, ddim_table, ddpm_table
from diffcore.solvers.ancestral import ddim_coefficients, ddpm_coefficients
from diffcore.solvers.table import TO_X0

_CPU = torch.device("cpu")


class DeviceCopies(dict[torch.device, Tensor]):
    """A table on the CPU and its copies: ``copies[device]`` is made when first read.

    A ``dict``, so that reading an existing copy enters no Python function.

    Args:
        table: The table, on the CPU.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self._traced = Traced()
        # Not at its first use: compiled code would be guarded by its absence.
        self[_CPU] = table.clone()

    def __missing__(self, device: torch.device) -> Tensor:
        """Copies the table to a device."""
        if torch.compiler.is_dynamo_compiling():
            copy: Tensor = getattr(self._traced, self._name(device))
            return copy
        copy = made_plainly(lambda: to_device(self.table, device, copy=True))
        return self.setdefault(device, copy)

    @constant_in_traces
    def _name(self, device: torch.device) -> str:
        return self._traced.name(device, lambda: self[device])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the table without its copies, whose devices the reader may not have."""
        return DeviceCopies, (self.table,)


class DiffusionTables(KeepsByArguments):
    """The numbers of one discrete, variance preserving diffusion.

    Contains no formula that reads a sample. All tables are float64 on the CPU, whatever torch's
    default device is. Kernels read copies, made once for each device.

    Args:
        betas: Variances of the Markov steps, float64 ``[T]`` on the CPU.
        prediction_type: One of ``PREDICTION_TYPES``.
        variance_type: One of ``VARIANCE_TYPES``.

    Attributes:
        schedule: alpha and sigma at each timestep.
        last_level: alpha and sigma at the last timestep, as numbers.
        timestep_map: Training timestep of each index of a respaced diffusion, else ``None``.
        alphas_cumprod: ``[T]``, as the tables below: see ``GaussianDiffusion``.
        fixed_variance: Variance of the reverse step, ``None`` where it is learned.
        fixed_log_variance: Its logarithm, finite at t = 0 too.
        log_betas: log beta, the upper end of "learned_range".
        noise: (alpha, sigma), ``[T, 2]``, for ``ops.q_sample``.
        posterior: Coefficients of (x_0, x_t) in the posterior mean, ``[T, 2]``.
        snr: alpha^2 / sigma^2, ``[T]``.
        x0: Coefficients of (x_t, model output) in x_0, ``[T, 2]``.
    """

    def __init__(self, betas: Tensor, prediction_type: str, variance_type: str) -> None:
        super().__init__()
        self.betas = betas
        self.prediction_type = prediction_type
        self.variance_type = variance_type
        self.timestep_map: tuple[int, ...] | None = None
        made_plainly(self._fill)

    def _fill(self) -> None:
        """Computes the tables that need no argument."""
        betas = self.betas
        self.schedule = NoiseSchedule.from_betas(betas)
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        self.last_level = (alpha[-1].item(), sigma[-1].item())
        log_bar = torch.log1p(-betas).cumsum(0)
        self.alphas_cumprod = torch.exp(log_bar)
        self.alphas_cumprod_prev = torch.cat([torch.ones_like(log_bar[:1]), log_bar[:-1].exp()])
        self.sqrt_alphas_cumprod = alpha
        self.sqrt_one_minus_alphas_cumprod = sigma
        self.log_one_minus_alphas_cumprod = torch.log(-torch.expm1(log_bar))

        # x_0 precedes the first timestep.
        alpha_prev = torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]])
        sigma_prev = torch.cat([torch.zeros_like(sigma[:1]), sigma[:-1]])
        posterior = tensors(posterior_coefficients(alpha, sigma, alpha_prev, sigma_prev))
        self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_variance, _ = posterior
        # beta_tilde is 0 at t = 0: its logarithm there is that of t = 1, if T > 1.
        first = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = torch.cat([first, self.posterior_variance[1:]]).log()

        self.log_betas = betas.log()
        self.fixed_variance: Tensor | None = None
        self.fixed_log_variance: Tensor | None = None
        if self.variance_type == "fixed_small":
            self.fixed_variance = self.posterior_variance
            self.fixed_log_variance = self.posterior_log_variance_clipped
        elif self.variance_type == "fixed_large":
            self.fixed_variance = torch.cat([first, betas[1:]])
            self.fixed_log_variance = self.fixed_variance.log()

        self.noise = DeviceCopies(self.schedule.table)
        self.posterior = DeviceCopies(
            torch.stack([self.posterior_mean_coef1, self.posterior_mean_coef2], dim=1)
        )
        self.snr = DeviceCopies(self.schedule.snr)
        x0 = tensors(x0_coefficients(alpha, sigma, self.prediction_type))
        self.x0 = DeviceCopies(torch.stack([c.expand_as(alpha) for c in x0], dim=1))

    def __len__(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    # ---- tables by timestep ------------------------------------------------------------------

    def column(self, name: str) -> DeviceCopies:
        """The table ``[T]`` of this name, for reading on a device."""
        return self._copies("_column", name)

    def _column(self, name: str) -> DeviceCopies:
        return DeviceCopies(getattr(self, name))

    def extract(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Entries ``t`` of a table ``[T]``, in the shape of ``x``.

        Args:
            name: Name of the table.
            t: Timesteps, integer ``[B]``.
            x: Samples ``[B, ...]``.

        Returns:
            float64 for float64 samples, else float32.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Out of range on a device that cannot report it must not read out of bounds either.
        index = t.clamp(0, len(self) - 1)
        values = replicated(self.column(name)[x.device], index)[index].to(dtype)
        return values.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The timestep input of the model: int64, timesteps of the training schedule."""
        if self.timestep_map is None:
            return t.long()
        steps: Tensor = replicated(self._kept("_timesteps")[t.device], t)[t.clamp(0, len(self) - 1)]
        return steps

    def _timesteps(self) -> DeviceCopies:
        return DeviceCopies(self._training_timesteps(None))

    def level_pairs(self) -> list[tuple[float, float]]:
        """(alpha, sigma) at each timestep, as numbers."""
        found: list[tuple[float, float]] = self._kept("_level_pairs")
        return found

    def _level_pairs(self) -> list[tuple[float, float]]:
        return [(alpha, sigma) for alpha, sigma in self.noise.table.tolist()]

    # ---- tables of kernels -------------------------------------------------------------------

    def ddpm(self, clip: float | None) -> DeviceCopies:
        """``reverse_step`` coefficients of the ancestral step from each timestep."""
        return self._copies("_ddpm", clip)

    def _ddpm(self, clip: float | None) -> DeviceCopies:
        return DeviceCopies(self._ddpm_coefficients(clip)[0].flip(0))

    def learned_variance(self, clip: float | None) -> DeviceCopies | None:
        """Coefficients of the variance output in these steps; ``None`` for a fixed variance."""
        return self._kept("_learned_variance", clip) if self.variance_type in LEARNED else None

    def _learned_variance(self, clip: float | None) -> DeviceCopies:
        _, variance = self._ddpm_coefficients(clip)
        assert variance is not None
        return DeviceCopies(variance.flip(0))

    def ddim(self, clip: float | None, eta: float, rederive_epsilon: bool) -> DeviceCopies:
        """``reverse_step`` coefficients of the DDIM step from each timestep."""
        return self._copies("_ddim", clip, eta, rederive_epsilon)

    def _ddim(self, clip: float | None, eta: float, rederive_epsilon: bool) -> DeviceCopies:
        levels, prediction_type = self._levels(None), self.prediction_type
        table = ddim_coefficients(levels, eta, rederive_epsilon, prediction_type, clip)
        return DeviceCopies(table.flip(0))

    def ddim_reverse(
        self, clip: float | None, rederive_epsilon: bool, prediction_type: str
    ) -> DeviceCopies:
        """``reverse_step`` coefficients of the DDIM step up from each timestep.

        The last goes to alpha = 0, as in guided-diffusion.
        """
        return self._copies("_ddim_reverse", clip, rederive_epsilon, prediction_type)

    def _ddim_reverse(
        self, clip: float | None, rederive_epsilon: bool, prediction_type: str
    ) -> DeviceCopies:
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        return DeviceCopies(
            step_formulas.ddim_coefficients(
                alpha,
                sigma,
                torch.cat([alpha[1:], alpha.new_zeros(1)]),
                torch.cat([sigma[1:], sigma.new_ones(1)]),
                prediction_type=prediction_type,
                # The same without a clip, but for the quotient by sigma.
                rederive_epsilon=rederive_epsilon and clip is not None,
                clip_range=clip,
            )
        )

    def p_shift(self) -> DeviceCopies:
        """What a gradient g adds to x_{t-1} of an ancestral step, variance_t g.

        Rows are (1, variance), ``[T, 2]``; with a learned variance they are the logarithm of the
        variance as a linear function of v.
        """
        return self._copies("_p_shift")

    def _p_shift(self) -> DeviceCopies:
        if self.fixed_variance is not None:
            ones = torch.ones_like(self.fixed_variance)
            return DeviceCopies(torch.stack([ones, self.fixed_variance], dim=1))
        small, large = self.posterior_log_variance_clipped, self.log_betas
        if self.variance_type == "learned":
            small, large = -torch.ones_like(small), torch.ones_like(large)
        return DeviceCopies(torch.stack([small + large, large - small], dim=1) / 2)

    def ddim_shift(self, eta: float) -> DeviceCopies:
        """(1, k) with k g what a gradient g adds to x_{t-1} of a DDIM step, ``[T, 2]``.

        x_0 moves by sigma^2 / alpha g and epsilon by -sigma g; nothing where alpha = 0.
        """
        return self._copies("_ddim_shift", eta)

    def _ddim_shift(self, eta: float) -> DeviceCopies:
        # With x_0 as the prediction, c_0 is how far x_{t-1} follows x_0 at the same x_t.
        c_0 = ddim_coefficients(self._levels(None), eta, True, "sample", None).flip(0)[:, 2]
        of_x0 = self.x0_shift().table
        return DeviceCopies(torch.stack([of_x0[:, 0], c_0 * of_x0[:, 1]], dim=1))

    def x0_shift(self) -> DeviceCopies:
        """(1, sigma^2 / alpha): what a gradient adds to x_0, ``[T, 2]``; 0 where alpha = 0."""
        return self._copies("_x0_shift")

    def _x0_shift(self) -> DeviceCopies:
        k = classifier_coefficient(self.schedule.alpha, self.schedule.sigma, "sample")
        assert isinstance(k, Tensor)
        return DeviceCopies(torch.stack([torch.ones_like(k), k], dim=1))

    def clipped_x0(self, clip: float | None) -> DeviceCopies:
        """``reverse_step`` coefficients whose result is the clipped x_0."""
        return self._copies("_clipped_x0", clip)

    def _clipped_x0(self, clip: float | None) -> DeviceCopies:
        table = self._ddpm_coefficients(clip)[0].flip(0)
        for column, value in enumerate(TO_X0):
            table[:, column] = value
        return DeviceCopies(table)

    def vlb(self, clip: float | None, decoder: str, given: str) -> DeviceCopies:
        """Coefficients of ``ops.vlb_term``, which reads ``given``: "x_t" or "noise"."""
        return self._copies("_vlb", clip, decoder, given)

    def _vlb(self, clip: float | None, decoder: str, given: str) -> DeviceCopies:
        return DeviceCopies(
            vlb_coefficients(
                self.schedule.alpha,
                self.schedule.sigma,
                prediction_type=self.prediction_type,
                variance_type=self.variance_type,
                clip_range=clip,
                decoder=decoder,
                given=given,
            )
        )

    def x0_error(self, clip: float | None) -> DeviceCopies:
        """``ops.vlb_term`` coefficients whose result is the squared error of the predicted x_0."""
        return self._copies("_x0_error", clip)

    def _x0_error(self, clip: float | None) -> DeviceCopies:
        table = self.vlb(clip, "gaussian", "noise").table[:, :FIXED].clone()
        for name, value in (("decoder", 0), ("factor", 1), ("offset", 0), ("d_0", 0)):
            table[:, VLB_COLUMNS.index(name)] = value
        return DeviceCopies(table)

    # ---- solvers -----------------------------------------------------------------------------

    @constant_in_traces
    def rows(self, num_steps: int | None, timestep_spacing: str) -> tuple[int, ...] | None:
        """The timesteps of a respaced loop, increasing; ``None`` for all T."""
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        if num_steps is None:
            return None
        return tuple(respaced_timesteps(len(self), num_steps, timestep_spacing)[::-1])

    def spaced(self, rows: tuple[int, ...] | None) -> DiffusionTables:
        """The tables of the process observed at these timesteps only."""
        found: DiffusionTables = self if rows is None else self._kept("_spaced", rows)
        return found

    def _spaced(self, rows: tuple[int, ...]) -> DiffusionTables:
        betas = self.respaced(rows, "leading")[1]
        return DiffusionTables(betas, self.prediction_type, self.variance_type)

    def ddpm_solver(self, rows: tuple[int, ...] | None, clip: float | None) -> SolverTable:
        """The solver of ancestral sampling over these timesteps."""
        return self._solver("_ddpm_solver", rows, clip)

    def _ddpm_solver(self, rows: tuple[int, ...] | None, clip: float | None) -> SolverTable:
        return ddpm_table(
            self._levels(rows),
            variance_type=self.variance_type,
            prediction_type=self.prediction_type,
            clip_range=clip,
        )

    def ddim_solver(
        self, rows: tuple[int, ...] | None, clip: float | None, eta: float, rederive_epsilon: bool
    ) -> SolverTable:
        """The solver of DDIM sampling over these timesteps."""
        return self._solver("_ddim_solver", rows, clip, eta, rederive_epsilon)

    def _ddim_solver(
        self, rows: tuple[int, ...] | None, clip: float | None, eta: float, rederive_epsilon: bool
    ) -> SolverTable:
        return ddim_table(
            self._levels(rows),
            eta=eta,
            rederive_epsilon=rederive_epsilon,
            prediction_type=self.prediction_type,
            clip_range=clip,
        )

    def ddim_reverse_solver(
        self, rows: tuple[int, ...] | None, clip: float | None, rederive_epsilon: bool
    ) -> SolverTable:
        """The DDIM solver from a clean sample up to the last of these timesteps."""
        return self._solver("_ddim_reverse_solver", rows, clip, rederive_epsilon)

    def _ddim_reverse_solver(
        self, rows: tuple[int, ...] | None, clip: float | None, rederive_epsilon: bool
    ) -> SolverTable:
        return ddim_table(
            self._levels(rows).reversed(),
            rederive_epsilon=rederive_epsilon,
            prediction_type=self.prediction_type,
            clip_range=clip,
        )

    def respaced(
        self, timesteps: int | Sequence[int], timestep_spacing: str
    ) -> tuple[tuple[int, ...], Tensor]:
        """Chosen timesteps, increasing, and the betas of the process observed at them only.

        Args:
            timesteps: How many, or which.
            timestep_spacing: One of ``TIMESTEP_SPACINGS``.

        Returns:
            Timesteps of the training schedule, and betas.

        Raises:
            TypeError: Timesteps that are not integers.
            ValueError: None, or one out of range.
        """
        given: Any = timesteps
        if hasattr(given, "__index__") and not getattr(given, "ndim", False):
            count = as_int("timesteps", given)
            if not 1 <= count <= len(self):
                raise ValueError(f"timesteps must be 1 to {len(self)} of them, got {count}")
            rows = self.rows(count, timestep_spacing)
        else:
            try:
                rows = tuple(sorted({as_int("timesteps", t) for t in given}))
            except (TypeError, RuntimeError):  # torch's, of a tensor that cannot be iterated
                fix = "p_sample_loop(num_steps=...) and ddim_sample_loop(num_steps=...) respace too"
                openai = hint(fix if isinstance(timesteps, str) else "")
                came = "Tensor" if isinstance(timesteps, Tensor) else repr(timesteps)
                raise TypeError(f"timesteps must be integers, got {came}{openai}") from None
        if not rows or not 0 <= rows[0] <= rows[-1] < len(self):
            raise ValueError(f"timesteps must be in 0 .. {len(self) - 1}, got {timesteps}")
        log_bar = torch.log1p(-self.betas).cumsum(0)[list(rows)]
        previous = torch.cat([torch.zeros_like(log_bar[:1]), log_bar[:-1]])
        known = self.timestep_map
        kept = tuple(known[t] if known else t for t in rows)
        return kept, -torch.expm1(log_bar - previous)

    # ---- private -----------------------------------------------------------------------------

    def _copies(self, make: str, *args: Any) -> DeviceCopies:
        found: DeviceCopies = self._kept(make, *args)
        return found

    def _solver(self, make: str, *args: Any) -> SolverTable:
        found: SolverTable = self._kept(make, *args)
        return found

    def _ddpm_coefficients(self, clip: float | None) -> tuple[Tensor, Tensor | None]:
        levels = self._levels(None)
        return ddpm_coefficients(levels, self.variance_type, self.prediction_type, clip)

    def _levels(self, rows: tuple[int, ...] | None) -> NoiseLevels:
        """Noise levels from the last of these timesteps down; the model gets training timesteps."""
        falling = list(range(len(self)) if rows is None else rows)[::-1]
        levels = NoiseLevels.from_schedule(self.schedule, falling)
        return replace(levels, timesteps=self._training_timesteps(rows).flip(0))

    def _training_timesteps(self, rows: tuple[int, ...] | None) -> Tensor:
        chosen = range(len(self)) if rows is None else rows
        known = self.timestep_map
        steps = [known[t] if known else t for t in chosen]
        return torch.tensor(steps, dtype=torch.int64, device="cpu")
