"""The variational bound of GaussianDiffusion, term by term, in bits a dimension."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import check_choice
from diffcore._engine import native
from diffcore._engine.dispatch import plain_eager
from diffcore._types import Model, Noise
from diffcore.coefficients.bound import DECODERS, FIXED, VLB_COLUMNS
from diffcore.coefficients.step import x0_coefficients
from diffcore.diffusion.tables import DiffusionTables
from diffcore.noise import PhiloxNoise
from diffcore.sampling.progress import progress_bar


class VariationalBound(DiffusionTables):
    """L = L_T + sum_{t>0} L_t + L_0, for each sample. Names are guided-diffusion's."""

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || N(0, I)): the part of the bound that no model can change.

        Args:
            x_start: x_0, ``[B, ...]``.

        Returns:
            ``[B]``, in bits a dimension.
        """
        self._check_t(0, x_start)
        alpha, sigma = self.schedule.alpha[-1].item(), self.schedule.sigma[-1].item()
        return ops.prior_kl(x_start, alpha, sigma) * _bits(x_start)

    def vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor | int,
        *,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        decoder: str = "discretized",
    ) -> dict[str, Tensor]:
        """A term of the bound: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at t = 0 -log p(x_0).

        With gradients for what the model returned, its variance included.

        Args:
            model: ``model(x_t, t, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``.
            x_t: Noised samples, like ``x_start``.
            t: Timesteps, integers ``[B]``, or one int.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.
            decoder: What -log p(x_0) is: "discretized" for pixels k/127.5 - 1 (the mass of their
                bin), "gaussian" for anything else, latents for example (the density).

        Returns:
            ``output`` ``[B]``, in bits a dimension, and ``pred_xstart``, like ``x_start``.

        Raises:
            ValueError: With "discretized", x_0 that is no pixel. On CUDA, where looking would wait
                for the device, only with ``DIFFCORE_DEBUG=1``.
        """
        t = self._check_t(t, x_start)
        clip = self._clip(clip_denoised)
        table = self._vlb_table(clip, decoder, "x_t", x_start.device)
        if decoder == "discretized" and may_look(x_start):
            check_pixels("x_start", x_start)
        prediction, variance = self._predict(model, x_t, t, model_kwargs)
        output = ops.vlb_term(
            x_start,
            prediction,
            table,
            t=t,
            x_t=x_t,
            variance_output=variance,
            scale=_bits(x_start),
        )
        pair = self._table(("x0 pair",), self._x0_pair, x_t.device)
        pred_xstart = ops.linear_combination(x_t, prediction, pair, t=t)
        if clip is not None:
            pred_xstart = pred_xstart.clamp(-clip, clip)
        return {"output": output, "pred_xstart": pred_xstart}

    @torch.no_grad()
    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        *,
        clip_denoised: bool | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        noise: Noise | None = None,
        decoder: str = "discretized",
        progress: bool | None = False,
    ) -> dict[str, Tensor]:
        """The whole bound: every timestep, one call of the model each, without gradients.

        Column t of what has a column for each timestep is timestep t, with L_0 first;
        guided-diffusion's run downwards, from T-1 to 0.

        Args:
            model: ``model(x_t, t, **model_kwargs)``.
            x_start: x_0, ``[B, ...]``.
            clip_denoised: Clip the predicted x_0; ``None`` for ``clip_sample`` of the constructor.
            model_kwargs: More arguments for the model.
            noise: Like ``x_start``, the noise of every x_t; or a recipe, of which timestep t takes
                the stream t after its own; ``None`` for a recipe seeded by torch's generator.
            decoder: As for ``vb_terms_bpd``.
            progress: Show a bar (tqdm); ``None`` for one on terminals only.

        Returns:
            ``total_bpd`` ``[B]``, the sum of ``prior_bpd`` ``[B]`` and of ``vb`` ``[B, T]``, in
            bits a dimension; ``xstart_mse`` ``[B, T]`` and ``mse`` ``[B, T]``, the mean squared
            errors of the predicted x_0 and of the noise that it implies, both after the clip.

        Raises:
            TypeError: ``x_start`` or ``noise`` is of another type.
            ValueError: With "discretized", x_0 that is no pixel (looked at once, on every device).

        Source:
            Ho et al. 2020 (arXiv 2006.11239) eq. 5; Nichol and Dhariwal 2021 (arXiv 2102.09672).
        """
        self._check_t(0, x_start)
        check_decoder(decoder, "x_start", x_start)
        noise = check_noise(noise, x_start)
        clip = self._clip(clip_denoised)
        prior = self.prior_bpd(x_start)
        vb, xstart_mse = [], []
        for t in progress_bar(range(self.num_timesteps), "calc_bpd_loop", progress):
            now = noise.at(noise.stream + t) if isinstance(noise, PhiloxNoise) else noise
            steps = torch.full((len(x_start),), t, dtype=torch.int64, device=x_start.device)
            term, error = self._noised_term(model, x_start, steps, now, clip, decoder, model_kwargs)
            vb.append(term)
            xstart_mse.append(error)
        found = {"vb": torch.stack(vb, dim=1), "xstart_mse": torch.stack(xstart_mse, dim=1)}
        snr = self._table(("snr",), lambda: self.schedule.snr, x_start.device)
        return {
            "total_bpd": found["vb"].sum(dim=1) + prior,
            "prior_bpd": prior,
            **found,
            "mse": (found["xstart_mse"] * snr).to(found["xstart_mse"].dtype),
        }

    def _noised_term(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        noise: Noise,
        clip: float | None,
        decoder: str,
        model_kwargs: Mapping[str, Any] | None,
    ) -> tuple[Tensor, Tensor]:
        """The term t (bits a dimension) and the mean squared error of x_0, each ``[B]``.

        From x_0 and the noise, the error of the predicted x_0 is that of the model and no more: it
        is not the difference of large numbers that a noised sample would make of it.
        """
        device = x_start.device
        x_t = ops.q_sample(x_start, t, noise, self._noise_table(device))
        prediction, variance = self._predict(model, x_t, t, model_kwargs)
        table = self._vlb_table(clip, decoder, "noise", device)
        term = ops.vlb_term(
            x_start,
            prediction,
            table,
            t=t,
            noise=noise,
            variance_output=variance,
            scale=_bits(x_start),
        )
        errors = self._mse_table(clip, device)
        scale = 1 / max(1, x_start.shape[1:].numel())
        return term, ops.vlb_term(x_start, prediction, errors, t=t, noise=noise, scale=scale)

    def _mse_table(self, clip: float | None, device: torch.device) -> Tensor:
        """A table of ``ops.vlb_term`` whose every row is the squared error of the predicted x_0."""

        def build() -> Tensor:
            bound = self._vlb_table(clip, "gaussian", "noise", torch.device("cpu"))
            table = bound[:, :FIXED].clone()
            for name, value in (("decoder", 0), ("factor", 1), ("offset", 0), ("d_0", 0)):
                table[:, VLB_COLUMNS.index(name)] = value
            return table

        return self._table(("mse", clip), build, device)

    def _x0_pair(self) -> Tensor:
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        pair = x0_coefficients(alpha, sigma, self.prediction_type)
        return torch.stack([torch.as_tensor(c).expand_as(alpha) for c in pair], dim=1)


def check_decoder(decoder: str, name: str, x: Tensor) -> None:
    """Refuse an unknown decoder, and data that the discretised one has no bins for.

    Args:
        decoder: One of ``DECODERS``.
        name: What the caller calls the data.
        x: The data. Looking at them waits for their device.

    Raises:
        ValueError: Either.
    """
    check_choice("decoder", decoder, DECODERS)
    if decoder == "discretized":
        check_pixels(name, x)


def may_look(x: Tensor) -> bool:
    """Whether values can be looked at without breaking a graph or waiting for a device."""
    return plain_eager() and (x.device.type == "cpu" or native.DEBUG)


def check_pixels(name: str, x: Tensor) -> None:
    """Refuse what is not k/127.5 - 1 for a whole k in 0 .. 255, to the rounding of its dtype.

    16-bit pixels must be the nearest to such a value. Float64 ones may have been float32 before.

    Args:
        name: What the caller calls it.
        x: The data.

    Raises:
        ValueError: Some are not.
    """
    exact = x.detach().double()
    grid = (exact * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1
    if x.dtype.itemsize < 4:
        good = grid.to(x.dtype) == x
    else:
        good = (exact - grid).abs() <= 4 * torch.finfo(torch.float32).eps
    if bool(good.all()):
        return
    bad = exact[~good]
    raise ValueError(
        f"{name} must be pixels k/127.5 - 1, k = 0 .. 255, with decoder='discretized': "
        f"{bad.numel()} of {x.numel()} values are not, such as {bad[0].item():.6g}; use "
        "decoder='gaussian' for latents and other data that are not 8-bit pixels"
    )


def check_noise(noise: Noise | None, like: Tensor, name: str = "noise") -> Noise:
    """The noise given, if it fits; else a recipe seeded by torch's generator.

    Args:
        noise: A tensor, a recipe or ``None``.
        like: The samples it is for.
        name: What the caller calls it.

    Returns:
        A tensor or a recipe.

    Raises:
        TypeError: It is something else.
        ValueError: The tensor has another shape.
    """
    if noise is None:
        return PhiloxNoise.from_generator(device=like.device)
    if isinstance(noise, Tensor):
        if noise.shape != like.shape:
            raise ValueError(
                f"{name} must have the shape of the samples, {list(like.shape)}, "
                f"got {list(noise.shape)}"
            )
    elif not isinstance(noise, PhiloxNoise):
        raise TypeError(f"{name} must be a tensor or a PhiloxNoise, got {type(noise).__name__}")
    return noise


def _bits(x: Tensor) -> float:
    """From nats a sample to bits a dimension."""
    return 1 / (max(1, x.shape[1:].numel()) * math.log(2))
