"""EDM's loss weights against their definition, and in the loss itself."""

from __future__ import annotations

import mpmath
import pytest
import torch

from diffcore import GaussianDiffusion, NoiseSchedule, PhiloxNoise, ops
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.losses import edm_weights
from diffcore.schedules import make_betas
from support.toys import BETAS

EPS = torch.finfo(torch.float64).eps
ONES = torch.ones(3)

SCHEDULES = {
    "sample": NoiseSchedule.from_sigmas(torch.logspace(-3, 2, 20)),  # alpha = 1, as EDM has it
    "epsilon": NoiseSchedule.from_betas(make_betas("linear", 1000)),
    "v_prediction": NoiseSchedule.from_betas(make_betas("squaredcos_cap_v2", 100)),
    "flow_prediction": NoiseSchedule.rectified_flow(50),
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 0.3])
def test_edm_weights_are_karras_weight_on_the_error_of_x0(prediction_type, sigma_data):
    snrs = SCHEDULES[prediction_type].snr
    snrs = snrs[snrs > 0]
    weights = edm_weights(snrs, sigma_data=sigma_data, prediction_type=prediction_type)
    assert weights.dtype == torch.float64
    for t in range(len(weights)):
        with mpmath.workdps(40):
            snr = mpmath.mpf(snrs[t].item())
            if prediction_type == "flow_prediction":
                # alpha + sigma = 1
                alpha = mpmath.sqrt(snr) / (mpmath.sqrt(snr) + 1)
                sigma = 1 - alpha
            else:
                # alpha^2 + sigma^2 = 1; of x_0 and of epsilon only the ratio counts
                alpha, sigma = mpmath.sqrt(snr / (snr + 1)), mpmath.sqrt(1 / (snr + 1))
            level, data = sigma / alpha, mpmath.mpf(sigma_data)
            karras = (level**2 + data**2) / (level * data) ** 2
            # d x_0 / d prediction, at a fixed x_t
            error = {
                "epsilon": -sigma / alpha,
                "sample": 1,
                "v_prediction": -sigma,
                "flow_prediction": -sigma,
            }[prediction_type]
            truth = karras * error**2
            # Half a dozen roundings, none of a difference.
            assert abs(weights[t].item() - truth) <= 8 * EPS * truth


def test_edm_weights_at_the_ends():
    ends, infinity = torch.tensor([0.0, torch.inf]), float("inf")
    weights = {p: edm_weights(ends, prediction_type=p).tolist() for p in PREDICTION_TYPES}
    assert weights == {
        "epsilon": [infinity, 1.0],  # any error of epsilon is an infinite one of x_0 at first
        "sample": [4.0, infinity],
        "v_prediction": [4.0, 1.0],
        "flow_prediction": [4.0, 1.0],
    }


def test_one_estimate_has_one_loss_whatever_the_model_calls_it():
    t = torch.arange(len(BETAS))
    x0, error = torch.randn(2, len(BETAS), 5, dtype=torch.float64)
    noise = PhiloxNoise(1)
    losses = []
    for prediction_type in ("sample", "epsilon", "v_prediction"):
        diffusion = GaussianDiffusion(BETAS, prediction_type)
        schedule = diffusion.schedule

        def model(x_t, t, schedule=schedule, prediction_type=prediction_type):
            alpha, sigma = schedule.alpha[t], schedule.sigma[t]
            estimate = x0 + 0.1 * error
            epsilon = ops.predict_epsilon(estimate, x_t, alpha, sigma, prediction_type="sample")
            return {
                "sample": lambda: estimate,
                "epsilon": lambda: epsilon,
                "v_prediction": lambda: ops.velocity(estimate, epsilon, alpha, sigma),
            }[prediction_type]()

        weights = edm_weights(schedule.snr, prediction_type=prediction_type)
        losses.append(diffusion.training_losses(model, x0, t, noise=noise, weights=weights)["loss"])
    # epsilon's error is alpha / sigma times smaller than what it is a difference of.
    close = {"rtol": 64 * EPS * schedule.snr.max().sqrt().item(), "atol": 0}
    torch.testing.assert_close(losses[1], losses[0], **close)
    torch.testing.assert_close(losses[2], losses[0], **close)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: edm_weights(1.0), TypeError, "snr must be a floating-point tensor, got float"),
        (
            lambda: edm_weights(ONES.long()),
            TypeError,
            "snr must be a floating-point tensor, got torch.int64",
        ),
        (lambda: edm_weights(ONES, sigma_data=0.0), ValueError, "sigma_data must be above 0"),
        (lambda: edm_weights(ONES, sigma_data=-1.0), ValueError, "sigma_data must be above 0"),
        (lambda: edm_weights(ONES, sigma_data=float("nan")), ValueError, "sigma_data"),
        (lambda: edm_weights(ONES, prediction_type="x0"), ValueError, "prediction_type"),
    ],
)
def test_weights_that_cannot_be_meant(call, error, message):
    with pytest.raises(error, match=message):
        call()
