"""SA-Solver against its paper's loop in float64, against diffusers, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from diffcore import solvers
from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels
from support.solver_list import levels_on
from support.walking import ancestral_noise, dummy, told, walk

RATIOS = torch.tensor([14.0, 9.0, 5.5, 2.5, 1.6, 0.7, 0.2], dtype=torch.float64)
TAUS = [0.0, 1.0, 0.6, 1.3, 0.0, 0.4]


def denoiser(x: Tensor, alpha: float, sigma: float) -> Tensor:
    return torch.tanh(x / (alpha + sigma)) + 0.3 * torch.cos(x / alpha) * sigma / (alpha + sigma)


def integrals(nodes: list[float], a: float, b: float, rate: float) -> list[float]:
    """Of each Lagrange polynomial times exp(rate (l - b)), over l from a to b, by Gauss."""
    at, weights = numpy.polynomial.legendre.leggauss(40)
    at, weights = (
        (a + b) / 2 + (b - a) / 2 * at,
        (b - a) / 2 * weights * numpy.exp(rate * ((a + b) / 2 + (b - a) / 2 * at - b)),
    )
    found = []
    for j, own in enumerate(nodes):
        value = numpy.ones_like(at)
        for k, other in enumerate(nodes):
            if k != j:
                value = value * (at - other) / (own - other)
        found.append(float((value * weights).sum()))
    return found


class Loop:
    """The paper's algorithm: every step from the corrected sample, with all values kept."""

    def __init__(self, levels: NoiseLevels, of_noise: bool, simple: bool) -> None:
        self.alpha, self.sigma = levels.alpha.tolist(), levels.sigma.tolist()
        self.lam = [
            math.log(a / s) if s else math.inf for a, s in zip(self.alpha, self.sigma, strict=True)
        ]
        self.of_noise, self.simple = of_noise, simple

    def value(self, i: int, x: Tensor) -> Tensor:
        x0 = denoiser(x, self.alpha[i], self.sigma[i])
        return (x - self.alpha[i] * x0) / self.sigma[i] if self.of_noise else x0

    def move(self, i: int, x: Tensor, known: dict[int, Tensor], tau: float, z: Tensor) -> Tensor:
        """The step from i with the polynomial through ``known``, the latest first."""
        lam, (alpha, sigma) = self.lam, (self.alpha[i + 1], self.sigma[i + 1])
        h, growth = lam[i + 1] - lam[i], 1 + tau * tau
        nodes = [lam[k] for k in known]
        if self.of_noise:
            weights = [-growth * sigma * w for w in integrals(nodes, lam[i], lam[i + 1], -1.0)]
            keep = alpha / self.alpha[i]
            added = tau * sigma * math.sqrt(math.expm1(2 * h))
        else:
            scale = growth * alpha
            weights = [scale * w for w in integrals(nodes, lam[i], lam[i + 1], growth)]
            if self.simple and len(nodes) == 2:
                other = scale * h / 2 if i + 1 in known else scale * h * h / 2 / (nodes[1] - lam[i])
                rest = alpha * -math.expm1(-growth * h) - other
                weights = [other, rest] if i + 1 in known else [rest, other]
            keep = sigma / self.sigma[i] * math.exp(-tau * tau * h)
            added = sigma * math.sqrt(-math.expm1(-2 * tau * tau * h))
        moved = sum(w * v for w, v in zip(weights, known.values(), strict=True))
        return keep * x + moved + added * z

    def run(
        self,
        x: Tensor,
        orders: Callable[[int], tuple[int, int]],
        taus: list[float],
        noise: Tensor,
        again: bool,
    ) -> Tensor:
        known: dict[int, Tensor] = {}
        before = x
        for i in range(len(self.lam) - 1):
            used, corrects = orders(i)
            known[i] = self.value(i, x)
            if i and corrects:
                latest = list(range(i, -1, -1))[:corrects]
                some = {k: known[k] for k in latest}
                x = self.move(i - 1, before, some, taus[i - 1], noise[i - 1])
                if again:
                    known[i] = self.value(i, x)
            before = x
            if self.sigma[i + 1] == 0:
                return known[i]
            some = {k: known[k] for k in range(i, max(-1, i - used), -1)}
            x = self.move(i, x, some, taus[i], noise[i])
        return x


def start(levels: NoiseLevels) -> Tensor:
    size = math.hypot(float(levels.alpha[0]), float(levels.sigma[0]))
    return size * torch.linspace(-1.2, 1.5, 7, dtype=torch.float64)


def found(table: solvers.SolverTable, x: Tensor, noise: Tensor) -> Tensor:
    rows = iter(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))
    steps = table.step_index.tolist()
    model = lambda x, t: denoiser(x, *next(rows))  # noqa: E731
    return walk(table, model, x, lambda row: noise[steps[row]])


ORDERS = [(1, 0), (2, 0), (4, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 4), (3, 4)]


@pytest.mark.parametrize("path", ["ve", "vp", "flow"])
@pytest.mark.parametrize(("predictor", "corrector"), ORDERS)
def test_it_is_the_papers_loop(path: str, predictor: int, corrector: int) -> None:
    levels = levels_on(path, RATIOS)
    noise = torch.randn(6, 7, dtype=torch.float64)
    for of_noise, simple in ((False, False), (False, True), (True, False)):
        table = solvers.sa_solver_table(
            levels, predictor_order=predictor, corrector_order=corrector, tau=TAUS,
            predict_x0=not of_noise, simple_order_2=simple, lower_order_final=False,
            prediction_type="sample",
        )  # fmt: skip
        wanted = Loop(levels, of_noise, simple).run(
            start(levels), lambda i: (predictor, corrector), TAUS, noise, again=False
        )
        gap = (found(table, start(levels), noise) - wanted).abs().max()
        assert gap <= 1e-11 * start(levels).abs().max()


@pytest.mark.parametrize("path", ["ve", "flow"])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (1, 3), (2, 2), (2, 3)])
def test_pece_calls_the_model_again(path: str, predictor: int, corrector: int) -> None:
    levels = levels_on(path, RATIOS)
    noise = torch.randn(6, 7, dtype=torch.float64)
    for of_noise in (False, True):
        table = solvers.sa_solver_table(
            levels, predictor_order=predictor, corrector_order=corrector, tau=TAUS, mode="pece",
            predict_x0=not of_noise, lower_order_final=False, prediction_type="sample",
        )  # fmt: skip
        assert len(table) == 11
        wanted = Loop(levels, of_noise, False).run(
            start(levels), lambda i: (predictor, corrector), TAUS, noise, again=True
        )
        gap = (found(table, start(levels), noise) - wanted).abs().max()
        assert gap <= 1e-11 * start(levels).abs().max()


@pytest.mark.parametrize("mode", ["pec", "pece"])
def test_the_last_orders_to_a_clean_sample_are_comfyuis(mode: str) -> None:
    levels = levels_on("ve", torch.cat([RATIOS, torch.zeros(1, dtype=torch.float64)]))
    noise, most = torch.randn(7, 7, dtype=torch.float64), (3, 4) if mode == "pec" else (2, 3)

    def orders(i: int) -> tuple[int, int]:  # of 7 steps the last returns x0
        return max(1, min(most[0], 6 - i)), min(most[1], 7 - i)

    table = solvers.sa_solver_table(
        levels,
        predictor_order=most[0],
        corrector_order=most[1],
        mode=mode,
        prediction_type="sample",
    )
    loop = Loop(levels, False, False)
    wanted = loop.run(start(levels), orders, [1.0] * 7, noise, again=mode == "pece")
    assert (found(table, start(levels), noise) - wanted).abs().max() <= 1e-10


def test_without_noise_or_corrector_it_is_other_solvers() -> None:
    levels = levels_on("vp", RATIOS)
    for order in (1, 2, 3):
        options = {"order": order, "lower_order_final": False}
        mine = solvers.sa_solver_table(
            levels, predictor_order=order, corrector_order=0, tau=0.0, lower_order_final=False
        )
        other = solvers.dpmpp_table(levels, solver_type="heun", exact_third_order=True, **options)
        assert (mine.coefficients - other.coefficients).nan_to_num().abs().max() <= 1e-14
    mine = solvers.sa_solver_table(
        levels, predictor_order=3, corrector_order=4, tau=0.0, lower_order_final=False
    )
    other = solvers.unipc_table(levels, order=3, lower_order_final=False)
    # But for the predictor of order 2 and the corrector of order 1, where UniPC has a half.
    assert (mine.coefficients - other.coefficients)[3:].nan_to_num().abs().max() <= 1e-14


REFUSED = {
    "mode must be one of 'pec', 'pece', got 'pc'": {"mode": "pc"},
    "predictor_order must be in 1 .. 3, got 4": {"predictor_order": 4},
    "predictor_order must be in 1 .. 4, got 5": {"predictor_order": 5, "corrector_order": 0},
    "predictor_order must be in 1 .. 2, got 3": {"predictor_order": 3, "mode": "pece"},
    "corrector_order must be in 0 .. 3 for mode='pece', got 4": {
        "corrector_order": 4,
        "mode": "pece",
    },
    "corrector_order must be at least 1 for mode='pece'": {"corrector_order": 0, "mode": "pece"},
    "tau must be a number or hold one for each of the 2 steps, got 3": {"tau": [1.0, 0.0, 1.0]},
    "tau must be at least 0 and finite, got -0.5": {"tau": [1.0, -0.5]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solvers.sa_solver_table([5.0, 2.0, 0.5], **REFUSED[message])


# ---- diffusers -----------------------------------------------------------------------------------


def bent(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x) * 0.7 + 0.2 * torch.cos(3 * x) * (float(t) + 1) / (float(t) + 300)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [4, 12])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (2, 2), (3, 3), (2, 4), (3, 4)])
def test_it_is_that_of_diffusers(steps: int, predictor: int, corrector: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    train = NoiseSchedule.from_betas(make_betas("linear", 1000))
    levels = NoiseLevels.from_schedule(train, told(1000, steps), final_sigmas_type="sigma_min")
    between = (levels.timesteps >= 200) & (levels.timesteps <= 800)
    for kind, form in (("epsilon", "data"), ("v_prediction", "data"), ("epsilon", "noise")):
        theirs = diffusers.SASolverScheduler(
            predictor_order=predictor, corrector_order=corrector, prediction_type=kind,
            algorithm_type=f"{form}_prediction", beta_start=1e-4, beta_end=0.02,
        )  # fmt: skip
        theirs.set_timesteps(steps)
        assert levels.timesteps.tolist() == theirs.timesteps.tolist()
        x, generator = (dummy() - 0.5).float(), torch.manual_seed(0)
        for t in theirs.timesteps:
            x = theirs.step(bent(x, t), t, x, generator=generator).prev_sample
        table = solvers.sa_solver_table(
            levels, predictor_order=predictor, corrector_order=corrector, tau=between.double(),
            predict_x0=form == "data", simple_order_2=True, prediction_type=kind,
        )  # fmt: skip
        draws = ancestral_noise(steps)
        ours = walk(table, bent, dummy() - 0.5, lambda row, draws=draws: draws[row])
        assert (ours - x).abs().max() <= 2e-4 * x.abs().max()
