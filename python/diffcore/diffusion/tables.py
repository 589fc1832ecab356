"""What GaussianDiffusion stands on: its float64 tables, their copies on devices, and its checks."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from diffcore._checks import check_choice
from diffcore._types import Coef, Model
from diffcore.coefficients.bound import LEARNED, VARIANCE_TYPES, vlb_coefficients
from diffcore.coefficients.step import PREDICTION_TYPES, parse_clip_range, posterior_coefficients
from diffcore.sampling.model import call_model
from diffcore.schedules.betas import check_betas
from diffcore.schedules.schedule import NoiseSchedule
from diffcore.schedules.timesteps import TIMESTEP_SPACINGS, respaced_timesteps
from diffcore.solvers import NoiseLevels, SolverTable, ddim_table, ddpm_table
from diffcore.solvers.table import TO_X0

# Copies kept: a few samplers on a few devices, not every combination ever asked for.
_MAX_TABLES = 64

LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")

Kept = TypeVar("Kept")


class DiffusionTables:
    """The numbers of one discrete, variance preserving diffusion; no formula that sees a sample.

    Args:
        betas: See ``GaussianDiffusion``, as for all the others.
        prediction_type: One of ``PREDICTION_TYPES``.
        variance_type: One of ``VARIANCE_TYPES``.
        clip_sample: Whether x_0 is clipped while sampling.
        clip_sample_range: To plus or minus this.
        loss_type: One of ``LOSS_TYPES``.
    """

    def __init__(
        self,
        betas: Tensor,
        prediction_type: str,
        variance_type: str,
        clip_sample: bool,
        clip_sample_range: float,
        loss_type: str,
    ) -> None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        check_choice("loss_type", loss_type, LOSS_TYPES)
        if not isinstance(clip_sample_range, (int, float)):
            raise TypeError(f"clip_sample_range must be a number, got {clip_sample_range!r}")
        parse_clip_range(clip_sample_range)
        self.betas = check_betas(betas)
        self.num_timesteps = len(self.betas)
        self.prediction_type = prediction_type
        self.variance_type = variance_type
        self.clip_sample = bool(clip_sample)
        self.clip_sample_range = float(clip_sample_range)
        self.loss_type = loss_type
        if prediction_type == "epsilon" and self.betas[-1] == 1:
            raise ValueError(
                "betas end at 1 (zero terminal SNR): the last x_t holds no x_0, so a prediction of "
                "epsilon cannot give one; use prediction_type='v_prediction' or 'sample'"
            )

        self.schedule = NoiseSchedule.from_betas(self.betas)
        log_bar = torch.log1p(-self.betas).cumsum(0)
        self.alphas_cumprod = torch.exp(log_bar)
        self.alphas_cumprod_prev = torch.cat([torch.ones_like(log_bar[:1]), log_bar[:-1].exp()])
        self.sqrt_alphas_cumprod = self.schedule.alpha
        self.sqrt_one_minus_alphas_cumprod = self.schedule.sigma
        self.log_one_minus_alphas_cumprod = torch.log(-torch.expm1(log_bar))

        self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_variance, _ = (
            torch.as_tensor(c) for c in posterior_coefficients(*self._times(None))
        )
        # beta_tilde is 0 at the first step: its logarithm copies the next one's, if there is one.
        first = self.posterior_variance[1:2] if self.num_timesteps > 1 else self.betas
        self.posterior_log_variance_clipped = torch.cat([first, self.posterior_variance[1:]]).log()
        if variance_type == "fixed_small":
            self._variance = self.posterior_variance
            self._log_variance = self.posterior_log_variance_clipped
        elif variance_type == "fixed_large":
            self._variance = torch.cat([first, self.betas[1:]])
            self._log_variance = self._variance.log()
        else:
            self._log_betas = self.betas.log()  # of t = 0 too, where the model is asked as well

        # The training timestep of each index, where this is a respaced view of another diffusion.
        self._timestep_map: tuple[int, ...] | None = None
        self._tables: dict[tuple[Any, ...], Tensor] = {}
        self._solvers: dict[tuple[Any, ...], SolverTable] = {}

    def _times(self, rows: tuple[int, ...] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(alpha, sigma) at rising timesteps and at the one before each; x_0 precedes the first."""
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        if rows is not None:
            alpha, sigma = alpha[list(rows)], sigma[list(rows)]
        alpha_prev = torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]])
        sigma_prev = torch.cat([torch.zeros_like(sigma[:1]), sigma[:-1]])
        return alpha, sigma, alpha_prev, sigma_prev

    def _table(
        self, key: tuple[Any, ...], build: Callable[[], Coef], device: torch.device
    ) -> Tensor:
        """A float64 table on a device: built and moved at the first call, found at every other."""
        return self._kept(
            self._tables, (*key, device), lambda: torch.as_tensor(build()).to(device, copy=True)
        )

    def _kept(
        self, known: dict[tuple[Any, ...], Kept], key: tuple[Any, ...], build: Callable[[], Kept]
    ) -> Kept:
        found = known.get(key)
        if found is None:
            if len(known) >= _MAX_TABLES:
                known.clear()
            # A table made under inference_mode could not serve a training step later.
            with torch.inference_mode(False):
                found = known[key] = build()
        return found

    def _named_table(self, name: str, device: torch.device) -> Tensor:
        return self._table((name,), lambda: getattr(self, name), device)

    def _noise_table(self, device: torch.device) -> Tensor:
        return self._table(("noise",), lambda: self.schedule.table, device)

    def _posterior_table(self, device: torch.device) -> Tensor:
        coefficients = [self.posterior_mean_coef1, self.posterior_mean_coef2]
        return self._table(("posterior",), lambda: torch.stack(coefficients, dim=1), device)

    def _x0_table(self, clip: float | None, device: torch.device) -> Tensor:
        """Coefficients of a ``reverse_step`` that stops at the clipped x_0."""

        def build() -> Tensor:
            table = self._ddpm(None, clip).coefficients.flip(0)
            table[:, :4] = torch.tensor(TO_X0)
            return table

        return self._table(("x0", clip), build, device)

    def _vlb_table(
        self, clip: float | None, decoder: str, given: str, device: torch.device
    ) -> Tensor:
        """The table of ``ops.vlb_term``."""

        def build() -> Tensor:
            return vlb_coefficients(
                self.schedule.alpha,
                self.schedule.sigma,
                prediction_type=self.prediction_type,
                variance_type=self.variance_type,
                clip_range=clip,
                decoder=decoder,
                given=given,
            )

        return self._table(("vlb", clip, decoder, given), build, device)

    def _ddpm(self, rows: tuple[int, ...] | None, clip: float | None) -> SolverTable:
        def build() -> SolverTable:
            return ddpm_table(
                self._levels(rows),
                variance_type=self.variance_type,
                prediction_type=self.prediction_type,
                clip_range=clip,
            )

        return self._kept(self._solvers, ("ddpm", rows, clip), build)

    def _ddim(
        self, rows: tuple[int, ...] | None, clip: float | None, eta: float, rederive_epsilon: bool
    ) -> SolverTable:
        def build() -> SolverTable:
            return ddim_table(
                self._levels(rows),
                eta=eta,
                rederive_epsilon=rederive_epsilon,
                prediction_type=self.prediction_type,
                clip_range=clip,
            )

        return self._kept(self._solvers, ("ddim", rows, clip, eta, rederive_epsilon), build)

    def _levels(self, rows: tuple[int, ...] | None) -> NoiseLevels:
        """The walk down all timesteps, or some; the model is told those of the training."""
        falling = list(range(self.num_timesteps) if rows is None else rows)[::-1]
        levels = NoiseLevels.from_schedule(self.schedule, falling)
        told = self._model_timesteps(rows, torch.device("cpu")).flip(0)
        return replace(levels, timesteps=told)

    def _ddpm_table(self, clip: float | None, device: torch.device) -> Tensor:
        """The rows of the walk down all timesteps, in the order of these."""
        return self._table(
            ("ddpm", clip), lambda: self._ddpm(None, clip).coefficients.flip(0), device
        )

    def _variance_table(self, clip: float | None, device: torch.device) -> Tensor | None:
        """s_0 and s_v of the same rows, where the model says its variance."""
        learned = self._ddpm(None, clip).variance
        if learned is None:
            return None
        return self._table(("ddpm", "variance"), lambda: learned.flip(0), device)

    def _ddim_table(
        self, clip: float | None, eta: float, rederive_epsilon: bool, device: torch.device
    ) -> Tensor:
        return self._table(
            ("ddim", clip, eta, rederive_epsilon),
            lambda: self._ddim(None, clip, eta, rederive_epsilon).coefficients.flip(0),
            device,
        )

    def _rows(self, num_steps: int | None, timestep_spacing: str) -> tuple[int, ...] | None:
        """The rising timesteps of a respaced loop; ``None`` for all of them."""
        check_choice("timestep_spacing", timestep_spacing, TIMESTEP_SPACINGS)
        if num_steps is None:
            return None
        return tuple(respaced_timesteps(self.num_timesteps, num_steps, timestep_spacing)[::-1])

    def _respaced(
        self, timesteps: int | Sequence[int], timestep_spacing: str
    ) -> tuple[tuple[int, ...], Tensor]:
        """The chosen timesteps, rising, and the betas of the process seen at them only."""
        if isinstance(timesteps, int):
            rows = self._rows(timesteps, timestep_spacing)
        else:
            try:
                rows = tuple(sorted({operator.index(t) for t in timesteps}))
            except TypeError as error:
                raise TypeError(f"timesteps must be integers, got {timesteps!r}") from error
        if not rows or not 0 <= rows[0] <= rows[-1] < self.num_timesteps:
            last = self.num_timesteps - 1
            raise ValueError(f"timesteps must lie in 0 .. {last}, got {timesteps}")
        log_bar = torch.log1p(-self.betas).cumsum(0)[list(rows)]
        previous = torch.cat([torch.zeros_like(log_bar[:1]), log_bar[:-1]])
        return rows, -torch.expm1(log_bar - previous)

    def _told(self, t: Tensor) -> Tensor:
        """The timesteps that the model is told."""
        if self._timestep_map is None:
            return t.long()
        return self._model_timesteps(None, t.device)[t.clamp(0, self.num_timesteps - 1)]

    def _model_timesteps(self, rows: tuple[int, ...] | None, device: torch.device) -> Tensor:
        """What the model is told at each row: int64, timesteps of the training schedule."""

        def build() -> Tensor:
            chosen = range(self.num_timesteps) if rows is None else rows
            known = self._timestep_map
            return torch.tensor([known[t] if known else t for t in chosen], dtype=torch.int64)

        return self._table(("timesteps", rows), build, device)

    def _weights(self, weights: Tensor, device: torch.device) -> Tensor:
        if not isinstance(weights, Tensor) or weights.shape != self.betas.shape:
            came = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"weights must have shape [{self.num_timesteps}], got {came}")
        return weights.to(device=device, dtype=torch.float64)

    def _predict(
        self, model: Model, x: Tensor, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> tuple[Tensor, Tensor | None]:
        """The model's prediction at t and, where the variance is learned, what it says of that."""
        learned = self.variance_type in LEARNED
        output = call_model(model, x, self._told(t), model_kwargs, learned=learned)
        if not learned:
            return output, None
        prediction, variance = output.chunk(2, dim=1)
        return prediction, variance

    def _clip(self, clip_denoised: bool | None) -> float | None:
        clip = self.clip_sample if clip_denoised is None else clip_denoised
        return self.clip_sample_range if clip else None

    def _check_t(self, t: Tensor | int, x: Tensor, name: str = "x_start") -> Tensor:
        """Timesteps as an integer ``[B]`` tensor beside ``x``, or an error that says why not."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            what = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"{name} must be a tensor of floating point numbers [B, ...], got {what}"
            )
        batch, last = x.shape[0], self.num_timesteps - 1
        if isinstance(t, int) and not isinstance(t, bool):
            if not 0 <= t <= last:
                raise ValueError(f"t must lie in 0 .. {last}, got {t}")
            return torch.full((batch,), t, dtype=torch.int64, device=x.device)
        if not isinstance(t, Tensor) or t.dtype not in (torch.int64, torch.int32):
            what = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"t must be an int or an int64 or int32 tensor, got {what}")
        if t.shape != (batch,) or t.device != x.device:
            raise ValueError(
                f"t must have shape [{batch}] on {x.device}, as {name}, "
                f"got {list(t.shape)} on {t.device}"
            )
        # Looking at values would stop a CUDA stream and break a compiled graph.
        if t.device.type == "cpu" and batch and not torch.compiler.is_compiling():
            low, high = int(t.min()), int(t.max())
            if low < 0 or high > last:
                raise ValueError(f"t must lie in 0 .. {last}, got values from {low} to {high}")
        return t

    def _variances(self, said: Tensor | None, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and log-variance of the reverse step, by what the model said of it, if it did.

        In the shape of ``x``, float64 beside float64, else float32.
        """
        if said is None:
            return self._extract("_variance", t, x), self._extract("_log_variance", t, x)
        log_variance = said if said.dtype == torch.float64 else said.float()
        if self.variance_type == "learned_range":
            small = self._extract("posterior_log_variance_clipped", t, x)
            large = self._extract("_log_betas", t, x)
            log_variance = small + 0.5 * (log_variance + 1) * (large - small)
        return log_variance.exp(), log_variance

    def _extract(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """Entries ``t`` of a table in the shape of ``x``, float64 beside float64, else float32."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        # Clamped, for a device that cannot say "out of range" must not read there either.
        index = t.clamp(0, self.num_timesteps - 1)
        values = self._named_table(name, x.device)[index].to(dtype)
        return values.reshape(-1, *[1] * (x.dim() - 1)).expand(x.shape)
