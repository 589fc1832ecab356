"""Posterior and bound of the VAE against formulas, torch.distributions and exact values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffcore import PhiloxNoise, ops
from diffcore.vae import DiagonalGaussianDistribution, elbo, reconstruction_loss, vae_loss

EPS = torch.finfo(torch.float64).eps
SHAPES = [(3, 4), (3, 4, 5), (3, 4, 5, 2), (3, 4, 2, 5, 2)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def parameters(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def per_sample(terms):
    return terms.flatten(1).sum(1)


def assert_sums_agree(actual, terms, extra=1.0):
    """``actual`` is the sum of ``terms`` over each sample, in any order of additions."""
    # n additions and a dozen roundings in each term, relative to the sizes that went in
    count = terms[0].numel()
    bound = (count + 16) * EPS * (per_sample(terms.abs()) + extra * count)
    assert actual.shape == terms.shape[:1]
    assert ((actual - per_sample(terms)).abs() <= bound).all()


@shapes
def test_names_and_shapes_are_those_of_diffusers(shape):
    given = parameters(shape)
    posterior = DiagonalGaussianDistribution(given)
    half = (shape[0], shape[1] // 2, *shape[2:])
    assert torch.equal(posterior.mean, given[:, : shape[1] // 2])
    assert torch.equal(posterior.logvar, given[:, shape[1] // 2 :])
    assert torch.equal(posterior.mode(), posterior.mean)
    for value in (posterior.std, posterior.var, posterior.sample(), posterior.sample_kl()[0]):
        assert value.shape == half
    torch.testing.assert_close(posterior.std**2, posterior.var, rtol=8 * EPS, atol=0)
    torch.testing.assert_close(posterior.var.log(), posterior.logvar, rtol=4 * EPS, atol=4 * EPS)


def test_logvar_is_clamped():
    posterior = DiagonalGaussianDistribution(torch.tensor([[0.0, 0.0, -40.0, 30.0]]))
    assert posterior.logvar.tolist() == [[-30.0, 20.0]]
    assert posterior.kl().isfinite().all()


@shapes
def test_kl_and_nll_are_those_of_torch_distributions(shape):
    one = DiagonalGaussianDistribution(parameters(shape))
    two = DiagonalGaussianDistribution(parameters(shape, 1))
    p, q = (Normal(d.mean, d.std) for d in (one, two))
    zero = torch.zeros_like(one.mean)
    x = parameters(one.mean.shape, 2)
    # The formulas of torch subtract numbers as large as these squares and exponentials.
    size = 4 * (
        1
        + max(
            v.abs().max().item() for v in (x, *(m for d in (one, two) for m in (d.mean, d.logvar)))
        )
    )
    size = size**2 * math.exp(size / 4)
    assert_sums_agree(one.kl(), kl_divergence(p, Normal(zero, zero + 1)), size)
    assert_sums_agree(one.kl(two), kl_divergence(p, q), size)
    assert_sums_agree(one.nll(x), -p.log_prob(x), size)
    assert torch.equal(one.kl(one), torch.zeros(shape[0], dtype=torch.float64))


@shapes
def test_sample_and_kl_in_one_pass(shape):
    posterior = DiagonalGaussianDistribution(parameters(shape))

    def seeded():
        return torch.Generator().manual_seed(5)

    key = PhiloxNoise.from_generator(seeded())
    noise = key.tensor(posterior.mean.shape, dtype=torch.float64)
    z, kl = posterior.sample_kl(seeded())
    assert torch.equal(z, posterior.sample(seeded()))
    torch.testing.assert_close(
        z, posterior.mean + posterior.std * noise, rtol=8 * EPS, atol=16 * EPS
    )
    assert torch.equal(kl, posterior.kl())
    for given in (key, noise):
        assert torch.equal(z, posterior.sample(noise=given))
        assert all(map(torch.equal, posterior.sample_kl(noise=given), (z, kl)))


def test_torchs_seed_governs_samples():
    posterior = DiagonalGaussianDistribution(parameters((2, 4)))
    torch.manual_seed(0)
    first = posterior.sample()
    assert not torch.equal(first, posterior.sample())
    torch.manual_seed(0)
    assert torch.equal(first, posterior.sample())


def test_deterministic():
    sure = DiagonalGaussianDistribution(parameters((2, 4, 3)), deterministic=True)
    zeros = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(sure.sample(), sure.mean)
    assert not sure.std.any()
    assert not sure.var.any()
    z, kl = sure.sample_kl()
    assert torch.equal(z, sure.mean)
    for value in (kl, sure.kl(), sure.nll(sure.mean)):
        assert torch.equal(value, zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    posterior = DiagonalGaussianDistribution(parameters((2, 4)).to(dtype))
    z, kl = posterior.sample_kl()
    assert z.dtype == dtype
    assert kl.dtype == posterior.nll(z).dtype == torch.float32
    sure = DiagonalGaussianDistribution(parameters((2, 4)).to(dtype), deterministic=True)
    assert sure.kl().dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_kl_near_zero_is_not_negative(dtype):
    # The textbook form gives -0.07 here in bfloat16, and -0.0076 in float16; the truth is 0.0048.
    value = torch.tensor(0.01, dtype=dtype)
    posterior = DiagonalGaussianDistribution(value.expand(1, 128))
    v = value.double()
    truth = 64 * 0.5 * (v**2 + torch.expm1(v) - v)
    # Computed in float32 from the 16-bit inputs: 64 terms, none of which cancels.
    bound = 80 * torch.finfo(torch.float32).eps * truth
    assert abs(posterior.kl().item() - truth) <= bound


def test_gradients_of_the_whole_loss():
    given = parameters((2, 4, 3)).requires_grad_()
    weight = parameters((2, 5), 1).requires_grad_()
    x = parameters((2, 5, 3), 2)

    def loss(given, weight):
        posterior = DiagonalGaussianDistribution(given)
        z, kl = posterior.sample_kl(torch.Generator().manual_seed(1))
        recon = torch.einsum("bci,cd->bdi", z, weight)
        return vae_loss(x, recon, kl, decoder_std=0.7)["loss"]

    assert torch.autograd.gradcheck(loss, (given, weight))


@shapes
@pytest.mark.parametrize("decoder_std", [1.0, 0.25])
def test_the_lectures_two_terms(shape, decoder_std):
    x, recon = parameters(shape), parameters(shape, 1)
    mean, logvar = parameters((shape[0], 6), 2), parameters((shape[0], 6), 3)
    first = (x - recon) ** 2 / (2 * decoder_std**2)
    assert_sums_agree(reconstruction_loss(x, recon, decoder_std=decoder_std), first, 0)
    second = ops.standard_normal_kl(mean, logvar, reduction="sample")
    terms = vae_loss(x, recon, second, decoder_std=decoder_std)
    assert torch.equal(terms["kl"], second)
    assert torch.equal(terms["loss"], terms["reconstruction"] + terms["kl"])
    assert torch.equal(elbo(x, recon, mean, logvar, decoder_std=decoder_std), -terms["loss"])


def test_reconstruction_is_a_log_density_up_to_its_constant():
    x, recon = parameters((2, 7)), parameters((2, 7), 1)
    for std in (1.0, 0.25):
        density = -Normal(recon, torch.full_like(recon, std)).log_prob(x)
        constant = math.log(std) + 0.5 * math.log(2 * math.pi)
        assert_sums_agree(
            reconstruction_loss(x, recon, decoder_std=std), density - constant, abs(constant) + 1
        )


def test_elbo_is_tight_when_the_posterior_is_exact():
    # p(z) = N(0, 1), p(x | z) = N(w z, 1): log p(x) is known, and so is the posterior of z. The
    # ELBO is quadratic in z, so its mean over z is that of two points, one std to either side.
    w = 1.7
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(1)
    var = 1 / (1 + w * w)
    mean, logvar = w * var * x, torch.full_like(x, math.log(var))
    ends = [mean + sign * math.sqrt(var) for sign in (-1, 1)]
    bound = sum(elbo(x, w * z, mean, logvar) for z in ends) / 2 - 0.5 * math.log(2 * math.pi)
    marginal = Normal(torch.zeros_like(x), torch.full_like(x, math.sqrt(1 + w * w)))
    log_p = marginal.log_prob(x).squeeze(1)
    size = (1 + x.squeeze(1) ** 2) * (1 + w * w)
    assert ((bound - log_p).abs() <= 32 * EPS * size).all()
    # Any other posterior falls short of log p(x) by its KL to the exact one.
    worse = mean + 0.5
    ends = [worse + sign * math.sqrt(var) for sign in (-1, 1)]
    bound = sum(elbo(x, w * z, worse, logvar) for z in ends) / 2 - 0.5 * math.log(2 * math.pi)
    gap = ops.normal_kl(worse, logvar, mean, logvar, reduction="sample")
    assert ((log_p - bound - gap).abs() <= 64 * EPS * (size + gap)).all()


X = torch.zeros(2, 3)
GOOD = DiagonalGaussianDistribution(torch.zeros(2, 6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: DiagonalGaussianDistribution([0.0]), TypeError, "parameters"),
        (lambda: DiagonalGaussianDistribution(X.long()), TypeError, "parameters"),
        (lambda: DiagonalGaussianDistribution(X), ValueError, "parameters"),
        (lambda: DiagonalGaussianDistribution(X[0]), ValueError, "parameters"),
        (lambda: GOOD.nll(torch.zeros(2, 2)), ValueError, "shape"),
        (lambda: GOOD.nll(X.int()), TypeError, "sample must be a floating-point tensor"),
        (lambda: GOOD.kl("standard"), TypeError, "other"),
        (lambda: GOOD.kl(DiagonalGaussianDistribution(torch.zeros(2, 4))), ValueError, "shape"),
        (
            lambda: GOOD.kl(DiagonalGaussianDistribution(torch.zeros(2, 6), True)),
            ValueError,
            "other",
        ),
        (lambda: reconstruction_loss([1.0], X), TypeError, "x must"),
        (lambda: reconstruction_loss(X, X[:, :2]), ValueError, "shape"),
        (lambda: reconstruction_loss(X, X, decoder_std=0.0), ValueError, "decoder_std"),
        (lambda: vae_loss(X, X, torch.zeros(3)), ValueError, "kl"),
        (lambda: vae_loss(X, X, 0.0), TypeError, "kl"),
        (lambda: elbo(X, X, X, X[:1]), ValueError, "shape"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
