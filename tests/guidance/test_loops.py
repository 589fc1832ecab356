"""Guidance in sampling loops: by row, by table, by every way of calling a step."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import GaussianDiffusion, NoiseLevels, PhiloxNoise, ops, solvers
from diffcore.guidance import (
    APG,
    CFG,
    TCFG,
    CFGPlusPlus,
    CFGZeroStar,
    Guidance,
    NormPreservingCFG,
    RescaledCFG,
)
from support import guidance_rules as authors

SIGMAS = torch.tensor([9.0, 4.0, 2.0, 1.1, 0.5, 0.1, 0.0], dtype=torch.float64)
SIZES = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
CONDITIONS: dict[str, Any] = {"model_kwargs": {"mean": 1.0}, "uncond_kwargs": {"mean": -0.3}}


class Denoiser:
    """The exact x_0 of data N(mean, sizes²) with alpha = 1; counts its calls."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def __call__(self, x: Tensor, t: Tensor, mean: float) -> Tensor:
        self.means.append(mean)
        s = t.reshape(-1, 1).to(x.dtype)
        size = (SIZES * (1 + 0.2 * mean)).to(x.dtype)
        return (size**2 * x + s**2 * mean) / (size**2 + s**2)


def start(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return 9 * torch.randn(batch, 4, generator=generator, dtype=torch.float64)


def by_hand(x: Tensor, combine: Any, sigmas: Tensor = SIGMAS) -> Tensor:
    """Euler's method on the guided denoised samples."""
    model = Denoiser()
    for i, (s, after) in enumerate(pairwise(sigmas)):
        t = s.expand(len(x))
        m = combine(i, model(x, t, 1.0), model(x, t, -0.3))
        x = m + after / s * (x - m)
    return x


RULES: dict[str, tuple[Guidance, Any]] = {
    "cfg": (CFG(3.0), lambda i, c, u: authors.cfg(c, u, 3.0)),
    "rescaled": (RescaledCFG(3.0, 0.6), lambda i, c, u: authors.rescaled(c, u, 3.0, 0.6)),
    "tcfg": (TCFG(3.0), lambda i, c, u: authors.tangential(c, u, 3.0)),
    "norm": (NormPreservingCFG(3.0), lambda i, c, u: authors.norm_preserving(c, u, 3.0)),
    "zero_star": (
        CFGZeroStar(3.0, zero_init_steps=2),
        lambda i, c, u: 0 * c if i < 2 else authors.zero_star(c, u, 3.0),
    ),
    "interval": (
        RescaledCFG(3.0, 0.6, interval=(0.2, 0.7)),
        lambda i, c, u: authors.rescaled(c, u, 3.0, 0.6) if 1 <= i < 4 else c,
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("calls", ["two calls", "one call"])
def test_sample_is_the_loop_by_hand(name: str, calls: str) -> None:
    rule, combine = RULES[name]
    model = Denoiser()
    table = solvers.euler_table(SIGMAS, prediction_type="sample")
    if calls == "two calls":
        found = diffcore.sample(model, start(), table, guidance=rule, **CONDITIONS)
    else:
        both = lambda x, t: torch.cat([model(x, t, -0.3), model(x, t, 1.0)])  # noqa: E731
        found = diffcore.sample(both, start(), table, guidance=rule)
    torch.testing.assert_close(found, by_hand(start(), combine), rtol=1e-11, atol=1e-11)


def test_momentum_in_a_loop_begins_anew() -> None:
    rule = APG(3.0, 0.2, 1.5, momentum=-0.6)
    running: list[Any] = [0.0]

    def combine(i: int, c: Tensor, u: Tensor) -> Tensor:
        running[0] = c - u - 0.6 * running[0]
        return authors.projected(c, u, 3.0, 0.2, 1.5, running[0])

    table = solvers.euler_table(SIGMAS, prediction_type="sample")
    first = diffcore.sample(Denoiser(), start(), table, guidance=rule, **CONDITIONS)
    torch.testing.assert_close(first, by_hand(start(), combine), rtol=1e-11, atol=1e-11)
    again = diffcore.sample(Denoiser(), start(), table, guidance=rule, **CONDITIONS)
    assert torch.equal(first, again)


def test_outside_an_interval_the_model_is_called_once() -> None:
    table = solvers.dpmpp_2m_table(SIGMAS, prediction_type="sample")
    model = Denoiser()
    rule = CFG(3.0, interval=(0.5, 0.9))
    found = diffcore.sample(model, start(), table, guidance=rule, **CONDITIONS)
    assert model.means == [1.0] * 3 + [1.0, -0.3] * 2 + [1.0]
    never = CFG(3.0, interval=(0, 0))
    plain = diffcore.sample(lambda x, t: Denoiser()(x, t, 1.0), start(), table)
    assert torch.equal(
        diffcore.sample(Denoiser(), start(), table, guidance=never, **CONDITIONS), plain
    )
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("rule", [RescaledCFG(3.0), CFGZeroStar(3.0), CFG(3.0, interval=(0.3, 1))])
def test_thresholds_and_callbacks_see_the_guided_prediction(rule: Guidance) -> None:
    table = solvers.dpmpp_2m_table(SIGMAS, prediction_type="sample")
    states: list[Any] = []
    options: dict[str, Any] = {"dynamic_thresholding_ratio": 0.9, "guidance": rule}
    found = diffcore.sample(
        Denoiser(), start(), table, callback=states.append, **options, **CONDITIONS
    )
    x, history, model = start(), (), Denoiser()
    for i, row in enumerate(table.rows):
        t = torch.full((3,), row.sigma, dtype=torch.float64)
        c, u = model(x, t, 1.0), model(x, t, -0.3)
        here = rule.at(i, len(table))
        m = c if here is None else here.combine(c, u)
        s = ops.dynamic_threshold(x, m, row.coefficients, ratio=0.9)
        x0 = table.denoised(i, x, m, threshold=s)
        torch.testing.assert_close(states[i]["denoised"], x0)
        torch.testing.assert_close(
            table.denoised(i, x, c, model_output_uncond=u, guidance=rule, threshold=s), x0
        )
        x, history = table.step(i, x, m, history, threshold=s)
    torch.testing.assert_close(found, x)


# ---- GaussianDiffusion ---------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("rule", [CFG(2.5), RescaledCFG(2.5), CFGZeroStar(2.5, 3)], ids=repr)
def test_the_loops_of_a_diffusion(rule: Guidance, variance_type: str) -> None:
    learned = variance_type != "fixed_small"
    diffusion = GaussianDiffusion(diffcore.make_betas("linear", 20), variance_type=variance_type)

    def model(x: Tensor, t: Tensor, mean: float) -> Tensor:
        epsilon = 0.7 * x - mean * torch.cos(x + 0.1 * t.reshape(-1, 1, 1))
        v = 0.3 * x + 0.2 * mean  # that of the conditional call is read
        return torch.cat([epsilon, v], 1) if learned else epsilon

    key = PhiloxNoise(5)
    shape = (2, 3, 6)
    found = diffusion.p_sample_loop(
        model, shape, noise=key, dtype=torch.float64, guidance=rule, **CONDITIONS
    )

    def guided(i: int, x: Tensor, t: Tensor) -> Tensor:
        c, u = model(x, t, 1.0), model(x, t, -0.3)
        here = rule.at(i, 20)
        if not learned:
            return c if here is None else here.combine(c, u)
        m = c[:, :3] if here is None else here.combine(c[:, :3].clone(), u[:, :3].clone())
        return torch.cat([m, c[:, 3:]], 1)

    x = key.tensor(shape, dtype=torch.float64)
    for i in range(20):
        t = torch.full((2,), 19 - i)
        m = guided(i, x, t)
        x = diffusion.p_sample(lambda x, t: m, x, t, noise=key.at(1 + i))["sample"]  # noqa: B023
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)

    found = diffusion.ddim_sample_loop(
        model, shape, noise=key, dtype=torch.float64, guidance=rule, **CONDITIONS
    )
    x = key.tensor(shape, dtype=torch.float64)
    for i in range(20):
        t = torch.full((2,), 19 - i)
        m = guided(i, x, t)
        x = diffusion.ddim_sample(lambda x, t: m, x, t)["sample"]  # noqa: B023
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


def test_guidance_scale_is_cfg_in_the_loops() -> None:
    diffusion = GaussianDiffusion(diffcore.make_betas("linear", 10))
    model = lambda x, t, mean: 0.7 * x - mean * torch.cos(x)  # noqa: E731
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        options: dict[str, Any] = {"noise": PhiloxNoise(5), **CONDITIONS}
        short = loop(model, (2, 3), guidance_scale=2.5, **options)
        assert torch.equal(loop(model, (2, 3), guidance=CFG(2.5), **options), short)
        with pytest.raises(ValueError, match="guidance_scale must be None with guidance"):
            loop(model, (2, 3), guidance_scale=2.5, guidance=CFG(2.5), **options)
        with pytest.raises(ValueError, match="guidance_scale must be given with uncond_kwargs"):
            loop(model, (2, 3), **options)


# ---- CFG++ ---------------------------------------------------------------------------------------


def euler_cfg_pp(x: Tensor, scale: float, combine: Any = None) -> Tensor:
    """The sampler "euler_cfg_pp" in alpha = 1, on exact denoisers."""
    model = Denoiser()
    for s, after in pairwise(SIGMAS):
        t = s.expand(len(x))
        c, u = model(x, t, 1.0), model(x, t, -0.3)
        m = authors.cfg(c, u, scale) if combine is None else combine(c, u)
        x = m + (x - u) / s * after
    return x


def dpmpp_2m_cfg_pp(x: Tensor, scale: float) -> Tensor:
    """The sampler "dpmpp_2m_cfg_pp" in alpha = 1."""
    model, before = Denoiser(), None
    for i, (s, after) in enumerate(pairwise(SIGMAS)):
        t = s.expand(len(x))
        c, u = model(x, t, 1.0), model(x, t, -0.3)
        m, h = authors.cfg(c, u, scale), (s / after).log()
        mix = -torch.exp(-h) * u
        if before is not None and after != 0:
            r = (SIGMAS[i - 1] / s).log() / h
            mix = mix - torch.expm1(-h) / (2 * r) * (m - before)
        x, before = m + mix + torch.exp(-h) * x, u
    return x


def _levels(steps: int) -> NoiseLevels:
    schedule = GaussianDiffusion(diffcore.make_betas("linear", 100)).schedule
    return NoiseLevels.from_schedule(schedule, torch.linspace(99, 5, steps).round().long())


@pytest.mark.parametrize("name", ["cfg_pp", "dpmpp_2m_cfg_pp"])
def test_the_samplers_of_cfg_pp(name: str) -> None:
    make = getattr(solvers, f"{name}_table")
    table = make(SIGMAS, prediction_type="sample")
    expected = {"cfg_pp": euler_cfg_pp, "dpmpp_2m_cfg_pp": dpmpp_2m_cfg_pp}[name](start(), 0.7)
    for options in ({"guidance": CFGPlusPlus(0.7)}, {"guidance_scale": 0.7}):
        found = diffcore.sample(Denoiser(), start(), table, **options, **CONDITIONS)
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["cfg_pp", "dpmpp_2m_cfg_pp"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_cfg_pp_of_other_predictions_and_paths(name: str, kind: str) -> None:
    """The same rows by the x_0 and the noise of each prediction."""
    levels = _levels(5)
    table = getattr(solvers, f"{name}_table")(levels, prediction_type=kind)
    x, c, u, h = torch.randn(4, 3, 7, dtype=torch.float64)
    points = levels.levels()
    for i in (0, 2, 4):
        here, after = points[i], points[i + 1]
        m = u + 0.8 * (c - u)
        x0 = ops.predict_x0(m, x, here.alpha, here.sigma, prediction_type=kind)
        of_u = ops.predict_x0(u, x, here.alpha, here.sigma, prediction_type=kind)
        noise = (x - here.alpha * of_u) / here.sigma
        expected = after.alpha * x0 + after.sigma * noise
        if name != "cfg_pp" and i == 2:
            step, last = after.lam - here.lam, here.lam - points[1].lam
            expected += after.alpha * (1 - torch.tensor(-step).exp()) * step / last / 2 * (x0 - h)
        found, kept = table.step(i, x, c, (h,), model_output_uncond=u, guidance_scale=0.8)
        torch.testing.assert_close(found, expected)
        if kept and i < 4:
            torch.testing.assert_close(kept[0], of_u)


def test_rows_of_cfg_pp_by_tensors_and_their_gradients() -> None:
    table = solvers.dpmpp_2m_cfg_pp_table(SIGMAS, prediction_type="sample")
    x, c, u, h = torch.randn(4, 3, 5, dtype=torch.float64)
    rule = RescaledCFG(0.8)
    options: dict[str, Any] = {"model_output_uncond": u, "guidance": rule}
    rows = torch.tensor([3, 0, 5])
    together, kept = table.step(rows, x, c, (h,), **options)
    for k, i in enumerate(rows.tolist()):
        one = {"model_output_uncond": u[k : k + 1], "guidance": rule}
        alone, left = table.step(i, x[k : k + 1], c[k : k + 1], (h[k : k + 1],), **one)
        torch.testing.assert_close(together[k : k + 1], alone)
        if i != 5:  # the last row writes none
            torch.testing.assert_close(kept[0][k : k + 1], left[0])

    def step(x: Tensor, c: Tensor, u: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        found, kept = table.step(2, x, c, (h,), model_output_uncond=u, guidance_scale=0.8)
        return found, kept[0]

    leaves = [y.clone().requires_grad_() for y in (x, c, u, h)]
    assert torch.autograd.gradcheck(step, leaves)
    assert torch.autograd.gradcheck(lambda *y: step(*y)[1], leaves)


def test_ancestral_cfg_pp_adds_the_noise_of_ddim() -> None:
    levels = _levels(6)
    x, m, z = torch.randn(3, 4, 5, dtype=torch.float64)
    table, plain = solvers.cfg_pp_table(levels, eta=1.0), solvers.ddim_table(levels, eta=1.0)
    for i in range(6):
        found, _ = table.step(i, x, m, noise=z, model_output_uncond=m, guidance_scale=1.7)
        torch.testing.assert_close(found, plain.step(i, x, m, noise=z)[0])


def test_cfg_pp_needs_its_tables_and_guidance() -> None:
    plain = solvers.euler_table(SIGMAS, prediction_type="sample")
    table = solvers.cfg_pp_table(SIGMAS, prediction_type="sample")
    x = start()
    wrong = "guidance must not be CFGPlusPlus for euler.* use solvers.cfg_pp_table"
    with pytest.raises(ValueError, match=wrong):
        diffcore.sample(Denoiser(), x, plain, guidance=CFGPlusPlus(0.7), **CONDITIONS)
    with pytest.raises(ValueError, match=wrong):
        plain.step(0, x, x, model_output_uncond=x, guidance=CFGPlusPlus(0.7))
    with pytest.raises(ValueError, match=r"guidance must be given for cfg_pp.* got None"):
        table.step(0, x, x)
    with pytest.raises(ValueError, match="guidance must be given for cfg_pp"):
        diffcore.sample(lambda x, t: x, x, table)
    rule = CFGPlusPlus(0.7, interval=(0.0, 0.5))
    model = Denoiser()
    found = diffcore.sample(model, x, table, guidance=rule, **CONDITIONS)
    assert model.means == [1.0, -0.3] * 6  # the noise is that of m_u in every row
    assert found.isfinite().all()
    with pytest.raises(ValueError, match=r"variance must be None in a table with uncond"):
        dataclasses.replace(table, variance=torch.zeros(6, 2))


# ---- routes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [RescaledCFG(3.0, 0.6), APG(3.0, 0.2, 1.5), TCFG(3.0)], ids=repr)
def test_a_step_by_other_routes(rule: Guidance) -> None:
    table = solvers.dpmpp_2m_table(SIGMAS, prediction_type="sample")
    x, c, u, h = torch.randn(4, 3, 5)

    def step(x: Tensor, c: Tensor, u: Tensor) -> Tensor:
        return table.step(2, x, c, (h[: len(x)],), model_output_uncond=u, guidance=rule)[0]

    plain = step(x, c, u)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(step, fullgraph=True)(x, c, u), plain)
    with torch.device("cpu"):
        assert torch.equal(step(x, c, u), plain)
    per_sample = torch.func.vmap(
        lambda x, c, u, h: table.step(
            2, x[None], c[None], (h[None],), model_output_uncond=u[None], guidance=rule
        )[0][0]
    )
    torch.testing.assert_close(per_sample(x, c, u, h), plain)
    _, tangent = torch.func.jvp(lambda c: step(x, c, u), (c,), (u,))
    eps = 1e-3
    difference = (step(x, c + eps * u, u) - step(x, c - eps * u, u)) / (2 * eps)
    torch.testing.assert_close(tangent, difference, rtol=1e-2, atol=1e-2)
    m = ops.reverse_step(
        *(y.to("meta") for y in (x, c)), (1.0,) * 8, model_output_uncond=u.to("meta"), guidance=rule
    )
    assert (m.shape, m.dtype, m.device.type) == (plain.shape, plain.dtype, "meta")


def test_an_interval_needs_a_row_that_is_an_int() -> None:
    table = solvers.euler_table(SIGMAS, prediction_type="sample")
    x = start()
    for rule in (CFG(2.0, interval=(0.1, 0.5)), CFGZeroStar(2.0)):
        with pytest.raises(ValueError, match="guidance must be the same in every row where i is"):
            table.step(torch.tensor(1), x, x, model_output_uncond=x, guidance=rule)
    outside = table.step(5, x, 2 * x, model_output_uncond=x, guidance=CFG(2.0, interval=(0, 0.5)))
    assert torch.equal(outside[0], table.step(5, x, 2 * x)[0])
    both = table.step(5, x, torch.cat([x, 2 * x]), guidance=CFG(2.0, interval=(0, 0.5)))
    assert torch.equal(outside[0], both[0])


def test_a_captured_loop_takes_a_rule() -> None:
    table = solvers.euler_table(SIGMAS, prediction_type="sample")
    rule = RescaledCFG(3.0, 0.6, interval=(0.2, 1.0))
    sampler = diffcore.sampling.capture(
        Denoiser(), table, (3, 4), guidance=rule, dtype=torch.float64, **CONDITIONS
    )
    found = diffcore.sample(Denoiser(), start(), table, guidance=rule, **CONDITIONS)
    assert torch.equal(sampler(x=start()), found)
