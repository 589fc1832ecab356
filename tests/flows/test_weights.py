"""Weights of losses: published formulas, and the same loss for every prediction type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffcore import losses

ALPHA = torch.linspace(0.05, 0.995, 40, dtype=torch.float64)
SIGMA = (1 - ALPHA**2).sqrt()
SNR = (ALPHA / SIGMA) ** 2

Weights = Callable[..., Tensor]
ON_EPSILON: dict[str, tuple[Weights, Tensor]] = {
    "p2": (lambda snr, **o: losses.p2_weights(snr, k=0.7, gamma=0.5, **o), (0.7 + SNR) ** -0.5),
    "debiased": (losses.debiased_weights, SNR**-0.5),
    "soft min-snr": (losses.soft_min_snr_weights, 5 / (SNR + 5)),
    "min-snr": (losses.min_snr_weights, SNR.clamp(max=5) / SNR),
    "edm": (losses.edm_weights, 1 + 4 / SNR),
}


@pytest.mark.parametrize("name", ON_EPSILON)
def test_every_prediction_has_the_same_weighted_loss(name: str) -> None:
    """An error d of x_0 is one of -alpha/sigma d of epsilon, and so on."""
    weights, on_epsilon = ON_EPSILON[name]
    torch.testing.assert_close(weights(SNR), on_epsilon, rtol=1e-12, atol=0)
    wanted = on_epsilon * (ALPHA / SIGMA) ** 2
    errors = {"epsilon": ALPHA / SIGMA, "sample": torch.ones_like(ALPHA), "v_prediction": 1 / SIGMA}
    for kind, error in errors.items():
        found = weights(SNR, prediction_type=kind) * error**2
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    # A flow's levels sum to 1; the error of its prediction is that of x_0 by sigma.
    flow_sigma = 1 / (1 + SNR.sqrt())
    found = weights(SNR, prediction_type="flow_prediction") / flow_sigma**2
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ON_EPSILON)
@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_no_noise_and_no_signal(name: str, kind: str) -> None:
    ends = torch.tensor([0.0, torch.inf], dtype=torch.float64)
    found = ON_EPSILON[name][0](ends, prediction_type=kind)
    assert not found.isnan().any()


def test_soft_min_snr_bends_where_min_snr_breaks() -> None:
    soft = losses.soft_min_snr_weights(SNR, prediction_type="sample")
    hard = losses.min_snr_weights(SNR, prediction_type="sample")
    torch.testing.assert_close(soft, 1 / (1 / SNR + 1 / 5), rtol=1e-12, atol=0)
    assert (soft < hard).all()
    assert (soft > hard / 2 - 1e-12).all()


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap", "none"])
def test_flow_weights_are_those_of_diffusers(weighting: str) -> None:
    training = pytest.importorskip("diffusers.training_utils")
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    theirs = training.compute_loss_weighting_for_sd3(weighting, sigma)
    found = losses.flow_weights(sigma, weighting)
    torch.testing.assert_close(found, theirs.double(), rtol=1e-6, atol=0)


def test_errors() -> None:
    for call in (
        lambda: losses.p2_weights(SNR, k=0.0),
        lambda: losses.p2_weights(SNR, gamma=-1.0),
        lambda: losses.soft_min_snr_weights(SNR, gamma=0.0),
        lambda: losses.debiased_weights(SNR, prediction_type="noise"),
        lambda: losses.flow_weights(SIGMA, "sd3"),
    ):
        with pytest.raises(ValueError, match="must be"):
            call()
    with pytest.raises(TypeError, match="sigma must be a floating-point tensor"):
        losses.flow_weights(torch.arange(3))
