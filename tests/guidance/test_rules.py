"""The rules of guidance: their authors' formulas, diffusers' guiders, gradients, special cases."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import ops, sample, solvers
from diffcore.guidance import (
    APG,
    CFG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    Guidance,
    NormPreservingCFG,
    RescaledCFG,
    Weighted,
)
from support import guidance_rules as authors
from support.op_case import without_kernels

W = 4.5
Formula = Callable[[Tensor, Tensor], Tensor]
RULES: dict[str, tuple[Guidance, Formula]] = {
    "cfg": (CFG(W), lambda c, u: authors.cfg(c, u, W)),
    "rescaled": (RescaledCFG(W, 0.6), lambda c, u: authors.rescaled(c, u, W, 0.6)),
    "zero_star": (CFGZeroStar(W, 0), lambda c, u: authors.zero_star(c, u, W)),
    "apg": (APG(W), lambda c, u: authors.projected(c, u, W, 0.0, math.inf)),
    "apg_limited": (APG(W, 0.3, 2.0), lambda c, u: authors.projected(c, u, W, 0.3, 2.0)),
    "tcfg": (TCFG(W), lambda c, u: authors.tangential(c, u, W)),
    "norm": (NormPreservingCFG(W), lambda c, u: authors.norm_preserving(c, u, W)),
}
BY_SUMS = [name for name in RULES if name != "cfg"]
each_rule = pytest.mark.parametrize("name", RULES)
each_by_sums = pytest.mark.parametrize("name", BY_SUMS)
ROW = (0.3, 0.2, 0.5, 0.0, 1.2, -0.3, -0.8, 0.9)


def predictions(shape: tuple[int, ...] = (3, 4, 9, 5), near: float = 0.4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    c, d = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return c + 0.2, c + near * d


@each_rule
@pytest.mark.parametrize("shape", [(3, 4, 9, 5), (2, 20_000), (5, 2)], ids=str)
def test_a_rule_is_its_authors_formula(name: str, shape: tuple[int, ...]) -> None:
    rule, formula = RULES[name]
    c, u = predictions(shape)
    atol = 1e-12
    if name == "tcfg":  # LAPACK's singular vector of n numbers has an error of about eps sqrt(n)
        size = float(u.flatten(1).norm(dim=1).max()) * math.sqrt(u[0].numel())
        atol = max(atol, torch.finfo(torch.float64).eps * size)
    for found in (rule.combine(c, u), _reference(rule, c, u)):
        torch.testing.assert_close(found, formula(c, u), rtol=1e-12, atol=atol)


def _reference(rule: Guidance, c: Tensor, u: Tensor) -> Tensor:
    with without_kernels():
        return rule.combine(c, u)


@each_by_sums
@pytest.mark.parametrize("near", [0.4, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_smaller_dtypes_are_as_near_as_eager(name: str, near: float, dtype: torch.dtype) -> None:
    rule, formula = RULES[name]
    c, u = (x.to(dtype) for x in predictions((4, 3, 31, 7), near))
    truth = formula(c.double(), u.double())
    eager = formula(c.float(), u.float()).to(dtype).double()
    found = rule.combine(c, u)
    assert found.dtype == dtype
    ulp = torch.finfo(dtype).eps * truth.abs().amax()
    assert (found.double() - truth).abs().max() <= 2 * (eager - truth).abs().max() + ulp


@each_rule
def test_a_step_is_that_of_the_combined_prediction(name: str) -> None:
    rule, formula = RULES[name]
    c, u = predictions()
    x, z = torch.randn_like(c), torch.randn_like(c)
    noisy = (*ROW[:3], 0.4, *ROW[4:])
    m = formula(c, u)
    for options in ({}, {"threshold": 0.7}):
        found = ops.reverse_step(
            x, c, noisy, noise=z, model_output_uncond=u, guidance=rule, **options
        )
        expected = ops.reverse_step(x, m, noisy, noise=z, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    pair = ops.reverse_step(x, torch.cat([u, c]), noisy, noise=z, guidance=rule)
    both = ops.reverse_step(x, c, noisy, noise=z, model_output_uncond=u, guidance=rule)
    assert torch.equal(pair, both)
    scored = ops.step_log_prob(x, c, z, noisy, model_output_uncond=u, guidance=rule)
    torch.testing.assert_close(scored, ops.step_log_prob(x, m, z, noisy))
    s = ops.dynamic_threshold(x, 3 * c, noisy, model_output_uncond=3 * u, guidance=rule)
    torch.testing.assert_close(s, ops.dynamic_threshold(x, formula(3 * c, 3 * u), noisy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_cfg_is_guidance_scale_to_the_bit(dtype: torch.dtype) -> None:
    c, u = (x.to(dtype) for x in predictions())
    x = torch.randn_like(c)
    for scale in (W, torch.tensor([1.5, 7.0, 0.3])):
        short = ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance_scale=scale)
        assert torch.equal(
            ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance=CFG(scale)), short
        )
        w = scale.reshape(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        m = u.to(compute) + w * (c.to(compute) - u.to(compute))
        eager = ops.reverse_step(x.to(compute), m.to(compute), ROW).to(dtype)
        torch.testing.assert_close(short, eager)


@each_by_sums
def test_scales_of_each_sample(name: str) -> None:
    rule, _ = RULES[name]
    scales = torch.tensor([1.5, 7.0, 3.0])
    c, u = predictions()
    found = dataclasses.replace(rule, scale=scales).combine(c, u)
    for k, scale in enumerate(scales.tolist()):
        one = dataclasses.replace(rule, scale=scale).combine(c[k : k + 1], u[k : k + 1])
        assert torch.equal(found[k : k + 1], one)


@each_by_sums
def test_the_sums_have_the_same_bits_on_any_number_of_threads(name: str) -> None:
    rule, _ = RULES[name]
    c, u = (x.float() for x in predictions((3, 70_001)))
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(rule.weights(c, u))
    finally:
        torch.set_num_threads(threads)
    alone = rule.weights(c[1:2], u[1:2])
    for weights in found:
        assert all(map(torch.equal, weights, found[0]))
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, found[0], strict=True))


@each_rule
def test_gradients(name: str) -> None:
    rule, _ = RULES[name]
    c, u = (x.requires_grad_() for x in predictions((2, 3, 4)))
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def step(x: Tensor, c: Tensor, u: Tensor) -> Tensor:
        return ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance=rule)

    assert torch.autograd.gradcheck(step, (x, c, u))
    assert torch.autograd.gradcheck(rule.combine, (c, u))


@each_by_sums
def test_one_row_sum_and_one_step(name: str, launched: list[str]) -> None:
    rule, _ = RULES[name]
    c, u = (x.float() for x in predictions())
    ops.reverse_step(torch.randn_like(c), c, ROW, model_output_uncond=u, guidance=rule)
    assert launched == ["guidance_weights", "reverse_step_guided"]


def test_predictions_that_say_nothing() -> None:
    c = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, math.nan]], dtype=torch.float64)
    u = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for rule, _ in RULES.values():
        found = rule.combine(c, u)
        assert found[:2].isfinite().all(), rule
        assert found[2, 1].isnan()
    zeros = torch.zeros(2, 3)
    for rule, _ in RULES.values():
        assert torch.equal(rule.combine(zeros, zeros), zeros), rule
        assert rule.combine(zeros[:0], zeros[:0]).shape == (0, 3)
        assert rule.combine(zeros[:, :0], zeros[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("factor", [3.0, 0.2, -0.4, -3.0])
def test_the_singular_vector_of_any_two_predictions(factor: float) -> None:
    c, other = predictions(near=1.0)
    u = factor * c + 0.3 * (other - c)
    for pair in ((c, u), (u, c)):
        expected = authors.tangential(*pair, W)
        torch.testing.assert_close(TCFG(W).combine(*pair), expected, rtol=1e-11, atol=1e-11)
    across = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    for m, m_u in ((across, across.flip(0)), (across.flip(0), across)):
        torch.testing.assert_close(TCFG(W).combine(m, m_u), authors.tangential(m, m_u, W))


def test_weights_that_are_known() -> None:
    c, u = predictions()
    torch.testing.assert_close(Weighted(3.0, 0.5).combine(c, u), 1.5 * u + 3 * (c - u))


# ---- momentum ------------------------------------------------------------------------------------


def test_momentum_is_that_of_the_authors_buffer() -> None:
    rule = APG(W, 0.2, 3.0, momentum=-0.5)
    running: Any = 0.0
    begun = rule.begin()
    for k in range(4):
        c, u = predictions(near=0.2 + 0.1 * k)
        x = torch.randn_like(c)
        running = c - u - 0.5 * running
        expected = authors.projected(c, u, W, 0.2, 3.0, running)
        found = ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance=begun)
        torch.testing.assert_close(found, ops.reverse_step(x, expected, ROW), rtol=0, atol=1e-12)
    assert begun == rule
    with pytest.raises(ValueError, match=r"guidance must be begun .* pass guidance.begin\(\)"):
        ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance=rule)


# ---- diffusers -----------------------------------------------------------------------------------


def _guider(name: str) -> Any:
    guiders = pytest.importorskip("diffusers.guiders")
    if name == "zero_star":
        guider = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=W, zero_init_steps=0)
    elif name == "tcfg":
        guider = guiders.TangentialClassifierFreeGuidance(guidance_scale=W)
    elif name == "rescaled":
        guider = guiders.ClassifierFreeGuidance(guidance_scale=W, guidance_rescale=0.6)
    else:
        guider = guiders.AdaptiveProjectedGuidance(
            guidance_scale=W - 1,
            adaptive_projected_guidance_rescale=2.0,
            eta=0.3,
            use_original_formulation=True,
        )
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(5))
    return guider


@pytest.mark.parametrize("name", ["zero_star", "tcfg", "rescaled", "apg_limited"])
def test_diffusers_has_the_same(name: str) -> None:
    c, u = predictions((3, 4, 8, 8))
    found = _guider(name).forward(c, u)
    found = getattr(found, "pred", found)
    # In float32 there: the singular vectors of tcfg, the sums of zero_star.
    tolerance = {"tcfg": 1e-4, "zero_star": 1e-5}.get(name, 1e-12)
    torch.testing.assert_close(RULES[name][0].combine(c, u), found, rtol=0, atol=tolerance)


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CFG("2"), TypeError, "scale must be a number, got str"),
        (
            lambda: CFG(torch.ones(2, 3, 4)),
            TypeError,
            r"scale must be .* \[B, C\], got",
        ),
        (lambda: RescaledCFG(2, 1.5), ValueError, r"rescale must be in \[0, 1\], got 1.5"),
        (lambda: CFGZeroStar(2, -1), ValueError, "zero_init_steps must be at least 0, got -1"),
        (lambda: APG(2, norm_threshold=-1), ValueError, "norm_threshold must be at least 0"),
        (lambda: TCFG(2, interval=(0.5, 0.2)), ValueError, r"interval must be \(start, stop\)"),
        (lambda: TCFG(2, interval=0.5), TypeError, "interval must be a pair of numbers, got float"),
    ],
)
def test_wrong_settings(make: Callable[[], Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_numbers_of_all_kinds() -> None:
    assert CFG(np.float32(2)) == CFG(2) == CFG(2.0)
    assert isinstance(RescaledCFG(np.int64(3)).scale, float)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guidance": 2.0}, TypeError, "guidance must be a rule .* got float; a number is"),
        ({"guidance": CFG(2), "guidance_scale": 2.0}, ValueError, "guidance_scale must be None"),
        ({"guidance": CFG(2, interval=(0, 0.5))}, ValueError, "guidance must be the same in every"),
        ({"guidance": CFGZeroStar(2)}, ValueError, "guidance must be the same in every"),
        ({"guidance": CFGPlusPlus(0.6)}, ValueError, "guidance must not be CFGPlusPlus here"),
        (
            {"guidance": TCFG(torch.ones(5))},
            ValueError,
            "scale must have 1 or 3 entries, one per .* got 5",
        ),
    ],
)
def test_wrong_calls(options: dict[str, Any], error: type, message: str) -> None:
    c, u = predictions()
    with pytest.raises(error, match=message):
        ops.reverse_step(c, c, ROW, model_output_uncond=u, **options)


def test_a_rule_without_an_unconditional_prediction() -> None:
    c, u = predictions()
    with pytest.raises(ValueError, match="model_output_uncond must be given with guidance"):
        ops.reverse_step(c, c, ROW, guidance=TCFG(2))
    with pytest.raises(ValueError, match=r"model_output_uncond must have the shape of x"):
        ops.reverse_step(c, c, ROW, model_output_uncond=u[:1], guidance=TCFG(2))
    with pytest.raises(ValueError, match="guidance_scale must be given with model_output_uncond"):
        ops.reverse_step(c, c, ROW, model_output_uncond=u)


# ---- numbers of channels and tokens --------------------------------------------------------------


def test_a_scale_of_each_channel() -> None:
    c, u = predictions((3, 4, 9, 5))
    x = torch.randn_like(c)
    scale = torch.rand(3, 4, dtype=torch.float64) * 5
    m = u + scale[:, :, None, None] * (c - u)
    torch.testing.assert_close(CFG(scale).combine(c, u), m, rtol=1e-12, atol=1e-12)
    wanted = ops.reverse_step(x, m, ROW)
    for given in ({"guidance_scale": scale}, {"guidance": CFG(scale)}):
        found = ops.reverse_step(x, c, ROW, model_output_uncond=u, **given)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        both = ops.reverse_step(x, torch.cat((u, c)), ROW, **given)
        assert torch.equal(both, found)
    with pytest.raises(ValueError, match="must have one number per sample, got shape"):
        ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance_scale=scale[:, :3])
    with pytest.raises(TypeError, match=r"scale must be a number or a .* tensor \[B\], got"):
        RescaledCFG(scale)


def test_a_scale_of_each_channel_in_a_loop() -> None:
    table = solvers.euler_table([3.0, 1.0, 0.4, 0.0])
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    scale = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.5, 5.0]], dtype=torch.float64)

    def model(x: Tensor, t: Tensor, shift: float) -> Tensor:
        return torch.tanh(x) + shift

    kwargs = {"model_kwargs": {"shift": 0.5}, "uncond_kwargs": {"shift": -0.5}}
    found = sample(model, x, table, guidance_scale=scale, **kwargs)
    for k in range(3):
        alone = sample(model, x[:, k], table, guidance_scale=scale[:, k], **kwargs)
        torch.testing.assert_close(found[:, k], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 6, 8), (2, 3, 4, 8)], ids=str)
def test_the_norm_of_each_token(shape: tuple[int, ...]) -> None:
    c, u = predictions(shape)
    scale = torch.tensor([2.0, 5.0], dtype=torch.float64)
    m = u + scale.view(-1, *[1] * (c.ndim - 1)) * (c - u)
    m = m * c.norm(dim=-1, keepdim=True) / m.norm(dim=-1, keepdim=True)
    rule = NormPreservingCFG(scale, dim=-1)
    torch.testing.assert_close(rule.combine(c, u), m, rtol=1e-12, atol=1e-12)
    x = torch.randn_like(c)
    found = ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance=rule)
    wanted = ops.reverse_step(x, m, ROW)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    c.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c: ops.reverse_step(x, c, ROW, model_output_uncond=u, guidance=rule), (c,)
    )
    with pytest.raises(ValueError, match="dim must be -1 or None, got 1"):
        NormPreservingCFG(2.0, dim=1)


def test_a_kl_of_several_dtypes_is_that_of_the_widest() -> None:
    """The numbers of both models' guidance too, though one model's tensors are narrower."""
    c, u = predictions((2, 3, 4))
    x, m = torch.randn(2, 3, 4), c.float()
    row = (*ROW[:3], 0.5, *ROW[4:])
    unconds = {"model_output_uncond": u, "reference_output_uncond": u.float()}
    found = ops.step_kl(x, m, m * 0.9, row, guidance=TCFG(2.5), **unconds)
    wide = {name: value.double() for name, value in unconds.items()}
    wanted = ops.step_kl(
        x.double(), m.double(), (m * 0.9).double(), row, guidance=TCFG(2.5), **wide
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
