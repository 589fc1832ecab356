"""The VAE of the lecture: posterior, loss, and bounds on the log-likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_flag, as_positive, as_tensor, check_dense, check_float_tensor
from diffcore._engine import messages
from diffcore._engine.dtensor import is_dtensor
from diffcore.noise import PhiloxNoise
from diffcore.reference import compute_dtype

__all__ = [
    "DiagonalGaussianDistribution",
    "elbo",
    "elbo_terms",
    "importance_weighted_bound",
    "reconstruction_loss",
    "vae_loss",
]

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


def reconstruction_loss(x: Tensor, x_recon: Tensor, *, decoder_std: float | Tensor = 1.0) -> Tensor:
    """L1 of the lecture, |x - D(z)|^2 / (2 s^2): -log N(x; D(z), s^2 I) up to a constant.

    Computed by the kernel of ``ops.denoising_loss``, whose squared error is a mean over each
    sample: with n elements in a sample, the weight n / (2 s^2) makes it this sum.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder, like ``x``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.

    Returns:
        ``[B]``, in nats, summed over each sample.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: ``x_recon`` has another shape than ``x``, or ``decoder_std`` is not above 0 or
            does not broadcast.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    plain = type(decoder_std) is float and decoder_std > 0
    if x.is_nested:
        check_float_tensor("x", x)
    std = decoder_std if plain else _std(decoder_std, x)
    if isinstance(std, Tensor) and std.ndim:
        return _loss_by_position(x, x_recon, std)
    weight = x.shape[1:].numel() / (2 * std**2)
    try:
        return ops.denoising_loss(x_recon, x, x, prediction_type="sample", weight=weight)
    except (TypeError, ValueError):
        _check_pair(x, x_recon)  # names the arguments of this function
        raise


def _loss_by_position(x: Tensor, x_recon: Tensor, std: Tensor) -> Tensor:
    """L1 with a standard deviation for each channel, or each element, of a sample."""
    _check_pair(x, x_recon)
    # log s rounded to 16 bits would be off by several percent.
    dtype = torch.promote_types(torch.promote_types(x.dtype, x_recon.dtype), torch.float32)
    logvar = 2 * std.to(dtype).log()
    # Of equal variances the KL is |x - x_recon|^2 / (2 s^2), in one launch.
    return ops.normal_kl(x.to(dtype), logvar, x_recon.to(dtype), logvar, reduction="sample")


def _std(decoder_std: float | Tensor, x: Tensor) -> float | Tensor:
    """The standard deviation: a float, 0-dim, or with the dimensions of one sample."""
    # The types first: Dynamo has no getattr for a symbolic number.
    is_known = isinstance(decoder_std, (int, float, Tensor))
    if not is_known and getattr(decoder_std, "ndim", False):
        decoder_std = as_tensor("decoder_std", decoder_std).to(x.device)  # a NumPy array
    if not isinstance(decoder_std, Tensor):
        return as_positive("decoder_std", decoder_std)
    std = decoder_std
    check_dense("decoder_std", std)
    if std.is_complex() or std.dtype == torch.bool:
        raise TypeError(f"decoder_std must be a real number or tensor, got {std.dtype}")
    if std.ndim and std.device != x.device:
        raise ValueError(f"decoder_std must be on {x.device}, the device of x, got {std.device}")
    if std.is_floating_point() and std.dtype.itemsize < 4:
        std = std.float()  # 1 / s^2 and log s need more than 16 bits
    if std.numel() == 1:
        return std.reshape(())
    if std.ndim == x.ndim and len(std) == 1:
        std = std[0]
    sample = x.shape[1:]
    fits = std.ndim == len(sample) and all(
        n in (1, m) for n, m in zip(std.shape, sample, strict=True)
    )
    if not fits or not std.is_floating_point():
        channels = [sample[0] if sample else 1, *[1] * (len(sample) - 1)]
        raise ValueError(
            "decoder_std must be a number, a tensor of one element or one that broadcasts over a "
            f"sample, such as {channels} by channel, got {std.dtype} {tuple(decoder_std.shape)}"
        )
    return std


def _check_pair(x: Tensor, x_recon: Tensor) -> None:
    """Refuse data and a reconstruction that do not belong together."""
    for name, tensor in (("x", x), ("x_recon", x_recon)):
        check_float_tensor(name, tensor)
        messages.check_tensor(name, tensor)
    for what in ("shape", "device"):
        ours, theirs = getattr(x, what), getattr(x_recon, what)
        if theirs != ours:
            if what == "shape":
                ours, theirs = tuple(ours), tuple(theirs)
            raise ValueError(f"x_recon must have the {what} of x, {ours}, got {theirs}")


def vae_loss(
    x: Tensor, x_recon: Tensor, kl: Tensor, *, decoder_std: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """The two terms of the lecture and their sum, -ELBO up to a constant, for each sample.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder, like ``x``.
        kl: ``[B]``, from ``DiagonalGaussianDistribution.sample_kl`` or ``ops.reparameterize_kl``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.

    Returns:
        ``loss`` = ``reconstruction`` (L1) + ``kl`` (L2), each ``[B]``, in nats.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114) eq. 7 and 10.
    """
    reconstruction = reconstruction_loss(x, x_recon, decoder_std=decoder_std)
    if isinstance(kl, Tensor) and kl.is_nested:
        check_dense("kl", kl)
    if not isinstance(kl, Tensor) or kl.shape != reconstruction.shape:
        what = tuple(kl.shape) if isinstance(kl, Tensor) else type(kl).__name__
        kind = ValueError if isinstance(kl, Tensor) else TypeError
        raise kind(f"kl must be a tensor of shape {tuple(reconstruction.shape)}, got {what}")
    return {"loss": reconstruction + kl, "reconstruction": reconstruction, "kl": kl}


def elbo(
    x: Tensor, x_recon: Tensor, mean: Tensor, logvar: Tensor, *, decoder_std: float | Tensor = 1.0
) -> Tensor:
    """The evidence lower bound -(L1 + L2) with one sample of z, for each sample of x.

    L1 = |x - D(z)|^2 / (2 s^2) omits the constant log s + 1/2 log 2 pi of each dimension of x;
    L2 = KL(N(mean, exp(logvar)) || N(0, I)).

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder, like ``x``.
        mean: Mean of the posterior of z, ``[B, ...]``.
        logvar: Log-variance of the posterior of z, like ``mean``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.

    Returns:
        ``[B]``, in nats.
    """
    kl = ops.standard_normal_kl(mean, logvar, reduction="sample")
    return -vae_loss(x, x_recon, kl, decoder_std=decoder_std)["loss"]


def elbo_terms(
    x: Tensor, x_recon: Tensor, kl: Tensor, *, decoder_std: float | Tensor = 1.0
) -> dict[str, Tensor]:
    """The bound log p(x) >= E[log N(x; D(z), s^2 I)] - KL with its constant, and its two terms.

    log N(x; D(z), s^2 I) = -L1 - n (log s + 1/2 log 2 pi) for x of n dimensions.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder, like ``x``.
        kl: ``[B]``, as for ``vae_loss``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.

    Returns:
        ``elbo`` = ``log_likelihood`` - ``kl``, each ``[B]``, in nats per sample, and ``bpd``
        ``[B]``, -elbo / (n log 2), in bits per dimension. These are values of a density: scaling x
        by a adds log2 a bits per dimension.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114) eq. 3.
    """
    terms = vae_loss(x, x_recon, kl, decoder_std=decoder_std)
    n = x.shape[1:].numel()
    log_likelihood = -terms["reconstruction"] - n * _log_normalizer(_std(decoder_std, x))
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

    Here log p(x, z) - log q(z | x) = log N(x; D(z), s^2 I) + log N(z; 0, I) - log N(z; mean,
    exp(logvar)), constants included. K = 1 gives an ELBO whose KL is sampled too; with K the
    expected bound increases to log p(x).

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder for each z, ``[K, B, ...]``.
        z: Samples of N(mean, exp(logvar)), ``[K, B, ...]``.
        mean: Mean of the posterior of z, ``[B, ...]``.
        logvar: Log-variance of the posterior of z, like ``mean``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.

    Returns:
        ``[B]``, in nats.

    Raises:
        TypeError: An argument is not a tensor.
        ValueError: Shapes that do not match.

    Source:
        Burda, Grosse and Salakhutdinov 2016 (arXiv 1509.00519) eq. 8.
    """
    for name, tensor in (("x", x), ("z", z), ("mean", mean)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    if z.ndim == 0 or z.shape[0] == 0:
        raise ValueError(f"z must have shape [K, B, ...] with K >= 1, got {tuple(z.shape)}")
    for name, tensor, wanted in (
        ("x_recon", x_recon, (z.shape[0], *x.shape)),
        ("z", z, (z.shape[0], *mean.shape)),
        ("logvar", logvar, mean.shape),
    ):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
        if tensor.shape != wanted:
            raise ValueError(f"{name} must have shape {tuple(wanted)}, got {tuple(tensor.shape)}")
    if x.shape[:1] != mean.shape[:1]:
        raise ValueError(
            f"x must have the batch of mean, {mean.shape[0]}, got shape {tuple(x.shape)}"
        )
    n, k = x.shape[1:].numel(), z.shape[0]
    if any(map(is_dtensor, (x, x_recon, z, mean, logvar))):
        # A DTensor that is sharded unevenly along the batch cannot be flattened.
        each = zip(x_recon, z, strict=True)
        log_weights = torch.stack(
            [_log_weights(x, r, v, mean, logvar, decoder_std) for r, v in each]
        )
    else:
        # The ops do not broadcast: K samples of each x are passed as K B samples.
        flat = [v.expand(k, *v.shape).flatten(0, 1) for v in (x, mean, logvar)]
        log_weights = _log_weights(
            flat[0], x_recon.flatten(0, 1), z.flatten(0, 1), flat[1], flat[2], decoder_std
        ).reshape(k, -1)
    bound = log_weights.logsumexp(dim=0) - math.log(k)
    return bound - n * _log_normalizer(_std(decoder_std, x))


def _log_weights(
    x: Tensor,
    x_recon: Tensor,
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    decoder_std: float | Tensor,
) -> Tensor:
    """The log of p(x, z) / q(z | x) of each sample, less the constant of the decoder."""
    zero = torch.zeros_like(z)
    return (
        -reconstruction_loss(x, x_recon, decoder_std=decoder_std)
        - ops.gaussian_nll(z, zero, zero, reduction="sample")
        + ops.gaussian_nll(z, mean, logvar, reduction="sample")
    )


def _log_normalizer(std: float | Tensor) -> float | Tensor:
    """Log s + 1/2 log 2 pi, the mean over a sample."""
    if not isinstance(std, Tensor):
        return math.log(std) + 0.5 * math.log(2 * math.pi)
    log_std = std.log().mean() if std.ndim else std.log()
    return log_std + 0.5 * math.log(2 * math.pi)
