"""The KL autoencoders of diffusers with ``diffcore.vae.DiagonalGaussianDistribution``."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Stock
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from diffcore import ops
from diffcore.noise import PhiloxNoise
from diffcore.vae import DiagonalGaussianDistribution

_Noise = Tensor | PhiloxNoise


class LatentDistribution(DiagonalGaussianDistribution, Stock):  # type: ignore[misc,override]
    """The posterior that ``encode`` of a fused autoencoder returns, ``N(mean, exp(logvar) I)``.

    Methods are those of ``diffcore.vae.DiagonalGaussianDistribution``: one launch each, in float32
    also for 16-bit latents, and sums over all dimensions but the batch, of images, videos and
    sound. Noise is drawn as diffusers draws it, so a generator gives the samples that it gave.
    """

    @classmethod
    def of(cls, posterior: Stock) -> LatentDistribution:
        """The same posterior, which shares its tensors.

        Args:
            posterior: Of diffusers.

        Returns:
            The posterior.
        """
        found = cls.__new__(cls)
        found.parameters, found.deterministic = posterior.parameters, posterior.deterministic
        found.mean, found.logvar = posterior.mean, posterior.logvar  # clamped
        return found

    def sample(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        noise: _Noise | None = None,
    ) -> Tensor:
        """Sample ``z = mean + exp(logvar / 2) noise``, differentiable in the parameters.

        Args:
            generator: As for diffusers: one, one for each sample, or ``None`` for torch's own.
            noise: The noise itself, like ``mean``, or a noise key, instead of a generator.

        Returns:
            ``[B, C, ...]``.
        """
        noise = self._drawn(generator) if noise is None else noise
        return super().sample(noise=noise)

    def sample_kl(
        self,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        *,
        noise: _Noise | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``sample()`` and ``kl()`` in one kernel, for training.

        Args:
            generator: As for ``sample``.
            noise: As for ``sample``.

        Returns:
            z ``[B, C, ...]`` and the KL to the standard normal ``[B]``, in nats.
        """
        noise = self._drawn(generator) if noise is None else noise
        return super().sample_kl(noise=noise)

    def nll(self, sample: Tensor, dims: Sequence[int] | None = None) -> Tensor:
        """-log N(sample; mean, var).

        Args:
            sample: ``[B, C, ...]``.
            dims: Those to sum over; all but the batch by default.

        Returns:
            ``[B]``, or what is left after ``dims``; in nats.
        """
        if dims is None or self.deterministic:
            return super().nll(sample)
        each = ops.gaussian_nll(sample, self.mean, self.logvar, reduction="none")
        return each.sum(dim=tuple(dims))

    def _drawn(self, generator: Any) -> Tensor:
        """The noise that diffusers draws, also of a distribution without variance."""
        like = self.parameters
        noise: Tensor = randn_tensor(
            self.mean.shape, generator=generator, device=like.device, dtype=like.dtype
        )
        return noise


class FusedVAE:
    """Before a stock autoencoder among the bases of a class: its ``encode`` gives our posterior."""

    stock: ClassVar[type]
    """The class of diffusers."""


def is_kl_autoencoder(model: Any) -> bool:
    """Whether a model has an ``encode`` that makes the posterior of diffusers' autoencoders.

    Args:
        model: Anything.

    Returns:
        Whether it is a module of a class, or of a subclass of one, of a file that uses it.
    """
    if not isinstance(model, nn.Module) or not hasattr(type(model), "encode"):
        return False
    # The file of the posterior itself has a base class of autoencoders of every kind.
    names = {base.__module__ for base in type(model).__mro__} - {Stock.__module__}
    return any(getattr(sys.modules.get(n), Stock.__name__, None) is Stock for n in names)


def fuse_vae(model: Any) -> None:
    """Let the ``encode`` of an autoencoder give our posterior.

    Args:
        model: A KL autoencoder of diffusers, stock or fused.
    """
    if not isinstance(model, FusedVAE):
        kind: Any = type(model)
        model.__class__ = fused_vae_class(kind)


def unfuse_vae(model: Any) -> None:
    """Give an autoencoder its stock class back.

    Args:
        model: A KL autoencoder of diffusers, stock or fused.
    """
    if isinstance(model, FusedVAE):
        model.__class__ = type(model).stock


@functools.cache
def fused_vae_class(stock: Any) -> Any:
    """A subclass of an autoencoder's class, with its name and module, with our posterior.

    Args:
        stock: The class.

    Returns:
        The class: what is saved under its name is the stock autoencoder.
    """

    @functools.wraps(stock.encode)
    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _with_ours(stock.encode(self, *args, **kwargs))

    body = {
        "__module__": stock.__module__,
        "__doc__": stock.__doc__,
        "__reduce__": _reduced,
        "stock": stock,
        "encode": encode,
    }
    return type(stock.__name__, (FusedVAE, stock), body)


def _with_ours(output: Any) -> Any:
    """What ``encode`` has returned, with our posterior."""
    if isinstance(output, tuple):
        return tuple([_ours(x) for x in output])
    posterior = getattr(output, "latent_dist", None)
    if posterior is not None:
        output.latent_dist = _ours(posterior)
    return output


def _ours(value: Any) -> Any:
    return LatentDistribution.of(value) if type(value) is Stock else value


def _reduced(self: Any) -> tuple[Any, ...]:
    """By the stock class, which pickle finds under this one's name."""
    return _restored, (type(self).stock,), dict(vars(self))


def _restored(stock: Any) -> Any:
    kind: Any = fused_vae_class(stock)
    return kind.__new__(kind)
