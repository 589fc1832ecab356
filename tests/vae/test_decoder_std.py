"""A standard deviation of the decoder for each channel, against the density in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore.vae import elbo, elbo_terms, importance_weighted_bound, reconstruction_loss, vae_loss

X, RECON = (torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
KL = torch.arange(4.0)
STD = torch.tensor([0.05, 1.0, 3.0]).view(3, 1, 1)
SHAPES = {
    "channel": STD,
    "leading-1": STD[None],
    "rows": torch.linspace(0.2, 2.0, 5).view(1, 5, 1),
    "element": torch.linspace(0.1, 2.0, 90).view(3, 5, 6),
}


def density(x: Tensor, recon: Tensor, std: Tensor) -> Tensor:
    """log N(x; recon, std^2), by torch.distributions in float64."""
    std = std.double().expand(x.shape)
    log_prob = torch.distributions.Normal(recon.double(), std).log_prob(x.double())
    return log_prob.flatten(1).sum(1)


def without_constant(x: Tensor, recon: Tensor, std: Tensor) -> Tensor:
    return ((x.double() - recon.double()) ** 2 / (2 * std.double() ** 2)).flatten(1).sum(1)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)]
)
def test_values(name: str, dtype: torch.dtype, rtol: float) -> None:
    x, recon, std = X.to(dtype), RECON.to(dtype), SHAPES[name].to(dtype)
    expected = without_constant(x, recon, std)
    terms = elbo_terms(x, recon, KL, decoder_std=std)
    log_prob = density(x, recon, std)
    for found, right in (
        (reconstruction_loss(x, recon, decoder_std=std), expected),
        (vae_loss(x, recon, KL, decoder_std=std)["loss"], expected + KL),
        (terms["log_likelihood"], log_prob),
        (terms["elbo"], log_prob - KL),
    ):
        assert found.shape == (4,)
        torch.testing.assert_close(found.double(), right, rtol=rtol, atol=rtol)


def test_other_bounds() -> None:
    mean, logvar = torch.randn(2, 4, 7)
    kl = diffcore.standard_normal_kl(mean, logvar, reduction="sample")
    found = elbo(X, RECON, mean, logvar, decoder_std=STD)
    right = -without_constant(X, RECON, STD) - kl.double()
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-4)
    # With one sample of z at the mean, log q - log p is known.
    bound = importance_weighted_bound(X, RECON[None], mean[None], mean, logvar, decoder_std=STD)
    normal = torch.distributions.Normal
    log_p = normal(0.0, 1.0).log_prob(mean.double()).sum(1)
    log_q = normal(mean.double(), (0.5 * logvar.double()).exp()).log_prob(mean.double()).sum(1)
    right = density(X, RECON, STD) + log_p - log_q
    torch.testing.assert_close(bound.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients(name: str) -> None:
    def of(f: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        args = [v.to(dtype, copy=True).requires_grad_() for v in (X, RECON, SHAPES[name])]
        return torch.autograd.grad(f(*args).sum(), args)

    right = of(without_constant, torch.float64)
    found = of(lambda x, r, s: reconstruction_loss(x, r, decoder_std=s), torch.float32)
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-4)


def test_one_number_keeps_its_bits() -> None:
    expected = reconstruction_loss(X, RECON, decoder_std=0.5)
    four = torch.full((1, 1, 1, 1), 0.5)
    for one in (torch.tensor(0.5), torch.tensor([0.5]), four, np.array(0.5), four.half()):
        assert torch.equal(reconstruction_loss(X, RECON, decoder_std=one), expected)
    by_channel = reconstruction_loss(X, RECON, decoder_std=torch.full((3, 1, 1), 0.5))
    torch.testing.assert_close(by_channel, expected, rtol=1e-6, atol=0)
    array = reconstruction_loss(X, RECON, decoder_std=STD.numpy())
    assert torch.equal(array, reconstruction_loss(X, RECON, decoder_std=STD))


@pytest.mark.parametrize(
    ("std", "kind", "message"),
    [
        ("a", TypeError, "decoder_std must be a number, got str"),
        (None, TypeError, "decoder_std must be a number, got NoneType"),
        (0.0, ValueError, "decoder_std must be above 0, got 0.0"),
        (-1, ValueError, "decoder_std must be above 0, got -1.0"),
        (torch.ones(3), ValueError, r"such as \[3, 1, 1\] by channel, got torch.float32 \(3,\)"),
        (torch.ones(4, 1, 1, 1), ValueError, r"broadcasts over a sample.* \(4, 1, 1, 1\)"),
        (torch.ones(2, 1, 1), ValueError, r"broadcasts over a sample.* \(2, 1, 1\)"),
        (torch.ones(3, 1, 1).long(), ValueError, "got torch.int64"),
    ],
)
def test_what_is_no_standard_deviation(std: Any, kind: type[Exception], message: str) -> None:
    for f in (reconstruction_loss, lambda x, r, **kw: elbo_terms(x, r, KL, **kw)):
        with pytest.raises(kind, match=message):
            f(X, RECON, decoder_std=std)


@pytest.mark.parametrize("std", [1.0, STD], ids=["number", "channel"])
def test_errors_name_x_and_x_recon(std: Any) -> None:
    wanted = r"x_recon must have the shape of x, \(4, 3, 5, 6\), got \(4, 1, 5, 6\)"
    with pytest.raises(ValueError, match=wanted):
        vae_loss(X, RECON[:, :1], KL, decoder_std=std)
    with pytest.raises(TypeError, match="x_recon must be a floating-point tensor, got list"):
        vae_loss(X, [1.0], KL, decoder_std=std)
    with pytest.raises(TypeError, match=r"x must be .* got torch.uint8; .* x / 127.5 - 1"):
        vae_loss(X.byte(), RECON, KL, decoder_std=std)
