"""The DDPM of the lecture: forward process, posterior, training losses, samplers and bound.

Methods have the names of guided-diffusion, and the parameters that both have keep its names and
its order, so that its training, sampling and likelihood scripts run with these methods. Its
parameter ``denoised_fn`` exists only in ``ddim_reverse_sample`` and its loop. From the place where
it would stand, and in the sampling loops from ``noise`` on, parameters are keyword-only: a
positional call that means another parameter raises TypeError. Parameters that guided-diffusion
lacks are keyword-only. The constructor differs: it takes strings for the model's output and the
loss, and ``respace`` replaces ``SpacedDiffusion``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import as_flag, as_positive, check_choice, check_not_compiling
from diffcore._engine.kept import made_plainly
from diffcore._types import Coef, CondFn, Model
from diffcore.coefficients.bound import DECODERS, LEARNED, VARIANCE_TYPES
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.diffusion import conditional, groups, jumps, reverse, training
from diffcore.diffusion.checks import (
    check_batch,
    check_mask,
    check_perturbation,
    check_reduction,
    check_robust,
    check_timestep_values,
    check_timesteps,
    check_weights,
    compiling,
    constant_eta,
    warn_of_images,
)
from diffcore.diffusion.inversion import Inversion
from diffcore.diffusion.tables import DiffusionTables
from diffcore.diffusion.vlb import VariationalBound
from diffcore.guidance import Guidance
from diffcore.noise import Noise, StepNoise, perturbation_key
from diffcore.ops._noise import default_key
from diffcore.sampling.loop import run_table
from diffcore.sampling.noise import initial_sample
from diffcore.sampling.sample import guidance_rule
from diffcore.schedules.betas import check_betas, check_direction

# The least normal float32: 1 / alpha is finite from there on.
_SMALLEST = torch.finfo(torch.float32).tiny


class GaussianDiffusion(VariationalBound, Inversion):
    """Variance preserving diffusion with discrete timesteps 0 .. T-1, and its reverse process.

    x_t = sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise. A model is called as
    ``model(x, t, **model_kwargs)`` with ``t`` int64 ``[B]``, always timesteps of the training
    schedule, and returns a tensor of the shape of ``x``. Under autocast its output may have another
    floating-point dtype; it is converted to that of ``x``.

    With a learned variance the model returns ``[B, 2C, ...]``: the prediction, then v, along
    dimension 1. v is the log-variance itself ("learned"), or a position between log beta_tilde, at
    v = -1, and log beta, at v = 1 ("learned_range"); v is not clamped. Kernels read both halves
    without a copy. DDIM reads the prediction only.

    The tables (``betas``, ``alphas_cumprod``, ``alphas_cumprod_prev``, ``sqrt_alphas_cumprod``,
    ``sqrt_one_minus_alphas_cumprod``, ``log_one_minus_alphas_cumprod``, ``posterior_variance``,
    ``posterior_log_variance_clipped``, ``posterior_mean_coef1``, ``posterior_mean_coef2``) are
    float64 ``[T]`` on the CPU, whatever torch's default device is. Kernels read copies, moved to
    each device once, and round once: there are no parameters, and nothing to move by ``.to()``.

    Args:
        betas: Variances of the Markov steps, ``[T]`` in (0, 1]: a tensor, an array or a list. The
            last may be 1 (zero terminal SNR), except with prediction_type "epsilon". 10 and more
            betas that fall at every step are refused, as alphas_cumprod or a reversed schedule.
        prediction_type: What the model predicts: "epsilon", "sample" (x_0), "v_prediction" or
            "flow_prediction".
        variance_type: Variance of the reverse step: "fixed_small" (beta_tilde), "fixed_large"
            (beta), or one that the model predicts, "learned" or "learned_range". At t = 0, where
            beta_tilde is 0 and no noise is added, the log-variance that ``p_mean_variance`` returns
            is that of t = 1, log beta_tilde, for both fixed types, and so is the variance of
            "fixed_large" (Ho et al.; guided-diffusion). With T = 1 it is log beta.
        clip_sample: Clip the predicted x_0 while sampling.
        clip_sample_range: To [-clip_sample_range, clip_sample_range].
        loss_type: What ``training_losses`` computes: "mse", "rescaled_mse", "kl" or "rescaled_kl".

    Attributes:
        num_timesteps: T.
        schedule: alpha and sigma at each timestep, a ``NoiseSchedule``.
        tables: The numbers that the methods read, and their copies on devices.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: Betas outside (0, 1], that fall throughout or that require grad, unknown
            strings, an empty clip range, or epsilon prediction with (almost) zero terminal SNR.

    Source:
        Ho, Jain and Abbeel 2020 (arXiv 2006.11239); Song, Meng and Ermon 2021 (arXiv 2010.02502);
        Nichol and Dhariwal 2021 (arXiv 2102.09672) for the learned variance.
    """

    _images_checked = False  # whether a call of training_losses has read the range of its data

    def __init__(
        self,
        betas: Tensor,
        prediction_type: str = "epsilon",
        variance_type: str = "fixed_small",
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        loss_type: str = "mse",
    ) -> None:
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
        check_choice("loss_type", loss_type, training.LOSS_TYPES)
        clip_sample_range = as_positive("clip_sample_range", clip_sample_range)
        betas = made_plainly(lambda: check_betas(betas))
        made_plainly(lambda: check_direction(betas))
        last = made_plainly(lambda: math.exp(0.5 * float(torch.log1p(-betas).sum())))
        if prediction_type == "epsilon" and last < _SMALLEST:
            raise ValueError(
                "betas must leave some signal with prediction_type='epsilon', got alpha = "
                f"{last:.3g} at the last timestep (zero terminal SNR in float32): a prediction of "
                "epsilon does not determine x_0 there; use prediction_type='v_prediction' or "
                "'sample'"
            )
        self._set_up(
            DiffusionTables(betas, prediction_type, variance_type),
            as_flag("clip_sample", clip_sample),
            clip_sample_range,
            loss_type,
        )

    def _set_up(
        self, tables: DiffusionTables, clip_sample: bool, clip_sample_range: float, loss_type: str
    ) -> None:
        """Takes checked settings."""
        self.prediction_type = tables.prediction_type
        self.variance_type = tables.variance_type
        self.clip_sample = clip_sample
        self.clip_sample_range = clip_sample_range
        self.loss_type = loss_type

        self.tables = tables
        self.num_timesteps = len(tables)
        self.schedule = tables.schedule
        self.betas = tables.betas
        self.alphas_cumprod = tables.alphas_cumprod
        self.alphas_cumprod_prev = tables.alphas_cumprod_prev
        self.sqrt_alphas_cumprod = tables.sqrt_alphas_cumprod
        self.sqrt_one_minus_alphas_cumprod = tables.sqrt_one_minus_alphas_cumprod
        self.log_one_minus_alphas_cumprod = tables.log_one_minus_alphas_cumprod
        self.posterior_variance = tables.posterior_variance
        self.posterior_log_variance_clipped = tables.posterior_log_variance_clipped
        self.posterior_mean_coef1 = tables.posterior_mean_coef1
        self.posterior_mean_coef2 = tables.posterior_mean_coef2

    def respace(
        self, timesteps: int | Sequence[int], timestep_spacing: str = "leading"
    ) -> GaussianDiffusion:
        """The same process observed at some of its timesteps only.

        Indices of the result run over the chosen timesteps; the model still gets the original ones.

        Args:
            timesteps: How many to keep, or which, in any order.
            timestep_spacing: How to choose them when ``timesteps`` is a number: "leading",
                "trailing" or "linspace".

        Returns:
            A diffusion with as many steps, whose betas are 1 - alphas_cumprod_t /
            alphas_cumprod_prev over the chosen timesteps.

        Raises:
            TypeError: Timesteps that are not integers.
            ValueError: No timestep, or one out of range.
            RuntimeError: Compiling or exporting.

        Source:
            Nichol and Dhariwal 2021 (arXiv 2102.09672) section 4 (SpacedDiffusion).
        """
        check_not_compiling("respace", "call it before, and compile what uses the result")
        timestep_map, betas = made_plainly(
            lambda: self.tables.respaced(timesteps, timestep_spacing)
        )
        tables = DiffusionTables(betas, self.prediction_type, self.variance_type)
        tables.timestep_map = timestep_map
        # Not the constructor: betas over gaps of different lengths may fall.
        spaced = GaussianDiffusion.__new__(GaussianDiffusion)
        spaced._set_up(tables, self.clip_sample, self.clip_sample_range, self.loss_type)
        return spaced

    # ---- forward process -----------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Moments of q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I).

        Args:
            x_start: x_0, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.

        Returns:
            (mean, variance, log_variance), of the shape of ``x_start``. The last two are float32,
            or float64 for float64 samples.
        """
        check_batch("x_start", x_start)
        t = check_timesteps(t, x_start, self.num_timesteps)
        check_timestep_values(t, self.num_timesteps)
        extract = self.tables.extract
        scale = extract("sqrt_alphas_cumprod", t, x_start)
        variance = extract("sqrt_one_minus_alphas_cumprod", t, x_start) ** 2
        log_variance = extract("log_one_minus_alphas_cumprod", t, x_start)
        return (scale * x_start).to(x_start.dtype), variance, log_variance

    def q_sample(
        self,
        x_start: Tensor,
        t: Tensor | int,
        noise: Noise | None = None,
        *,
        group_dim: int | None = None,
    ) -> Tensor:
        """A sample of q(x_t | x_0): sqrt(alphas_cumprod_t) x_0 + sqrt(1 - alphas_cumprod_t) noise.

        Args:
            x_start: x_0, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            noise: Standard normal, like ``x_start``, or a noise key; ``None`` for a key seeded by
                torch's generator.
            group_dim: A dimension whose entries have a timestep each, such as 2 for the frames of
                ``[B, C, F, H, W]``: t may then be ``[B, G]``.

        Returns:
            x_t, like ``x_start``.
        """
        if group_dim is not None:
            return groups.noised(self.tables, x_start, t, noise, group_dim)
        t = check_timesteps(t, x_start, self.num_timesteps)
        if noise is None:
            noise = default_key(x_start)
        return training.noised(self.tables, x_start, t, noise)

    def q_sample_jump(
        self, x_t: Tensor, t: Tensor | int, u: Tensor | int, noise: Noise | None = None
    ) -> Tensor:
        """A sample of q(x_u | x_t) for u >= t: r x_t + sqrt(sigma_u^2 - r^2 sigma_t^2) noise.

        r = alpha_u / alpha_t, and the variance is 1 - (1 - beta_{t+1}) ... (1 - beta_u): the Markov
        steps from t to u in one launch. u = t returns x_t. Timesteps in tensors are not read on the
        host, except on the CPU, to check them; their factors take a few small launches more, and
        are nan where u < t.

        Args:
            x_t: Noised samples, ``[B, ...]``.
            t: Their timesteps, integers ``[B]``, or one int.
            u: The timesteps to jump to, integers ``[B]``, or one int.
            noise: Standard normal, like ``x_t``, or a noise key; ``None`` for a key seeded by
                torch's generator. For samples independent of the noise in x_t another than that.

        Returns:
            x_u, like ``x_t``.

        Raises:
            ValueError: A timestep out of range, or u < t.

        Source:
            Lugmayr et al. 2022 (RePaint, arXiv 2201.09865) algorithm 1, line 10, over many steps.
        """
        return jumps.jumped(self.tables, x_t, t, u, noise)

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
        t = check_timesteps(t, x_start, self.num_timesteps)
        return (
            reverse.posterior_mean(self.tables, x_start, x_t, t),
            self.tables.extract("posterior_variance", t, x_start),
            self.tables.extract("posterior_log_variance_clipped", t, x_start),
        )

    # ---- training ------------------------------------------------------------------------------

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor | int,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Noise | None = None,
        *,
        weights: Tensor | None = None,
        decoder: str = "discretized",
        group_dim: int | None = None,
        reduction: str = "sample",
        mask: Tensor | None = None,
        mask_reduction: str = "mask",
        loss: str = "mse",
        delta: Coef | None = None,
        input_perturbation: float = 0.0,
    ) -> dict[str, Tensor]:
        """The loss of each sample, by ``loss_type`` of the constructor.

        ::

            mse           w_t mean (m - target)^2 [+ vb]    Algorithm 1, the simplified objective
            rescaled_mse  the same, with vb times T / 1000
            kl            vb                                in bits per dimension
            rescaled_kl   T vb                              unbiased for L_0 + ... + L_{T-1}

        vb is the term of the variational bound at t: L_t, or at t = 0 the decoder's L_0. With a
        learned variance it is added to the mse: the hybrid objective, in which the gradient of vb
        reaches the variance only. No prediction is clipped here.

        Args:
            model: ``model(x_t, t, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``; images in [-1, 1]. The first call warns of CPU images in
                [0, 1] or [0, 255].
            t: Timesteps, integers ``[B]``, usually uniform in 0 .. T-1.
            model_kwargs: More arguments for the model.
            noise: Standard normal, like ``x_start``, or a noise key; ``None`` for a key seeded by
                torch's generator. The noise of a key is generated twice and never stored.
            weights: ``[T]``, a weight for each timestep (``losses.min_snr_weights``), as a tensor,
                an array or a list; 1 if ``None``. Keep it on the device of ``x_start``: moving it
                there waits. Weights apply to the mse only and are refused with "kl" and
                "rescaled_kl".
            decoder: L_0 for pixels k/127.5 - 1 ("discretized": the mass of their bin) or for other
                data such as latents ("gaussian": the density). Pixel values are not validated while
                training: the bin of another x_0 is x_0 ± 1/255.
            group_dim: A dimension of the samples whose entries have a timestep each, such as 2 for
                the frames of ``[B, C, F, H, W]``: t may then be ``[B, G]``, also for the model.
            reduction: "sample", or, with ``group_dim``, "group" for the loss of each group.
            mask: What of each sample counts, with values in [0, 1]; broadcast to the shape of
                ``x_start``, as in ``ops.denoising_loss``. The model gets all of x_t. With a mask vb
                is computed in plain torch.
            mask_reduction: What a sum over a sample is divided by: "mask" (the sum of its mask, 0
                counting as loss 0) or "all" (its number of elements).
            loss: What the mse is of each error: "mse" (its square), "pseudo_huber" or "smooth_l1",
                as in ``ops.denoising_loss``. Refused with "kl" and "rescaled_kl".
            delta: Error at which that loss becomes linear: a number, or ``[T]``, one for each
                timestep. Keep a tensor on the device of ``x_start``.
            input_perturbation: gamma: the model's input has the noise z + gamma z' with a second
                normal z' (``noise.perturbation_key``), its target z alone. At least 0; needs the
                noise of a key. Source: Ning et al. 2023 (arXiv 2301.11706), who use 0.1.

        Returns:
            ``loss``, and its parts ``mse`` and ``vb`` as far as the loss has them, each ``[B]``, or
            ``[B, G]`` by group; average them over the batch.

        Raises:
            TypeError: An argument, or the model's output, of the wrong type.
            ValueError: An argument, or the model's output, of the wrong shape or value.

        Source:
            Ho et al. 2020 (arXiv 2006.11239) eq. 14; Nichol and Dhariwal 2021 (arXiv 2102.09672)
            eq. 16.
        """
        check_choice("decoder", decoder, DECODERS)
        if group_dim is None:
            t = check_timesteps(t, x_start, self.num_timesteps)
        else:
            t = groups.timesteps(x_start, t, group_dim, self.num_timesteps)
        if reduction != "sample":
            check_reduction(reduction, group_dim)
        if weights is not None:
            if self.loss_type not in ("mse", "rescaled_mse"):
                raise ValueError(
                    f"weights must be None with loss_type={self.loss_type!r}, got a tensor"
                )
            weights = check_weights(weights, self.num_timesteps, x_start.device)
        if loss != "mse" or delta is not None:
            delta = check_robust(loss, delta, self.loss_type, self.num_timesteps, x_start.device)
        if mask is not None or mask_reduction != "mask":
            check_mask(mask, mask_reduction, x_start)
        if not compiling() and not self._images_checked:
            self._images_checked = warn_of_images("x_start", x_start)
        if noise is None:
            noise = default_key(x_start)
        if input_perturbation:
            input_perturbation = check_perturbation(input_perturbation, noise)
        if group_dim is not None:
            return groups.losses(
                self.tables,
                self.loss_type,
                model,
                x_start,
                t,
                model_kwargs,
                noise,
                group_dim,
                perturbation=input_perturbation,
                weights=weights,
                decoder=decoder,
                counted=(mask, mask_reduction),
                error=(loss, delta),
                reduction=reduction,
            )
        x_t = training.noised(self.tables, x_start, t, noise)
        if input_perturbation:
            key = perturbation_key(noise)
            x_t = training.perturbed(self.tables, x_t, t, key, input_perturbation)
        output, variance_output = reverse.predict(self.tables, model, x_t, t, model_kwargs)
        return training.losses(
            self.tables,
            self.loss_type,
            x_start,
            output,
            variance_output,
            noise,
            t,
            weights=weights,
            decoder=decoder,
            counted=(mask, mask_reduction),
            error=(loss, delta),
        )

    # ---- reverse process, one step -------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | int,
        clip_denoised: bool | None = None,
        *,
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
        t = self._timesteps_of(x, t)
        output, variance_output = reverse.predict(self.tables, model, x, t, model_kwargs)
        clip = self._clip_range(clip_denoised)
        return reverse.moments(self.tables, x, output, variance_output, t, clip)

    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | int,
        clip_denoised: bool | None = None,
        *,
        cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Noise | None = None,
    ) -> dict[str, Tensor]:
        """One ancestral step: mean + sqrt(variance_t) noise, without noise where t = 0.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            x: x_t, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            cond_fn: Classifier guidance: ``cond_fn(x, t, **model_kwargs)``, with x_t and the
                timestep input of the model, returns the gradient of log p(y | x_t) by x_t, like x.
                variance_t times it is added to the mean; ``pred_xstart`` stays that of the model.
                It enters ``torch.enable_grad()`` itself where gradients are off.
            model_kwargs: More arguments for the model.
            noise: Standard normal, like ``x``, or a noise key; ``None`` for a key seeded by torch's
                generator.

        Returns:
            ``sample`` (x_{t-1}) and ``pred_xstart``, like ``x``.

        Source:
            Ho et al. 2020 (arXiv 2006.11239) algorithm 2; Dhariwal and Nichol 2021 (arXiv
            2105.05233) algorithm 1 for ``cond_fn``.
        """
        t = self._timesteps_of(x, t)
        clip = self._clip_range(clip_denoised)
        table, variance_table = self.tables.ddpm(clip), self.tables.learned_variance(clip)
        output, variance_output = reverse.predict(self.tables, model, x, t, model_kwargs)
        if noise is None:
            noise = default_key(x)
        sample = reverse.step(x, output, t, table, noise, variance_output, variance_table)
        if cond_fn is not None:
            gradient = conditional.gradient(self.tables, cond_fn, x, t, model_kwargs)
            sample = conditional.p_sample(self.tables, sample, gradient, variance_output, t)
        return {
            "sample": sample,
            "pred_xstart": reverse.predicted_x0(self.tables, x, output, t, clip),
        }

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor | int,
        clip_denoised: bool | None = None,
        *,
        cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        eta: float = 0.0,
        rederive_epsilon: bool = True,
        noise: Noise | None = None,
    ) -> dict[str, Tensor]:
        """One DDIM step, from t to t - 1; call it on ``respace(...)`` for longer steps.

        A predicted variance is not read.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            x: x_t, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, or one int.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            cond_fn: As for ``p_sample``. epsilon becomes epsilon - sigma_t times the gradient, and
                x_0 follows from it; it is added to the clipped x_0, which is not clipped again.
            model_kwargs: More arguments for the model.
            eta: 0 for the deterministic step, 1 for ancestral noise.
            rederive_epsilon: Compute epsilon from the clipped x_0 (OpenAI's rule) instead of using
                that of the model (the default of diffusers). The same without clipping.
            noise: Standard normal, like ``x``, or a noise key; ``None`` for a key seeded by torch's
                generator. Not read with eta = 0.

        Returns:
            ``sample`` (x_{t-1}) and ``pred_xstart``, like ``x``.

        Source:
            Song et al. 2021 (arXiv 2010.02502) eq. 12; Dhariwal and Nichol 2021 (arXiv 2105.05233)
            algorithm 2 for ``cond_fn``.
        """
        t = self._timesteps_of(x, t)
        clip = self._clip_range(clip_denoised)
        eta = constant_eta(eta)
        table = self.tables.ddim(clip, eta, as_flag("rederive_epsilon", rederive_epsilon))
        output, _ = reverse.predict(self.tables, model, x, t, model_kwargs)
        if noise is None and eta:
            noise = default_key(x)
        sample = reverse.step(x, output, t, table, noise if eta else None)
        pred_xstart = reverse.predicted_x0(self.tables, x, output, t, clip)
        if cond_fn is not None:
            gradient = conditional.gradient(self.tables, cond_fn, x, t, model_kwargs)
            sample = conditional.added(sample, gradient, self.tables.ddim_shift(eta), t)
            pred_xstart = conditional.added(pred_xstart, gradient, self.tables.x0_shift(), t)
        return {"sample": sample, "pred_xstart": pred_xstart}

    # ---- reverse process, all steps ------------------------------------------------------------

    def p_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        noise: Noise | None = None,
        clip_denoised: bool | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        num_steps: int | None = None,
        timestep_spacing: str = "leading",
        step_noise: StepNoise | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float | Tensor | None = None,
        guidance: Guidance | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        differentiable: bool = False,
        checkpoint: bool = False,
    ) -> Tensor:
        """Ancestral sampling (Algorithm 2), from x_T down to x_0, without waiting for the device.

        Runs under ``torch.no_grad()``, unless it is ``differentiable``; a model or a ``cond_fn``
        that needs gradients of its own enters ``torch.enable_grad()``. For thresholds or a callback
        use ``diffcore.sample`` with a table of ``diffcore.solvers``, for a loop of your own
        ``SolverTable.step``.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            shape: Shape of the samples, ``[B, ...]``.
            noise: x_T, or a noise key for it; ``None`` for a key seeded by torch's generator.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            cond_fn: As for ``p_sample``; added to the prediction under ``guidance``.
            model_kwargs: More arguments for the model.
            device: Where to sample; ``None`` for that of a ``noise`` tensor, else of the model's
                parameters, else of the tensors in a key.
            progress: Show a progress bar (tqdm).
            num_steps: How many timesteps to visit; ``None`` for all T.
            timestep_spacing: Which timesteps: "leading", "trailing" or "linspace".
            step_noise: A noise key, of which step i reads the stream 1 + i after its own; a tensor
                ``[S, B, ...]``; or ``(i, x) -> noise``, not called at the last step, where no noise
                is added. ``None`` for the key of x_T, or one seeded by torch's generator.
            dtype: Of the samples; ``None`` for that of ``noise``, else torch's default.
            generator: Source of seeds; ``None`` for torch's own.
            guidance_scale: As for ``diffcore.sample``.
            guidance: As for ``diffcore.sample``.
            uncond_kwargs: As for ``diffcore.sample``.
            differentiable: As for ``diffcore.sample``: record the loop for autograd.
            checkpoint: As for ``diffcore.sample``: call the model again in the backward pass.

        Returns:
            x_0, of the given shape.
        """
        rule = guidance_rule(guidance_scale, guidance, uncond_kwargs)
        rows = self.tables.rows(num_steps, timestep_spacing)
        x, step_noise = initial_sample(model, shape, noise, step_noise, device, dtype, generator)
        solver = self.tables.ddpm_solver(rows, self._clip_range(clip_denoised))
        learned = self.variance_type in LEARNED
        calls = {"model_kwargs": model_kwargs, "uncond_kwargs": uncond_kwargs, "guidance": rule}
        options: dict[str, Any] = {**calls, "learned": learned, "progress": progress}
        options |= {"differentiable": differentiable, "checkpoint": checkpoint}
        options |= conditional.in_loop(cond_fn, self.tables, rows, None)
        return run_table(model, x, solver, step_noise, **options)

    def ddim_sample_loop(
        self,
        model: Model,
        shape: Sequence[int],
        *,
        noise: Noise | None = None,
        clip_denoised: bool | None = None,
        cond_fn: CondFn | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        progress: bool = False,
        eta: float = 0.0,
        num_steps: int | None = None,
        timestep_spacing: str = "leading",
        rederive_epsilon: bool = True,
        step_noise: StepNoise | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        guidance_scale: float | Tensor | None = None,
        guidance: Guidance | None = None,
        uncond_kwargs: Mapping[str, Any] | None = None,
        differentiable: bool = False,
        checkpoint: bool = False,
    ) -> Tensor:
        """DDIM sampling. The last step goes to x_0 itself: alpha_prev = 1, and no noise.

        Runs under ``torch.no_grad()``, unless it is ``differentiable``; a model or a ``cond_fn``
        that needs gradients of its own enters ``torch.enable_grad()``. For thresholds or a callback
        use ``diffcore.sample`` with a table of ``diffcore.solvers``, for a loop of your own
        ``SolverTable.step``. A predicted variance is not read.

        Args:
            model: ``model(x, t, **model_kwargs)``.
            shape: Shape of the samples, ``[B, ...]``.
            noise: x_T, or a noise key for it; ``None`` for a key seeded by torch's generator.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            cond_fn: As for ``ddim_sample``; added to the prediction under ``guidance``.
            model_kwargs: More arguments for the model.
            device: Where to sample; ``None`` for that of a ``noise`` tensor, else of the model's
                parameters, else of the tensors in a key.
            progress: Show a progress bar (tqdm).
            eta: 0 for the deterministic sampler, 1 for ancestral noise.
            num_steps: How many timesteps to visit; ``None`` for all T.
            timestep_spacing: Which timesteps: "leading", "trailing" or "linspace".
            rederive_epsilon: Compute epsilon from the clipped x_0 (OpenAI's rule) instead of using
                that of the model (the default of diffusers). The same without clipping.
            step_noise: As for ``p_sample_loop``; with eta = 0 a function is never called.
            dtype: Of the samples; ``None`` for that of ``noise``, else torch's default.
            generator: Source of seeds; ``None`` for torch's own.
            guidance_scale: As for ``diffcore.sample``.
            guidance: As for ``diffcore.sample``.
            uncond_kwargs: As for ``diffcore.sample``.
            differentiable: As for ``diffcore.sample``: record the loop for autograd.
            checkpoint: As for ``diffcore.sample``: call the model again in the backward pass.

        Returns:
            x_0, of the given shape.
        """
        rule = guidance_rule(guidance_scale, guidance, uncond_kwargs)
        rows = self.tables.rows(num_steps, timestep_spacing)
        x, step_noise = initial_sample(model, shape, noise, step_noise, device, dtype, generator)
        clip = self._clip_range(clip_denoised)
        flag = as_flag("rederive_epsilon", rederive_epsilon)
        eta = constant_eta(eta)
        solver = self.tables.ddim_solver(rows, clip, eta, flag)
        learned = self.variance_type in LEARNED
        calls = {"model_kwargs": model_kwargs, "uncond_kwargs": uncond_kwargs, "guidance": rule}
        options: dict[str, Any] = {**calls, "learned": learned, "progress": progress}
        options |= {"differentiable": differentiable, "checkpoint": checkpoint}
        options |= conditional.in_loop(cond_fn, self.tables, rows, eta)
        return run_table(model, x, solver, step_noise, **options)
