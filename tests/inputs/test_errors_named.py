"""Mistakes whose error named nothing, or something else: each names the argument and a fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import diffcore
from diffcore import ops, sampling, schedules, solvers
from diffcore.solvers import NoiseLevels
from support.toys import BETAS, half

D = diffcore.GaussianDiffusion(BETAS)
X = torch.linspace(-1, 1, 12).view(2, 6)
SIGMAS = [4.0, 2.0, 1.0, 0.0]
GENERATOR = torch.Generator()
KEY = diffcore.PhiloxNoise(1)
POSTERIOR = diffcore.DiagonalGaussianDistribution(X)

Case = tuple[Callable[[], Any], type[Exception], str]
CASES: dict[str, Case] = {
    "ddim-sigma-0": (
        lambda: ops.ddim_step(X, X, 1.0, 0.0, 0.9, 0.19**0.5),
        ValueError,
        r"sigma must not be 0 with rederive_epsilon=True.*; pass rederive_epsilon=False",
    ),
    "skip": (
        lambda: NoiseLevels.from_sigmas(SIGMAS).skip(1.0),
        TypeError,
        "steps must be an int, got float",
    ),
    "sigmas-number": (
        lambda: solvers.flow_euler_table(10),
        TypeError,
        r"sigmas must be a tensor of real numbers, got int; .* get_sigmas_flow\(n\)",
    ),
    "levels-rise": (
        lambda: solvers.ddpm_table([0.0, 0.1, 0.5]),
        ValueError,
        "levels must fall for ddpm_table, got levels that rise from sigma / alpha = 0 to 0.5; .*",
    ),
    "timesteps-rise": (
        lambda: NoiseLevels.from_schedule(D.schedule, [9, 5, 5]),
        ValueError,
        "timesteps must fall at every step, got 5 at index 2",
    ),
    "respace-string": (
        lambda: D.respace("ddim10"),
        TypeError,
        r"timesteps must be integers, got 'ddim10'; .*ddim_sample_loop\(num_steps=",
    ),
    "generators": (
        lambda: D.p_sample_loop(half, (2, 6), generator=[GENERATOR] * 2),
        TypeError,
        "generator must be a torch.Generator, got list; .* PhiloxNoise with sample_ids",
    ),
    "samples-of-a-posterior": (
        lambda: POSTERIOR.sample(5),
        TypeError,
        "generator must be a torch.Generator, got int$",
    ),
    "sparse": (
        lambda: ops.add_noise(X, X, torch.rand(2).to_sparse(), 0.5),
        TypeError,
        r"alpha must be a dense, strided tensor, got .*sparse",
    ),
    "sparse-samples": (
        lambda: ops.add_noise(X.to_sparse(), X, 0.5, 0.5),
        TypeError,
        r"x0 must be a dense, strided tensor, got .*sparse",
    ),
    "levels-number": (
        lambda: solvers.dpmpp_table(10),
        TypeError,
        r"levels must be a tensor of real numbers, got int; .* get_sigmas_karras\(n",
    ),
    "huge-count": (
        lambda: schedules.get_sigmas_karras(10**400, 0.1, 9.0),
        ValueError,
        "n must fit 64 bits, got an int beyond them",
    ),
    "respace-count": (
        lambda: D.respace(0),
        ValueError,
        "timesteps must be 1 to 20 of them, got 0",
    ),
    "no-levels": (
        lambda: schedules.stretch_to_terminal([], 0.1),
        ValueError,
        r"sigmas must have the shape \[N\] with N >= 1, got \(0,\)",
    ),
    "q_sample-noise": (
        lambda: D.q_sample(X, 3, X[:1]),
        ValueError,
        r"noise must have the shape of x_start, \(2, 6\), got \(1, 6\)",
    ),
    "training-noise": (
        lambda: D.training_losses(half, X, 3, noise=X[:, :1]),
        ValueError,
        r"noise must have the shape of x_start, \(2, 6\), got \(2, 1\)",
    ),
    "complex-std": (
        lambda: diffcore.vae_loss(X, X, X[:, 0], decoder_std=torch.tensor(1j)),
        TypeError,
        "decoder_std must be a real number or tensor, got torch.complex64",
    ),
    "meta-std": (
        lambda: diffcore.vae_loss(X, X, X[:, 0], decoder_std=torch.ones(6, device="meta")),
        ValueError,
        "decoder_std must be on cpu, the device of x, got meta",
    ),
    "type-of-prediction": (
        lambda: solvers.euler_table(SIGMAS, prediction_type=np.ones(2)),
        TypeError,
        "prediction_type must be a string, got ndarray",
    ),
    "name-of-betas": (
        lambda: schedules.make_betas(np.ones(2), 5),
        TypeError,
        "name must be a string, got ndarray",
    ),
    "weights": (
        lambda: D.training_losses(half, X, 3, weights="min_snr"),
        TypeError,
        r"weights must be a tensor of \[T\] numbers, got str",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_argument_is_named(name: str) -> None:
    call, kind, message = CASES[name]
    with pytest.raises(kind, match=f"^{message}"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda g: D.p_sample_loop(half, (2, 6), noise=KEY, generator=g),
        lambda g: D.ddim_sample_loop(half, (2, 6), noise=KEY, generator=g),
        lambda g: D.p_sample_loop(half, (2, 6), noise=X, step_noise=KEY, generator=g),
        lambda g: ops.reparameterize(X, X, KEY, generator=g),
        lambda g: ops.reparameterize(X, X, X, generator=g),
        lambda g: ops.reparameterize_kl(X, X, KEY, generator=g),
        lambda g: POSTERIOR.sample(g, noise=KEY),
        lambda g: POSTERIOR.sample_kl(g, noise=KEY),
        lambda g: diffcore.likelihood.vdm_bound(
            half, X, gamma_min=-5.0, gamma_max=5.0, decoder="gaussian", t=0.5 * torch.ones(2),
            noise=KEY, generator=g,
        ),
    ],
)  # fmt: skip
def test_a_generator_that_seeds_nothing_is_refused(call: Callable[[Any], Any]) -> None:
    call(None)
    with pytest.raises(ValueError, match="generator must be None where "):
        call(GENERATOR)


def test_coefficients_in_float8() -> None:
    eighth = torch.tensor([0.5, 0.25]).to(torch.float8_e4m3fn)
    for f in (
        lambda s: ops.velocity(X, X, 0.5, s),
        lambda s: ops.add_noise(X, X, 0.5, s, return_target="v_prediction")[1],
        lambda s: ops.denoising_loss(
            X, X, X, prediction_type="v_prediction", alpha=0.5, sigma=s
        ),
        lambda s: ops.predict_x0(X, X, 0.5, s),
    ):  # fmt: skip
        assert torch.equal(f(eighth), f(eighth.float()))


def test_weights_as_a_list_or_an_array() -> None:
    weights = torch.arange(20, dtype=torch.float64)
    expected = D.training_losses(half, X, 3, noise=KEY, weights=weights)["loss"]
    for given in (weights.tolist(), weights.numpy(), np.arange(20), list(range(20))):
        found = D.training_losses(half, X, 3, noise=KEY, weights=given)["loss"]
        assert torch.equal(found, expected)


def test_the_samplers_of_k_diffusion_name_their_arguments_too() -> None:
    with pytest.raises(TypeError, match=r"x must be .* got ndarray; pass torch.from_numpy\(x\)"):
        sampling.sample_euler(half, X.numpy(), SIGMAS)
    with pytest.raises(TypeError, match="sigmas must be a tensor of real numbers, got int"):
        sampling.sample_euler(half, X, 10)
    with pytest.raises(TypeError, match="eta must be a number, got str"):
        sampling.sample_euler_ancestral(half, X, SIGMAS, eta="1")


def test_snr_as_a_list_or_an_array() -> None:
    snr = D.schedule.snr
    for f in (diffcore.losses.min_snr_weights, diffcore.losses.edm_weights):
        for given in (snr.tolist(), snr.numpy()):
            assert torch.equal(f(given), f(snr))
        for wrong in ("a", 3.0, [1, 2], snr.long()):
            with pytest.raises(TypeError, match=r"^snr must be a "):
                f(wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: schedules.shift_sigmas("a", 3.0), "sigmas must be real numbers, got str"),
        (lambda: schedules.time_shift([[1.0], 2.0], 0.5), "sigmas must be real numbers, got list"),
        (lambda: schedules.stretch_to_terminal(None, 0.1), "sigmas must be real numbers, got None"),
        (
            lambda: schedules.timesteps_to_sigmas(D.schedule, X * 1j),
            "timesteps must be real numbers, got torch.complex64",
        ),
        (
            lambda: schedules.sigmas_to_timesteps(D.schedule, {}),
            "sigmas must be real numbers, got dict",
        ),
        (
            lambda: solvers.unipc_table(SIGMAS, disable_corrector=1),
            "disable_corrector must be a sequence of ints, got int",
        ),
        (
            lambda: solvers.unipc_table(SIGMAS, disable_corrector=[1.5]),
            "disable_corrector must be an int, got float",
        ),
        (
            lambda: diffcore.sample(half, X, solvers.euler_table(SIGMAS), callback="print"),
            "callback must be a function, got str",
        ),
    ],
)
def test_what_is_no_number_or_function(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        call()
