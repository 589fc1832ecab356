"""Models that say their own variance: tables, loops, refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from diffcore import GaussianDiffusion, PhiloxNoise, sample, solvers
from diffcore._engine import native
from diffcore.sampling import capture
from support.bounds import assert_same_bits
from support.refusals import refused
from support.toys import BETAS, EPS, Says, half

STEPS = len(BETAS)
each_type = pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
SHAPE = (4, 3, 2, 5)

# ---- tables ------------------------------------------------------------------------------------


def table_of(variance_type: str, **options: Any) -> solvers.SolverTable:
    schedule = GaussianDiffusion(BETAS).schedule
    levels = solvers.NoiseLevels.from_schedule(schedule, [19, 12, 6, 3, 0])
    return solvers.ddpm_table(levels, variance_type=variance_type, **options)


@each_type
def test_a_table_holds_half_the_log_variance(variance_type: str) -> None:
    table, small, large = (table_of(v) for v in (variance_type, "fixed_small", "fixed_large"))
    assert table.variance is not None
    assert table.variance.dtype == torch.float64
    assert table.variance.shape == (5, 2)
    assert table.column("c_z").tolist() == [1, 1, 1, 1, 0]
    assert table.stochastic
    for name in solvers.COLUMNS:
        if name != "c_z":
            assert torch.equal(table.column(name), small.column(name)), name
    s_0, s_v = table.variance[:-1].unbind(1)
    if variance_type == "learned":
        assert torch.equal(table.variance[:-1], torch.tensor([[0, 0.5]] * 4, dtype=torch.float64))
    else:
        low, high = (t.column("c_z")[:-1].log() for t in (small, large))
        torch.testing.assert_close(s_0 - s_v, low, rtol=0, atol=8 * EPS)
        torch.testing.assert_close(s_0 + s_v, high, rtol=0, atol=8 * EPS)
    assert table.variance[-1].tolist() == [0, 0]
    assert table.to("cpu") is table
    assert small.variance is None


@each_type
def test_a_step_that_goes_nowhere_draws_nothing(variance_type: str) -> None:
    alpha = torch.tensor([0.6, 0.8, 0.8], dtype=torch.float64)
    schedule = GaussianDiffusion(BETAS).schedule
    levels = solvers.NoiseLevels.from_schedule(schedule, [19, 0])
    levels = solvers.NoiseLevels(
        alpha, (1 - alpha**2).sqrt(), torch.tensor([9, 0]), "vp", levels.time_of
    )
    table = solvers.ddpm_table(levels, variance_type=variance_type)
    assert table.column("c_z").tolist() == [1, 0]
    assert table.variance is not None
    assert table.variance.isfinite().all()


@each_type
def test_rows_by_number_counter_and_sample(variance_type: str, device: str) -> None:
    table = table_of(variance_type).to(device)
    x, m, v, m_u, z = (torch.randn(5, 2, 3, device=device) for _ in range(5))
    for more in ({}, {"model_output_uncond": m_u, "guidance_scale": 3.0}, {"threshold": 1.5}):
        for noise in (z, PhiloxNoise(2)):
            how: dict[str, Any] = {"noise": noise, "variance_output": v, **more}
            rows = []
            for i in range(5):
                by_int, left = table.step(i, x, m, **how)
                assert left == ()
                counter = torch.tensor(i, device=device)
                by_counter, _ = table.step(counter, x, m, **how)
                # float64 on its way to a kernel or not, the exponential is of the same number
                assert_same_bits(by_counter, by_int, f"row {i}")
                rows.append(by_int[i])
            each, _ = table.step(torch.arange(5, device=device), x, m, **how)
            assert_same_bits(each, torch.stack(rows))


@each_type
def test_a_step_is_the_formula(variance_type: str) -> None:
    table = table_of(variance_type)
    x, m, v, z = torch.randn(4, 5, 3, dtype=torch.float64)
    assert table.variance is not None
    for i in range(5):
        found, _ = table.step(i, x, m, noise=z, variance_output=v)
        still, _ = table.step(i, x, m, noise=torch.zeros_like(z), variance_output=v)
        s_0, s_v = table.variance[i].tolist()
        deviation = table.column("c_z")[i] * torch.exp(s_0 + s_v * v)
        torch.testing.assert_close(found - still, deviation * z, rtol=0, atol=64 * EPS)


@each_type
def test_one_launch_reads_the_halves_in_place(variance_type: str, launched: list[str]) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type)
    x, both = torch.randn(SHAPE), torch.randn(4, 6, 2, 5)
    table, noise = table_of(variance_type), PhiloxNoise(0)
    m, v = both.chunk(2, dim=1)
    wanted, _ = table.step(1, x, m.contiguous(), noise=noise, variance_output=v.contiguous())
    t = torch.tensor([3, 9, 0, 1])

    def says(x: Tensor, t: Tensor) -> Tensor:
        return both

    # Whatever is not read in place is copied to a tensor made for it: there must be none.
    made: list[tuple[int, ...]] = []
    real = torch.empty_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "diffcore._engine.execute._new_like", lambda x: made.append(x.shape) or real(x)
        )
        launched.clear()
        found, _ = table.step(1, x, m, noise=noise, variance_output=v)
        d.p_sample(says, x, t, noise=noise)
        d.p_sample_loop(says, SHAPE, noise=x, step_noise=noise)
        d.ddim_sample_loop(says, SHAPE, noise=x)
    assert_same_bits(found, wanted)
    learned, still = "reverse_step_learned_noise*", "reverse_step"
    assert launched == [
        *(learned, learned, still),
        *([learned] * (STEPS - 1) + [still]),
        *([still] * STEPS),
    ]
    assert made == []


# ---- loops -------------------------------------------------------------------------------------


def conditional(x: Tensor, t: Tensor, y: float = 0.0) -> Tensor:
    return torch.cat([torch.tanh(x) + y, torch.sin(3 * x) * (1 + y)], dim=1)


def both_at_once(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([conditional(x, t, 0.3), conditional(x, t)])


@each_type
def test_every_loop_is_the_same_walk(variance_type: str) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type)
    noise = PhiloxNoise(5)
    x_T = noise.tensor(SHAPE)
    levels = solvers.NoiseLevels.from_schedule(d.schedule, list(range(STEPS))[::-1])
    table = solvers.ddpm_table(levels, variance_type=variance_type, clip_range=1.0)
    wanted, said = x_T, []
    for i, t in enumerate(range(STEPS)[::-1]):
        step = d.p_sample(conditional, wanted, t, noise=noise.at(1 + i))
        said.append(step["pred_xstart"])
        wanted = step["sample"]
    assert_same_bits(d.p_sample_loop(conditional, SHAPE, noise=noise), wanted, "p_sample_loop")
    assert_same_bits(sample(conditional, x_T, table, noise=noise), wanted, "sample")
    assert_same_bits(capture(conditional, table, SHAPE)(noise), wanted, "capture")
    told: list[Tensor] = []
    sample(conditional, x_T, table, noise=noise, callback=lambda s: told.append(s["denoised"]))
    assert_same_bits(torch.stack(told), torch.stack(said), "denoised")


@each_type
def test_guidance_takes_the_conditional_variance(variance_type: str) -> None:
    table = table_of(variance_type)
    x, noise = torch.randn(SHAPE), PhiloxNoise(1)
    guided: dict[str, Any] = {"noise": noise, "guidance_scale": 2.5}
    found = sample(conditional, x, table, uncond_kwargs={"y": 0.3}, **guided)
    assert_same_bits(sample(both_at_once, x, table, **guided), found, "one call for both")
    assert_same_bits(capture(both_at_once, table, SHAPE, guidance_scale=2.5)(noise, x=x), found)
    by_hand = x
    for i in range(len(table)):
        (m, v), (m_u, _) = (conditional(by_hand, by_hand, y).chunk(2, dim=1) for y in (0.0, 0.3))
        by_hand, _ = table.step(
            i,
            by_hand,
            m,
            noise=noise.at(1 + i),
            model_output_uncond=m_u,
            guidance_scale=2.5,
            variance_output=v,
        )
    assert_same_bits(found, by_hand)
    assert not torch.equal(found, sample(conditional, x, table, noise=noise))

    def swapped(x: Tensor, t: Tensor) -> Tensor:  # the other variance: it must matter
        m, v = both_at_once(x, t).chunk(2, dim=1)
        return torch.cat([m, v.flip(0)], dim=1)

    assert not torch.equal(found, sample(swapped, x, table, **guided))


def test_thresholds_see_the_prediction_alone() -> None:
    x, noise = torch.randn(SHAPE), PhiloxNoise(1)
    how: dict[str, Any] = {"noise": noise, "dynamic_thresholding_ratio": 0.8}
    found = sample(Says(-1.0, 3.0), x, table_of("learned_range"), **how)
    wanted = sample(lambda x, t: 3 * x, x, table_of("fixed_small"), **how)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@each_type
def test_ddim_reads_the_prediction_alone(variance_type: str) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type)
    fixed = GaussianDiffusion(BETAS)
    x, noise = torch.randn(SHAPE), PhiloxNoise(4)
    for eta in (0.0, 0.7):
        how: dict[str, Any] = {"noise": noise, "eta": eta, "num_steps": 5}
        assert_same_bits(
            d.ddim_sample_loop(Says(math.inf), SHAPE, **how),
            fixed.ddim_sample_loop(half, SHAPE, **how),
        )
        one = d.ddim_sample(Says(math.inf), x, 7, eta=eta, noise=noise)
        assert_same_bits(
            tuple(one.values()),
            tuple(fixed.ddim_sample(half, x, 7, eta=eta, noise=noise).values()),
        )


@each_type
def test_respacing_keeps_what_was_chosen(variance_type: str) -> None:
    d = GaussianDiffusion(BETAS, "sample", variance_type, True, 0.9, "rescaled_mse")
    spaced = d.respace(6, "trailing")
    assert (spaced.variance_type, spaced.loss_type) == (variance_type, "rescaled_mse")
    noise = PhiloxNoise(1)
    assert_same_bits(
        spaced.p_sample_loop(conditional, SHAPE, noise=noise),
        d.p_sample_loop(conditional, SHAPE, noise=noise, num_steps=6, timestep_spacing="trailing"),
    )


@each_type
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_samples(variance_type: str, dtype: torch.dtype) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type)
    out = d.p_sample_loop(Says(-1.0), SHAPE, dtype=dtype)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert d.p_sample_loop(Says(-1.0), (0, 3), dtype=dtype).shape == (0, 3)

    def narrow(x: Tensor, t: Tensor) -> Tensor:
        return Says(-1.0)(x, t).to(dtype)

    assert d.p_sample_loop(narrow, SHAPE).dtype == torch.float32


@pytest.mark.skipif(native._C is None, reason="needs the compiled module")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
def test_a_loop_compiles_to_one_graph() -> None:
    torch._dynamo.reset()
    counters.clear()
    table = table_of("learned_range")

    def run(x: Tensor, seed: Tensor) -> Tensor:
        return sample(conditional, x, table, noise=PhiloxNoise(seed))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x, seed = torch.randn(SHAPE), torch.tensor(3)
    assert_same_bits(compiled(x, seed), run(x, seed))
    assert not counters["graph_break"]


# ---- refusals ----------------------------------------------------------------------------------


def test_what_a_model_must_return() -> None:
    d = GaussianDiffusion(BETAS, variance_type="learned")
    x = torch.zeros(SHAPE)
    for call in (
        lambda m: d.p_mean_variance(m, x, 3),
        lambda m: d.p_sample(m, x, 3),
        lambda m: d.ddim_sample(m, x, 3),
        lambda m: d.training_losses(m, x, 3),
        lambda m: d.p_sample_loop(m, SHAPE),
        lambda m: d.ddim_sample_loop(m, SHAPE),
        lambda m: sample(m, x, table_of("learned")),
        lambda m: capture(m, table_of("learned"), SHAPE)(),
    ):
        wanted = r"must return the shape \(4, 6, 2, 5\) \(the prediction, .*variance\), got "
        refused(ValueError, wanted + r"\(4, 3, 2, 5\)", call, half)
        refused(ValueError, wanted + r"\(4, 9, 2, 5\)", call, lambda x, t: torch.cat([x] * 3, 1))
        refused(ValueError, wanted + r"\(8, 3, 2, 5\)", call, lambda x, t: torch.cat([x, x]))
        refused(ValueError, wanted + r"\(120,\)", call, lambda x, t: x.flatten())
        refused(TypeError, "must return a torch.Tensor", call, lambda x, t: (x, x))
    for flat in (
        lambda: d.p_sample(Says(0.0), x.flatten(), 3),
        lambda: d.p_sample_loop(half, (4,)),
    ):
        refused(ValueError, r"shape \[B, C, ...\].* got \(", flat)
    # A model of two halves whose second half is not read.
    fixed = GaussianDiffusion(BETAS)
    for call in (
        lambda m: fixed.p_sample(m, x, 3),
        lambda m: sample(m, x, table_of("fixed_small")),
    ):
        refused(ValueError, r"shape \(4, 3, 2, 5\), got \(4, 6, 2, 5\)", call, Says(0.0))


def test_a_step_needs_v_exactly_when_its_table_has_a_variance() -> None:
    x = torch.zeros(SHAPE)
    learned, fixed = table_of("learned"), table_of("fixed_small")
    for i in (0, 4, torch.tensor(1), torch.arange(4)):
        refused(ValueError, "variance_output must be given", learned.step, i, x, x, noise=x)
        refused(
            ValueError,
            "variance_output must be None",
            fixed.step,
            i,
            x,
            x,
            noise=x,
            variance_output=x,
        )
    refused(ValueError, "noise must be given at row 0", learned.step, 0, x, x, variance_output=x)
    refused(
        ValueError, "variance_output must have the shape of x", learned.step, 0, x, x, noise=x,
        variance_output=x[:1],
    )  # fmt: skip
    refused(TypeError, "variance_output", learned.step, 0, x, x, noise=x, variance_output="v")


def test_tables_that_cannot_be() -> None:
    table, learned = solvers.dpmpp_2m_table(table_levels()), table_of("learned")
    two = torch.zeros(len(table), 2, dtype=torch.float64)
    refused(ValueError, "must be None in a table with", replace, table, variance=two, rows=())
    refused(ValueError, r"shape \(5, 2\)", replace, learned, variance=two[:2], rows=())


def table_levels() -> solvers.NoiseLevels:
    return solvers.NoiseLevels.from_schedule(GaussianDiffusion(BETAS).schedule, [19, 9, 3])
