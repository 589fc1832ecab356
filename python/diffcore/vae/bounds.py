"""The loss of a VAE, and bounds on its log-likelihood."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_positive, as_real, check_dense, check_float_tensor
from diffcore._engine.dtensor import is_dtensor
from diffcore.vae.decoders import log_normalizer, reconstruction_loss
from diffcore.vae.distribution import DiagonalGaussianDistribution


def vae_loss(
    x: Tensor,
    x_recon: Tensor,
    kl: Tensor,
    *,
    decoder_std: float | Tensor = 1.0,
    decoder: str = "gaussian",
    beta: float | Tensor = 1.0,
) -> dict[str, Tensor]:
    """The two terms of the lecture and their sum, -ELBO up to a constant, for each sample.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder, like ``x``.
        kl: ``[B]``, from ``DiagonalGaussianDistribution.sample_kl`` or ``ops.reparameterize_kl``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.
        decoder: "gaussian", "laplace" or "bernoulli", as for ``vae.reconstruction_loss``.
        beta: Weight of the KL, a number or a tensor (0-dim or ``[B]``), such as a value of
            ``vae.linear_annealing`` or ``vae.cyclical_annealing``. 1 for the bound; the weight 1e-6
            of latent diffusion's autoencoders is for this KL, a sum over each sample.

    Returns:
        ``loss`` = ``reconstruction`` (L1) + beta ``kl`` (L2), each ``[B]``, in nats. ``kl`` is the
        one that was given.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114) eq. 7 and 10; beta: Higgins et al. 2017 (ICLR).
    """
    reconstruction = reconstruction_loss(x, x_recon, decoder_std=decoder_std, decoder=decoder)
    if isinstance(kl, Tensor) and kl.is_nested:
        check_dense("kl", kl)
    if not isinstance(kl, Tensor) or kl.shape != reconstruction.shape:
        what = tuple(kl.shape) if isinstance(kl, Tensor) else type(kl).__name__
        kind = ValueError if isinstance(kl, Tensor) else TypeError
        raise kind(f"kl must be a tensor of shape {tuple(reconstruction.shape)}, got {what}")
    loss = reconstruction + (kl if type(beta) is float and beta == 1 else _weighted(kl, beta))
    return {"loss": loss, "reconstruction": reconstruction, "kl": kl}


def _weighted(kl: Tensor, beta: float | Tensor) -> Tensor:
    """The KL times its weight."""
    if not isinstance(beta, Tensor):
        return as_real("beta", beta) * kl
    check_dense("beta", beta)
    if beta.is_complex() or beta.dtype == torch.bool:
        raise TypeError(f"beta must be a real number or tensor, got {beta.dtype}")
    if beta.numel() != 1 and beta.shape != kl.shape:
        raise ValueError(
            f"beta must be a number, a tensor of one element or {list(kl.shape)}, "
            f"got {tuple(beta.shape)}"
        )
    return beta.reshape(()) * kl if beta.numel() == 1 else beta * kl


def elbo(
    x: Tensor,
    x_recon: Tensor,
    mean: Tensor,
    logvar: Tensor,
    *,
    decoder_std: float | Tensor = 1.0,
    decoder: str = "gaussian",
) -> Tensor:
    """The evidence lower bound -(L1 + L2) with one sample of z, for each sample of x.

    L1 = |x - D(z)|^2 / (2 s^2) (for other decoders see ``vae.reconstruction_loss``) omits the
    constant log s + 1/2 log 2 pi of each dimension of x; L2 = KL(N(mean, exp(logvar)) || N(0, I)).

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder, like ``x``.
        mean: Mean of the posterior of z, ``[B, ...]``.
        logvar: Log-variance of the posterior of z, like ``mean``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.
        decoder: "gaussian", "laplace" or "bernoulli", as for ``vae.reconstruction_loss``.

    Returns:
        ``[B]``, in nats.
    """
    kl = ops.standard_normal_kl(mean, logvar, reduction="sample")
    return -vae_loss(x, x_recon, kl, decoder_std=decoder_std, decoder=decoder)["loss"]


def elbo_terms(
    x: Tensor,
    x_recon: Tensor,
    kl: Tensor,
    *,
    decoder_std: float | Tensor = 1.0,
    decoder: str = "gaussian",
) -> dict[str, Tensor]:
    """The bound log p(x) >= E[log p(x | z)] - KL with its constant, and its two terms.

    For x of n dimensions, L1 = ``vae.reconstruction_loss`` and s = ``decoder_std``, log p(x | z) is
    -L1 - n (log s + 1/2 log 2 pi) for a Gaussian decoder, log N(x; D(z), s^2 I); -L1 - n log 2 s
    for a Laplace one; and -L1 for a Bernoulli one.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder, like ``x``.
        kl: ``[B]``, as for ``vae_loss``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.
        decoder: "gaussian", "laplace" or "bernoulli", as for ``vae.reconstruction_loss``.

    Returns:
        ``elbo`` = ``log_likelihood`` - ``kl``, each ``[B]``, in nats per sample, and ``bpd``
        ``[B]``, -elbo / (n log 2), in bits per dimension. These are values of a density: scaling x
        by a adds log2 a bits per dimension. Those of a Bernoulli decoder are of the probability of
        binary data.

    Source:
        Kingma and Welling 2014 (arXiv 1312.6114) eq. 3.
    """
    terms = vae_loss(x, x_recon, kl, decoder_std=decoder_std, decoder=decoder)
    n = x.shape[1:].numel()
    log_likelihood = -terms["reconstruction"] - n * log_normalizer(decoder_std, x, decoder)
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
    decoder: str = "gaussian",
) -> Tensor:
    """A tighter bound from K samples of z: log p(x) >= E[log 1/K sum_k p(x, z_k) / q(z_k | x)].

    Here log p(x, z) - log q(z | x) = log p(x | z) + log N(z; 0, I) - log N(z; mean, exp(logvar)),
    constants included; log p(x | z) is that of ``elbo_terms``. K = 1 gives an ELBO whose KL is
    sampled too; with K the expected bound increases to log p(x).

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder for each z, ``[K, B, ...]``.
        z: Samples of N(mean, exp(logvar)), ``[K, B, ...]``.
        mean: Mean of the posterior of z, ``[B, ...]``.
        logvar: Log-variance of the posterior of z, like ``mean``.
        decoder_std: s, the standard deviation of the decoder: a number, a tensor of one element, or
            one that broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be
            trained. 1 in the lecture.
        decoder: "gaussian", "laplace" or "bernoulli", as for ``vae.reconstruction_loss``.

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
            [_log_weights(x, r, v, mean, logvar, decoder_std, decoder) for r, v in each]
        )
    else:
        # The ops do not broadcast: K samples of each x are passed as K B samples.
        flat = [v.expand(k, *v.shape).flatten(0, 1) for v in (x, mean, logvar)]
        log_weights = _log_weights(
            flat[0], x_recon.flatten(0, 1), z.flatten(0, 1), flat[1], flat[2], decoder_std, decoder
        ).reshape(k, -1)
    bound = log_weights.logsumexp(dim=0) - math.log(k)
    return bound - n * log_normalizer(decoder_std, x, decoder)


def latent_bound(
    x: Tensor,
    x_recon: Tensor,
    posterior: DiagonalGaussianDistribution,
    log_prior: Tensor,
    *,
    scaling_factor: float = 1.0,
    decoder_std: float | Tensor = 1.0,
    decoder: str = "gaussian",
) -> dict[str, Tensor]:
    """The bound of a latent model: a VAE whose z has a learned prior, such as a diffusion.

    log p(x) >= E_q[log p(x | z) + log p(z)] + H(q(z | x)), with one sample z of the posterior q.
    The entropy H(q) = 1/2 sum (1 + log 2 pi + logvar) is exact. Where the prior models f z instead
    of z (diffusers' ``scaling_factor``), log p(z) = log p(f z) + n_z log f.

    Args:
        x: The data, ``[B, ...]``.
        x_recon: Output of the decoder for z, like ``x``.
        posterior: q(z | x), of which z is a sample.
        log_prior: log p(f z) under the prior, or a lower bound of it, ``[B]``, in nats per sample:
            ``likelihood.ode_log_likelihood(...).log_likelihood``, ``-vdm_bound(...).total_nats``
            with ``decoder="gaussian"``, or ``-calc_bpd_loop(...)["total_bpd"]`` times n_z log 2
            with ``decoder="gaussian"``.
        scaling_factor: f, what z is multiplied by before the prior gets it.
        decoder_std: As for ``elbo_terms``.
        decoder: As for ``elbo_terms``.

    Returns:
        ``elbo`` = ``log_likelihood`` + ``log_prior`` + ``entropy``, each ``[B]``, in nats per
        sample: log p(x | z), log p(z) and H(q). ``bpd`` ``[B]`` is -elbo / (n log 2) for x of n
        dimensions, in bits per dimension.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: A deterministic posterior, whose entropy is -inf, or shapes that do not match.

    Source:
        Vahdat, Kreis and Kautz 2021 (arXiv 2106.05931).
    """
    if not isinstance(posterior, DiagonalGaussianDistribution):
        raise TypeError(
            f"posterior must be a DiagonalGaussianDistribution, got {type(posterior).__name__}"
        )
    if posterior.deterministic:
        raise ValueError(
            "posterior must have a variance, got a deterministic one, whose entropy is -inf"
        )
    factor = as_positive("scaling_factor", scaling_factor, finite=True)
    loss = reconstruction_loss(x, x_recon, decoder_std=decoder_std, decoder=decoder)
    for name, tensor in (("log_prior", log_prior), ("posterior.mean", posterior.mean)):
        check_float_tensor(name, tensor)
        if tensor.shape[: 1 if tensor is posterior.mean else None] != loss.shape:
            raise ValueError(
                f"{name} must have the batch of x, {list(loss.shape)}, got {tuple(tensor.shape)}"
            )
    n, n_z = x.shape[1:].numel(), posterior.mean.shape[1:].numel()
    log_likelihood = -loss - n * log_normalizer(decoder_std, x, decoder)
    logvar = posterior.logvar.reshape(len(loss), -1)
    logvar = logvar.to(torch.promote_types(logvar.dtype, torch.float32))
    entropy = 0.5 * logvar.sum(1) + 0.5 * n_z * (1 + math.log(2 * math.pi))
    log_prior = log_prior + n_z * math.log(factor)
    bound = log_likelihood + log_prior + entropy
    return {
        "elbo": bound,
        "log_likelihood": log_likelihood,
        "log_prior": log_prior,
        "entropy": entropy,
        "bpd": bound / (-n * math.log(2)),
    }


def _log_weights(
    x: Tensor,
    x_recon: Tensor,
    z: Tensor,
    mean: Tensor,
    logvar: Tensor,
    decoder_std: float | Tensor,
    decoder: str,
) -> Tensor:
    """The log of p(x, z) / q(z | x) of each sample, less the constant of the decoder."""
    zero = torch.zeros_like(z)
    return (
        -reconstruction_loss(x, x_recon, decoder_std=decoder_std, decoder=decoder)
        - ops.gaussian_nll(z, zero, zero, reduction="sample")
        + ops.gaussian_nll(z, mean, logvar, reduction="sample")
    )
