"""The reverse process of GaussianDiffusion: single steps, and the loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._types import Model, Noise, StepNoise
from diffcore.coefficients.bound import LEARNED
from diffcore.diffusion.tables import DiffusionTables
from diffcore.sampling.loop import run_table
from diffcore.sampling.noise import initial_sample, noise_or_default


class ReverseProcess(DiffusionTables):
    """p(x_{t-1} | x_t), and the samplers; a part of ``GaussianDiffusion``."""

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | int,
        *,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Moments of p(x_{t-1} | x_t) = N(coef1_t pred_xstart + coef2_t x_t, variance_t I).

        A learned log-variance is v, or log beta_tilde + (v + 1) / 2 (log beta - log beta_tilde).

        Args:
            model: ``model(x, t, **model_kwargs)``.
            x: x_t, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.

        Returns:
            ``mean``, ``variance``, ``log_variance`` and ``pred_xstart``, of the shape of ``x``. The
            variances are float32, or float64 for float64 samples.
        """
        t = self._check_t(t, x, "x")
        output, said = self._predict(model, x, t, model_kwargs)
        clip = self._clip(clip_denoised)
        variance, log_variance = self._variances(said, t, x)
        return {
            "mean": ops.reverse_step(x, output, self._ddpm_table(clip, x.device), t=t),
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": ops.reverse_step(x, output, self._x0_table(clip, x.device), t=t),
        }

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | int,
        *,
        noise: Noise | None = None,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step: mean + sqrt(variance_t) noise, without noise where t = 0.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            x: x_t, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            noise: Standard normal, like ``x``, or a recipe; drawn if ``None``.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.

        Returns:
            ``sample`` (x_{t-1}) and ``pred_xstart``, like ``x``.
        """
        clip = self._clip(clip_denoised)
        t = self._check_t(t, x, "x")
        table, variance = self._ddpm_table(clip, x.device), self._variance_table(clip, x.device)
        return self._step(model, x, t, table, clip, noise, model_kwargs, variance=variance)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | int,
        *,
        eta: float = 0.0,
        rederive_epsilon: bool = True,
        noise: Noise | None = None,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """One DDIM step, from t to t - 1; call it on ``respace(...)`` for longer steps.

        What a model says of its variance is not read.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            x: x_t, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            eta: 0 for the deterministic step, 1 for ancestral noise.
            rederive_epsilon: Take epsilon from the clipped x_0 (OpenAI's rule) instead of leaving
                the model's (the default of diffusers). The same thing without clipping.
            noise: Standard normal, like ``x``, or a recipe; drawn if ``None`` and eta > 0.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.

        Returns:
            ``sample`` (x_{t-1}) and ``pred_xstart``, like ``x``.
        """
        clip = self._clip(clip_denoised)
        t = self._check_t(t, x, "x")
        table = self._ddim_table(clip, eta, rederive_epsilon, x.device)
        return self._step(model, x, t, table, clip, noise, model_kwargs, noisy=eta > 0)

    # ---- reverse process, all steps ---------------------------------------------------------

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        num_steps: int | None = None,
        timestep_spacing: str = "leading",
        noise: Noise | None = None,
        step_noise: StepNoise | None = None,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Ancestral sampling (Algorithm 2), from x_T down to x_0, without waiting for the device.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            shape: Shape of the samples, ``[B, ...]``.
            num_steps: Visit so many timesteps only; ``None`` for all T.
            timestep_spacing: Which ones: "leading", "trailing" or "linspace".
            noise: x_T, or a recipe for it; ``None`` for a recipe seeded by torch's generator.
            step_noise: A recipe, of which step i takes the stream 1 + i after its own; a tensor
                ``[S, B, ...]``; or ``(i, x) -> noise``, not called at the last step, where none is
                added. ``None`` for the recipe of x_T, or one seeded by torch's generator.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.
            device: Where to sample; ``None`` for that of ``noise``, else of the model's parameters.
            dtype: Of the samples; ``None`` for that of ``noise``, else torch's default.
            generator: Source of seeds; ``None`` for torch's own.
            progress: Show a bar (tqdm).

        Returns:
            x_0, of the given shape.
        """
        rows = self._rows(num_steps, timestep_spacing)
        x, step_noise = initial_sample(model, shape, noise, step_noise, device, dtype, generator)
        table = self._ddpm(rows, self._clip(clip_denoised))
        return run_table(model, x, table, step_noise, model_kwargs=model_kwargs, progress=progress)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        num_steps: int | None = None,
        eta: float = 0.0,
        timestep_spacing: str = "leading",
        rederive_epsilon: bool = True,
        noise: Noise | None = None,
        step_noise: StepNoise | None = None,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """DDIM sampling. The last step goes to x_0 itself: alpha_prev = 1, and no noise.

        What a model says of its variance is not read.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            shape: Shape of the samples, ``[B, ...]``.
            num_steps: How many timesteps to visit; ``None`` for all T.
            eta: 0 for the deterministic sampler, 1 for ancestral noise.
            timestep_spacing: Which timesteps: "leading", "trailing" or "linspace".
            rederive_epsilon: Take epsilon from the clipped x_0 (OpenAI's rule) instead of leaving
                the model's (the default of diffusers). The same thing without clipping.
            noise: As for ``p_sample_loop``.
            step_noise: As for ``p_sample_loop``; not called at all with eta = 0.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.
            device: As for ``p_sample_loop``.
            dtype: As for ``p_sample_loop``.
            generator: As for ``p_sample_loop``.
            progress: Show a bar (tqdm).

        Returns:
            x_0, of the given shape.
        """
        rows = self._rows(num_steps, timestep_spacing)
        x, step_noise = initial_sample(model, shape, noise, step_noise, device, dtype, generator)
        table = self._ddim(rows, self._clip(clip_denoised), eta, rederive_epsilon)
        return run_table(
            model,
            x,
            table,
            step_noise,
            model_kwargs=model_kwargs,
            progress=progress,
            learned=self.variance_type in LEARNED,
        )

    def _step(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        table: Tensor,
        clip: float | None,
        noise: Noise | None,
        model_kwargs: Mapping[str, Any] | None,
        *,
        noisy: bool = True,
        variance: Tensor | None = None,
    ) -> dict[str, Tensor]:
        output, said = self._predict(model, x, t, model_kwargs)
        sample = ops.reverse_step(
            x,
            output,
            table,
            t=t,
            noise=noise_or_default(noise, x) if noisy else None,
            variance_output=None if variance is None else said,
            variance_coefficients=variance,
        )
        return {
            "sample": sample,
            "pred_xstart": ops.reverse_step(x, output, self._x0_table(clip, x.device), t=t),
        }
