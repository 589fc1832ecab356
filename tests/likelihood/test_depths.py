"""Pixels of other depths than 8 bits: the op against mpmath, the bound against its parts."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import BitsPerDim, GaussianDiffusion, PhiloxNoise
from diffcore.diffusion.bound import decoder_term, noised_term
from diffcore.likelihood import vdm_bound

mpmath = pytest.importorskip("mpmath")
mass = diffcore.discretized_gaussian_log_likelihood


def pixels(bits: int, count: int, generator: torch.Generator) -> Tensor:
    most = 2**bits - 1
    k = torch.randint(most + 1, (count,), generator=generator, dtype=torch.float64)
    k[:2] = torch.tensor([0.0, float(most)])  # both open bins
    k[2:4] = torch.tensor([1.0, most - 1.0]) if bits > 1 else k[:2]
    return 2 * k / most - 1


def right(x: float, mean: float, log_scale: float, bits: int) -> mpmath.mpf:
    """The log of the mass, from the definition, in 60 digits."""
    with mpmath.workdps(60):
        most = mpmath.mpf(2**bits - 1)
        k = mpmath.nint((mpmath.mpf(x) + 1) * most / 2)
        scale = mpmath.exp(mpmath.mpf(log_scale))
        low, high = ((mpmath.mpf(x) + s / most - mpmath.mpf(mean)) / scale for s in (-1, 1))
        low = -mpmath.inf if k == 0 else low
        high = mpmath.inf if k == most else high
        if low > 0:  # from the tail that is small
            low, high = -high, -low
        return mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low))


@pytest.mark.parametrize("bits", [1, 2, 5, 7, 9, 10, 12, 16, 24])
def test_the_op_against_mpmath(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = pixels(bits, 60, generator)
    width = 2 / (2**bits - 1)
    near = width * torch.randn(60, generator=generator, dtype=torch.float64)
    means = torch.where(torch.arange(60) % 3 == 0, near / width, x + 2 * near)
    log_scales = math.log(width) + 2 * torch.randn(60, generator=generator, dtype=torch.float64)
    log_scales[::7] = -1.0
    means, log_scales = (v.requires_grad_() for v in (means, log_scales))
    x.requires_grad_()
    found = mass(x, means=means, log_scales=log_scales, bits=bits)
    expected = [
        right(*v, bits) for v in zip(*map(Tensor.tolist, (x, means, log_scales)), strict=True)
    ]
    expected = torch.tensor([float(v) for v in expected], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), expected, rtol=2e-10, atol=1e-50)
    # The mass does not change if all is moved, but in open bins: gradients of x and the mean.
    slopes = torch.autograd.grad(found.sum(), (x, means, log_scales))
    torch.testing.assert_close(slopes[0], -slopes[1], rtol=1e-12, atol=0)
    for i in (8, 11, 14, 17):
        a, m, s = (v[i].item() for v in (x, means, log_scales))
        with mpmath.workdps(60):
            e = mpmath.mpf(width) * 1e-12
            numeric = float((right(a, m + e, s, bits) - right(a, m - e, s, bits)) / (2 * e))
        assert math.isclose(slopes[1][i].item(), numeric, rel_tol=1e-8, abs_tol=1e-12 / width), i


@pytest.mark.parametrize("bits", [1, 3, 6, 10])
def test_the_masses_of_all_values_sum_to_1(bits: int) -> None:
    most = 2**bits - 1
    x = 2 * torch.arange(most + 1, dtype=torch.float64) / most - 1
    for mean, log_scale in ((0.3, -1.0), (-0.99, -4.0), (1.3, -9.0), (0.0, 2.0)):
        logs = mass(
            x, means=torch.full_like(x, mean), log_scales=torch.full_like(x, log_scale), bits=bits
        )
        assert abs(logs.exp().sum().item() - 1) < 1e-11


def test_dtypes_and_reductions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = pixels(10, 24, generator).reshape(4, 6)
    means, log_scales = x + 1e-3, torch.full_like(x, -6.0)
    wide = mass(x, means=means, log_scales=log_scales, bits=10)
    single = [v.float() for v in (x, means, log_scales)]
    options = {"means": single[1], "log_scales": single[2], "bits": 10}
    found = mass(single[0], **options)
    same = mass(
        *(single[0].double(),), means=single[1].double(), log_scales=single[2].double(), bits=10
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, same.float(), rtol=0, atol=0)
    total = mass(single[0], **options, reduction="sample")
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), wide.sum(1), rtol=1e-3, atol=0)
    # 8 bits keep their bits.
    eight = mass(x, means=means, log_scales=log_scales)
    assert torch.equal(mass(x, means=means, log_scales=log_scales, bits=8), eight)
    for bits in (0, 33, -8):
        with pytest.raises(ValueError, match="bits must be"):
            mass(x, means=means, log_scales=log_scales, bits=bits)
    with pytest.raises(ValueError, match=r"means must have the shape of x, \(4, 6\), got \(6,\)"):
        mass(x, means=means[0], log_scales=log_scales, bits=10)
    with pytest.raises(TypeError, match="bits must be an int, got float"):
        mass(x, means=means, log_scales=log_scales, bits=8.0)


BETAS = diffcore.make_betas("linear", 6, beta_start=1e-3, beta_end=0.4)


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.3 * x


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_the_term_of_8_bits_is_that_of_the_kernel(variance_type: str) -> None:
    diffusion = GaussianDiffusion(BETAS, variance_type=variance_type)
    network = model
    if variance_type != "fixed_small":
        network = lambda x, t: torch.cat([0.3 * x, 0.2 * x], 1)  # noqa: E731
    x = torch.randint(256, (5, 2, 3), generator=torch.Generator().manual_seed(1)) / 127.5 - 1
    t = torch.zeros(5, dtype=torch.int64)
    for noise in (PhiloxNoise(5), torch.randn(5, 2, 3)):
        for clip in (1.0, None):
            kernel = noised_term(diffusion.tables, network, x, t, noise, clip, "discretized", None)
            found = decoder_term(diffusion.tables, network, x, noise, clip, 8, None)
            torch.testing.assert_close(found[0], kernel[0], rtol=2e-5, atol=0)
            assert torch.equal(found[1], kernel[1])


@pytest.mark.parametrize("bits", [5, 12, 16])
def test_the_bound(bits: int) -> None:
    diffusion = GaussianDiffusion(BETAS, clip_sample=False)
    most = 2**bits - 1
    generator = torch.Generator().manual_seed(2)
    k = torch.randint(most + 1, (7, 3, 4), generator=generator).double()
    k[0, 0, :2] = torch.tensor([0.0, float(most)])
    x = (2 * k / most - 1).float()
    noise = torch.randn(7, 3, 4, generator=generator)
    run = partial(diffcore.bits_per_dim, diffusion, model, noise=noise)
    found = run(x, bits=bits)
    other = run(x, decoder="gaussian")
    # L_0 from its definition: the mean is the predicted x_0, the variance that of the process.
    alpha, sigma = (v[0].item() for v in (diffusion.schedule.alpha, diffusion.schedule.sigma))
    x_t = alpha * x.double() + sigma * noise.double()
    means = (x_t - sigma * 0.3 * x_t) / alpha
    scale = 0.5 * math.log(diffusion.tables.posterior_log_variance_clipped[0].exp().item())
    values = zip((2 * k / most - 1).flatten().tolist(), means.flatten().tolist(), strict=True)
    total = -sum(float(right(a, m, scale, bits)) for a, m in values)
    assert math.isclose(found.terms[0].item(), total / (84 * math.log(2)), rel_tol=1e-5)
    assert torch.equal(found.terms[1:], other.terms[1:])
    assert found.bits == bits
    keyed = partial(diffcore.bits_per_dim, diffusion, model, bits=bits)
    every = keyed(x, noise=PhiloxNoise(1))
    half = [keyed(x[a:b], noise=PhiloxNoise(1, sample_ids=a)) for a, b in ((0, 3), (3, 7))]
    assert BitsPerDim.combine(half).total == every.total
    with pytest.raises(ValueError, match=f"results must have one bits, {bits}, got 8"):
        BitsPerDim.combine([half[0], run(torch.ones_like(x), noise=PhiloxNoise(1))])


@pytest.mark.parametrize("bits", [5, 8, 12, 16])
def test_the_bound_in_continuous_time(bits: int) -> None:
    most = 2**bits - 1
    generator = torch.Generator().manual_seed(4)
    k = torch.randint(most + 1, (3, 2, 4), generator=generator).double()
    k[:, 0, :2] = torch.tensor([0.0, float(most)])
    x, noise = (2 * k / most - 1).float(), torch.randn(3, 2, 4, generator=generator)
    t = torch.tensor([0.1, 0.5, 0.9])
    run = partial(vdm_bound, lambda z, gamma: 0.9 * z, x, gamma_min=-9.0, gamma_max=4.0, t=t)
    found = run(noise=noise, bits=bits)
    # z_0 = alpha_0 x + sigma_0 noise, and p(x | z_0) has the mean z_0 / alpha_0.
    means = 2 * k / most - 1 + math.exp(-4.5) * noise.double()
    pairs = zip((2 * k / most - 1).flatten().tolist(), means.flatten().tolist(), strict=True)
    values = torch.tensor([float(right(a, m, -4.5, bits)) for a, m in pairs]).reshape(3, 8)
    torch.testing.assert_close(found.reconstruction_nats, -values.sum(1), rtol=2e-5, atol=0)
    other = run(noise=noise, decoder="gaussian")
    assert torch.equal(found.diffusion_nats, other.diffusion_nats)
    keyed = [run(noise=PhiloxNoise(3), bits=bits).reconstruction_nats for _ in range(2)]
    assert torch.equal(*keyed)
    if bits != 8:
        with pytest.raises(ValueError, match=r"x must be pixels k/127\.5 - 1, k = 0 \.\. 255"):
            run()
        with pytest.raises(ValueError, match="bits must be 8, its default, with decoder="):
            run(bits=bits, decoder="gaussian")


def test_refusals_and_checkpoints(tmp_path) -> None:
    diffusion = GaussianDiffusion(BETAS)
    x = torch.arange(12.0).reshape(3, 4) / 2047.5 - 1
    run = partial(diffcore.bits_per_dim, diffusion, model, noise=PhiloxNoise(1))
    for call, message in (
        (partial(run, x), r"data must be pixels k/127\.5 - 1, k = 0 \.\. 255, with"),
        (partial(run, x, bits=10), r"data must be pixels k/511\.5 - 1, k = 0 \.\. 1023, with"),
        (
            partial(run, (x + 1) * 2047.5, bits=12),
            r"pass data / 2047\.5 - 1 for images in \[0, 4095",
        ),
        (partial(run, x.bfloat16(), bits=12), "data must be float32 or float64 for 12 bits, got"),
        (
            partial(run, x, bits=12, decoder="gaussian"),
            "bits must be 8, its default, with decoder=",
        ),
        (partial(run, x, bits=40), r"bits must be in 1 \.\. 32, got 40"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    file = tmp_path / "bits.json"
    found = run(x, bits=12, checkpoint=file)
    assert run(x, bits=12, checkpoint=file).total == found.total
    with pytest.raises(ValueError, match="bits"):
        run(torch.ones(3, 4), checkpoint=file)
