"""The posterior that the encoder of a VAE predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_flag, check_float_tensor
from diffcore._engine import messages
from diffcore.noise import PhiloxNoise
from diffcore.reference import compute_dtype

_LOGVAR_MIN, _LOGVAR_MAX = -30.0, 20.0


class DiagonalGaussianDistribution:
    """The posterior N(mean, exp(logvar) I) of z that a VAE's encoder predicts.

    Names and clamp are those of diffusers. ``kl`` and ``nll`` sum over all dimensions but the
    batch, however many there are. The log-variances are clamped once, by a plain torch operation in
    the constructor; the kernels below read the clamped tensor. An encoder whose output needs no
    clamp saves that pass by calling ``ops.reparameterize_kl`` itself.

    Args:
        parameters: ``[B, 2C, ...]``, the means and then the log-variances along dimension 1.
        deterministic: Use the mean only: variance, KL and NLL are 0.

    Attributes:
        mean: ``[B, C, ...]``.
        logvar: ``[B, C, ...]``, clamped to [-30, 20].
        std: exp(logvar / 2).
        var: exp(logvar).

    Raises:
        TypeError: ``parameters`` is not a floating-point tensor.
        ValueError: Dimension 1 is missing or odd.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114); Rombach et al. 2022 (arXiv 2112.10752).
    """

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        check_float_tensor("parameters", parameters)
        if parameters.dim() < 2 or parameters.shape[1] % 2:
            raise ValueError(
                f"parameters must have shape [B, 2C, ...], got {tuple(parameters.shape)}"
            )
        self.parameters = parameters
        self.deterministic = as_flag("deterministic", deterministic)
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(_LOGVAR_MIN, _LOGVAR_MAX)

    @property
    def std(self) -> Tensor:
        """Standard deviation, ``[B, C, ...]``."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(0.5 * self.logvar)

    @property
    def var(self) -> Tensor:
        """Variance, ``[B, C, ...]``."""
        return torch.zeros_like(self.mean) if self.deterministic else torch.exp(self.logvar)

    def sample(
        self, generator: torch.Generator | None = None, *, noise: Tensor | PhiloxNoise | None = None
    ) -> Tensor:
        """Sample z = mean + exp(logvar / 2) noise, differentiable in the parameters.

        Args:
            generator: Source of the seed of the noise; ``None`` for torch's own.
            noise: The noise itself, like ``mean``, or a noise key, instead of a generator.

        Returns:
            ``[B, C, ...]``.
        """
        if self.deterministic:
            return self.mean
        return ops.reparameterize(self.mean, self.logvar, noise, generator=generator)

    def sample_kl(
        self, generator: torch.Generator | None = None, *, noise: Tensor | PhiloxNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """``sample()`` and ``kl()`` in one kernel, for training.

        The kernel reads mean and clamped log-variance once. The clamp is a separate pass, made in
        the constructor.

        Args:
            generator: Source of the seed of the noise; ``None`` for torch's own.
            noise: The noise itself, like ``mean``, or a noise key, instead of a generator.

        Returns:
            z ``[B, C, ...]`` and the KL to the standard normal ``[B]``, in nats.
        """
        if self.deterministic:
            return self.mean, self._zeros()
        return ops.reparameterize_kl(self.mean, self.logvar, noise, generator=generator)

    def mode(self) -> Tensor:
        """The mode of the distribution, which is its mean, ``[B, C, ...]``."""
        return self.mean

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(self || other), L2 of the lecture, summed over all dimensions but the batch.

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
            raise ValueError(
                "other must have a variance, got a deterministic distribution: the KL is infinite"
            )
        try:
            return ops.normal_kl(
                self.mean, self.logvar, other.mean, other.logvar, reduction="sample"
            )
        except (TypeError, ValueError):
            self._check_like("other.mean", other.mean)
            raise

    def nll(self, sample: Tensor) -> Tensor:
        """-log N(sample; mean, var), summed over all dimensions but the batch.

        Args:
            sample: ``[B, C, ...]``.

        Returns:
            ``[B]``, in nats.
        """
        if self.deterministic:
            return self._zeros()
        try:
            return ops.gaussian_nll(sample, self.mean, self.logvar, reduction="sample")
        except (TypeError, ValueError):
            self._check_like("sample", sample)  # names the argument of this method
            raise

    def _check_like(self, name: str, x: Tensor) -> None:
        """Refuse what does not belong to the mean."""
        check_float_tensor(name, x)
        messages.check_tensor(name, x)
        ours, theirs = ((tuple(v.shape), str(v.device)) for v in (self.mean, x))
        for what, mine, came in zip(("shape", "device"), ours, theirs, strict=True):
            if came != mine:
                raise ValueError(f"{name} must have the {what} of the mean, {mine}, got {came}")

    def _zeros(self) -> Tensor:
        mean = self.mean
        return mean.new_zeros(mean.shape[0], dtype=compute_dtype(mean.dtype))
