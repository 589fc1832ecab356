"""UniPC of the noise, and with other predictors: against its paper and diffusers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import solvers
from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels
from support.solver_list import levels_on
from support.walking import dummy, told, walk

RATIOS = torch.tensor([14.0, 9.0, 5.5, 2.5, 1.6, 0.7, 0.2], dtype=torch.float64)


def noise_of(x: Tensor, alpha: float, sigma: float) -> Tensor:
    return torch.tanh(x / (alpha + sigma)) + 0.3 * torch.cos(x / alpha) * alpha / (alpha + sigma)


def solved(points: list[float], hh: float, big_b: float) -> Tensor:
    """The rho of the paper: R rho = b, with R a Vandermonde matrix."""
    b, phi = [], math.expm1(hh) / hh - 1
    for k in range(1, len(points) + 1):
        b.append(phi * math.factorial(k) / big_b)
        phi = phi / hh - 1 / math.factorial(k + 1)
    matrix = torch.tensor([[p**k for p in points] for k in range(len(points))], dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.tensor(b, dtype=torch.float64))


def by_formula(levels: NoiseLevels, order: int, kind: str, of_noise: bool, start: Tensor) -> Tensor:
    alpha, sigma = levels.alpha.tolist(), levels.sigma.tolist()
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    known: list[Tensor] = []
    before, x = start, start
    for i in range(len(levels)):
        noise = noise_of(x, alpha[i], sigma[i])
        now = noise if of_noise else (x - sigma[i] * noise) / alpha[i]
        for j in (i - 1, i):  # correct the step to i, then predict the step from i
            if j < 0 or j + 1 > len(levels):
                continue
            corrects = j < i
            used = min(order, j + 1)
            h = lam[j + 1] - lam[j]
            hh = h if of_noise else -h
            big_b = hh if kind == "bh1" else math.expm1(hh)
            base = known[0] if corrects else now
            older = known[1:] if corrects else known
            r = [(lam[j - k] - lam[j]) / h for k in range(1, used)]
            d = [(m - base) / rk for m, rk in zip(older, r, strict=False)]
            if corrects:
                r, d = [*r, 1.0], [*d, now - base]
                rho = solved(r, hh, big_b) if used > 1 else torch.tensor([0.5])
            else:
                rho = torch.tensor([0.5]) if used == 2 else solved(r, hh, big_b) if r else []
            ends = (alpha, sigma) if of_noise else (sigma, alpha)
            sample = before if corrects else x
            moved = ends[0][j + 1] / ends[0][j] * sample - ends[1][j + 1] * (
                math.expm1(hh) * base + big_b * sum(w * v for w, v in zip(rho, d, strict=True))
            )
            before, x = (before, moved) if corrects else (x, moved)
        known.insert(0, now)
    return x


@pytest.mark.parametrize("path", ["ve", "vp", "flow"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
def test_both_forms_are_the_papers(path: str, order: int, solver: str) -> None:
    levels = levels_on(path, RATIOS)
    size = math.hypot(float(levels.alpha[0]), float(levels.sigma[0]))
    start = size * torch.linspace(-1.2, 1.5, 7, dtype=torch.float64)
    for of_noise in (False, True):
        table = solvers.unipc_table(
            levels, order=order, solver_type=solver, predict_x0=not of_noise,
            lower_order_final=False,
        )  # fmt: skip
        rows = iter(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))
        found = walk(table, lambda x, t, rows=rows: noise_of(x, *next(rows)), start)
        wanted = by_formula(levels, order, solver, of_noise, start)
        assert (found - wanted).abs().max() <= 1e-11 * size


def test_another_predictor_without_corrector_is_that_solver() -> None:
    levels = levels_on("vp", RATIOS)
    for predict_x0, kind in ((True, "dpmsolver++"), (False, "dpmsolver")):
        for order in (1, 2, 3):
            for solver_type in ("midpoint", "heun"):
                mine = solvers.unipc_table(
                    levels,
                    order=order,
                    predict_x0=predict_x0,
                    solver_p=solver_type,
                    lower_order_final=False,
                    disable_corrector=range(6),
                )
                other = solvers.dpmpp_table(
                    levels,
                    order=order,
                    algorithm_type=kind,
                    solver_type=solver_type,
                    lower_order_final=False,
                )
                gap = (mine.coefficients - other.coefficients).nan_to_num().abs().max()
                assert gap <= 1e-14


def test_a_clip_is_of_x0_and_its_noise() -> None:
    levels = levels_on("vp", torch.tensor([3.0, 1.0, 0.4, 0.1], dtype=torch.float64))
    start = torch.linspace(-1.2, 1.5, 7, dtype=torch.float64)
    for bound in (0.5, 1e6):
        results = []
        for clip_range, of_model in ((bound, math.inf), (None, bound)):
            table = solvers.unipc_table(levels, predict_x0=False, clip_range=clip_range)
            rows = iter(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))

            def model(x: Tensor, t: object, rows=rows, clip=of_model) -> Tensor:
                alpha, sigma = next(rows)
                x0 = ((x - sigma * noise_of(x, alpha, sigma)) / alpha).clamp(-clip, clip)
                return (x - alpha * x0) / sigma

            results.append(walk(table, model, start))
        assert (results[0] - results[1]).abs().max() <= 1e-12
    for bad in ({"solver_p": "euler"}, {"predict_x0": "x0"}):
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            solvers.unipc_table(levels, **bad)


# ---- diffusers -----------------------------------------------------------------------------------

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def bent(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x) * 0.7 + 0.2 * torch.cos(3 * x) * (float(t) + 1) / (float(t) + 300)


def same(theirs: Any, table: solvers.SolverTable) -> None:
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    x = (dummy() - 0.5).float()
    for t in theirs.timesteps:
        x = theirs.step(bent(x, t), t, x).prev_sample
    found = walk(table, bent, dummy() - 0.5)
    assert (found - x).abs().max() <= 2e-4 * x.abs().max()


def levels_of_theirs(steps: int) -> NoiseLevels:
    train = NoiseSchedule.from_betas(make_betas("linear", 1000))
    return NoiseLevels.from_schedule(train, told(1000, steps), final_sigmas_type="sigma_min")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
def test_the_noise_form_is_that_of_diffusers(order: int, solver: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    for kind in ("epsilon", "v_prediction"):
        theirs = diffusers.UniPCMultistepScheduler(
            solver_order=order, solver_type=solver, predict_x0=False, prediction_type=kind,
            final_sigmas_type="sigma_min", **LINEAR,
        )  # fmt: skip
        theirs.set_timesteps(10)
        table = solvers.unipc_table(
            levels_of_theirs(10), order=order, solver_type=solver, predict_x0=False,
            prediction_type=kind,
        )  # fmt: skip
        same(theirs, table)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("solver_type", ["midpoint", "heun"])
def test_another_predictor_is_that_of_diffusers(order: int, solver_type: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    options = {"final_sigmas_type": "sigma_min", "prediction_type": "sample", **LINEAR}
    predictor = diffusers.DPMSolverMultistepScheduler(
        solver_order=order, solver_type=solver_type, **options
    )
    theirs = diffusers.UniPCMultistepScheduler(solver_order=order, solver_p=predictor, **options)
    theirs.set_timesteps(12)
    predictor.set_timesteps(12)
    table = solvers.unipc_table(
        levels_of_theirs(12), order=order, solver_p=solver_type, prediction_type="sample"
    )
    same(theirs, table)
