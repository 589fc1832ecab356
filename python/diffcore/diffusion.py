"""The DDPM of the lecture: forward process, posterior, training loss, and both samplers.

Method names and calling conventions are those of guided-diffusion, so a user swaps the import. The
arithmetic is ops', one launch each; this file only decides which float64 table a launch reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._bound_terms import VariationalBound
from ._loop import Model, Noise, StepNoise, call_model, or_drawn, start, walk


class GaussianDiffusion(VariationalBound):
    """Variance preserving diffusion with discrete timesteps 0 .. T-1, and its reverse process.

    x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise. A model is called as
    ``model(x, t, **model_kwargs)`` with ``t`` int64 ``[B]``, always timesteps of the training
    schedule, and returns a tensor of the shape of ``x``. Under autocast it may come in another
    floating dtype; it is converted to that of ``x``.

    The tables (``betas``, ``alphas_cumprod``, ``alphas_cumprod_prev``, ``sqrt_alphas_cumprod``,
    ``sqrt_one_minus_alphas_cumprod``, ``log_one_minus_alphas_cumprod``, ``posterior_variance``,
    ``posterior_log_variance_clipped``, ``posterior_mean_coef1``, ``posterior_mean_coef2``) are
    float64 ``[T]`` on the CPU. Kernels read copies, moved once to each device and rounded once.

    Args:
        betas: Variances of the Markov steps, ``[T]`` in (0, 1]. The last may be 1 (zero terminal
            SNR), except with prediction_type "epsilon".
        prediction_type: What the model predicts: "epsilon", "sample" (x_0), "v_prediction" or
            "flow_prediction".
        variance_type: Variance of the reverse step: "fixed_small" (beta_tilde) or "fixed_large"
            (beta). At t = 0, where beta_tilde is 0 and no noise is drawn, the log-variance that
            ``p_mean_variance`` reports is the next step's log beta_tilde for both, and so is the
            variance of "fixed_large" (Ho et al.; guided-diffusion). With T = 1 there is no next
            step: log beta.
        clip_sample: Clip the predicted x_0 while sampling.
        clip_sample_range: To [-clip_sample_range, clip_sample_range].

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Betas outside (0, 1], unknown strings, an empty clip range, or epsilon
            prediction with zero terminal SNR.

    Source:
        Ho, Jain and Abbeel 2020 (arXiv 2006.11239); Song, Meng and Ermon 2021 (arXiv 2010.02502).
    """

    def __init__(
        self,
        betas: Tensor,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
    ) -> None:
        super().__init__(betas, prediction_type, variance_type, clip_sample, clip_sample_range)

    def respace(
        self, timesteps: int | Sequence[int], timestep_spacing: str = "leading"
    ) -> GaussianDiffusion:
        """The same process seen at some of its timesteps only.

        Indices of the result run over the chosen timesteps; the model still gets the original ones.

        Args:
            timesteps: How many to keep, or which, in any order.
            timestep_spacing: How to choose them when ``timesteps`` is a number: "leading",
                "trailing" or "linspace".

        Returns:
            A diffusion with as many steps, whose betas are 1 - alphas_cumprod_t /
            alphas_cumprod_prev over the chosen timesteps.

        Source:
            Nichol and Dhariwal 2021 (arXiv 2102.09672) section 4 (SpacedDiffusion).
        """
        rows, betas = self._respaced(timesteps, timestep_spacing)
        spaced = GaussianDiffusion(
            betas,
            self.prediction_type,
            self.variance_type,
            self.clip_sample,
            self.clip_sample_range,
        )
        known = self._timestep_map
        spaced._timestep_map = tuple(known[t] if known else t for t in rows)
        return spaced

    # ---- forward process --------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I).

        Args:
            x_start: x_0, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.

        Returns:
            (mean, variance, log_variance), of the shape of ``x_start``. The last two are float32,
            or float64 for float64 samples.
        """
        t = self._check_t(t, x_start)
        scale = self._extract("sqrt_alphas_cumprod", t, x_start)
        variance = self._extract("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2
        log_variance = self._extract("log_one_minus_alphas_cumprod", t, x_start)
        return (scale * x_start).to(x_start.dtype), variance, log_variance

    def q_sample(self, x_start: Tensor, t: Tensor | int, noise: Noise | None = None) -> Tensor:
        """A sample of q(x_t | x_0): sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise.

        Args:
            x_start: x_0, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            noise: Standard normal, like ``x_start``, or a recipe for it; ``None`` for a recipe
                seeded by torch's generator.

        Returns:
            x_t, like ``x_start``.
        """
        t = self._check_t(t, x_start)
        noise = or_drawn(noise, x_start)
        return ops.q_sample(x_start, t, noise, self._noise_table(x_start.device))

    def q_posterior_mean_variance(
        self, x_start: Tensor, x_t: Tensor, t: Tensor | int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of q(x_{t-1} | x_t, x_0) = N(coef1_t x_0 + coef2_t x_t, beta_tilde_t I).

        Args:
            x_start: x_0, ``[B, ...]``.
            x_t: Noised samples, like ``x_start``.
            t: Timesteps, integers ``[B]``, or one int.

        Returns:
            (mean, variance, log_variance_clipped), of the shape of ``x_start``; at t = 0 the
            variance is 0 and the clipped logarithm is that of t = 1.
        """
        t = self._check_t(t, x_start)
        return (
            ops.linear_combination(x_start, x_t, self._posterior_table(x_t.device), t=t),
            self._extract("posterior_variance", t, x_start),
            self._extract("posterior_log_variance_clipped", t, x_start),
        )

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor | int,
        noise: Noise | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The simplified objective (Algorithm 1): w_t times the mean squared error of the model.

        Args:
            model: ``model(x_t, t, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, usually uniform in 0 .. T-1.
            noise: Standard normal, like ``x_start``, or a recipe for it; ``None`` for a recipe
                seeded by torch's generator. A recipe is drawn twice, and never stored.
            model_kwargs: More arguments for the model.
            weights: ``[T]``, a weight for each timestep (``losses.min_snr_weights``); 1 if
                ``None``. Keep it on the device of ``x_start``: moving it there waits.

        Returns:
            ``{"loss": [B]}``, the mean over each sample, to be averaged over the batch.
        """
        t = self._check_t(t, x_start)
        noise = or_drawn(noise, x_start)
        x_t = ops.q_sample(x_start, t, noise, self._noise_table(x_start.device))
        output = call_model(model, x_t, self._told(t), model_kwargs)
        alpha = sigma = None
        if self.prediction_type == "v_prediction":
            alpha = self._named_table("sqrt_alphas_cumprod", x_start.device)
            sigma = self._named_table("sqrt_one_minus_alphas_cumprod", x_start.device)
        loss = ops.denoising_loss(
            output,
            x_start,
            noise,
            prediction_type=self.prediction_type,
            alpha=alpha,
            sigma=sigma,
            weight=None if weights is None else self._weights(weights, x_start.device),
            t=t,
        )
        return {"loss": loss}

    # ---- reverse process, one step ----------------------------------------------------------

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

        Args:
            model: ``model(x, t, **model_kwargs)``.
            x: x_t, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.

        Returns:
            ``mean``, ``variance``, ``log_variance`` and ``pred_xstart``, of the shape of ``x``.
        """
        t = self._check_t(t, x, "x")
        output = call_model(model, x, self._told(t), model_kwargs)
        clip = self._clip(clip_denoised)
        return {
            "mean": ops.reverse_step(x, output, self._ddpm_table(clip, x.device), t=t),
            "variance": self._extract("_variance", t, x),
            "log_variance": self._extract("_log_variance", t, x),
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
        table = self._ddpm_table(clip, x.device)
        return self._step(model, x, t, table, clip, noise, model_kwargs)

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
        x, step_noise = start(model, shape, noise, step_noise, device, dtype, generator)
        table = self._ddpm(rows, self._clip(clip_denoised))
        return walk(model, x, table, step_noise, model_kwargs=model_kwargs, progress=progress)

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
        x, step_noise = start(model, shape, noise, step_noise, device, dtype, generator)
        table = self._ddim(rows, self._clip(clip_denoised), eta, rederive_epsilon)
        return walk(model, x, table, step_noise, model_kwargs=model_kwargs, progress=progress)

    def _step(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | int,
        table: Tensor,
        clip: float | None,
        noise: Noise | None,
        model_kwargs: Mapping[str, Any] | None,
        noisy: bool = True,
    ) -> dict[str, Tensor]:
        t = self._check_t(t, x, "x")
        output = call_model(model, x, self._told(t), model_kwargs)
        z = or_drawn(noise, x) if noisy else None
        return {
            "sample": ops.reverse_step(x, output, table, t=t, noise=z),
            "pred_xstart": ops.reverse_step(x, output, self._x0_table(clip, x.device), t=t),
        }
