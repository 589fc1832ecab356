"""KL of full covariances against torch.distributions and the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from diffcore.vae import full_covariance_kl

G = torch.Generator().manual_seed(8)
N = 4


def gaussians(*batch: int):
    mean = torch.randn(*batch, N, generator=G, dtype=torch.float64)
    root = torch.randn(*batch, N, N, generator=G, dtype=torch.float64)
    return mean, root @ root.mT + 0.3 * torch.eye(N, dtype=torch.float64)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_values_and_gradients(batch: tuple[int, ...]) -> None:
    given = (*gaussians(*batch), *gaussians(*batch))
    leaves, copies = ([v.clone().requires_grad_() for v in given] for _ in range(2))
    found = full_covariance_kl(*leaves)
    right = kl_divergence(*(MultivariateNormal(*copies[k : k + 2]) for k in (0, 2)))
    assert found.shape == batch
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-12)
    slopes = (torch.autograd.grad(v.sum(), to) for v, to in ((found, leaves), (right, copies)))
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    factors = [torch.linalg.cholesky(v) for v in given[1::2]]
    same = full_covariance_kl(
        given[0],
        mean2=given[2],
        scale_tril1=factors[0] + torch.ones(N, N).triu(1),  # not read
        scale_tril2=factors[1],
    )
    torch.testing.assert_close(same, right, rtol=1e-11, atol=1e-12)


def test_to_the_standard_normal() -> None:
    mean, covariance = gaussians(3)
    eye = torch.eye(N, dtype=torch.float64)
    right = kl_divergence(
        MultivariateNormal(mean, covariance), MultivariateNormal(torch.zeros_like(mean), eye)
    )
    torch.testing.assert_close(full_covariance_kl(mean, covariance), right, rtol=1e-12, atol=0)


def test_close_gaussians_do_not_cancel() -> None:
    # L2 = L, L1 = L (1 + e): KL = n/2 (expm1(d) - d), d = 2 log1p(e), about n e².
    _, covariance = gaussians()
    factor, mean = torch.linalg.cholesky(covariance), torch.zeros(N, dtype=torch.float64)
    for e in (1e-3, 1e-6):
        found = full_covariance_kl(
            mean, mean2=mean, scale_tril1=factor * (1 + e), scale_tril2=factor
        )
        right = N * e * e * (1 - e / 3)  # with d = 2e - e² + ..: the next term is e⁴
        assert abs(found.item() / right - 1) < max(2 * e * e, 1e-9)


def test_refusals() -> None:
    mean, covariance = gaussians(2)
    for call, message in (
        (
            lambda: full_covariance_kl(mean),
            "covariance1 must be given, or scale_tril1, got neither",
        ),
        (
            lambda: full_covariance_kl(mean, covariance, scale_tril1=covariance),
            "covariance1 must be None where scale_tril1 is given, got both",
        ),
        (lambda: full_covariance_kl(mean, -covariance), "covariance1 must be positive definite, "),
        (
            lambda: full_covariance_kl(mean, covariance, mean, covariance[..., :2]),
            r"covariance2 must have shape \[\.\.\., 4, 4\] of torch.float64, as mean1, got",
        ),
        (lambda: full_covariance_kl(mean, covariance, mean[:, :2]), "mean2 must have 4 dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="mean1 must be float32 or float64, got"):
        full_covariance_kl(mean.bfloat16(), covariance.bfloat16())
