"""UniPC written with its two states, and the formulas that solvers are made of."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from diffcore import solvers
from diffcore.coefficients.step import posterior_coefficients
from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.sigmas import get_sigmas_karras
from diffcore.solvers import NoiseLevels
from diffcore.solvers.exponential import interpolating_weights, phi
from support.solver_list import PATHS, geometric, levels_on
from support.walking import walk


def bent(x: Tensor, t: float) -> Tensor:
    return torch.tanh(x) + 0.1 * torch.cos(3 * x) * (t + 1) / (t + 3)


# ---- UniPC -------------------------------------------------------------------------------------


def uni_weights(rs: list[float], h: float, kind: str, order: int, unknowns: int) -> np.ndarray:
    """rho with R rho = b, Zhao et al. eq. 9: R_jk = r_k^(j-1), b_j = j! phi_{j+1} h^j / B-ish."""
    base = -h if kind == "bh1" else math.expm1(-h)
    right, term, factorial = [], math.expm1(-h) / -h - 1, 1
    for j in range(1, order + 1):
        right.append(term * factorial / base)
        factorial *= j + 1
        term = term / -h - 1 / factorial
    matrix = np.array([[r**j for r in rs[:unknowns]] for j in range(unknowns)])
    return np.linalg.solve(matrix, np.array(right[:unknowns]))


def unipc(
    levels: NoiseLevels, x: Tensor, order: int, kind: str, disabled: tuple[int, ...], lower: bool
) -> Tensor:
    """A predicted sample, a corrected sample, a list of x0: what the table folds into one row."""
    track, steps = levels.levels(), len(levels)
    lam = [level.lam for level in track]
    x0s: list[Tensor] = []
    corrected, used = x, 1

    def move(i: int, start: Tensor, p: int, new: Tensor | None) -> Tensor:
        """From level i, where x0s[i] is known, to level i + 1."""
        here, after = track[i], track[i + 1]
        if after.sigma == 0:
            return x0s[i]
        h = lam[i + 1] - lam[i]
        base = -h if kind == "bh1" else math.expm1(-h)
        rs = [(lam[i - k] - lam[i]) / h for k in range(1, p)]
        slopes = [(x0s[i - k] - x0s[i]) / r for k, r in zip(range(1, p), rs, strict=True)]
        if new is not None:
            rs, slopes = [*rs, 1.0], [*slopes, new - x0s[i]]
        half = (new is None and p == 2) or (new is not None and p == 1)
        rho = [0.5] if half else uni_weights(rs, h, kind, p, len(rs)) if rs else []
        total = sum((float(r) * s for r, s in zip(rho, slopes, strict=True)), torch.zeros_like(x))
        straight = after.sigma / here.sigma * start - after.alpha * math.expm1(-h) * x0s[i]
        return straight - after.alpha * base * total

    for i in range(steps):
        new = bent(x, track[i].timestep)
        if i > 0 and i - 1 not in disabled:
            x = move(i - 1, corrected, used, new)
        x0s.append(new)
        corrected = x
        used = min(order, i + 1, steps - i if lower else order)
        x = move(i, corrected, used, None)
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["bh1", "bh2"])
@pytest.mark.parametrize("disabled", [(), (0, 3)])
@pytest.mark.parametrize("to_zero", [False, True])
def test_unipc_is_its_two_states(path, order, kind, disabled, to_zero):
    levels = levels_on(path, geometric(8, 0.1, 20.0, to_zero=to_zero))
    x = torch.linspace(-3, 3, 7, dtype=torch.float64) * float(levels.sigma[0])
    table = solvers.unipc_table(
        levels,
        order=order,
        solver_type=kind,
        disable_corrector=disabled,
        lower_order_final=to_zero,
        prediction_type="sample",
    )
    truth = unipc(levels, x, order, kind, disabled, to_zero)
    assert (walk(table, bent, x) - truth).abs().max() <= 1e-11


# ---- phi and the weights made of it --------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("z", [-1e-12, -1e-5, -0.01, -0.3, -1.0, -1.0001, -2.5, -30.0, 0.0, 0.7])
def test_phi(k, z):
    with mpmath.workdps(60):
        truth = mpmath.nsum(lambda j: mpmath.mpf(z) ** int(j) / mpmath.factorial(j + k), [0, 150])
        assert abs(phi(k, z) - truth) <= 2e-15 * abs(truth)


@pytest.mark.parametrize("big_h", [1e-6, 0.01, 0.5, 2.0, 12.0])
@pytest.mark.parametrize("nodes", [[0.0], [0.0, -1.0], [0.0, -0.6, -1.9], [1.0, 0.0, -1.1, -2.0]])
def test_weights_integrate_polynomials_exactly(big_h, nodes):
    weights = interpolating_weights(nodes, big_h)
    with mpmath.workdps(40):
        for degree in range(len(nodes)):
            truth = mpmath.quad(
                lambda v, d=degree: big_h * mpmath.exp(-big_h * (1 - v)) * v**d, [0, 0.5, 1]
            )
            got = sum(w * v**degree for w, v in zip(weights, nodes, strict=True))
            size = sum(abs(w * v**degree) for w, v in zip(weights, nodes, strict=True))
            assert abs(got - truth) <= 1e-14 * max(size, abs(truth))


# ---- what the model is shown, and what its answer means ------------------------------------------


@pytest.mark.parametrize(("kind", "sign"), [("epsilon", 1), ("v_prediction", -1)])
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_preconditioning(kind, sign, sigma_data):
    sigmas = get_sigmas_karras(5, 0.002, 80.0)
    table = solvers.edm_heun_table(sigmas, sigma_data=sigma_data, prediction_type=kind)
    middle = [value for value in sigmas[1:-1].tolist() for _ in (0, 1)]
    s = torch.tensor([80.0, *middle], dtype=torch.float64)
    total = s**2 + sigma_data**2
    expected = {
        "a_x": sigma_data**2 / total,
        "a_m": sign * s * sigma_data / total.sqrt(),
    }
    for column, values in expected.items():
        torch.testing.assert_close(table.column(column), values, rtol=1e-14, atol=0)
    torch.testing.assert_close(table.input_scale, total.rsqrt(), rtol=1e-14, atol=0)
    torch.testing.assert_close(table.timesteps, s.log() / 4, rtol=1e-14, atol=1e-15)
    assert math.isclose(table.init_noise_sigma, math.sqrt(80.0**2 + 1))
    churned = solvers.edm_euler_table(sigmas, s_churn=2.0, prediction_type=kind)
    torch.testing.assert_close(churned.timesteps, churned.sigma.log() / 4)
    plain = solvers.edm_euler_table(sigmas, prediction_type="sample")
    assert plain.column("a_x").tolist() == [0.0] * 5
    assert plain.column("a_m").tolist() == [1.0] * 5


def test_the_unclipped_epsilon_of_a_preconditioned_network():
    sigmas = get_sigmas_karras(5, 0.01, 20.0)
    levels = NoiseLevels.from_edm(sigmas)
    x = torch.linspace(-20, 20, 5, dtype=torch.float64)
    unclipped = solvers.ddim_table(levels, rederive_epsilon=False)
    again = solvers.ddim_table(levels)
    assert (walk(unclipped, bent, x) - walk(again, bent, x)).abs().max() <= 1e-12


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow_prediction"])
@pytest.mark.parametrize("rederive", [True, False])
def test_clipped_ddim_in_sigma_space_is_that_of_the_samples(kind, rederive):
    schedule = NoiseSchedule.from_betas(make_betas("linear", 1000))
    levels = NoiseLevels.from_schedule(schedule, torch.tensor([900, 600, 300, 30]))
    options = {"prediction_type": kind, "clip_range": 0.5, "rederive_epsilon": rederive}
    x = torch.linspace(-3, 3, 9, dtype=torch.float64)
    one = walk(solvers.ddim_table(levels, **options), bent, x)
    space = levels.sigma_space()
    other = walk(solvers.ddim_table(space, **options), bent, x / levels.alpha[0])
    assert (one - other).abs().max() <= 1e-13
    assert space.init_noise_sigma == float(levels.sigma[0] / levels.alpha[0])
    assert levels.sigma_space(init_noise_sigma=2.0).init_noise_sigma == 2.0


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_variances_and_the_last_step(variance_type):
    schedule = NoiseSchedule.from_betas(make_betas("linear", 1000))
    times = torch.tensor([900, 600, 300])
    for final in ("zero", "sigma_min"):
        levels = NoiseLevels.from_schedule(schedule, times, final_sigmas_type=final)
        table = solvers.ddpm_table(levels, variance_type=variance_type)
        tail = (levels.alpha[:-1], levels.sigma[:-1], levels.alpha[1:], levels.sigma[1:])
        variances = posterior_coefficients(*tail)[2 if variance_type == "fixed_small" else 3]
        steps = 2 if final == "zero" else 3
        expected = torch.as_tensor(variances).sqrt()[:steps]
        torch.testing.assert_close(table.column("c_z")[:steps], expected, rtol=1e-15, atol=0)
        assert (table.column("c_z")[-1] == 0) == (final == "zero")


def test_levels_between_lie_on_the_path():
    for path in PATHS:
        levels = levels_on(path, geometric(2, 0.1, 10.0))
        level = levels.at(0.7)
        total = {"ve": level.alpha, "flow": level.alpha + level.sigma}.get(
            path, math.hypot(level.alpha, level.sigma)
        )
        assert math.isclose(total, 1, rel_tol=1e-15)
        assert math.isclose(level.ratio, 0.7, rel_tol=1e-15)
        assert math.isclose(level.lam, -math.log(0.7), rel_tol=1e-14)
    assert math.isclose(levels_on("flow", geometric(2, 0.1, 10.0)).at(0.25).timestep, 200.0)


def test_clipping_bounds_x0_and_the_rule_for_epsilon_matters_then():
    levels = NoiseLevels.from_schedule(
        NoiseSchedule.from_betas(make_betas("linear", 1000)), torch.tensor([900, 600, 300, 0])
    )
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    outs = {
        rule: walk(solvers.ddim_table(levels, rederive_epsilon=rule, clip_range=0.4), bent, x)
        for rule in (True, False)
    }
    assert (outs[True] - outs[False]).abs().max() > 0.01
    for out in outs.values():
        assert out.abs().max() <= 0.4
