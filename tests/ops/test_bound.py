"""The terms of the variational bound: a world with known answers, and the textbook formulas.

Data N(MEAN, STD²), whose best model is linear: every term is a number (MATH: a closed form). Its
error is linear in x_0 and the noise, so the four points x_0 = MEAN ± STD, noise = ±1 give every
expectation exactly.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import GaussianDiffusion, PhiloxNoise, make_betas, ops
from diffcore.coefficients.bound import (
    GIVEN,
    VARIANCE_TYPES,
    log_variances,
    prior_coefficients,
    vlb_coefficients,
)
from diffcore.coefficients.step import PREDICTION_TYPES
from support.worlds import (
    ALPHA,
    BAR,
    BETAS,
    MEAN,
    SIGMA,
    STD,
    STEPS,
    World,
    best_prediction,
    column,
)

EVERY = torch.arange(STEPS)
WORLD = World(MEAN, STD, BETAS)
KINDS = ("fixed_small", "fixed_large", "optimal")
TERMS = {kind: column(WORLD.terms(kind)) for kind in KINDS}
OPTIMAL = column(WORLD.variance("optimal"))
PRIOR, ENTROPY, PRIOR_OF_MARGINAL = (
    float(number) for number in (WORLD.prior(), WORLD.entropy(), WORLD.kl_of_the_end())
)


def model(x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The best possible one."""
    return best_prediction(x_t, (alpha, sigma, alpha**2 * STD**2 + sigma**2), prediction_type)


def four_points() -> tuple[Tensor, Tensor]:
    """x_0 and noise `[T, 4]`, whose means are expectations."""
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    return (MEAN + STD * signs[:, 0]).repeat(STEPS, 1), signs[:, 1].repeat(STEPS, 1)


def expected(
    variance: str,
    prediction_type: str,
    given: str,
    dtype: torch.dtype = torch.float64,
    points: tuple[Tensor, Tensor] | None = None,
    device: str = "cpu",
) -> Tensor:
    """Every term by the op, per dimension, `[T]`."""
    x0, noise = points or four_points()
    alpha, sigma = ALPHA.unsqueeze(1), SIGMA.unsqueeze(1)
    x_t = alpha * x0 + sigma * noise
    learned = variance == "optimal"
    table = vlb_coefficients(
        ALPHA,
        SIGMA,
        prediction_type=prediction_type,
        variance_type="learned" if learned else variance,
        decoder="gaussian",
        given=given,
    )
    v = OPTIMAL.log().unsqueeze(1).expand_as(x0)
    x0, noise, x_t, m, v = (
        x.to(device, dtype).contiguous()
        for x in (x0, noise, x_t, model(x_t, alpha, sigma, prediction_type), v)
    )
    options: dict[str, Any] = {"x_t": x_t} if given == "x_t" else {"noise": noise}
    if learned:
        options["variance_output"] = v
    scale = 1 / x0.shape[1]
    found = ops.vlb_term(x0, m, table.to(device), t=EVERY.to(device), scale=scale, **options)
    return found.cpu().double()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted) / wanted).abs().max())


# ---- the world with known answers ---------------------------------------------------------------


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "optimal"])
def test_every_term_is_its_closed_form(variance, prediction_type, given, device) -> None:
    found = expected(variance, prediction_type, given, device=device)
    assert relative(found, TERMS[variance]) < 1e-12
    wanted = TERMS[variance].sum() + PRIOR
    assert abs(found.sum() + PRIOR - wanted) < 1e-12


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "optimal"])
def test_every_term_in_float32(variance, prediction_type, given, device) -> None:
    generator = torch.Generator().manual_seed(5)
    draws = torch.randn(2, STEPS, 4096, generator=generator, dtype=torch.float64)
    points = MEAN + STD * draws[0], draws[1]
    exact = expected(variance, prediction_type, given, points=points)
    found = expected(variance, prediction_type, given, torch.float32, points, device)
    assert relative(found, exact) < 1e-5


def test_the_prior_is_its_closed_form(device: str) -> None:
    x0 = four_points()[0][:1].to(device)
    found = ops.prior_kl(x0, float(ALPHA[-1]), float(SIGMA[-1])) / 4
    assert abs(float(found) - PRIOR) < 1e-15
    factor, offset = prior_coefficients(float(ALPHA[-1]), float(SIGMA[-1]))
    assert factor == 0.5 * float(ALPHA[-1]) ** 2
    assert 0 < offset < 1e-9
    single = ops.prior_kl(x0.float(), float(ALPHA[-1]), float(SIGMA[-1])) / 4
    assert abs(float(single) / PRIOR - 1) < 1e-6


def test_the_prior_on_a_subspace(device: str) -> None:
    generator = torch.Generator().manual_seed(6)
    square = torch.cat([torch.ones(6, 1), torch.randn(6, 5, generator=generator)], 1).double()
    basis = torch.linalg.qr(square)[0][:, 1:]  # orthogonal to the mean
    inside = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    x0 = (inside @ basis.T).to(device)
    alpha, sigma = 0.3, 0.8
    variance = torch.tensor(sigma**2, dtype=torch.float64)
    exact = 0.5 * (alpha**2 * inside**2 + variance - 1 - variance.log()).sum(1)
    for dof in (5, 5.0, torch.full((3,), 5, device=device)):
        found = ops.prior_kl(x0, alpha, sigma, dof=dof)
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-13, atol=0)
    assert torch.equal(ops.prior_kl(x0, alpha, sigma, dof=6), ops.prior_kl(x0, alpha, sigma))
    # Samples of different sizes, the rest 0.
    counts = torch.tensor([5, 3, 1])
    padded = inside * (torch.arange(5) < counts.unsqueeze(1))
    exact = 0.5 * (alpha**2 * padded**2).sum(1) + 0.5 * counts.double() * (
        variance - 1 - variance.log()
    )
    found = ops.prior_kl(padded.to(device), alpha, sigma, dof=counts.to(device))
    torch.testing.assert_close(found.cpu(), exact, rtol=1e-13, atol=0)
    diffusion = GaussianDiffusion(make_betas("linear", 50, scale_to_1000=True))
    level = float(diffusion.schedule.alpha[-1]), float(diffusion.schedule.sigma[-1])
    exact = ops.prior_kl(padded, *level, dof=counts) / (counts * math.log(2))
    torch.testing.assert_close(diffusion.prior_bpd(padded, dof=counts), exact)
    exact = ops.prior_kl(x0, *level, dof=5) / (5 * math.log(2))
    torch.testing.assert_close(diffusion.prior_bpd(x0, dof=5), exact)
    for dof, message in (
        (7, "dof must be above 0 and at most 6, got 7"),
        (counts[:2], "a number or"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.prior_kl(x0, alpha, sigma, dof=dof)


def test_with_the_best_variance_nothing_is_lost_but_the_prior() -> None:
    """VLB = H + KL(q(x_T) || N(0, I)); and H <= any other bound."""
    bound = float(expected("optimal", "epsilon", "noise").sum()) + PRIOR
    assert abs(bound - (ENTROPY + PRIOR_OF_MARGINAL)) < 1e-12
    for variance in ("fixed_small", "fixed_large"):
        other = float(expected(variance, "epsilon", "noise").sum()) + PRIOR
        assert ENTROPY < bound < other


# ---- the textbook ------------------------------------------------------------------------------


def textbook(
    x0: Tensor, x_t: Tensor, m: Tensor, v: Tensor, t: int, kind: str, variance: str, clip: Any
) -> Tensor:
    """KL of two Gaussians through their means and variances, float64, nats of each element."""
    beta, bar = BETAS[t], BAR[t]
    prev = BAR[t - 1] if t else torch.ones(())
    predicted = {
        "epsilon": lambda: (x_t - SIGMA[t] * m) / ALPHA[t],
        "sample": lambda: m,
        "v_prediction": lambda: ALPHA[t] * x_t - SIGMA[t] * m,
        "flow_prediction": lambda: (x_t - SIGMA[t] * m) / (ALPHA[t] + SIGMA[t]),
    }[kind]()
    if clip is not None:
        predicted = predicted.clamp(*clip)
    c0, c1 = prev.sqrt() * beta / (1 - bar), (1 - beta).sqrt() * (1 - prev) / (1 - bar)
    at = max(t, 1)
    log_small = torch.log(BETAS[at] * (1 - BAR[at - 1]) / (1 - BAR[at]))
    log_variance = {
        "fixed_small": lambda: log_small + 0 * v,
        "fixed_large": lambda: (log_small if t == 0 else beta.log()) + 0 * v,
        "learned": lambda: v,
        "learned_range": lambda: (v + 1) / 2 * beta.log() + (1 - v) / 2 * log_small,
    }[variance]()
    if t == 0:
        squared = (x0 - predicted) ** 2
        return 0.5 * (math.log(2 * math.pi) + log_variance + squared * torch.exp(-log_variance))
    shift = (c0 * x0 + c1 * x_t) - (c0 * predicted + c1 * x_t)
    d = log_small - log_variance
    return 0.5 * (-1 - d + torch.exp(d) + shift**2 * torch.exp(-log_variance))


@pytest.mark.parametrize("clip", [None, (-0.4, 0.6)], ids=["free", "clipped"])
@pytest.mark.parametrize("variance", VARIANCE_TYPES)
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_the_textbook_formula(kind: str, variance: str, clip: Any, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x0, noise, m, v = torch.randn(4, 6, 3, 5, generator=generator, dtype=torch.float64)
    x0, v = 0.4 * x0, 0.3 * v - 3 * (variance == "learned")
    t = torch.tensor([0, 0, 1, 2, 500, 999])
    alpha, sigma = (c[t].reshape(-1, 1, 1) for c in (ALPHA, SIGMA))
    x_t = alpha * x0 + sigma * noise
    m = m if kind == "sample" else noise + 0.01 * m
    each = [
        textbook(*row, int(i), kind, variance, clip)
        for *row, i in zip(x0, x_t, m, v, t, strict=True)
    ]
    wanted = torch.stack(each).sum((1, 2))
    extra = {"variance_output": v.to(device)} if variance.startswith("learned") else {}
    for given, values in (("x_t", x_t), ("noise", noise)):
        table = vlb_coefficients(
            ALPHA,
            SIGMA,
            prediction_type=kind,
            variance_type=variance,
            clip_range=clip,
            decoder="gaussian",
            given=given,
        ).to(device)
        options = {**extra, given: values.to(device)}
        found = ops.vlb_term(x0.to(device), m.to(device), table, t=t.to(device), **options).cpu()
        assert relative(found, wanted) < 1e-9  # the means' difference, in the textbook


def test_log_variances_copy_the_first() -> None:
    small, large = log_variances(ALPHA, SIGMA)
    assert small[0] == small[1]
    assert torch.allclose(large.exp(), BETAS, rtol=1e-12)
    alone, beta = log_variances(ALPHA[:1], SIGMA[:1])
    assert alone == beta


@pytest.mark.parametrize("variance", VARIANCE_TYPES)
def test_a_single_step_is_the_decoders(variance: str) -> None:
    table = vlb_coefficients(ALPHA[:1], SIGMA[:1], variance_type=variance, decoder="gaussian")
    x0, m = torch.randn(2, 2, 4, dtype=torch.float64)
    extra = {"variance_output": torch.zeros_like(x0)} if variance.startswith("learned") else {}
    found = ops.vlb_term(x0, m, table, t=0, x_t=ALPHA[0] * x0 + SIGMA[0] * m, **extra)
    log_variance = 0.0 if variance == "learned" else float(BETAS[0].log())
    wanted = 4 * 0.5 * (math.log(2 * math.pi) + log_variance)
    assert torch.allclose(found, torch.full_like(found, wanted), rtol=1e-12)


def test_a_key_is_its_noise(device: str) -> None:
    key = PhiloxNoise(3, stream=4)
    x0, m = torch.randn(2, 5, 3, 7, device=device)
    table = vlb_coefficients(ALPHA, SIGMA, given="noise").to(device)
    t = torch.tensor([0, 1, 10, 500, 999], device=device)
    drawn = ops.vlb_term(x0, m, table, t=t, noise=key)
    read = ops.vlb_term(x0, m, table, t=t, noise=key.tensor(x0.shape, device=device))
    assert torch.equal(drawn, read)
