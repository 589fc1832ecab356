"""GaussianDiffusion: what it refuses, and how it says so."""

from __future__ import annotations

import math

import pytest
import torch

from diffcore.diffusion import GaussianDiffusion
from diffcore.schedules import rescale_zero_terminal_snr
from support.toys import BETAS, half

# ---- refusals -----------------------------------------------------------------------------------


def test_epsilon_prediction_refuses_zero_terminal_snr():
    betas = rescale_zero_terminal_snr(BETAS)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        GaussianDiffusion(betas)
    out = GaussianDiffusion(betas, "v_prediction").p_sample_loop(half, (2, 3))
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((BETAS, "eps"), ValueError, "prediction_type"),
        ((BETAS, "epsilon", "fixed"), ValueError, "variance_type"),
        ((BETAS, "epsilon", "fixed_small", True, 1.0, "l2"), ValueError, "loss_type"),
        ((BETAS, "epsilon", "fixed_small", True, 0.0), ValueError, "clip_sample_range"),
        ((BETAS, "epsilon", "fixed_small", True, "1"), TypeError, "clip_sample_range"),
        ((torch.tensor([0.1, 2.0]),), ValueError, "betas"),
        (("linear",), TypeError, "betas"),
        ((torch.tensor([0.1, math.nan]),), ValueError, "betas"),
    ],
)
def test_bad_constructor_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        GaussianDiffusion(*arguments)


D = GaussianDiffusion(BETAS)
X = torch.zeros(2, 3)
TIMES = {
    "below": (torch.tensor([-1, 3]), ValueError),
    "beyond": (torch.tensor([3, 20]), ValueError),
    "int beyond": (20, ValueError),
    "int below": (-1, ValueError),
    "floats": (torch.tensor([1.0, 2.0]), TypeError),
    "short ints": (torch.tensor([1, 2], dtype=torch.int16), TypeError),
    "bools": (torch.tensor([True, False]), TypeError),
    "bool": (True, TypeError),
    "float": (1.0, TypeError),
    "none": (None, TypeError),
    "floats in a list": ([1.0, 2.0], TypeError),
    "bools in a list": ([True, False], TypeError),
    "too many in a list": ([1, 2, 3], ValueError),
    "beyond in a list": ([1, 20], ValueError),
    "one beyond": (torch.tensor(20), ValueError),
    "too many": (torch.tensor([1, 2, 3]), ValueError),
    "matrix": (torch.tensor([[1], [2]]), ValueError),
    "elsewhere": (torch.zeros(2, dtype=torch.int64, device="meta"), ValueError),
}
METHODS = {
    "q_mean_variance": lambda t: D.q_mean_variance(X, t),
    "q_sample": lambda t: D.q_sample(X, t),
    "q_posterior_mean_variance": lambda t: D.q_posterior_mean_variance(X, X, t),
    "training_losses": lambda t: D.training_losses(half, X, t),
    "p_mean_variance": lambda t: D.p_mean_variance(half, X, t),
    "p_sample": lambda t: D.p_sample(half, X, t),
    "ddim_sample": lambda t: D.ddim_sample(half, X, t),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize(("t", "error"), TIMES.values(), ids=TIMES.keys())
def test_bad_timesteps(method, t, error):
    with pytest.raises(error, match=r"\bt (must|holds)"):
        method(t)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: D.q_sample([1.0], 0), TypeError, "x_start"),
        (lambda: D.q_sample(torch.zeros(2, 3, dtype=torch.int64), 0), TypeError, "x_start"),
        (lambda: D.q_sample(torch.tensor(1.0), 0), TypeError, "x_start"),
        (lambda: D.q_sample(X, 0, noise=torch.zeros(3, 3)), ValueError, "shape"),
        (lambda: D.q_sample(X, 0, noise=X.int()), TypeError, "dtype"),
        (lambda: D.q_posterior_mean_variance(X, X[:1], 0), ValueError, "shape"),
        (lambda: D.p_mean_variance(half, "x", 0), TypeError, "x must"),
        (lambda: D.p_mean_variance(lambda x, t: x[:1], X, 0), ValueError, "model must return"),
        (lambda: D.p_mean_variance(lambda x, t: (x,), X, 0), TypeError, "model must return"),
        (lambda: D.p_sample(lambda x, t: x.long(), X, 0), TypeError, "model must return"),
        (lambda: D.p_sample(half, X, 0, noise=X[:1]), ValueError, "noise"),
        (lambda: D.ddim_sample(half, X, 0, eta=2.0), ValueError, "eta"),
        (lambda: D.training_losses(half, X, 0, weights=torch.ones(3)), ValueError, "weights"),
        (lambda: D.p_sample_loop(half, (2, 3), noise=torch.zeros(3)), ValueError, "noise"),
        (lambda: D.p_sample_loop(half, (2, 3), noise="randn"), TypeError, "noise"),
        (lambda: D.p_sample_loop(half, (2, 3), noise=X.long()), TypeError, "noise"),
        (lambda: D.p_sample_loop(half, (2, 3), num_steps=21), ValueError, "num_steps"),
        (lambda: D.p_sample_loop(half, (2, 3), step_noise=lambda i, x: 1.0), TypeError, "noise"),
        (lambda: D.p_sample_loop(half, (2, 3), step_noise=lambda i, x: x[:1]), ValueError, "noise"),
        (lambda: D.ddim_sample_loop(half, (2, 3), timestep_spacing="x"), ValueError, "spacing"),
        (
            lambda: D.ddim_sample_loop(half, (2, 3), num_steps=2, timestep_spacing="x"),
            ValueError,
            "spacing",
        ),
        (lambda: D.ddim_sample_loop(half, (2, 3), eta=-1.0), ValueError, "eta"),
        (lambda: D.respace([]), ValueError, "timesteps"),
        (lambda: D.respace([1, 20]), ValueError, "timesteps"),
        (lambda: D.respace([-1, 2]), ValueError, "timesteps"),
        (lambda: D.respace(21), ValueError, "timesteps must be 1 to 20"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_timesteps_to_keep_are_integers():
    diffusion = GaussianDiffusion(BETAS)
    with pytest.raises(TypeError, match="timesteps must be integers"):
        diffusion.respace([0.5, 3.9])
    kept = diffusion.respace(torch.tensor([3, 0]))
    assert torch.equal(kept.betas, diffusion.respace([0, 3]).betas)


def test_samples_have_a_batch():
    diffusion = GaussianDiffusion(BETAS)
    for loop in (diffusion.p_sample_loop, diffusion.ddim_sample_loop):
        with pytest.raises(ValueError, match=r"shape must be \[B, ...\], got \(\)"):
            loop(half, ())
