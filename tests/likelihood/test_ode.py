"""log p(x) by the probability flow: Gaussians and a mixture, whose densities are known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import diffcore
from diffcore import PhiloxNoise, solvers
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.likelihood import ODELogLikelihood, ode_log_likelihood
from diffcore.likelihood.flow_weights import FlowWeights
from diffcore.solvers import NoiseLevels, SolverTable
from support.solver_list import DETERMINISTIC, levels_on

G = torch.Generator().manual_seed(4)
D = 3
ROOT = torch.randn(D, D, generator=G, dtype=torch.float64)
EYE = torch.eye(D, dtype=torch.float64)
COVARIANCE = ROOT @ ROOT.T / 3 + 0.2 * EYE
MEAN = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)
X = MEAN + torch.randn(5, D, generator=G, dtype=torch.float64) @ torch.linalg.cholesky(COVARIANCE).T
VARIANCES, AXES = torch.linalg.eigh(COVARIANCE)


def at_level(alpha: float, sigma: float) -> MultivariateNormal:
    return MultivariateNormal(alpha * MEAN, alpha**2 * COVARIANCE + sigma**2 * EYE)


def best_noise(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """The best predictions of x_0 and the noise for the Gaussian data."""
    along = (x - alpha * MEAN) @ AXES / (alpha**2 * VARIANCES + sigma**2)
    return MEAN + alpha * (along * VARIANCES) @ AXES.T, sigma * along @ AXES.T


def model_of(
    table: SolverTable, kind: str, best: Callable[..., tuple[Tensor, Tensor]] = best_noise
):
    """The model that knows the data, called once for each row in their order."""
    levels = iter(list(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True)))

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = next(levels)
        x0, noise = best(x, alpha, sigma)
        return {
            "epsilon": noise,
            "sample": x0,
            "v_prediction": alpha * noise - sigma * x0,
            "flow_prediction": noise - x0,
        }[kind]

    return model


def error_of(make: Callable[..., SolverTable], levels: NoiseLevels, kind: str = "epsilon") -> float:
    table = make(levels, prediction_type=kind)
    end = at_level(table.final_alpha, table.final_sigma)
    found = ode_log_likelihood(model_of(table, kind), X, table, prior=end.log_prob)
    right = at_level(float(levels.alpha[0]), float(levels.sigma[0])).log_prob(X)
    return float((found.log_likelihood - right).abs().max())


def rising(path: str, steps: int, low: float = -2.0, high: float = 1.5) -> NoiseLevels:
    return levels_on(path, torch.logspace(low, high, steps + 1, dtype=torch.float64))


# A row for each kind: history of x_0, of the derivative, two calls a step, a corrector.
@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("heun", "ve"),
        ("lms-4", "vp"),
        ("dpmpp-2s", "flow"),
        ("dpmpp-3m-exact", "vp"),
        ("unipc-3-bh1", "vp"),
    ],
)
def test_the_order_of_convergence_is_that_of_the_table(name: str, path: str) -> None:
    make = DETERMINISTIC[name]
    longer, shorter = (error_of(make, rising(path, steps)) for steps in (30, 60))
    order = make(levels_on("ve", torch.tensor([1.0, 2.0, 4.0]).double())).order
    # The first steps of a multistep solver have lower orders.
    assert math.log2(longer / shorter) > min(order, 3) - 0.3, (longer, shorter)


@pytest.mark.parametrize("path", ["ve", "vp", "flow"])
def test_the_weights_are_derivatives_of_what_each_solver_does(path: str) -> None:
    levels = rising(path, 9, -0.7, 0.7)
    for name, make in DETERMINISTIC.items():
        for kind in PREDICTION_TYPES:
            table = make(levels, prediction_type=kind)
            at = zip(table.alpha.tolist(), table.sigma.tolist(), strict=True)
            one = torch.ones(1, 1, dtype=torch.float64)

            def unit(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
                total = alpha**2 + sigma**2
                return alpha * x / total, sigma * x / total

            best = model_of(table, kind, unit)
            b = [best(one, None).item() for _ in at]
            slopes = torch.tensor(b, dtype=torch.float64, requires_grad=True)
            rows = iter(range(len(table)))
            x = diffcore.sample(
                lambda x, t, a=slopes, rows=rows: a[next(rows)] * x, one, table, differentiable=True
            )
            (right,) = torch.autograd.grad(x.log().sum(), slopes)
            found = FlowWeights.of(table)
            weights = torch.tensor(found.of_rows, dtype=torch.float64)
            torch.testing.assert_close(weights, right, rtol=1e-10, atol=1e-12, msg=f"{name} {kind}")
            constant = x.log().item() - (right * slopes).sum().item()
            assert math.isclose(found.log_factor, constant, rel_tol=1e-10, abs_tol=1e-10), name


@pytest.mark.parametrize("name", ["heun", "lms-3", "unipc-2-bh1"])
def test_the_prediction_type_does_not_matter(name: str) -> None:
    levels = rising("flow", 8, -0.7, 0.7)
    errors = [error_of(DETERMINISTIC[name], levels, kind) for kind in PREDICTION_TYPES]
    assert max(errors) - min(errors) < 1e-11, errors


def levels_to(precision: int, steps: int) -> NoiseLevels:
    """Levels of a flow from clean samples to pure noise, short steps at both ends."""
    ratios = torch.logspace(-precision, precision, steps, dtype=torch.float64)
    sigmas = ratios / (1 + ratios)
    return NoiseLevels.from_flow([0.0, *sigmas.tolist(), 1.0])


def test_log_p_to_1e_10() -> None:
    std = torch.tensor([0.6], dtype=torch.float64)
    x = torch.tensor([[0.3], [1.1]], dtype=torch.float64)
    table = solvers.lms_table(levels_to(6, 7000), prediction_type="flow_prediction")
    levels = iter(table.sigma.tolist())

    def model(x: Tensor, t: Tensor) -> Tensor:
        sigma = next(levels)
        variance = ((1 - sigma) * std) ** 2 + sigma**2
        return (sigma - (1 - sigma) * std**2) / variance * x

    found = ode_log_likelihood(model, x, table)
    right = torch.distributions.Normal(0 * std, std).log_prob(x).sum(1)
    assert (found.log_likelihood - right).abs().max() < 1e-10
    assert torch.equal(found.log_prior + found.log_det, found.log_likelihood)
    bits = -found.log_likelihood / math.log(2)
    torch.testing.assert_close(found.bpd, bits, rtol=1e-14, atol=0)
    assert math.isclose(found.mean_bpd, bits.mean().item(), rel_tol=1e-9)
    assert math.isclose(found.standard_error, bits.std().item() / math.sqrt(2), rel_tol=1e-8)


def test_data_of_the_standard_normal_have_the_log_determinant_of_the_table() -> None:
    # The reference is exact there: also in a few steps of order 1.
    for path, kind in (("flow", "flow_prediction"), ("vp", "v_prediction"), ("ve", "epsilon")):
        table = solvers.euler_table(rising(path, 6), prediction_type=kind)

        def best(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
            total = alpha**2 + sigma**2
            return alpha * x / total, sigma * x / total

        found = ode_log_likelihood(model_of(table, kind, best), X, table)
        factor = diffcore.sample(model_of(table, kind, best), torch.ones(1, 1).double(), table)
        assert (found.log_det - D * factor.log()).abs().max() < 1e-13


def two_modes(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """The best predictions for 1/2 N(-c, 0.3² I) + 1/2 N(c, 0.3² I)."""
    c = torch.tensor([0.8, 0.3], dtype=x.dtype)
    variance = (0.3 * alpha) ** 2 + sigma**2
    score = (torch.tanh(alpha * (x @ c) / variance).unsqueeze(1) * alpha * c - x) / variance
    return (x + sigma**2 * score) / alpha, -sigma * score


def mixture(alpha: float, sigma: float) -> Callable[[Tensor], Tensor]:
    c = alpha * torch.tensor([0.8, 0.3], dtype=torch.float64)
    std = math.hypot(0.3 * alpha, sigma)

    def log_prob(x: Tensor) -> Tensor:
        logs = [(-((x - m) ** 2) / (2 * std**2)).sum(1) for m in (c, -c)]
        total = torch.logaddexp(*logs) - math.log(2)
        return total - 2 * math.log(std) - math.log(2 * math.pi)

    return log_prob


POINTS = torch.tensor([[0.8, 0.3], [0.1, -0.2], [-1.0, 0.4], [0.4, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(("name", "order"), [("heun", 2), ("dpmpp-2m", 2), ("lms-3", 3)])
def test_a_mixture_of_gaussians(name: str, order: int) -> None:
    errors = []
    for steps in (80, 160):
        table = DETERMINISTIC[name](rising("vp", steps), prediction_type="epsilon")
        found = ode_log_likelihood(
            model_of(table, "epsilon", two_modes),
            POINTS,
            table,
            prior=mixture(table.final_alpha, table.final_sigma),
        )
        first = float(table.alpha[0]), float(table.sigma[0])
        errors.append(float((found.log_likelihood - mixture(*first)(POINTS)).abs().max()))
    assert errors[0] / errors[1] > 2 ** (order - 0.3), errors
    assert errors[1] < 2e-2


def slope_of(table: SolverTable, r: int) -> Tensor:
    alpha, sigma = float(table.alpha[r]), float(table.sigma[r])
    return sigma * torch.linalg.inv(at_level(alpha, sigma).covariance_matrix)


def test_hutchinson_is_unbiased_with_the_known_variance() -> None:
    table = solvers.heun_table(rising("vp", 8), prediction_type="epsilon")
    exact = ode_log_likelihood(model_of(table, "epsilon"), X[:1], table)
    count = 4000
    estimate = partial(
        ode_log_likelihood,
        x=X[:1].expand(count, D).contiguous(),
        table=table,
        divergence="hutchinson",
        noise=PhiloxNoise(7),
    )
    found = estimate(model_of(table, "epsilon"))
    # Var z^T J z = sum_{i<j} (J_ij + J_ji)², J symmetric, independent from row to row.
    weights = FlowWeights.of(table).of_rows
    variance = sum(
        w**2 * 2 * (slope_of(table, r) ** 2).triu(1).sum().item() * 2 for r, w in enumerate(weights)
    )
    mean = found.log_det.mean().item() - exact.log_det.item()
    assert abs(mean) < 4 * math.sqrt(variance / count)
    assert abs(found.log_det.var().item() / variance - 1) < 0.15  # 4 standard errors
    assert found.estimator_variance.isnan().all()
    assert (exact.estimator_variance == 0).all()
    several = estimate(model_of(table, "epsilon"), num_samples=4)
    assert abs(several.log_det.var().item() / (variance / 4) - 1) < 0.15
    assert abs(several.estimator_variance.mean().item() / (variance / 4) - 1) < 0.1


def test_samples_have_the_same_estimate_in_any_batch() -> None:
    table = solvers.euler_table(rising("vp", 4), prediction_type="epsilon")
    options = {"divergence": "hutchinson", "num_samples": 2}
    run = partial(ode_log_likelihood, table=table, **options)
    network = torch.nn.Linear(D, D).double()
    model = lambda x, t: network(x)  # noqa: E731
    together = run(model, X, noise=PhiloxNoise(3))
    parts = [run(model, X[a:b], noise=PhiloxNoise(3, sample_ids=a)) for a, b in ((0, 2), (2, 5))]
    both = ODELogLikelihood.combine(parts)
    torch.testing.assert_close(both.log_det, together.log_det, rtol=1e-13, atol=0)
    torch.testing.assert_close(both.bpd, together.bpd, rtol=1e-13, atol=0)
    assert str(together) == f"{both.mean_bpd:.4f} ± {both.standard_error:.4f} bits/dim (5 samples)"
    assert network.weight.grad is None


def test_edm_and_float32_and_inference_mode() -> None:
    levels = NoiseLevels.from_edm(torch.logspace(-2, 1.2, 120).tolist())
    table = solvers.heun_table(levels, prediction_type="v_prediction")
    scales = iter(list(zip(table.sigma.tolist(), table.input_scale.tolist(), strict=True)))

    def network(y: Tensor, t: Tensor) -> Tensor:
        sigma, scale = next(scales)
        x = y.double() / scale
        x0, _ = best_noise(x, 1.0, sigma)
        c_out = sigma * 0.5 / math.hypot(sigma, 0.5)
        out = (x0 - 0.25 / (sigma**2 + 0.25) * x) / c_out
        return (-out).to(y.dtype)  # v_prediction is minus EDM's F

    end = at_level(1.0, float(levels.sigma[-1]))
    with torch.inference_mode():
        found = ode_log_likelihood(
            network, X.float(), table, prior=lambda x: end.log_prob(x.double())
        )
    right = at_level(1.0, float(levels.sigma[0])).log_prob(X)
    assert found.log_likelihood.dtype == torch.float64
    assert (found.log_likelihood - right).abs().max() < 5e-3


def test_a_subspace() -> None:
    # Points without center of mass: the density on the subspace, from an orthonormal basis of it.
    basis = torch.linalg.qr(torch.cat([torch.ones(4, 1), torch.randn(4, 3)], 1).double())[0][:, 1:]
    std = 0.7
    y = std * torch.randn(5, 3, generator=G, dtype=torch.float64)
    table = solvers.lms_table(levels_to(4, 400), prediction_type="flow_prediction")

    def model_at(table: SolverTable) -> Callable[[Tensor, Tensor], Tensor]:
        levels = iter(table.sigma.tolist())

        def model(x: Tensor, t: Tensor) -> Tensor:
            sigma = next(levels)
            variance = ((1 - sigma) * std) ** 2 + sigma**2
            slope = (sigma - (1 - sigma) * std**2) / variance
            return slope * (x - x.mean(1, keepdim=True))

        return model

    right = ode_log_likelihood(model_at(table), y @ basis.T, table, dof=3)
    normal = torch.distributions.Normal(0.0, torch.tensor(std, dtype=torch.float64))
    assert (right.log_likelihood - normal.log_prob(y).sum(1)).abs().max() < 1e-5
    assert right.dimensions.tolist() == [3.0] * 5
    each = ode_log_likelihood(model_at(table), y @ basis.T, table, dof=torch.full((5,), 3))
    assert torch.equal(each.log_likelihood, right.log_likelihood)


def test_refusals() -> None:
    up, down = rising("vp", 4), rising("vp", 4).reversed()
    table = solvers.euler_table(up)
    run = partial(ode_log_likelihood, lambda x, t: 0.5 * x, X)
    for call, message in (
        (partial(run, solvers.euler_table(down)), "table must have levels that rise, from data to"),
        (
            partial(run, solvers.ddim_table(up, clip_range=1.0)),
            r"table must not clip the .* to \[-1",
        ),
        (
            partial(run, solvers.ddim_table(down, eta=1.0)),
            "table must be of a solver without noise",
        ),
        (partial(run, solvers.cfg_pp_table(up)), "table must not need guidance, got SolverTable"),
        (
            partial(run, table, divergence="trace"),
            "divergence must be one of 'exact', 'hutchinson'",
        ),
        (
            partial(run, table, noise=PhiloxNoise(0)),
            "noise must not be given with divergence='exac",
        ),
        (partial(run, table, num_samples=2), "num_samples must not be given with divergence='exac"),
        (partial(run, table, dof=4), r"dof must be above 0 and at most 3, got 4\.0"),
        (
            partial(run, table, dof=torch.ones(2)),
            r"dof must be a number or \[5\], got \(2,\)",
        ),
        (partial(run, table, prior=lambda x: x), r"prior must return a tensor of shape \[5\], got"),
        (
            partial(ode_log_likelihood, torch.no_grad()(lambda x, t: 0.5 * x), X, table),
            "model must be differentiable in x, got an output without gradient",
        ),
        (lambda: ODELogLikelihood.combine([]), "results must have at least one entry, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (partial(run, "euler"), "table must be a SolverTable, got str"),
        (partial(run, table, prior=1.0), "prior must be a function or None, got float"),
        (
            partial(run, table, divergence="hutchinson", noise=X),
            "noise must be a PhiloxNoise or None, got Tensor",
        ),
        (lambda: ODELogLikelihood.combine([2]), "results must be ODELogLikelihood, got int"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
