"""DEIS and DPM-Solver: against integrals of polynomials in float64, and against diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import solvers
from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels
from support.solver_list import levels_on
from support.walking import ancestral_noise, dummy, told, walk

RATIOS = torch.tensor([14.0, 9.0, 5.5, 2.5, 1.6, 0.7, 0.2], dtype=torch.float64)
CLOSE = 1e-11
PATHS = ("ve", "vp", "flow")


def noise_of(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """A model of the noise that is neither linear nor even in x."""
    return torch.tanh(x / (alpha + sigma)) + 0.3 * torch.cos(x / alpha) * alpha / (alpha + sigma)


def model_for(table: solvers.SolverTable, kind: str = "epsilon") -> Callable[..., Tensor]:
    levels = iter(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))

    def model(x: Tensor, t: object) -> Tensor:
        alpha, sigma = next(levels)
        noise = noise_of(x, alpha, sigma)
        x0 = (x - sigma * noise) / alpha
        return {
            "epsilon": noise,
            "sample": x0,
            "v_prediction": alpha * noise - sigma * x0,
            "flow_prediction": noise - x0,
        }[kind]

    return model


def start(levels: NoiseLevels) -> Tensor:
    size = math.hypot(float(levels.alpha[0]), float(levels.sigma[0]))
    return size * torch.linspace(-1.2, 1.5, 7, dtype=torch.float64)


def integrals(nodes: list[float], place: Callable[[float], float], a: float, b: float) -> list:
    """Of each Lagrange polynomial in place(rho), over rho from a to b, by Gauss with 80 points."""
    at, weights = numpy.polynomial.legendre.leggauss(80)
    logs = (math.log(a) + math.log(b)) / 2 + (math.log(b) - math.log(a)) / 2 * at
    rho = numpy.exp(logs)
    weights = weights * (math.log(b) - math.log(a)) / 2 * rho
    where, found = numpy.array([place(r) for r in rho]), []
    for j, own in enumerate(nodes):
        value = numpy.ones_like(rho)
        for k, other in enumerate(nodes):
            if k != j:
                value = value * (where - other) / (own - other)
        found.append(float((value * weights).sum()))
    return found


PLACES: dict[str, Callable[[float], float]] = {
    "log_rho": math.log,
    "rho": float,
    "t": solvers.vp_time,
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("variable", PLACES)
def test_deis_integrates_the_polynomial_through_the_noise(path: str, order: int, variable: str):
    levels = levels_on(path, RATIOS)
    place = PLACES[variable]
    x, known = start(levels), []
    alpha, sigma = levels.alpha.tolist(), levels.sigma.tolist()
    rho = [s / a for a, s in zip(alpha, sigma, strict=True)]
    for i in range(len(levels)):
        known.insert(0, noise_of(x, alpha[i], sigma[i]))
        used = min(order, i + 1)
        nodes = [place(rho[i - k]) for k in range(used)]
        weights = integrals(nodes, place, rho[i], rho[i + 1])
        moved = sum(w * e for w, e in zip(weights, known, strict=False))
        x = alpha[i + 1] * (x / alpha[i] + moved)
    for kind in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        table = solvers.deis_table(
            levels, order=order, variable=variable, lower_order_final=False, prediction_type=kind
        )
        found = walk(table, model_for(table, kind), start(levels))
        assert (found - x).abs().max() <= CLOSE * start(levels).abs().max()


def test_deis_is_dpm_solver_in_log_rho_and_adams_bashforth_in_rho() -> None:
    levels = levels_on("ve", RATIOS)
    for order, options in ((1, {}), (2, {"solver_type": "heun"}), (3, {"exact_third_order": True})):
        options["solver_type"] = "heun"
        one = solvers.deis_table(levels, order=order)
        other = solvers.dpmpp_table(levels, order=order, algorithm_type="dpmsolver", **options)
        assert torch.equal(one.coefficients, other.coefficients)
    one = solvers.deis_table(levels, order=4, variable="rho", lower_order_final=False)
    lms = solvers.lms_table(levels)
    results = [walk(table, model_for(table), start(levels)) for table in (one, lms)]
    assert (results[0] - results[1]).abs().max() <= CLOSE * 14


def test_time_of_the_linear_sde() -> None:
    for t in (1e-5, 0.01, 0.3, 1.0):
        ratio = math.sqrt(math.expm1(19.9 * t * t / 2 + 0.1 * t))
        assert math.isclose(solvers.vp_time(ratio), t, rel_tol=1e-12)
    assert solvers.vp_time(0.0) == 0
    with pytest.raises(TypeError, match="time_of must be callable, got float"):
        solvers.deis_table([2.0, 1.0], variable="t", time_of=1.0)
    with pytest.raises(ValueError, match="variable must be one of 'log_rho', 'rho', 't', got 'x'"):
        solvers.deis_table([2.0, 1.0], variable="x")


def by_formula(
    levels: NoiseLevels, order: int, solver_type: str, tau: float, noise: Tensor
) -> Tensor:
    """The multistep DPM-Solver of the noise as written in its papers, with differences D."""
    x, known = start(levels), []
    alpha, sigma = levels.alpha.tolist(), levels.sigma.tolist()
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    for i in range(len(levels)):
        known.insert(0, noise_of(x, alpha[i], sigma[i]))
        used, h = min(order, i + 1), lam[i + 1] - lam[i]
        one = math.expm1(h)
        part = one * known[0]
        if used > 1:
            r0 = (lam[i] - lam[i - 1]) / h
            d1 = (known[0] - known[1]) / r0
        if used == 2:
            part = part + (one / 2 if solver_type == "midpoint" else one / h - 1) * d1
        if used == 3:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            late = (known[1] - known[2]) / r1
            d2 = (d1 - late) / (r0 + r1)
            d1 = d1 + r0 / (r0 + r1) * (d1 - late)
            part = part + (one / h - 1) * d1 + ((one - h) / h**2 - 0.5) * d2
        added = sigma[i + 1] * math.sqrt(tau * math.expm1(2 * h))
        x = alpha[i + 1] / alpha[i] * x - (1 + tau) * sigma[i + 1] * part + added * noise[i]
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
@pytest.mark.parametrize(("order", "tau"), [(1, 0.0), (2, 0.0), (3, 0.0), (1, 1.0), (2, 0.4)])
def test_dpm_solver_is_its_formula(path: str, order: int, solver_type: str, tau: float) -> None:
    levels = levels_on(path, RATIOS)
    noise = torch.randn(len(levels), 7, dtype=torch.float64)
    wanted = by_formula(levels, order, solver_type, tau, noise)
    table = solvers.dpmpp_table(
        levels,
        order=order,
        algorithm_type="sde-dpmsolver" if tau else "dpmsolver",
        solver_type=solver_type,
        eta=tau,
        lower_order_final=False,
    )
    found = walk(table, model_for(table), start(levels), lambda row: noise[row])
    assert (found - wanted).abs().max() <= CLOSE * wanted.abs().max()


@pytest.mark.parametrize(
    "make",
    [
        partial(solvers.dpmpp_table, algorithm_type="dpmsolver"),
        partial(solvers.dpmpp_singlestep_table, algorithm_type="dpmsolver"),
        solvers.deis_table,
    ],
)
def test_a_clip_is_of_x0_and_its_noise(make: Callable[..., solvers.SolverTable]) -> None:
    levels = levels_on("vp", torch.tensor([3.0, 1.0, 0.4], dtype=torch.float64))
    table = make(levels, order=2, clip_range=0.5, lower_order_final=False)
    free = make(levels, order=2, lower_order_final=False)

    def clipped(x: Tensor, t: float) -> Tensor:
        alpha, sigma = 1 / math.hypot(1, t), t / math.hypot(1, t)
        x0 = ((x - sigma * noise_of(x, alpha, sigma)) / alpha).clamp(-0.5, 0.5)
        return (x - alpha * x0) / sigma

    wanted = walk(free, clipped, start(levels))
    assert (walk(table, model_for(table), start(levels)) - wanted).abs().max() <= CLOSE
    wide = make(levels, order=2, clip_range=1e6, lower_order_final=False)
    results = [walk(t, model_for(t), start(levels)) for t in (wide, free)]
    assert (results[0] - results[1]).abs().max() <= CLOSE


THRESHOLDED: dict[str, Callable[..., solvers.SolverTable]] = {
    "ipndm": solvers.ipndm_table,
    "pndm": solvers.pndm_table,
    "heunpp2": solvers.heunpp2_table,
    "deis": solvers.deis_table,
    "dpm": partial(solvers.dpmpp_table, algorithm_type="dpmsolver"),
    "dpm-blocks": partial(solvers.dpmpp_singlestep_table, algorithm_type="dpmsolver"),
    "unipc": partial(solvers.unipc_table, predict_x0=False),
    "sa": partial(solvers.sa_solver_table, tau=0.0, predict_x0=False, mode="pece"),
    "dpm_fast": partial(solvers.dpm_fast_table, num_calls=5),
}


@pytest.mark.parametrize("name", THRESHOLDED)
def test_thresholding_reaches_every_row(name: str) -> None:
    """A threshold of at most 1 and at least 1 is the clip to [-1, 1]."""
    make, x = THRESHOLDED[name], 10 * torch.randn(2, 3, 4, dtype=torch.float64)
    model = lambda x, t: torch.sin(x)  # noqa: E731
    levels = [10.0, 5.0, 2.0, 0.7, 0.2]
    clipped = diffcore.sample(model, x, make(levels, clip_range=1.0))
    free = diffcore.sample(model, x, make(levels))
    found = diffcore.sample(
        model, x, make(levels), dynamic_thresholding_ratio=0.5, sample_max_value=1.0
    )
    assert (found - clipped).abs().max() <= 1e-12
    assert (free - clipped).abs().max() > 0.1


def test_sde_dpm_solver_needs_signal() -> None:
    levels = NoiseLevels.from_flow([1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="levels must start at alpha > 0 for 'sde-dpmsolver' with"):
        solvers.dpmpp_table(levels, algorithm_type="sde-dpmsolver", prediction_type="sample")
    with pytest.raises(ValueError, match="algorithm_type must be one of 'dpmsolver\\+\\+', 'dpm"):
        solvers.dpmpp_singlestep_table([2.0, 1.0], algorithm_type="sde-dpmsolver++")


# ---- diffusers -----------------------------------------------------------------------------------

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
FIRST = {"final_sigmas_type": "sigma_min"}  # theirs has no last step to sigma = 0 here


def bent(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x) * 0.7 + 0.2 * torch.cos(3 * x) * (float(t) + 1) / (float(t) + 300)


def same(theirs: Any, table: solvers.SolverTable, **options: Any) -> None:
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    x = (dummy() - 0.5).float()
    for t in theirs.timesteps:
        x = theirs.step(bent(x, t), t, x, **options).prev_sample
    draws = ancestral_noise(len(table))
    found = walk(table, bent, dummy() - 0.5, lambda row: draws[row])
    assert (found - x).abs().max() <= 2e-4 * x.abs().max()


def levels_of_theirs(steps: int) -> NoiseLevels:
    train = NoiseSchedule.from_betas(make_betas("linear", 1000))
    return NoiseLevels.from_schedule(train, told(1000, steps), **FIRST)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [3, 10, 20])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_dpm_solver_is_that_of_diffusers(steps: int, solver_type: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    for order, kind in ((1, "dpmsolver"), (2, "dpmsolver"), (3, "dpmsolver"), (2, "sde-dpmsolver")):
        options = {"algorithm_type": kind, "solver_type": solver_type}
        theirs = diffusers.DPMSolverMultistepScheduler(
            solver_order=order, **options, **LINEAR, **FIRST
        )
        theirs.set_timesteps(steps)
        table = solvers.dpmpp_table(levels_of_theirs(steps), order=order, **options)
        same(theirs, table, generator=torch.manual_seed(0))
    for order in (2, 3):
        theirs = diffusers.DPMSolverSinglestepScheduler(
            solver_order=order, algorithm_type="dpmsolver", solver_type=solver_type, **LINEAR,
            **FIRST,
        )  # fmt: skip
        theirs.set_timesteps(steps)
        table = solvers.dpmpp_singlestep_table(
            levels_of_theirs(steps),
            order=order,
            algorithm_type="dpmsolver",
            solver_type=solver_type,
        )
        same(theirs, table)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [3, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_that_of_diffusers(steps: int, order: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    for kind in ("epsilon", "v_prediction"):
        theirs = diffusers.DEISMultistepScheduler(
            solver_order=order, prediction_type=kind, **LINEAR
        )
        theirs.set_timesteps(steps)
        table = solvers.deis_table(levels_of_theirs(steps), order=order, prediction_type=kind)
        same(theirs, table)
