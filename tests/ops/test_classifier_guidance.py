"""Classifier guidance: what it does to x_0 and to the noise that a prediction implies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffcore import ops

X, EPSILON, G = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)).double()
LEVELS = {"vp": (0.6, 0.8), "flow": (0.35, 0.65), "ve": (1.0, 7.5)}


def target(kind: str, alpha: float, sigma: float, x0: Tensor, noise: Tensor) -> Tensor:
    return {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow_prediction": noise - x0,
    }[kind]


@pytest.mark.parametrize("kind", ops.PREDICTION_TYPES)
@pytest.mark.parametrize("path", LEVELS)
def test_it_moves_x0_and_the_noise_at_the_same_x(kind: str, path: str) -> None:
    """E[x_0 | x, y] - E[x_0 | x] is sigma^2 / alpha times the gradient: Tweedie's formula."""
    alpha, sigma = LEVELS[path]
    x0 = (X - sigma * EPSILON) / alpha
    m = target(kind, alpha, sigma, x0, EPSILON)
    found = ops.classifier_guidance(m, G, alpha, sigma, prediction_type=kind, scale=1.5)
    wanted = target(kind, alpha, sigma, x0 + 1.5 * sigma**2 / alpha * G, EPSILON - 1.5 * sigma * G)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    back = ops.predict_x0(found, X, alpha, sigma, prediction_type=kind)
    torch.testing.assert_close(back, x0 + 1.5 * sigma**2 / alpha * G, rtol=1e-12, atol=1e-12)


def test_the_gaussian_world() -> None:
    """With the exact gradient the guided prediction is the prediction for the posterior."""
    alpha, sigma, mean, s2, y, r2 = 0.6, 0.8, 0.3, 0.5, 1.2, 0.7

    def best(mean: float, s2: float) -> Tensor:
        return mean + alpha * s2 / (alpha**2 * s2 + sigma**2) * (X - alpha * mean)

    # y = x_0 + N(0, r2), so p(y | x) = N(best(mean, s2), r2 + Var(x_0 | x)).
    rest = s2 * sigma**2 / (alpha**2 * s2 + sigma**2)
    slope = alpha * s2 / (alpha**2 * s2 + sigma**2)
    gradient = slope * (y - best(mean, s2)) / (r2 + rest)
    after = s2 * r2 / (s2 + r2)
    wanted = best(after * (mean / s2 + y / r2), after)
    for kind in ops.PREDICTION_TYPES:
        m, guided = (target(kind, alpha, sigma, x0, (X - alpha * x0) / sigma)
                     for x0 in (best(mean, s2), wanted))  # fmt: skip
        found = ops.classifier_guidance(m, gradient, alpha, sigma, prediction_type=kind)
        torch.testing.assert_close(found, guided, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ops.PREDICTION_TYPES)
def test_without_signal_it_moves_nothing(kind: str) -> None:
    for alpha in (0.0, 1e-42):
        found = ops.classifier_guidance(X, G, alpha, 1.0, prediction_type=kind)
        assert torch.equal(found, X)
    alphas, sigmas = torch.tensor([0.0, 0.6, 0.8, 1.0]).double(), torch.full((4,), 0.5).double()
    found = ops.classifier_guidance(X, G, alphas, sigmas, prediction_type=kind)
    assert torch.equal(found[0], X[0])
    one = [ops.classifier_guidance(X, G, float(a), 0.5, prediction_type=kind) for a in alphas]
    assert torch.equal(found, torch.stack([y[i] for i, y in enumerate(one)]))


def test_errors() -> None:
    two = torch.ones(2)
    for given in ((two, 0.5, 1.0), (0.5, two, 1.0), (0.5, 0.5, two)):
        with pytest.raises(ValueError, match="alpha, sigma and scale must have 1 or 4 entries"):
            ops.classifier_guidance(X, G, *given[:2], scale=given[2])
    with pytest.raises(ValueError, match=r"scale must have the shape of alpha, \(4,\), or be one"):
        ops.classifier_guidance(X, G, torch.ones(4), 0.5, scale=two)
    with pytest.raises(TypeError, match=r"gradient must be a torch\.Tensor, got float"):
        ops.classifier_guidance(X, 1.0, 0.6, 0.8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="gradient must have the shape of model_output"):
        ops.classifier_guidance(X, G[0], 0.6, 0.8)
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        ops.classifier_guidance(X, G, 0.6, 0.8, prediction_type="eps")
