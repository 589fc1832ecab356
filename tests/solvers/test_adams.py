"""iPNDM, PNDM and Heun++ against their formulas in float64, and against diffusers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import solvers
from diffcore.schedules import NoiseSchedule, make_betas, respaced_timesteps
from diffcore.solvers import NoiseLevels
from support.walking import dummy, walk

SIGMAS = [14.0, 9.0, 5.5, 2.5, 1.6, 0.7, 0.2]
ENDS = ([*SIGMAS, 0.0], SIGMAS)
CLOSE = 1e-12


def denoiser(x: Tensor, sigma: float) -> Tensor:
    """Neither linear nor even, so that every coefficient shows."""
    return torch.tanh(x / 3) + 0.3 * torch.cos(x) * sigma / (1 + sigma)


def start() -> Tensor:
    return 14 * torch.linspace(-1.2, 1.5, 7, dtype=torch.float64)


def loop(sigmas: list[float], combine: Callable[[int, list[Tensor]], Tensor]) -> Tensor:
    """x + (sigma' - sigma) times a combination of the derivatives so far, the latest first."""
    x, known = start(), []
    for i, (here, after) in enumerate(pairwise(sigmas)):
        known.insert(0, (x - denoiser(x, here)) / here)
        x = x + (after - here) * combine(i, known)
    return x


def equal(d: list[Tensor], order: int) -> Tensor:
    """Adams-Bashforth for equal steps, from Newton's backward differences 1, 1/2, 5/12, 3/8."""
    total, rest = torch.zeros_like(d[0]), d[:order]
    for gamma in (1.0, 1 / 2, 5 / 12, 3 / 8):
        if rest:
            total = total + gamma * rest[0]
            rest = [a - b for a, b in pairwise(rest)]
    return total


def variable(i: int, d: list[Tensor], sigmas: list[float], order: int) -> Tensor:
    """The published formula of ipndm_v, coefficient by coefficient."""
    h = [sigmas[i + 1 - k] - sigmas[i - k] for k in range(min(order, i + 1))]
    if len(h) == 1:
        return d[0]
    c = [1 + h[0] / h[1] / 2, -h[0] / h[1] / 2, 0.0, 0.0]
    if len(h) > 2:
        t1 = (1 - h[0] / (3 * (h[0] + h[1])) * (h[0] * (h[0] + h[1])) / (h[1] * (h[1] + h[2]))) / 2
        c = [c[0] + t1, c[1] - (1 + h[1] / h[2]) * t1, t1 * h[1] / h[2], 0.0]
    if len(h) > 3:
        h01, h12 = h[0] + h[1], h[1] + h[2]
        h012, h123 = h01 + h[2], h12 + h[3]
        t2 = (1 - h[0] / (3 * h01)) / 2 + (1 - h[0] / (2 * h01)) * h[0] / (6 * h012)
        t2 = t2 * (h[0] * h01 * h012) / (h[1] * h12 * h123)
        q = h[1] * h12 / (h[2] * (h[2] + h[3]))
        c[0] += t2
        c[1] -= (1 + h[1] / h[2] + q) * t2
        c[2] += (h[1] / h[2] + q * (1 + h[2] / h[3])) * t2
        c[3] = -t2 * q * h[1] / h[2]
    return sum((w * v for w, v in zip(c, d, strict=False)), torch.zeros_like(d[0]))


@pytest.mark.parametrize("sigmas", ENDS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("final", [True, False])
def test_ipndm_is_its_formula(sigmas: list[float], order: int, final: bool) -> None:
    for steps in ("equal", "variable"):

        def combine(i: int, d: list[Tensor], steps: str = steps) -> Tensor:
            used = 1 if final and sigmas[i + 1] == 0 else min(order, i + 1)
            return equal(d, used) if steps == "equal" else variable(i, d, sigmas, used)

        wanted = loop(sigmas, combine)
        for kind in ("sample", "epsilon"):
            table = solvers.ipndm_table(
                sigmas, order=order, steps=steps, euler_at_final=final, prediction_type=kind
            )

            def model(x: Tensor, sigma: float, kind: str = kind) -> Tensor:
                x0 = denoiser(x, sigma)
                return x0 if kind == "sample" else (x - x0) / sigma

            assert (walk(table, model, start()) - wanted).abs().max() <= CLOSE * 14


def test_where_ipndm_is_adams_bashforth() -> None:
    """With equal steps all are; ipndm_v is up to order 2 with any, and of order 4 with none."""
    even = torch.linspace(8, 1, 8, dtype=torch.float64)
    for order in (1, 2, 3, 4):
        exact = solvers.lms_table(even, order=order).coefficients
        fixed = solvers.ipndm_table(even, order=order).coefficients
        assert (fixed - exact).nan_to_num().abs().max() <= 1e-13
        for levels, agree in ((even, order <= 3), (SIGMAS, order <= 2)):
            exact = solvers.lms_table(levels, order=order).coefficients[:, 2:]
            found = _variable(levels, order).coefficients[:, 2:]
            gap = (found - exact).nan_to_num().abs().max()
            assert gap <= 1e-13 if agree else gap > 0.01


def _variable(levels: Any, order: int) -> solvers.SolverTable:
    return solvers.ipndm_table(levels, order=order, steps="variable")


def plms(sigmas: list[float]) -> Tensor:
    """PNDM's loop with all derivatives kept."""
    x = start()
    known = [(x - denoiser(x, sigmas[0])) / sigmas[0]]
    step = sigmas[1] - sigmas[0]
    middle = x + step * known[0]
    if len(sigmas) == 2:
        return middle
    x = x + step * (known[0] + (middle - denoiser(middle, sigmas[1])) / sigmas[1]) / 2
    for here, after in pairwise(sigmas[1:]):
        known.insert(0, (x - denoiser(x, here)) / here)
        x = x + (after - here) * equal(known, 4)
    return x


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_pndm_is_its_formula(count: int) -> None:
    for sigmas in (SIGMAS[: count + 1], [*SIGMAS[:count], 0.0]):
        if len(sigmas) <= count:
            continue
        table = solvers.pndm_table(sigmas, prediction_type="sample")
        assert len(table) == (count + 1 if count > 1 else 1)
        assert (walk(table, denoiser, start()) - plms(sigmas)).abs().max() <= CLOSE * 14


def test_pndm_refuses_steps_from_which_the_first_derivative_does_not_follow() -> None:
    # Steps of 1, 2 and 3.6 = 6 / 5 (1 + 2).
    with pytest.raises(ValueError, match="levels must not have a third step of 6 / 5 of the first"):
        solvers.pndm_table([0.4, 1.4, 3.4, 7.0, 9.0])
    assert len(solvers.pndm_table([0.4, 1.4, 3.4, 7.0])) == 4  # its fourth step would need it


def test_steps_are_named() -> None:
    with pytest.raises(ValueError, match="steps must be one of 'equal', 'variable', got 'fixed'"):
        solvers.ipndm_table(SIGMAS, steps="fixed")


def heunpp2(sigmas: list[float]) -> Tensor:
    x, last = start(), len(sigmas) - 2
    for i in range(last + 1):
        step = sigmas[i + 1] - sigmas[i]
        ds, at = [], x
        for k in range(min(3, last + 1 - i)):
            ds.append((at - denoiser(at, sigmas[i + k])) / sigmas[i + k])
            if i + k + 1 < len(sigmas):
                at = at + (sigmas[i + k + 1] - sigmas[i + k]) * ds[-1]
        later = [sigmas[i + k] / (len(ds) * sigmas[0]) for k in range(1, len(ds))]
        x = x + step * sum(w * d for w, d in zip([1 - sum(later), *later], ds, strict=True))
    return x


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_heunpp2_is_its_formula(count: int) -> None:
    for sigmas in (SIGMAS[: count + 1], [*SIGMAS[:count], 0.0]):
        if len(sigmas) <= count:
            continue
        table = solvers.heunpp2_table(sigmas, prediction_type="sample")
        assert len(table) == max(1, 3 * (len(sigmas) - 1) - 3)
        assert (walk(table, denoiser, start()) - heunpp2(sigmas)).abs().max() <= CLOSE * 14


def test_order_4_of_ipndm_v_keeps_a_straight_path_only_with_constant_ratios() -> None:
    """As published: the weights of its derivatives sum to 1 there alone."""
    for levels, exact in (([8.0, 4.0, 2.0, 1.0, 0.5, 0.25], True), (SIGMAS, False)):
        x0, noise = 0.4, start()
        table = _variable(levels, 4)
        found = walk(table, lambda x, sigma, noise=noise: noise, x0 + levels[0] * noise)
        assert bool((found - (x0 + levels[-1] * noise)).abs().max() <= 1e-12) == exact


# ---- diffusers -----------------------------------------------------------------------------------


def bent(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x) * 0.7 + 0.2 * torch.cos(3 * x) * (float(t) + 1) / (float(t) + 300)


def their_walk(scheduler: Any) -> Tensor:
    x = (dummy() - 0.5).float()
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t), t, x).prev_sample
    return x.double()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("steps", [2, 4, 10, 25])
def test_pndm_is_that_of_diffusers(to_one: bool, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PNDMScheduler(
        skip_prk_steps=True,
        set_alpha_to_one=to_one,
        beta_start=1e-4,
        beta_end=0.02,
    )
    theirs.set_timesteps(steps)
    levels = NoiseLevels.from_schedule(
        NoiseSchedule.from_betas(make_betas("linear", 1000)),
        torch.tensor(respaced_timesteps(1000, steps, "leading")),
        final_sigmas_type="zero" if to_one else "sigma_min",
    )
    table = solvers.pndm_table(levels)  # with v they combine the v of all levels
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    wanted = their_walk(theirs)
    found = walk(table, bent, dummy() - 0.5)
    assert (found - wanted).abs().max() <= 2e-4 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_ipndm_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.IPNDMScheduler()
    theirs.set_timesteps(12)
    # Its model predicts alpha epsilon - sigma x_0, and x starts at alpha = 0: skip that level.
    alpha, sigma = theirs.alphas.double()[1:], theirs.betas.double()[1:]
    levels = NoiseLevels(alpha, sigma, theirs.timesteps[1:].double(), "vp", float)
    table = solvers.ipndm_table(levels, euler_at_final=False, prediction_type="v_prediction")
    x = (dummy() - 0.5).float()
    for t in theirs.timesteps[1:]:
        x = theirs.step(bent(x, t), t, x).prev_sample
    found = walk(table, bent, dummy() - 0.5)
    assert (found - x).abs().max() <= 2e-4 * x.abs().max()
