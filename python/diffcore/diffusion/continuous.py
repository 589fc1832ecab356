"""The variance preserving diffusion in continuous time, t in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from diffcore import ops, timesteps
from diffcore._checks import as_int, check_choice
from diffcore._devices import beside, in_float64
from diffcore._engine.kept import made_plainly
from diffcore._types import ClipRange, Coef, Model
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.diffusion.checks import (
    check_mask,
    check_perturbation,
    check_reduction,
    compiling,
    warn_of_images,
)
from diffcore.diffusion.training_levels import (
    as_model_input,
    levels_beside,
    noise_and_levels,
    noised,
    of_level,
    perturbed,
    weights_beside,
)
from diffcore.guidance import Guidance
from diffcore.noise import Noise, PhiloxNoise, StepNoise
from diffcore.sampling.from_noise import KeepsSolvers, sample_from_noise
from diffcore.sampling.model import call_model, check_model_kwargs
from diffcore.schedules.logsnr import LOGSNR_SCHEDULES
from diffcore.solvers import NoiseLevels, SolverTable, ddim_table
from diffcore.solvers.levels import FINAL_SIGMAS_TYPES

OfTime: TypeAlias = Callable[[Tensor], Tensor]

TIMESTEP_INPUTS = ("t", "logsnr")

# The least normal float32: 1 / alpha is finite from there on.
_SMALLEST = torch.finfo(torch.float32).tiny
# How finely a schedule is checked to fall, and searched for the time of a noise level.
_GRID = 1025


class ContinuousTimeGaussianDiffusion(KeepsSolvers):
    """Variance preserving diffusion with times t in [0, 1], as ``GaussianDiffusion`` in T steps.

    x_t = alpha x_0 + sigma noise with alpha^2 = sigmoid(logsnr(t)), sigma^2 = sigmoid(-logsnr(t)).
    A model is called as ``model(x_t, input, **model_kwargs)`` with its timestep input ``[B]``,
    float32, or float64 beside float64 samples. It returns a tensor of the shape of ``x_t``.

    ``likelihood.vdm_bound`` has the bound of such a model in bits per dimension, with
    gamma(t) = -logsnr(t).

    Args:
        logsnr: The schedule: "cosine", "linear" or "beta_linear" (``schedules.LOGSNR_SCHEDULES``),
            or a falling function of float64 times.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        timestep_input: What the model gets: "t", "logsnr", or a function of t, such as
            ``lambda t: 1000 * t`` for a network that was made for 1000 timesteps.

    Attributes:
        prediction_type: As given.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Unknown strings, a schedule that does not fall, or epsilon prediction with
            (almost) no signal at t = 1.

    Source:
        Kingma et al. 2021 (arXiv 2107.00630); Song et al. 2021 (arXiv 2011.13456); the name is
        lucidrains'.
    """

    _images_checked = False  # whether a call of training_losses has read the range of its data

    def __init__(
        self,
        logsnr: str | OfTime = "cosine",
        prediction_type: str = "epsilon",
        *,
        timestep_input: str | OfTime = "t",
    ) -> None:
        super().__init__()
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if not callable(logsnr):
            check_choice("logsnr", logsnr, tuple(LOGSNR_SCHEDULES))
            logsnr = LOGSNR_SCHEDULES[logsnr]
        if not callable(timestep_input):
            check_choice("timestep_input", timestep_input, TIMESTEP_INPUTS)
        self._function, self._input_of = logsnr, timestep_input
        self.prediction_type = prediction_type
        made_plainly(self._check)

    def _check(self) -> None:
        """Refuses a schedule that does not fall, or that leaves no signal to predict epsilon."""
        found = self.logsnr(torch.linspace(0, 1, _GRID, dtype=torch.float64, device="cpu"))
        wrong = ~(found[1:] < found[:-1])
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            before, after = found[at : at + 2].tolist()
            raise ValueError(
                f"logsnr must fall from t = 0 to t = 1, got {before:.6g} at t = "
                f"{at / (_GRID - 1):.6g} and {after:.6g} after it; gamma = -logsnr rises"
            )
        last = math.exp(min(float(found[-1]), 0.0) / 2)
        if self.prediction_type == "epsilon" and last < _SMALLEST:
            raise ValueError(
                "logsnr must leave some signal at t = 1 with prediction_type='epsilon', got alpha "
                f"= {last:.3g} (zero terminal SNR in float32); use prediction_type='v_prediction' "
                "or 'sample'"
            )

    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at times t.

        Args:
            t: Times in [0, 1], of any shape.

        Returns:
            float64, the shape of ``t``; float32 where its device has no float64.
        """
        return beside(self._wide_logsnr(t), t)

    def _wide_logsnr(self, t: Tensor) -> Tensor:
        t = in_float64(t)
        found = self._function(t)
        if not isinstance(found, Tensor) or found.shape != t.shape:
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise TypeError(f"logsnr must return a tensor of shape {tuple(t.shape)}, got {came}")
        return in_float64(found)

    def _level(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log-SNR, alpha and sigma at times t, on their device."""
        wide = self._wide_logsnr(t)
        alpha, sigma = _alpha_sigma(wide)
        return beside(wide, t), beside(alpha, t), beside(sigma, t)

    # ---- forward process -----------------------------------------------------------------------

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor | float,
        noise: Noise | None = None,
        *,
        group_dim: int | None = None,
    ) -> Tensor:
        """A sample of q(x_t | x_0): alpha x_0 + sigma noise.

        Args:
            x_start: x_0, ``[B, ...]``.
            t: Times in [0, 1], ``[B]``, or one number.
            noise: Standard normal, like ``x_start``, or a noise key; ``None`` for a key seeded by
                torch's generator.
            group_dim: A dimension of the samples whose entries have a time each, such as 2 for the
                frames of ``[B, C, F, H, W]``: t may then be ``[B, G]``.

        Returns:
            x_t, like ``x_start``.
        """
        times = levels_beside("t", t, x_start, "x_start", 0.0, 1.0, group_dim)
        return noised(x_start, noise, *self._level(times)[1:], group_dim)

    def sample_timesteps(
        self,
        batch: int,
        noise: PhiloxNoise | None = None,
        *,
        stratified: bool = False,
        groups: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A time for each sample of a training step, uniform in (0, 1).

        A function of the key, independent of its noise: see ``timesteps.draw``.

        Args:
            batch: B.
            noise: A noise key; ``None`` for one seeded by torch's generator.
            stratified: As for ``timesteps.draw``.
            groups: G, for a time of each group.
            dtype: Of the result.
            device: ``None`` for that of the key's tensors, else torch's default.

        Returns:
            ``[B]``.
        """
        return timesteps.draw(
            "uniform",
            batch,
            noise,
            stratified=stratified,
            groups=groups,
            dtype=dtype,
            device=device,
        )

    # ---- training ------------------------------------------------------------------------------

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor | float | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Noise | None = None,
        *,
        weights: Tensor | Callable[..., Tensor] | None = None,
        group_dim: int | None = None,
        reduction: str = "sample",
        mask: Tensor | None = None,
        mask_reduction: str = "mask",
        loss: str = "mse",
        delta: Coef | Callable[[Tensor], Tensor] | None = None,
        input_perturbation: float = 0.0,
    ) -> dict[str, Tensor]:
        """The squared error of the prediction for each sample, w mean (m - target)^2.

        Args:
            model: ``model(x_t, input, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``; images in [-1, 1]. The first call warns of CPU images in
                [0, 1] or [0, 255].
            t: Times in [0, 1], ``[B]``, or one number; ``None`` for ``sample_timesteps`` of the key
                ``noise``, or of one seeded by torch's generator.
            model_kwargs: More arguments for the model.
            noise: Standard normal, like ``x_start``, or a noise key; ``None`` for a key seeded by
                torch's generator. The noise of a key is generated twice and never stored. One key
                gives a training step its times and its noise.
            weights: w, ``[B]``, or a function ``weights(snr, prediction_type=)``, such as
                ``losses.min_snr_weights``; it gets snr ``[B]``, float64, and the diffusion's
                ``prediction_type``. 1 if ``None``.
            group_dim: A dimension of the samples whose entries have a time each, such as 2 for the
                frames of ``[B, C, F, H, W]``: t is then ``[B, G]``, also for the
                model, and must be given.
            reduction: "sample", or, with ``group_dim``, "group" for the loss of each group.
            mask: What of each sample counts, as in ``ops.denoising_loss``.
            mask_reduction: "mask" or "all", as in ``ops.denoising_loss``.
            loss: Of an error, "mse", "pseudo_huber" or "smooth_l1", see ``ops.denoising_loss``.
            delta: Error at which that loss becomes linear: a number, ``[B]``, with groups ``[B,
                G]``, or a function of t, float64.
            input_perturbation: gamma: the model's input has the noise z + gamma z' with a second
                normal z' (``noise.perturbation_key``), its target z alone. At least 0; needs the
                noise of a key.

        Returns:
            ``loss`` and ``mse``, the same, ``[B]``, or ``[B, G]`` by group.

        Raises:
            TypeError: An argument, or the model's output, of the wrong type.
            ValueError: An argument, or the model's output, of the wrong shape or value.
        """
        check_model_kwargs(model_kwargs)
        noise, t = noise_and_levels(noise, t, x_start, "x_start", self.sample_timesteps, group_dim)
        times = levels_beside("t", t, x_start, "x_start", 0.0, 1.0, group_dim)
        check_reduction(reduction, group_dim)
        check_mask(mask, mask_reduction, x_start)
        if not compiling() and not self._images_checked:
            self._images_checked = warn_of_images("x_start", x_start)
        if input_perturbation:
            input_perturbation = check_perturbation(input_perturbation, noise)
        logsnr, alpha, sigma = self._level(times)
        x_t = noised(x_start, noise, alpha, sigma, group_dim)
        if input_perturbation:
            x_t = perturbed(x_t, noise, input_perturbation, sigma, group_dim)
        given = as_model_input(self._inputs(times, logsnr), x_start)
        output = call_model(model, x_t, given, model_kwargs)
        if callable(weights):
            weights = weights(logsnr.exp(), prediction_type=self.prediction_type)
        mixed = self.prediction_type == "v_prediction"
        mse = ops.denoising_loss(
            output,
            x_start,
            noise,
            prediction_type=self.prediction_type,
            alpha=alpha if mixed else None,
            sigma=sigma if mixed else None,
            weight=weights_beside(weights, x_start, group_dim),
            group_dim=group_dim,
            reduction=reduction,
            mask=mask,
            mask_reduction=mask_reduction,
            loss=loss,
            delta=of_level("delta", delta, times),
        )
        return {"loss": mse, "mse": mse}

    def _inputs(self, t: Tensor, logsnr: Tensor) -> Tensor:
        """The timestep inputs of the model at these times."""
        if callable(self._input_of):
            return self._input_of(t)
        return t if self._input_of == "t" else logsnr

    # ---- sampling ------------------------------------------------------------------------------

    def levels(self, num_steps: int, *, final_sigmas_type: str = "zero") -> NoiseLevels:
        """The noise levels at t = 1, 1 - 1/N, ..., 1/N, and the last one.

        Args:
            num_steps: N.
            final_sigmas_type: The last level is the clean sample ("zero") or that of t = 0
                ("sigma_min").

        Returns:
            N + 1 levels for any solver.

        Raises:
            ValueError: ``num_steps`` below 1, or an unknown ``final_sigmas_type``.
        """
        count = as_int("num_steps", num_steps, 1)
        check_choice("final_sigmas_type", final_sigmas_type, FINAL_SIGMAS_TYPES)
        return made_plainly(lambda: self._levels(count, final_sigmas_type))

    def _levels(self, num_steps: int, final_sigmas_type: str) -> NoiseLevels:
        i = torch.arange(num_steps, -1, -1, dtype=torch.float64, device="cpu")
        t = i / num_steps
        logsnr = self.logsnr(t)
        inputs = self._inputs(t[:-1], logsnr[:-1])
        if final_sigmas_type == "zero":
            logsnr[-1] = math.inf
        alpha, sigma = _alpha_sigma(logsnr)
        return NoiseLevels(alpha, sigma, inputs, "vp", _InputOf(self))

    def time_of(self, logsnr: float) -> float:
        """The time at which the schedule has a given log-SNR: the inverse of ``logsnr``.

        Args:
            logsnr: A number; beyond the schedule's the time is 0 or 1.

        Returns:
            t in [0, 1], to the precision of float64.
        """
        low, high = 0.0, 1.0
        while True:
            grid = torch.linspace(low, high, _GRID, dtype=torch.float64, device="cpu")
            after = int((self.logsnr(grid) > logsnr).sum())
            if after in (0, _GRID):
                return low if after == 0 else high
            before, here = grid[after - 1].item(), grid[after].item()
            if (before, here) == (low, high) or here - before <= math.ulp(here):
                return here
            low, high = before, here

    def sample(
        self,
        model: Model,
        shape: Sequence[int] | Tensor,
        num_steps: int,
        noise: Noise | None = None,
        *,
        solver: Callable[..., SolverTable] = ddim_table,
        clip_range: ClipRange = None,
        guidance_scale: float | Tensor | None = None,
        guidance: Guidance | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        step_noise: StepNoise | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """Samples, from t = 1 to the clean sample.

        ``diffcore.sample`` with ``solver(levels(num_steps))``.

        Args:
            model: ``model(x_t, input, **model_kwargs)``.
            shape: Shape of the samples, ``[B, ...]``; or, instead of ``noise``, the noise itself.
            num_steps: N.
            noise: x_1, standard normal of the given shape, or a noise key for it; ``None`` for a
                key seeded by torch's generator.
            solver: A function of ``solvers`` from noise levels to a table, such as
                ``solvers.ddpm_table`` or ``solvers.dpmpp_2m_table``. It gets the diffusion's
                ``prediction_type``.
            clip_range: Bounds of the predicted x_0, or ``None``.
            guidance_scale: As for ``diffcore.sample``.
            guidance: As for ``diffcore.sample``.
            model_kwargs: More arguments for the model.
            uncond_kwargs: As for ``diffcore.sample``.
            step_noise: The noise of the steps, as ``noise`` of ``diffcore.sample``; ``None`` for
                the key of the first sample.
            device: Where to sample; ``None`` for that of a ``noise`` tensor, else of the model's
                parameters, else of the tensors in a key.
            dtype: Of the samples; ``None`` for that of ``noise``, else torch's default.
            generator: Source of seeds; ``None`` for torch's own.
            options: More arguments of ``diffcore.sample``, such as ``mask``, ``callback`` and
                ``progress``.

        Returns:
            x_0, of the given shape; with ``return_trajectory`` a ``Trajectory``.
        """
        return sample_from_noise(
            model,
            shape,
            self._solver(solver, num_steps, clip_range),
            noise=noise,
            step_noise=step_noise,
            device=device,
            dtype=dtype,
            generator=generator,
            guidance_scale=guidance_scale,
            guidance=guidance,
            uncond_kwargs=uncond_kwargs,
            model_kwargs=model_kwargs,
            **options,
        )

    def _table(
        self, solver: Callable[..., SolverTable], num_steps: int, clip_range: ClipRange
    ) -> SolverTable:
        levels = self.levels(num_steps)
        return solver(levels, prediction_type=self.prediction_type, clip_range=clip_range)


@dataclass(frozen=True)
class _InputOf:
    """The timestep input of the model at a value of sigma / alpha."""

    diffusion: ContinuousTimeGaussianDiffusion

    def __call__(self, ratio: float) -> float:
        """For ``NoiseLevels.time_of``."""
        logsnr = -2 * math.log(ratio) if ratio > 0 else math.inf
        t = self.diffusion.time_of(logsnr)
        pair = (torch.tensor([v], dtype=torch.float64, device="cpu") for v in (t, logsnr))
        return float(self.diffusion._inputs(*pair))


def _alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
