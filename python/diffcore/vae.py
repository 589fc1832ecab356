"""The VAE of the lecture: its posterior, and the two terms of its bound."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from diffcore import ops
from diffcore.noise import PhiloxNoise
from diffcore.reference import compute_dtype

_LOGVAR_MIN, _LOGVAR_MAX = -30.0, 20.0


class DiagonalGaussianDistribution:
    """N(mean, exp(logvar) I), what a VAE's encoder says about z. Names and clamp are diffusers'.

    Any number of dimensions after the second; ``kl`` and ``nll`` sum over all but the batch.

    Args:
        parameters: ``[B, 2C, ...]``, the means and then the log-variances along dimension 1.
        deterministic: Use the mean alone: variance, KL and NLL are 0.

    Attributes:
        mean: ``[B, C, ...]``.
        logvar: ``[B, C, ...]``, clamped to [-30, 20].
        std: exp(logvar / 2).
        var: exp(logvar).

    Raises:
        TypeError: ``parameters`` is not a tensor of floating point numbers.
        ValueError: Dimension 1 is missing or odd.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114); Rombach et al. 2022 (arXiv 2112.10752).
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        if not isinstance(parameters, Tensor) or not parameters.is_floating_point():
            is_tensor = isinstance(parameters, Tensor)
            what = f"a tensor of {parameters.dtype}" if is_tensor else type(parameters).__name__
            raise TypeError(f"parameters must be a tensor of floating point numbers, got {what}")
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(
                f"parameters must have shape [B, 2C, ...], got {list(parameters.shape)}"
            )
        self.parameters = parameters
        self.deterministic = bool(deterministic)
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(_LOGVAR_MIN, _LOGVAR_MAX)

    @cached_property
    def std(self) -> Tensor:
        """Standard deviation, ``[B, C, ...]``."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @cached_property
    def var(self) -> Tensor:
        """Variance, ``[B, C, ...]``."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(
        self, generator: torch.Generator | None = None, *, noise: Tensor | PhiloxNoise | None = None
    ) -> Tensor:
        """Draw z = mean + exp(logvar / 2) noise, differentiable in the parameters.

        Args:
            generator: Source of the noise's seed; ``None`` for torch's own.
            noise: The noise, like ``mean``, or a recipe for it, instead.

        Returns:
            ``[B, C, ...]``.
        """
        if self.deterministic:
            return self.mean
        return ops.reparameterize(self.mean, self.logvar, noise, generator=generator)

    def sample_kl(
        self, generator: torch.Generator | None = None, *, noise: Tensor | PhiloxNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """``sample()`` and ``kl()`` in one pass over the parameters, for training.

        Args:
            generator: Source of the noise's seed; ``None`` for torch's own.
            noise: The noise, like ``mean``, or a recipe for it, instead.

        Returns:
            z ``[B, C, ...]`` and the KL to the standard normal ``[B]``, in nats.
        """
        if self.deterministic:
            return self.mean, self._zeros()
        return ops.reparameterize_kl(self.mean, self.logvar, noise, generator=generator)

    def mode(self) -> Tensor:
        """The most probable z: the mean, ``[B, C, ...]``."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other), the lecture's L2, summed over all dimensions but the batch.

        Args:
            other: ``None`` for the standard normal.

        Returns:
            ``[B]``, in nats.
        """
        if self.deterministic:
            return self._zeros()
        if other is None:
            return ops.standard_normal_kl(self.mean, self.logvar, reduction="sample")
        if getattr(other, "deterministic", None) is None:
            kind = type(other).__name__
            raise TypeError(f"other must be a DiagonalGaussianDistribution or None, got {kind}")
        if other.deterministic:
            raise ValueError("other is deterministic: the KL to a point is infinite")
        return ops.normal_kl(self.mean, self.logvar, other.mean, other.logvar, reduction="sample")

    def nll(self, sample: Tensor) -> Tensor:
        """-log N(sample; mean, var), summed over all dimensions but the batch.

        Args:
            sample: ``[B, C, ...]``.

        Returns:
            ``[B]``, in nats.
        """
        if self.deterministic:
            return self._zeros()
        return ops.gaussian_nll(sample, self.mean, self.logvar, reduction="sample")

    def _zeros(self) -> Tensor:
        mean = self.mean
        return mean.new_zeros(len(mean), dtype=compute_dtype(mean.dtype))


def reconstruction_loss(x: Tensor, x_recon: Tensor, *, decoder_std: float | Tensor = 1.0) -> Tensor:
    """The lecture's L1 = |x - D(z)|^2 / (2 s^2): -log N(x; D(z), s^2 I) up to a constant.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: What the decoder made of z, like ``x``.
        decoder_std: s, the standard deviation of the decoder, a number, or a tensor of one element,
            which may be trained; 1 in the lecture.

    Returns:
        ``[B]``, in nats, summed over each sample.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if isinstance(decoder_std, Tensor):
        if decoder_std.numel() != 1:
            shape = list(decoder_std.shape)
            raise ValueError(f"decoder_std must be a number or of one element, got {shape}")
        decoder_std = decoder_std.reshape(())
    elif not decoder_std > 0:
        raise ValueError(f"decoder_std must be positive, got {decoder_std}")
    # The fused squared error is a mean over each sample: its weight turns it into the sum wanted.
    weight = x.shape[1:].numel() / (2 * decoder_std**2)
    return ops.denoising_loss(x_recon, x, x, prediction_type="sample", weight=weight)


def vae_loss(
    x: Tensor, x_recon: Tensor, kl: Tensor, *, decoder_std: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """The lecture's two terms and their sum, -ELBO up to a constant, for each sample.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: What the decoder made of z, like ``x``.
        kl: ``[B]``, from ``DiagonalGaussianDistribution.sample_kl`` or ``ops.reparameterize_kl``.
        decoder_std: s, the standard deviation of the decoder, a number, or a tensor of one element,
            which may be trained; 1 in the lecture.

    Returns:
        ``loss`` = ``reconstruction`` (L1) + ``kl`` (L2), each ``[B]``, in nats.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114) eq. 7 and 10.
    """
    reconstruction = reconstruction_loss(x, x_recon, decoder_std=decoder_std)
    if not isinstance(kl, Tensor) or kl.shape != reconstruction.shape:
        what = list(kl.shape) if isinstance(kl, Tensor) else type(kl).__name__
        raise ValueError(f"kl must have shape {list(reconstruction.shape)}, got {what}")
    return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}


def elbo(
    x: Tensor, x_recon: Tensor, mean: Tensor, logvar: Tensor, *, decoder_std: float | Tensor = 1.0
) -> Tensor:
    """The evidence lower bound -(L1 + L2) with one sample of z, for each sample of x.

    L1 = |x - D(z)|^2 / (2 s^2) leaves out the constant log s + 1/2 log 2 pi of each dimension of x;
    L2 = KL(N(mean, exp(logvar)) || N(0, I)).

    Args:
        x: The data, ``[B, ...]``.
        x_recon: What the decoder made of z, like ``x``.
        mean: Of the posterior of z, ``[B, ...]``.
        logvar: Of the posterior of z, like ``mean``.
        decoder_std: s, the standard deviation of the decoder, a number, or a tensor of one element,
            which may be trained; 1 in the lecture.

    Returns:
        ``[B]``, in nats.
    """
    kl = ops.standard_normal_kl(mean, logvar, reduction="sample")
    return -vae_loss(x, x_recon, kl, decoder_std=decoder_std)["loss"]


def elbo_terms(
    x: Tensor, x_recon: Tensor, kl: Tensor, *, decoder_std: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """The bound with its constant, log p(x) >= E[log N(x; D(z), s^2 I)] - KL, and its two terms.

    log N(x; D(z), s^2 I) = -L1 - n (log s + 1/2 log 2 pi) for x of n dimensions.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: What the decoder made of z, like ``x``.
        kl: ``[B]``, as for ``vae_loss``.
        decoder_std: s, the standard deviation of the decoder, a number, or a tensor of one element,
            which may be trained; 1 in the lecture.

    Returns:
        ``elbo`` = ``log_likelihood`` - ``kl``, each ``[B]``, in nats a sample, and ``bpd`` ``[B]``,
        -elbo / (n log 2), in bits a dimension. It is of a density: an x that was scaled by a has
        log2 a bits a dimension more.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114) eq. 3.
    """
    terms = vae_loss(x, x_recon, kl, decoder_std=decoder_std)
    n = x.shape[1:].numel()
    log_likelihood = -terms["reconstruction"] - n * _log_normaliser(decoder_std)
    bound = log_likelihood - kl
    bpd = bound / (-n * math.log(2))
    return {"elbo": bound, "log_likelihood": log_likelihood, "kl": kl, "bpd": bpd}


def importance_weighted_bound(
    x: Tensor,
    x_recon: Tensor,
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    decoder_std: float | Tensor = 1.0,
) -> Tensor:
    """A tighter bound from K samples of z: log p(x) >= E[log 1/K sum_k p(x, z_k) / q(z_k | x)].

    With log p(x, z) - log q(z | x) = log N(x; D(z), s^2 I) + log N(z; 0, I) - log N(z; mean,
    exp(logvar)), constants included. K = 1 is an ELBO whose KL is sampled too; the bound rises with
    K, to log p(x).

    Args:
        x: The data, ``[B, ...]``.
        x_recon: What the decoder made of each z, ``[K, B, ...]``.
        z: Samples of N(mean, exp(logvar)), ``[K, B, ...]``.
        mean: Of the posterior of z, ``[B, ...]``.
        logvar: Of the posterior of z, like ``mean``.
        decoder_std: s, the standard deviation of the decoder, a number, or a tensor of one element,
            which may be trained; 1 in the lecture.

    Returns:
        ``[B]``, in nats.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes that do not fit.

    Source:
        Burda, Grosse and Salakhutdinov 2016 (arXiv 1509.00519) eq. 8.
    """
    for name, tensor in (("x", x), ("z", z), ("mean", mean)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if z.ndim == 0 or len(z) == 0:
        raise ValueError(f"z must hold K >= 1 samples [K, B, ...], got {list(z.shape)}")
    for name, tensor, wanted in (
        ("x_recon", x_recon, (len(z), *x.shape)),
        ("z", z, (len(z), *mean.shape)),
        ("logvar", logvar, mean.shape),
    ):
        if not isinstance(tensor, Tensor) or tensor.shape != wanted:
            what = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must have shape {list(wanted)}, got {what}")
    if x.shape[:1] != mean.shape[:1]:
        raise ValueError(f"x must have a batch of {len(mean)}, as mean has, got {list(x.shape)}")
    n, k = x.shape[1:].numel(), len(z)
    # K samples of each x are K B samples to the ops, which have no broadcasting.
    each = [v.expand(k, *v.shape).flatten(0, 1) for v in (x, mean, logvar)]
    drawn = z.flatten(0, 1)
    zero = torch.zeros_like(drawn)
    log_weights = (
        -reconstruction_loss(each[0], x_recon.flatten(0, 1), decoder_std=decoder_std)
        - ops.gaussian_nll(drawn, zero, zero, reduction="sample")
        + ops.gaussian_nll(drawn, each[1], each[2], reduction="sample")
    )
    bound = log_weights.reshape(k, -1).logsumexp(dim=0) - math.log(k)
    return bound - n * _log_normaliser(decoder_std)


def _log_normaliser(decoder_std: float | Tensor) -> float | Tensor:
    if isinstance(decoder_std, Tensor):
        return decoder_std.reshape(()).log() + 0.5 * math.log(2 * math.pi)
    return math.log(decoder_std) + 0.5 * math.log(2 * math.pi)
