"""The variational bound, L = L_T + sum_{t>0} L_t + L_0, in bits per dimension."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore._checks import check_choice
from diffcore._types import Model
from diffcore.coefficients.bound import DECODERS
from diffcore.diffusion import bound, reverse
from diffcore.diffusion.checks import (
    can_read_values,
    check_batch,
    check_decoder,
    check_noise,
    check_noised,
    check_pixels,
    check_timestep_values,
    check_timesteps,
)
from diffcore.diffusion.settings import Settings
from diffcore.noise import Noise, PhiloxNoise
from diffcore.sampling.progress import progress_bar


class VariationalBound(Settings):
    """The methods of ``GaussianDiffusion`` that compute the bound."""

    def prior_bpd(self, x_start: Tensor, *, dof: float | Tensor | None = None) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)), the part of the bound without the model.

        Args:
            x_start: x_0, ``[B, ...]``.
            dof: Number of dimensions of the subspace in which x_0 and the noise lie, a number or
                ``[B]``; ``None`` for all (``ops.prior_kl``).

        Returns:
            ``[B]``, in bits per dimension (of the subspace).
        """
        check_batch("x_start", x_start)
        return bound.prior(self.tables, x_start, dof)

    def vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor | int,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        decoder: str = "discretized",
    ) -> dict[str, Tensor]:
        """A term of the bound: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 -log p(x_0).

        Differentiable in the model's output, its variance included.

        Args:
            model: ``model(x_t, t, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``.
            x_t: Noised samples, like ``x_start``.
            t: Timesteps, integers ``[B]``, or one int.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.
            decoder: -log p(x_0) for pixels k/127.5 - 1 ("discretized": the mass of their bin) or
                for other data such as latents ("gaussian": the density).

        Returns:
            ``output`` ``[B]``, in bits per dimension, and ``pred_xstart``, like ``x_start``.

        Raises:
            ValueError: ``x_start`` that is not made of pixels, with "discretized". On CUDA, where
                the check would wait for the device, only with ``DIFFCORE_DEBUG=1``.
        """
        check_choice("decoder", decoder, DECODERS)
        t = check_timesteps(t, x_start, self.num_timesteps)
        check_timestep_values(t, self.num_timesteps)
        check_noised("x_t", x_t, "x_start", x_start)
        if decoder == "discretized" and can_read_values(x_start):
            check_pixels("x_start", x_start)
        output, variance_output = reverse.predict(self.tables, model, x_t, t, model_kwargs)
        clip = self._clip_range(clip_denoised)
        return bound.term_of_x_t(
            self.tables, x_start, x_t, output, variance_output, t, clip, decoder
        )

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        noise: Noise | None = None,
        decoder: str = "discretized",
        progress: bool | None = False,
    ) -> dict[str, Tensor]:
        """The complete bound: one call of the model at every timestep, without gradients.

        Runs under ``torch.no_grad()``; ``vb_terms_bpd`` and ``training_losses`` are differentiable.

        Column t of the results ``[B, T]`` is timestep t, so L_0 comes first. The columns of
        guided-diffusion run in the opposite direction, from T-1 to 0.

        Args:
            model: ``model(x_t, t, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.
            noise: The noise of every x_t, like ``x_start``; or a noise key, of which timestep t
                reads the stream t after its own; ``None`` for a key seeded by torch's generator.
            decoder: As for ``vb_terms_bpd``.
            progress: Show a progress bar (tqdm); ``None`` for one on terminals only.

        Returns:
            ``total_bpd`` ``[B]``, the sum of ``prior_bpd`` ``[B]`` and of ``vb`` ``[B, T]``, in
            bits per dimension; ``xstart_mse`` ``[B, T]`` and ``mse`` ``[B, T]``, the mean squared
            errors of the predicted x_0 and of the noise that it implies, both after the clip.

        Raises:
            TypeError: ``x_start`` or ``noise`` of another type.
            ValueError: ``x_start`` that is not made of pixels, with "discretized" (read once, on
                every device).

        Source:
            Ho et al. 2020 (arXiv 2006.11239) eq. 5; Nichol and Dhariwal 2021 (arXiv 2102.09672).
        """
        check_batch("x_start", x_start)
        check_decoder(decoder, "x_start", x_start)
        noise = check_noise(noise, x_start)
        clip = self._clip_range(clip_denoised)
        prior = self.prior_bpd(x_start)
        found = []
        for t in progress_bar(range(self.num_timesteps), "calc_bpd_loop", progress):
            steps = check_timesteps(t, x_start, self.num_timesteps)
            now = noise.at(noise.stream + t) if isinstance(noise, PhiloxNoise) else noise
            options = (now, clip, decoder, model_kwargs)
            found.append(bound.noised_term(self.tables, model, x_start, steps, *options))
        return bound.of_terms(self.tables, prior, found)
