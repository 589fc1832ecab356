"""EDM: preconditioned training and Heun's sampler, in the paper's noise levels sigma."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffcore import ops, timesteps
from diffcore._checks import as_int, as_positive, as_real
from diffcore._devices import to_device, widened
from diffcore._engine import messages
from diffcore._types import ClipRange, Coef, Model
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
from diffcore.sampling.from_noise import KeepsSolvers, default_as_constant, sample_from_noise
from diffcore.sampling.model import call_model, check_model_kwargs
from diffcore.schedules import get_sigmas_karras
from diffcore.solvers import NoiseLevels, SolverTable, heun_table

__all__ = ["EDM"]

_CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")


class EDM(KeepsSolvers):
    """Elucidated diffusion: x = x_0 + sigma noise, and a network with preconditioned input, output.

    The denoiser is D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) with ::

        c_skip  = sigma_data^2 / (sigma^2 + sigma_data^2)
        c_out   = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
        c_in    = 1 / sqrt(sigma^2 + sigma_data^2)
        c_noise = log(sigma) / 4

    A model is F itself, called as ``model(c_in x, c_noise, **model_kwargs)`` with c_noise ``[B]``,
    float32, or float64 beside float64 samples. It returns a tensor of the shape of ``x``. Class
    labels and other conditions are ``model_kwargs``.

    The defaults of ``p_mean``, ``p_std``, ``sigma_min`` and ``sigma_max`` are the paper's, for data
    of standard deviation 0.5. They are noise levels as they are, not multiples of ``sigma_data``:
    AlphaFold 3, whose data has 16, trains with ``p_mean=-1.2 + log(16)``, ``p_std=1.5`` and samples
    with ``sigma_min=16 * 0.0004``, ``sigma_max=16 * 160``.

    Args:
        sigma_data: Standard deviation of the data.
        p_mean: Mean of log(sigma) in training.
        p_std: Standard deviation of log(sigma) in training.
        sigma_min: The lowest noise level of the sampler before 0.
        sigma_max: Its highest.
        rho: How strongly its levels crowd at the low end, see ``sigmas.get_sigmas_karras``.

    Raises:
        TypeError: An argument is no number.
        ValueError: Not 0 < sigma_min <= sigma_max, or another number out of its range.

    Source:
        Karras et al. 2022 (arXiv 2206.00364) table 1; Karras et al. 2024 (EDM2, arXiv 2312.02696)
        for the learned weight of the loss.
    """

    _images_checked = False  # whether a call of training_losses has read the range of its data

    def __init__(
        self,
        sigma_data: float = 0.5,
        p_mean: float = -1.2,
        p_std: float = 1.2,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
    ) -> None:
        super().__init__()
        self.sigma_data = as_positive("sigma_data", sigma_data, finite=True)
        self.p_mean = as_real("p_mean", p_mean)
        if not math.isfinite(self.p_mean):
            raise ValueError(f"p_mean must be finite, got {self.p_mean}")
        self.p_std = as_positive("p_std", p_std, finite=True)
        self.sigma_min = as_positive("sigma_min", sigma_min, finite=True)
        self.sigma_max = as_positive("sigma_max", sigma_max, finite=True)
        if self.sigma_min > self.sigma_max:
            raise ValueError(
                f"sigma_min must be at most sigma_max, {self.sigma_max}, got {self.sigma_min}"
            )
        self.rho = as_positive("rho", rho)

    def __repr__(self) -> str:
        """The call that makes it."""
        names = ("sigma_data", "p_mean", "p_std", "sigma_min", "sigma_max", "rho")
        return f"EDM({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    # ---- forward process -----------------------------------------------------------------------

    def q_sample(
        self,
        x_start: Tensor,
        sigma: Tensor | float,
        noise: Noise | None = None,
        *,
        group_dim: int | None = None,
    ) -> Tensor:
        """Noised samples x = x_0 + sigma noise.

        Args:
            x_start: x_0, ``[B, ...]``.
            sigma: Noise levels above 0, ``[B]``, or one number.
            noise: Standard normal, like ``x_start``, or a noise key; ``None`` for a key seeded by
                torch's generator.
            group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
                frames of ``[B, C, F, H, W]``: sigma may then be ``[B, G]``.

        Returns:
            x, like ``x_start``; not scaled by c_in.
        """
        level = levels_beside("sigma", sigma, x_start, "x_start", 0.0, group_dim=group_dim)
        return noised(x_start, noise, 1.0, level, group_dim)

    def sample_sigmas(
        self,
        batch: int,
        noise: PhiloxNoise | None = None,
        *,
        stratified: bool = False,
        groups: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A noise level for each sample of a training step: log(sigma) ~ N(p_mean, p_std^2).

        A function of the key, independent of its noise: see ``timesteps.draw``.

        Args:
            batch: B.
            noise: A noise key; ``None`` for one seeded by torch's generator.
            stratified: As for ``timesteps.draw``.
            groups: G, for a level of each group.
            dtype: Of the result.
            device: ``None`` for that of the key's tensors, else torch's default.

        Returns:
            ``[B]``.
        """
        messages.check_dtype(dtype)
        u, at = timesteps.drawn(
            "uniform", batch, noise, stratified=stratified, groups=groups, device=device
        )
        sigma = torch.exp(self.p_mean + self.p_std * torch.special.ndtri(u))
        return to_device(sigma.to(dtype), at)

    def preconditioning(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The factors c_skip, c_out and c_in, and the timestep input c_noise.

        Args:
            sigma: Noise levels above 0, of any shape.

        Returns:
            Four float64 tensors of the shape of ``sigma``; float32 where its device has no
            float64.
        """
        sigma = widened(sigma)
        c_in = self._c_in(sigma)
        skip, out = self.sigma_data * c_in, sigma * c_in
        return skip * skip, self.sigma_data * out, c_in, sigma.log() / 4

    def _c_in(self, sigma: Tensor) -> Tensor:
        return (sigma * sigma + self.sigma_data**2).rsqrt()

    def denoise(
        self,
        model: Model,
        x: Tensor,
        sigma: Tensor | float,
        model_kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """The denoiser D(x; sigma) = c_skip x + c_out F(c_in x; c_noise).

        Args:
            model: F, ``model(c_in x, c_noise, **model_kwargs)``.
            x: Noised samples, ``[B, ...]``, not scaled.
            sigma: Their noise levels above 0, ``[B]``, or one number.
            model_kwargs: More arguments for the model.

        Returns:
            The predicted x_0, like ``x``.
        """
        check_model_kwargs(model_kwargs)
        level = levels_beside("sigma", sigma, x, "x", 0.0)
        c_skip, c_out, c_in, c_noise = self.preconditioning(level)
        scaled = ops.linear_combination(x, x, (c_in, 0.0))
        output = call_model(model, scaled, as_model_input(c_noise, x), model_kwargs)
        return ops.linear_combination(x, output, (c_skip, c_out))

    # ---- training ------------------------------------------------------------------------------

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        sigma: Tensor | float | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Noise | None = None,
        *,
        logvar: Tensor | Callable[[Tensor], Tensor] | None = None,
        weights: Tensor | Callable[[Tensor], Tensor] | None = None,
        group_dim: int | None = None,
        reduction: str = "sample",
        mask: Tensor | None = None,
        mask_reduction: str = "mask",
        loss: str = "mse",
        delta: Coef | Callable[[Tensor], Tensor] | None = None,
        input_perturbation: float = 0.0,
    ) -> dict[str, Tensor]:
        """The loss of each sample, lambda mean (D - x_0)^2 with lambda = 1 / c_out^2.

        Computed as mean (F - target)^2 with target = (x_0 - c_skip x) / c_out, which is sigma /
        (sigma_data r) x_0 - sigma_data / r noise, r = sqrt(sigma^2 + sigma_data^2): no difference
        of close numbers at any sigma, and neither x nor the target nor the noise of a key is in
        memory. With ``logvar``, u, the loss is mse / exp(u) + u (EDM2): where u(sigma) is the best
        one, the logarithm of the mse, every noise level has the same weight.

        Args:
            model: F, ``model(c_in x, c_noise, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``. The first call warns of CPU images in [0, 1] or [0, 255].
            sigma: Noise levels above 0, ``[B]``, or one number; ``None`` for ``sample_sigmas`` of
                the key ``noise``, or of one seeded by torch's generator.
            model_kwargs: More arguments for the model.
            noise: Standard normal, like ``x_start``, or a noise key; ``None`` for a key seeded by
                torch's generator. The noise of a key is generated twice and never stored. One key
                gives a training step its levels and its noise.
            logvar: EDM2's uncertainty u, of the shape of the loss or 0-dim; or a function of
                c_noise, such as a small network. It gets gradients.
            weights: Weights beside lambda, ``[B]``, or a function of sigma, float64 ``[B]``; with
                groups ``[B, G]``.
            group_dim: A dimension of the samples whose entries have a level each, such as 2 for the
                frames of ``[B, C, F, H, W]``: sigma is then ``[B, G]``, also for the
                model, and must be given.
            reduction: "sample", or, with ``group_dim``, "group" for the loss of each group.
            mask: What of each sample counts, as in ``ops.denoising_loss``.
            mask_reduction: "mask" or "all", as in ``ops.denoising_loss``.
            loss: Of an error, "mse", "pseudo_huber" or "smooth_l1", see ``ops.denoising_loss``.
            delta: Error at which that loss becomes linear: a number, ``[B]``, with groups ``[B,
                G]``, or a function of sigma, float64.
            input_perturbation: gamma: the model's input has the noise z + gamma z' with a second
                normal z' (``noise.perturbation_key``), its target z alone. At least 0; needs the
                noise of a key.

        Returns:
            ``loss``, and ``mse``, which is the loss without ``logvar``; each ``[B]``, or ``[B, G]``
            by group.

        Raises:
            TypeError: An argument, or the model's output, of the wrong type.
            ValueError: An argument, or the model's output, of the wrong shape or value.

        Source:
            Karras et al. 2022 (arXiv 2206.00364) eq. 8; Karras et al. 2024 (arXiv 2312.02696)
            eq. 14.
        """
        check_model_kwargs(model_kwargs)
        noise, sigma = noise_and_levels(
            noise, sigma, x_start, "x_start", self.sample_sigmas, group_dim
        )
        level = levels_beside("sigma", sigma, x_start, "x_start", 0.0, group_dim=group_dim)
        check_reduction(reduction, group_dim)
        check_mask(mask, mask_reduction, x_start)
        if not compiling() and not self._images_checked:
            self._images_checked = warn_of_images("x_start", x_start)
        if input_perturbation:
            input_perturbation = check_perturbation(input_perturbation, noise)
        if callable(weights):
            weights = weights(level)
        c_in = self._c_in(level)
        of_noise = level * c_in
        scaled = noised(x_start, noise, c_in, of_noise, group_dim)
        if input_perturbation:
            scaled = perturbed(scaled, noise, input_perturbation, of_noise, group_dim)
        c_noise = as_model_input(level.log() / 4, x_start)
        output = call_model(model, scaled, c_noise, model_kwargs)
        mse = ops.denoising_loss(
            output,
            x_start,
            noise,
            target=(of_noise / self.sigma_data, c_in * -self.sigma_data),
            weight=weights_beside(weights, x_start, group_dim),
            group_dim=group_dim,
            reduction=reduction,
            mask=mask,
            mask_reduction=mask_reduction,
            loss=loss,
            delta=of_level("delta", delta, level),
        )
        if logvar is None:
            return {"loss": mse, "mse": mse}
        u = _logvar(logvar(c_noise) if callable(logvar) else logvar, mse)
        return {"loss": mse * torch.exp(-u) + u, "mse": mse}

    # ---- sampling ------------------------------------------------------------------------------

    def levels(self, num_steps: int = 18) -> NoiseLevels:
        """The noise levels of the sampler: Karras' from sigma_max to sigma_min, and 0.

        Args:
            num_steps: N.

        Returns:
            N + 1 levels for any solver, whose model is F; init_noise_sigma is sigma_max, as in the
            paper.
        """
        num_steps = as_int("num_steps", num_steps, 1)
        sigmas = get_sigmas_karras(num_steps, self.sigma_min, self.sigma_max, self.rho)
        levels = NoiseLevels.from_edm(sigmas, sigma_data=self.sigma_data)
        return replace(levels, init_noise_sigma=self.sigma_max)

    def sample(
        self,
        model: Model,
        shape: Sequence[int] | Tensor,
        num_steps: int = 18,
        noise: Noise | None = None,
        *,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        solver: Callable[..., SolverTable] = heun_table,
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
        """Samples by EDM's sampler: Heun's method, with churn if asked for.

        ``diffcore.sample`` with ``solver(levels(num_steps))``.

        Args:
            model: F, ``model(c_in x, c_noise, **model_kwargs)``.
            shape: Shape of the samples, ``[B, ...]``; or, instead of ``noise``, the noise itself.
            num_steps: N. Heun's method calls the model 2 N - 1 times.
            noise: Standard normal, of the given shape; the first sample is sigma_max times it. Or a
                noise key for it; ``None`` for a key seeded by torch's generator.
            s_churn: As for ``solvers.heun_table``, and the three after it.
            s_tmin: The lowest sigma that churn raises.
            s_tmax: The highest.
            s_noise: Factor of the noise of churn.
            solver: A function of ``solvers`` from noise levels to a table, such as
                ``solvers.dpmpp_2m_table``. It gets churn only where ``s_churn`` is not 0.
            clip_range: Bounds of the predicted x_0, or ``None``.
            guidance_scale: As for ``diffcore.sample``.
            guidance: As for ``diffcore.sample``.
            model_kwargs: More arguments for the model.
            uncond_kwargs: As for ``diffcore.sample``.
            step_noise: The noise of churn, as ``noise`` of ``diffcore.sample``; ``None`` for the
                key of the first sample.
            device: Where to sample; ``None`` for that of a ``noise`` tensor, else of the model's
                parameters, else of the tensors in a key.
            dtype: Of the samples; ``None`` for that of ``noise``, else torch's default.
            generator: Source of seeds; ``None`` for torch's own.
            options: More arguments of ``diffcore.sample``, such as ``mask``, ``callback`` and
                ``progress``.

        Returns:
            x_0, of the given shape; with ``return_trajectory`` a ``Trajectory``.

        Source:
            Karras et al. 2022 (arXiv 2206.00364) algorithm 2.
        """
        churn: tuple[float, ...] = ()
        if as_real("s_churn", s_churn) != 0:
            given = map(as_real, _CHURN, (s_churn, s_tmin, s_tmax, s_noise))
            churn = tuple(map(default_as_constant, given, (0.0, 0.0, math.inf, 1.0)))
        num_steps = default_as_constant(as_int("num_steps", num_steps), 18)
        table = self._solver(solver, num_steps, clip_range, churn)
        return sample_from_noise(
            model,
            shape,
            table,
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
        self,
        solver: Callable[..., SolverTable],
        num_steps: int,
        clip_range: ClipRange,
        churn: tuple[float, ...],
    ) -> SolverTable:
        options = dict(zip(_CHURN, churn, strict=False))
        return solver(self.levels(num_steps), clip_range=clip_range, **options)


def _logvar(u: Any, mse: Tensor) -> Tensor:
    """EDM2's u beside the losses, of their shape or 0-dim, in their dtype."""
    if not isinstance(u, Tensor) or not u.is_floating_point():
        came = u.dtype if isinstance(u, Tensor) else type(u).__name__
        raise TypeError(f"logvar must be or return a floating-point tensor, got {came}")
    if u.ndim and u.shape != mse.shape:
        if u.shape[: mse.ndim] != mse.shape or u.numel() != mse.numel():
            raise ValueError(f"logvar must have shape {tuple(mse.shape)}, got {tuple(u.shape)}")
        u = u.reshape(mse.shape)
    found: Tensor = u.to(mse.dtype)
    return found
