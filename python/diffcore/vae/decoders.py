"""The distribution of x under the decoder of a VAE: its loss and its constant, in nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from diffcore import ops
from diffcore._checks import (
    as_positive,
    as_tensor,
    check_choice,
    check_dense,
    check_float_tensor,
)
from diffcore._engine import messages
from diffcore.diffusion.checks import can_read_values

_CONSTANTS = {"gaussian": 0.5 * math.log(2 * math.pi), "laplace": math.log(2)}
LIKELIHOODS = ("gaussian", "laplace", "bernoulli")
"""What ``decoder=`` of the losses and bounds may be."""


def reconstruction_loss(
    x: Tensor,
    x_recon: Tensor,
    *,
    decoder_std: float | Tensor = 1.0,
    decoder: str = "gaussian",
) -> Tensor:
    """-log p(x | z) of the decoder, up to its constant; L1 of the lecture for a Gaussian one.

    With s = ``decoder_std``, summed over each sample:

    - "gaussian": |x - D(z)|^2 / (2 s^2), of N(x; D(z), s^2 I);
    - "laplace": |x - D(z)| / s, of the density exp(-|x - D(z)| / s) / (2 s), the L1 loss;
    - "bernoulli": log(1 + e^D(z)) - x D(z), of p(x = 1) = sigmoid(D(z)): ``x_recon`` are logits.

    The Gaussian one is computed by the kernel of ``ops.denoising_loss``, whose squared error is a
    mean over each sample: with n elements in a sample, the weight n / (2 s^2) makes it this sum.
    The others are plain torch, in float32 for 16-bit tensors.

    Args:
        x: The data, ``[B, ...]``. In [0, 1] for "bernoulli"; values between 0 and 1 give the cross
            entropy, which is not minus the log of a normalized density.
        x_recon: Output of the decoder, like ``x``.
        decoder_std: s, the standard deviation of a Gaussian decoder, and the scale of a Laplace one
            (whose standard deviation is sqrt(2) s): a number, a tensor of one element, or one that
            broadcasts over a sample, such as ``[C, 1, 1]`` by channel. A tensor may be trained. 1
            in the lecture; a Bernoulli decoder has none.
        decoder: "gaussian", "laplace" or "bernoulli".

    Returns:
        ``[B]``, in nats, summed over each sample.

    Raises:
        TypeError: An argument of the wrong type or dtype.
        ValueError: ``x_recon`` has another shape than ``x``, ``decoder_std`` is not above 0 or
            does not broadcast or is not 1 with "bernoulli", or ``x`` is outside [0, 1] with
            "bernoulli" (on CUDA only with ``DIFFCORE_DEBUG=1``).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if decoder != "gaussian":
        return _other_loss(x, x_recon, decoder_std, decoder)
    plain = type(decoder_std) is float and decoder_std > 0
    if x.is_nested:
        check_float_tensor("x", x)
    std = decoder_std if plain else as_std(decoder_std, x)
    if isinstance(std, Tensor) and std.ndim:
        return _loss_by_position(x, x_recon, std)
    weight = x.shape[1:].numel() / (2 * std**2)
    try:
        return ops.denoising_loss(x_recon, x, x, prediction_type="sample", weight=weight)
    except (TypeError, ValueError):
        _check_pair(x, x_recon)  # names the arguments of this function
        raise


def _other_loss(x: Tensor, x_recon: Tensor, decoder_std: float | Tensor, decoder: str) -> Tensor:
    """The loss of a decoder that has no kernel."""
    check_choice("decoder", decoder, LIKELIHOODS)
    _check_pair(x, x_recon)
    dtype = torch.promote_types(torch.promote_types(x.dtype, x_recon.dtype), torch.float32)
    x, x_recon = x.to(dtype), x_recon.to(dtype)
    if decoder == "laplace":
        loss = (x - x_recon).abs() / as_std(decoder_std, x)
    else:
        _check_bernoulli(x, decoder_std)
        loss = functional.binary_cross_entropy_with_logits(x_recon, x, reduction="none")
    return loss.reshape(loss.shape[0], -1).sum(1) if loss.ndim else loss


def _check_bernoulli(x: Tensor, decoder_std: float | Tensor) -> None:
    """Refuse a standard deviation, and data that are no probabilities."""
    if isinstance(decoder_std, Tensor) or decoder_std != 1:
        what = "a tensor" if isinstance(decoder_std, Tensor) else repr(decoder_std)
        raise ValueError(f"decoder_std must be 1 with decoder='bernoulli', got {what}")
    if can_read_values(x) and x.numel():
        low, high = (end.item() for end in x.detach().aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                "x must lie in [0, 1] with decoder='bernoulli', got values from "
                f"{low:.6g} to {high:.6g}; pass x / 2 + 0.5 for images in [-1, 1]"
            )


def _loss_by_position(x: Tensor, x_recon: Tensor, std: Tensor) -> Tensor:
    """L1 with a standard deviation for each channel, or each element, of a sample."""
    _check_pair(x, x_recon)
    # log s rounded to 16 bits would be off by several percent.
    dtype = torch.promote_types(torch.promote_types(x.dtype, x_recon.dtype), torch.float32)
    logvar = 2 * std.to(dtype).log()
    # Of equal variances the KL is |x - x_recon|^2 / (2 s^2), in one launch.
    return ops.normal_kl(x.to(dtype), logvar, x_recon.to(dtype), logvar, reduction="sample")


def as_std(decoder_std: float | Tensor, x: Tensor) -> float | Tensor:
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


def log_normalizer(
    decoder_std: float | Tensor, x: Tensor, decoder: str = "gaussian"
) -> float | Tensor:
    """The constant that ``reconstruction_loss`` leaves out, in nats per dimension of x.

    Args:
        decoder_std: As for ``reconstruction_loss``.
        x: The data.
        decoder: One of ``LIKELIHOODS``.

    Returns:
        log s + 1/2 log 2 pi for a Gaussian, log 2 s for a Laplace, 0 for a Bernoulli decoder; the
        mean over a sample.
    """
    if decoder == "bernoulli":
        return 0.0
    std = as_std(decoder_std, x)
    constant = _CONSTANTS[decoder]
    if not isinstance(std, Tensor):
        return math.log(std) + constant
    log_std = std.log().mean() if std.ndim else std.log()
    return log_std + constant
