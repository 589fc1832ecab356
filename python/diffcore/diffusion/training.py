"""What GaussianDiffusion trains a model by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffcore import ops
from diffcore._checks import check_choice
from diffcore._types import Model, Noise
from diffcore.coefficients.bound import DECODERS
from diffcore.diffusion.tables import DiffusionTables
from diffcore.sampling.noise import noise_or_default


class TrainingLosses(DiffusionTables):
    """The losses of a model; a part of ``GaussianDiffusion``."""

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor | int,
        noise: Noise | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        *,
        weights: Tensor | None = None,
        decoder: str = "discretized",
    ) -> dict[str, Tensor]:
        """The loss of each sample, by ``loss_type`` of the constructor.

        ::

            mse           w_t mean (m - target)^2 [+ vb]    Algorithm 1, the simplified objective
            rescaled_mse  the same, with vb times T / 1000
            kl            vb                                in bits per dimension
            rescaled_kl   T vb                              unbiased for L_0 + ... + L_{T-1}

        vb is the term of the variational bound at t: L_t, or at t = 0 the decoder's L_0. To an mse
        it is added where the variance is learned: the hybrid objective, in which its gradient goes
        to the variance alone. No prediction is clipped here.

        Args:
            model: ``model(x_t, t, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``.
            t: Timesteps, integers ``[B]``, usually uniform in 0 .. T-1.
            noise: Standard normal, like ``x_start``, or a recipe for it; ``None`` for a recipe
                seeded by torch's generator. A recipe is drawn twice, and never stored.
            model_kwargs: More arguments for the model.
            weights: ``[T]``, a weight for each timestep (``losses.min_snr_weights``); 1 if
                ``None``. Keep it on the device of ``x_start``: moving it there waits. They weigh
                the mse alone, and go with no kl.
            decoder: L_0 for pixels k/127.5 - 1 ("discretized": the mass of their bin) or for
                anything, latents above all ("gaussian": the density). Whether they are pixels is
                not looked at while training: of another x_0 the bin is x_0 ± 1/255.

        Returns:
            ``loss`` and the ``mse`` and ``vb`` that it is the sum of, as far as there are, each
            ``[B]``, to be averaged over the batch.

        Raises:
            TypeError, ValueError: Arguments that do not fit, or what the model returned.

        Source:
            Ho et al. 2020 (arXiv 2006.11239) eq. 14; Nichol and Dhariwal 2021 (arXiv 2102.09672)
            eq. 16.
        """
        check_choice("decoder", decoder, DECODERS)
        of_bound = self.loss_type in ("kl", "rescaled_kl")
        if of_bound and weights is not None:
            raise ValueError(f"weights are given; loss_type={self.loss_type!r} has none")
        t = self._check_t(t, x_start)
        noise = noise_or_default(noise, x_start)
        x_t = ops.q_sample(x_start, t, noise, self._noise_table(x_start.device))
        output, variance = self._predict(model, x_t, t, model_kwargs)
        if of_bound:
            factor = self.num_timesteps if self.loss_type == "rescaled_kl" else 1.0
            vb = self._bound_term(x_start, output, variance, noise, t, decoder, factor)
            return {"loss": vb, "vb": vb}
        mse = self._squared_error(x_start, output, noise, t, weights)
        if variance is None:
            return {"loss": mse, "mse": mse}
        factor = self.num_timesteps / 1000 if self.loss_type == "rescaled_mse" else 1.0
        vb = self._bound_term(x_start, output.detach(), variance, noise, t, decoder, factor)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _squared_error(
        self, x_start: Tensor, output: Tensor, noise: Noise, t: Tensor, weights: Tensor | None
    ) -> Tensor:
        alpha = sigma = None
        if self.prediction_type == "v_prediction":
            alpha = self._named_table("sqrt_alphas_cumprod", x_start.device)
            sigma = self._named_table("sqrt_one_minus_alphas_cumprod", x_start.device)
        return ops.denoising_loss(
            output,
            x_start,
            noise,
            prediction_type=self.prediction_type,
            alpha=alpha,
            sigma=sigma,
            weight=None if weights is None else self._weights(weights, x_start.device),
            t=t,
        )

    def _bound_term(
        self,
        x_start: Tensor,
        output: Tensor,
        variance: Tensor | None,
        noise: Noise,
        t: Tensor,
        decoder: str,
        factor: float,
    ) -> Tensor:
        """``factor`` times the bound's term, in bits per dimension."""
        n = max(x_start.shape[1:].numel(), 1)
        return ops.vlb_term(
            x_start,
            output,
            self._vlb_table(None, decoder, "noise", x_start.device),
            t=t,
            noise=noise,
            variance_output=variance,
            scale=factor / (n * math.log(2)),
        )
