"""cond_fn of the loop: classifier guidance with any solver, beside every other rule."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, ops, sampling, solvers
from diffcore.guidance import APG, CFG, CFGPlusPlus, Guidance, RescaledCFG
from diffcore.solvers import NoiseLevels, SolverTable
from support.solver_list import ALL, geometric, levels_on

KEY = PhiloxNoise(4)
SIGMAS = torch.tensor([8.0, 5.0, 3.0, 1.2, 0.5, 0.15, 0.0], dtype=torch.float64)
CONDITIONS: dict[str, Any] = {"model_kwargs": {"mean": 0.9}, "uncond_kwargs": {"mean": -0.4}}


def model(x: Tensor, t: Tensor, mean: float = 0.3) -> Tensor:
    return torch.tanh(x) + mean / (1 + t.reshape(-1, 1).to(x.dtype))


def slope(x: Tensor, t: Tensor, mean: float = 0.3) -> Tensor:
    """A gradient that depends on everything."""
    return (mean - x) / (1 + t.reshape(-1, 1).to(x.dtype) ** 2)


def start(batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 8 * torch.randn(batch, 4, generator=generator, dtype=torch.float64)


# ---- the exact posterior of a Gaussian world -----------------------------------------------------

MEAN, S2, Y, R2 = 0.3, 0.5, 1.2, 0.7  # x_0 ~ N(MEAN, S2), y = x_0 + N(0, R2)
AFTER = S2 * R2 / (S2 + R2)
POSTERIOR = (AFTER * (MEAN / S2 + Y / R2), AFTER)


def best(x: Tensor, alpha: float, sigma: float, mean: float, s2: float) -> Tensor:
    """E[x_0 | x] of data N(mean, s2)."""
    return mean + alpha * s2 / (alpha**2 * s2 + sigma**2) * (x - alpha * mean)


def exact_gradient(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """By x of log p(y | x), p(y | x) = N(E[x_0 | x], R2 + Var(x_0 | x))."""
    total = alpha**2 * S2 + sigma**2
    return alpha * S2 / total * (Y - best(x, alpha, sigma, MEAN, S2)) / (R2 + S2 * sigma**2 / total)


def predicted(kind: str, x: Tensor, x0: Tensor, alpha: float, sigma: float) -> Tensor:
    noise = (x - alpha * x0) / sigma
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[kind]


def in_world(table: SolverTable, kind: str, mean: float, s2: float) -> Any:
    """The best model of N(mean, s2), and the exact gradient; each is called once a row."""
    rows = {"model": iter(table.rows), "cond_fn": iter(table.rows)}

    def model(x: Tensor, t: Tensor) -> Tensor:
        row = next(rows["model"])
        x = x / row.input_scale
        return predicted(kind, x, best(x, row.alpha, row.sigma, mean, s2), row.alpha, row.sigma)

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        row = next(rows["cond_fn"])
        return exact_gradient(x / row.input_scale, row.alpha, row.sigma) / row.input_scale

    return model, cond_fn


@pytest.mark.parametrize("kind", ops.PREDICTION_TYPES)
@pytest.mark.parametrize("path", ["vp", "ve", "flow"])
def test_every_solver_samples_as_with_the_model_of_the_posterior(path: str, kind: str) -> None:
    """The guided prediction is that of the posterior, so each loop is that of its model."""
    for name, make in ALL.items():
        table = make(levels_on(path, geometric(6, 0.05, 20.0)), prediction_type=kind)
        prior, cond_fn = in_world(table, kind, MEAN, S2)
        posterior, _ = in_world(table, kind, *POSTERIOR)
        options: dict[str, Any] = {"noise": KEY} if table.stochastic else {}
        found = diffcore.sample(prior, start(), table, cond_fn=cond_fn, **options)
        wanted = diffcore.sample(posterior, start(), table, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=name)


def test_the_samples_have_the_moments_of_the_posterior() -> None:
    """Many small steps of the probability flow: an affine map, known from two of its values."""
    betas = diffcore.make_betas("linear", 1000)
    schedule = diffcore.NoiseSchedule.from_betas(betas)
    levels = NoiseLevels.from_schedule(schedule, list(range(999, -1, -1)))
    errors = []
    for every in (8, 4, 2):
        some = NoiseLevels.from_schedule(schedule, levels.timesteps[::every])
        table = solvers.ddim_table(some)
        prior, cond_fn = in_world(table, "epsilon", MEAN, S2)
        zero, one = diffcore.sample(
            prior, torch.tensor([[0.0], [1.0]]).double(), table, cond_fn=cond_fn
        ).flatten()
        mean, variance = float(zero), float(one - zero) ** 2  # of the map of N(0, 1)
        errors.append(math.hypot(mean - POSTERIOR[0], variance - POSTERIOR[1]))
    assert errors[0] > 1.8 * errors[1] > 3 * errors[2]  # first order
    assert errors[2] < 4e-3
    unguided = (MEAN, S2)
    assert math.hypot(unguided[0] - POSTERIOR[0], unguided[1] - POSTERIOR[1]) > 0.4


@pytest.mark.parametrize("space", ["edm", "edm v", "sigma_space"])
def test_the_gradient_is_by_what_the_model_gets(space: str) -> None:
    """Scaled inputs: the loop multiplies by the scale, as the chain rule says."""
    if space == "sigma_space":
        schedule = diffcore.NoiseSchedule.from_betas(diffcore.make_betas("linear", 1000))
        levels = NoiseLevels.from_schedule(schedule, [900, 600, 300, 100]).sigma_space()
    else:
        levels = NoiseLevels.from_edm(SIGMAS)
    kind = "v_prediction" if space == "edm v" else "epsilon"
    table = solvers.heun_table(levels, prediction_type=kind)
    rows = iter(table.rows)

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        row = next(rows)
        return exact_gradient(x / row.input_scale, row.alpha, row.sigma) / row.input_scale

    def of(mean: float, s2: float) -> Any:
        each = iter(range(len(table)))

        def model(x: Tensor, t: Tensor) -> Tensor:  # by the table's own rule for x_0
            i = next(each)
            row = table.rows[i]
            x = x / row.input_scale
            a_x, a_m = row.coefficients[4:6]
            return (best(x, row.alpha, row.sigma, mean, s2) - a_x * x) / a_m

        return model

    found = diffcore.sample(of(MEAN, S2), start(), table, cond_fn=cond_fn)
    wanted = diffcore.sample(of(*POSTERIOR), start(), table)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


# ---- beside guidance, thresholds and hooks -------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [None, CFG(3.0), CFG(0.0), RescaledCFG(3.0), CFG(3.0, interval=(0.3, 0.8)),
             APG(3.0, momentum=-0.5)], ids=str,
)  # fmt: skip
def test_beside_guidance(rule: Guidance | None) -> None:
    table = solvers.dpmpp_2m_table(SIGMAS, prediction_type="sample", clip_range=3.0)
    states: list[Any] = []
    given = {"model_kwargs": {"mean": 0.9}} if rule is None else CONDITIONS
    found = diffcore.sample(
        model, start(), table, guidance=rule, cond_fn=slope, callback=states.append, **given
    )
    begun = None if rule is None else rule.begin()
    x, history = start(), ()
    for i, row in enumerate(table.rows):
        t = table.timesteps[i].expand(3)
        m = model(x, t, 0.9)
        here = None if begun is None else begun.at(i, len(table))
        if here is not None:
            u = model(x, t, -0.4)
            moved = here.moved(m, u)
            here.remember(m, moved)
            w, g = here.numbers(m, moved)
            w, g = (c.reshape(-1, 1) if isinstance(c, Tensor) else c for c in (w, g))
            m = moved + g * moved + w * (m - moved)
        m = m + row.sigma**2 * slope(x, t, 0.9)
        torch.testing.assert_close(states[i]["denoised"], m.clamp(-3, 3), rtol=1e-9, atol=1e-9)
        x, history = table.step(i, x, m, history)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_in_a_table_of_cfg_pp_the_noise_stays_that_of_m_u() -> None:
    table = solvers.cfg_pp_table(SIGMAS, prediction_type="sample")
    found = diffcore.sample(
        model, start(), table, guidance=CFGPlusPlus(0.8), cond_fn=slope, **CONDITIONS
    )
    x = start()
    for i, (sigma, after) in enumerate(pairwise(SIGMAS)):
        t = table.timesteps[i].expand(3)
        u = model(x, t, -0.4)
        x0 = u + 0.8 * (model(x, t, 0.9) - u) + sigma**2 * slope(x, t, 0.9)
        x = x0 + after * (x - u) / sigma
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_thresholds_and_a_learned_variance() -> None:
    levels = levels_on("vp", geometric(5, 0.1, 6.0, to_zero=True))
    table = solvers.ddpm_table(levels, variance_type="learned", prediction_type="sample")

    def both(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([model(x, t), 0.2 * torch.sin(x)], 1)

    given: dict[str, Any] = {"dynamic_thresholding_ratio": 0.8}
    found = diffcore.sample(both, start(), table, noise=KEY, cond_fn=slope, **given)
    x = start()
    for i, row in enumerate(table.rows):
        t = table.timesteps[i].expand(3)
        m = model(x, t) + row.sigma**2 / row.alpha * slope(x, t)
        s = m.abs().quantile(0.8, dim=1).clamp_min(1)
        noise = KEY.at(1 + i) if row.noisy else None
        x, _ = table.step(i, x, m, noise=noise, threshold=s, variance_output=0.2 * torch.sin(x))
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_without_signal_the_first_row_is_not_guided() -> None:
    table = solvers.flow_euler_table([1.0, 0.6, 0.3, 0.0])
    calls: list[float] = []

    def cond_fn(x: Tensor, t: Tensor) -> Tensor:
        calls.append(float(t[0]))
        return slope(x, t)

    found = diffcore.sample(model, start(), table, cond_fn=cond_fn)
    x = start()
    for i, (sigma, after) in enumerate([(1.0, 0.6), (0.6, 0.3), (0.3, 0.0)]):
        t = table.timesteps[i].expand(3)
        k = 0 if i == 0 else -sigma / (1 - sigma)
        x = x + (after - sigma) * (model(x, t) + k * slope(x, t))
    assert calls == [1000.0, 600.0, 300.0]
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


# ---- gradients -----------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def by_autograd(x: Tensor, t: Tensor) -> Tensor:
    """guided-diffusion's form: a leaf, and torch.autograd.grad."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        log_p = -(leaf - 0.3).square().sum() / 2
        return torch.autograd.grad(log_p, leaf)[0] / (1 + t.reshape(-1, 1).to(x.dtype) ** 2)


TABLES = {
    "heun": solvers.heun_table(SIGMAS, prediction_type="sample"),
    "ancestral": solvers.euler_ancestral_table(SIGMAS, prediction_type="sample"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("mode", ["no_grad", "differentiable", "checkpoint"])
def test_a_cond_fn_that_calls_autograd(name: str, mode: str) -> None:
    recorded = {
        "no_grad": {},
        "differentiable": {"differentiable": True},
        "checkpoint": {"differentiable": True, "checkpoint": True},
    }[mode]
    x, y = start().requires_grad_(), start().requires_grad_()

    def plain(x: Tensor, t: Tensor) -> Tensor:
        return slope(x.detach(), t)

    found = diffcore.sample(model, x, TABLES[name], noise=KEY, cond_fn=by_autograd, **recorded)
    wanted = diffcore.sample(model, y, TABLES[name], noise=KEY, cond_fn=plain, **recorded)
    torch.testing.assert_close(found, wanted)
    assert found.requires_grad == (mode != "no_grad")
    if found.requires_grad:
        grads = (
            torch.autograd.grad(z.sin().sum(), leaf)[0] for z, leaf in ((found, x), (wanted, y))
        )
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_through_the_classifier(checkpoint: bool) -> None:
    net = Net()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return diffcore.sample(
            lambda x, t: torch.func.functional_call(net, {"layer.weight": weight}, x),
            x,
            TABLES["heun"],
            cond_fn=lambda x, t: 0.1 * torch.tanh(x @ weight),
            differentiable=True,
            checkpoint=checkpoint,
        )

    weight = net.layer.weight.detach().requires_grad_()
    assert torch.autograd.gradcheck(run, (start(1).requires_grad_(), weight))


# ---- other routes, errors ------------------------------------------------------------------------


def test_captured_and_vmapped_loops() -> None:
    table = TABLES["ancestral"]
    sampler = sampling.capture(model, table, (3, 4), cond_fn=slope, dtype=torch.float64)
    x = KEY.tensor((3, 4), dtype=torch.float64) * table.init_noise_sigma
    wanted = diffcore.sample(model, x, table, noise=KEY, cond_fn=slope)
    assert torch.equal(sampler(KEY), wanted)
    heun = TABLES["heun"]
    two = torch.stack([start(), 0.5 * start()])
    found = torch.func.vmap(lambda x: diffcore.sample(model, x, heun, cond_fn=slope))(two)
    wanted = torch.stack([diffcore.sample(model, x, heun, cond_fn=slope) for x in two])
    torch.testing.assert_close(found, wanted)


def test_a_compiled_loop() -> None:
    table = solvers.dpmpp_2m_table(SIGMAS[::2], prediction_type="sample")

    def run(x: Tensor) -> Tensor:
        return diffcore.sample(
            model, x, table, guidance_scale=2.0, cond_fn=slope, callback=lambda s: 0.5 * s["x"],
            **CONDITIONS,
        )  # fmt: skip

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(start()), run(start()))


def test_the_gradient_may_have_another_dtype() -> None:
    x = start().float()
    wide = diffcore.sample(model, x, TABLES["heun"], cond_fn=lambda x, t: slope(x, t).double())
    assert wide.dtype == torch.float32
    assert torch.equal(wide, diffcore.sample(model, x, TABLES["heun"], cond_fn=slope))


@pytest.mark.parametrize(
    ("cond_fn", "error", "message"),
    [
        ("grad", TypeError, "cond_fn must be a function, got str"),
        (lambda x, t: None, TypeError, "cond_fn must return a torch.Tensor, got NoneType"),
        (lambda x, t: x.int(), TypeError, "cond_fn must return a floating-point tensor, got torch"),
        (lambda x, t: x.sum(1), ValueError, r"the shape of x, \(3, 4\), got \(3,\); return the gr"),
        (lambda x, t: x.to("meta"), ValueError, "cond_fn must return the device of x, cpu, got"),
    ],
)
def test_wrong_answers(cond_fn: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        diffcore.sample(model, start(), TABLES["heun"], cond_fn=cond_fn)
