"""Numbers as people have them: NumPy scalars, 0-dim arrays, ints for floats, mean the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import coefficients, losses, schedules, solvers
from diffcore._checks import as_int, as_real
from diffcore.schedules import NoiseSchedule
from diffcore.solvers import NoiseLevels, SolverTable
from support.toys import BETAS, half

SCHEDULE = NoiseSchedule.from_betas(BETAS)
DIFFUSION = diffcore.GaussianDiffusion(BETAS)
SIGMAS = [4.0, 2.0, 1.0, 0.5, 0.0]
X, NOISE = torch.linspace(-1, 1, 24).view(4, 6), torch.linspace(1, -2, 24).view(4, 6)
KEY = diffcore.PhiloxNoise(3)

# f(i, r): a call that takes its ints through i and its real numbers, multiples of 1/8, through r.
Call = Callable[[Callable[[int], Any], Callable[[float], Any]], Any]
CALLS: dict[str, Call] = {
    "make_betas": lambda i, r: schedules.make_betas(
        "linear", i(9), beta_start=r(0.125), beta_end=r(0.5)
    ),
    "alpha_bar": lambda i, r: schedules.betas_for_alpha_bar(
        lambda t: 1 - t, i(4), max_beta=r(0.75)
    ),
    "rectified_flow": lambda i, r: NoiseSchedule.rectified_flow(i(5)).table,
    "karras": lambda i, r: schedules.get_sigmas_karras(i(5), r(0.125), r(9.0), r(3.0)),
    "exponential": lambda i, r: schedules.get_sigmas_exponential(i(5), r(0.125), r(9.0)),
    "poly": lambda i, r: schedules.get_sigmas_polyexponential(i(5), r(0.125), r(9.0), r(2.0)),
    "beta": lambda i, r: schedules.get_sigmas_beta(i(5), r(0.125), r(9.0), r(0.5), r(0.75)),
    "vp": lambda i, r: schedules.get_sigmas_vp(i(5), r(19.0), r(0.125), r(0.5)),
    "flow": lambda i, r: schedules.get_sigmas_flow(i(5), shift=r(3.0), sigma_min=r(0.125)),
    "laplace": lambda i, r: schedules.get_sigmas_laplace(i(5), r(0.125), r(9.0), r(0.5), r(0.25)),
    "kl_optimal": lambda i, r: schedules.get_sigmas_kl_optimal(i(5), r(0.125), r(9.0)),
    "linear_quadratic": lambda i, r: schedules.get_sigmas_linear_quadratic(
        i(5), sigma_max=r(2.0), threshold_noise=r(0.125), linear_steps=i(3)
    ),
    "ays": lambda i, r: schedules.get_sigmas_ays(i(5)),
    "sgm_uniform": lambda i, r: schedules.get_sigmas_sgm_uniform(SCHEDULE, i(2)),
    "shift": lambda i, r: schedules.shift_sigmas([0.5, 0.25], r(3.0)),
    "time_shift": lambda i, r: schedules.time_shift([0.5, 0.25], r(0.5)),
    "mu": lambda i, r: torch.tensor(schedules.dynamic_shift_mu(i(512), i(256), i(4096), r(0.5))),
    "stretch": lambda i, r: schedules.stretch_to_terminal([0.5, 0.25], r(0.125)),
    "spaced": lambda i, r: schedules.spaced_timesteps(
        i(20), i(5), "leading", steps_offset=i(1), last_timestep=i(15)
    ),
    "respaced": lambda i, r: torch.tensor(schedules.respaced_timesteps(i(20), i(5))),
    "clipped": lambda i, r: torch.tensor(schedules.clipped_length(SCHEDULE, r(-1.0))),
    "min_snr": lambda i, r: losses.min_snr_weights(SCHEDULE.snr, gamma=r(5.0)),
    "edm_weights": lambda i, r: losses.edm_weights(SCHEDULE.snr, sigma_data=r(0.5)),
    "euler": lambda i, r: solvers.euler_table(
        SIGMAS, s_churn=r(0.5), s_tmin=r(0.25), s_tmax=r(3.0), s_noise=r(1.5), clip_range=r(2.0)
    ),
    "ancestral": lambda i, r: solvers.euler_ancestral_table(SIGMAS, eta=r(0.5), s_noise=r(1.5)),
    "ddim": lambda i, r: solvers.ddim_table(SIGMAS, eta=r(0.5), clip_range=(r(-1.0), r(2.0))),
    "dpm2": lambda i, r: solvers.dpm2_ancestral_table(SIGMAS, eta=r(0.5), s_noise=r(1.5)),
    "lms": lambda i, r: solvers.lms_table(SIGMAS, order=i(3)),
    "dpmpp": lambda i, r: solvers.dpmpp_table(
        SIGMAS, order=i(3), algorithm_type="sde-dpmsolver++", eta=r(0.5), s_noise=r(1.5)
    ),
    "dpmpp_2s": lambda i, r: solvers.dpmpp_2s_table(SIGMAS, eta=r(0.5), s_noise=r(1.5)),
    "dpmpp_sde": lambda i, r: solvers.dpmpp_sde_table(SIGMAS, eta=r(0.5), r=r(0.75)),
    "singlestep": lambda i, r: solvers.dpmpp_singlestep_table(SIGMAS, order=i(3)),
    "unipc": lambda i, r: solvers.unipc_table(SIGMAS, order=i(2), disable_corrector=[i(1)]),
    "ipndm": lambda i, r: solvers.ipndm_table(SIGMAS, order=i(3)),
    "deis": lambda i, r: solvers.deis_table(SIGMAS, order=i(3)),
    "dpm_fast": lambda i, r: solvers.dpm_fast_table([5.0, 1.0], i(4), eta=r(0.5), s_noise=r(1.5)),
    "sa_solver": lambda i, r: solvers.sa_solver_table(
        SIGMAS, predictor_order=i(2), corrector_order=i(3), tau=r(0.5), s_noise=r(1.5)
    ),
    "gradient_estimation": lambda i, r: solvers.gradient_estimation_table(SIGMAS, gamma=r(1.5)),
    "er_sde": lambda i, r: solvers.er_sde_table(SIGMAS, order=i(3), num_integration_points=i(9)),
    "seeds_3": lambda i, r: solvers.seeds_3_table(SIGMAS, eta=r(0.5), r_1=r(0.25), r_2=r(0.5)),
    "restart": lambda i, r: solvers.restart_table(
        [5.0, 3.0, 1.0, 0.5], restarts=[(r(1.0), r(5.0), i(2), i(3))], s_noise=r(1.5), rho=r(3.0)
    ),
    "flow_table": lambda i, r: solvers.flow_euler_table(
        [1.0, 0.5, 0.0], num_train_timesteps=r(500.0)
    ),
    "edm_table": lambda i, r: solvers.edm_heun_table(SIGMAS, sigma_data=r(0.75), s_churn=r(1.0)),
    "skip": lambda i, r: solvers.euler_table(NoiseLevels.from_sigmas(SIGMAS).skip(i(2))),
    "sigma_space": lambda i, r: solvers.euler_table(
        NoiseLevels.from_schedule(SCHEDULE, [15, 5]).sigma_space(init_noise_sigma=r(3.0))
    ),
    "coefficients": lambda i, r: coefficients.ddim_coefficients(
        r(0.5), r(0.75), r(0.75), r(0.5), eta=r(0.5), clip_range=r(1.0)
    ),
    "constructor": lambda i, r: diffcore.GaussianDiffusion(
        BETAS, clip_sample_range=r(0.5)
    ).p_sample(half, X, 3, noise=NOISE)["sample"],
    "respace": lambda i, r: DIFFUSION.respace(i(5)).betas,
    "respace_list": lambda i, r: DIFFUSION.respace([i(5), i(2)]).betas,
    "p_loop": lambda i, r: DIFFUSION.p_sample_loop(half, (i(4), 6), num_steps=i(5), noise=KEY),
    "ddim_loop": lambda i, r: DIFFUSION.ddim_sample_loop(
        half, (4, 6), num_steps=i(5), eta=r(0.5), noise=KEY
    ),
    "ddim_sample": lambda i, r: DIFFUSION.ddim_sample(half, X, i(5), eta=r(0.5), noise=NOISE)[
        "sample"
    ],
    "sample": lambda i, r: diffcore.sample(
        lambda x, t: torch.cat([x, 0.5 * x]),
        X,
        solvers.euler_table(SIGMAS),
        guidance_scale=r(1.5),
        dynamic_thresholding_ratio=r(0.75),
        sample_max_value=r(2.0),
    ),
    "step": lambda i, r: solvers.euler_table(SIGMAS).step(i(1), X, NOISE)[0],
    "add_noise": lambda i, r: diffcore.add_noise(X, NOISE, r(0.75), r(0.5)),
    "velocity": lambda i, r: diffcore.velocity(X, NOISE, r(0.75), r(0.5)),
    "linear": lambda i, r: diffcore.linear_combination(X, NOISE, (r(0.75), r(0.5))),
    "predict_x0": lambda i, r: diffcore.predict_x0(X, NOISE, r(0.75), r(0.5)),
    "ddpm_step": lambda i, r: diffcore.ddpm_step(X, NOISE, r(0.5), r(0.75), r(0.75), r(0.5)),
    "loss": lambda i, r: diffcore.denoising_loss(X, X, NOISE, weight=r(0.75)),
    "prior_kl": lambda i, r: diffcore.prior_kl(X, r(0.125), r(0.75)),
    "threshold": lambda i, r: diffcore.dynamic_threshold(
        X, NOISE, (0, 0, 0, 0, 1.0, 0.5, 0, 0), ratio=r(0.75), sample_max_value=r(2.0)
    ),
    "vae": lambda i, r: diffcore.vae_loss(X, NOISE, X[:, 0], decoder_std=r(0.75))["loss"],
    "elbo": lambda i, r: diffcore.elbo_terms(X, NOISE, X[:, 0], decoder_std=r(0.75))["bpd"],
}
INTS = {"np.int64": np.int64, "np.int32": np.int32, "tensor": torch.tensor}
REALS = {
    "np.float64": np.float64,
    "np.float32": np.float32,
    "array": np.array,
    "Fraction": Fraction,
}


def numbers_of(made: Any) -> list[Any]:
    if isinstance(made, SolverTable):
        return [*made.__getstate__().values(), made.rows]
    return [made]


@pytest.mark.parametrize("name", CALLS)
def test_a_number_of_another_type_gives_the_same_bits(name: str) -> None:
    torch.manual_seed(0)
    expected = numbers_of(CALLS[name](int, float))
    for as_i, as_r in zip([*INTS.values(), int], REALS.values(), strict=True):
        torch.manual_seed(0)
        for one, other in zip(numbers_of(CALLS[name](as_i, as_r)), expected, strict=True):
            if isinstance(other, Tensor):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
            else:
                assert type(one) is type(other)
                assert one == other


def test_ints_and_reals() -> None:
    for seven in (7, np.int8(7), np.uint64(7), np.array(7), torch.tensor(7)):
        assert type(as_int("n", seven)) is int
        assert as_int("n", seven) == 7
    for one in (1, np.float16(1), np.int64(1), Fraction(1), np.array(1.0), torch.tensor([1.0])):
        assert type(as_real("r", one)) is float
        assert as_real("r", one) == 1.0
    assert math.isnan(as_real("r", math.nan))
    for wrong in (True, np.bool_(True), 1.0, "1", None, [1], np.array([1]), torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="n must be an int, got "):
            as_int("n", wrong)
    for wrong in (True, np.bool_(True), "1", None, [1.0], 1j, np.complex128(1), torch.ones(2)):
        with pytest.raises(TypeError, match="r must be a number, got "):
            as_real("r", wrong)
    with pytest.raises(TypeError, match="r must be a number, got a tensor that requires grad"):
        as_real("r", torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="r must be below"):
        as_real("r", 10**400)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        as_int("n", np.int64(0), 1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_an_array_of_coefficients_is_a_tensor(dtype: type) -> None:
    alpha, sigma = np.array([0.9, 0.8, 0.7, 0.6], dtype), np.array([[0.1], [0.2], [0.3], [0.4]])
    a, s = torch.from_numpy(alpha), torch.from_numpy(sigma[:, 0])
    t = torch.tensor([3, 2, 1, 0])
    for f in (
        lambda a, s: diffcore.add_noise(X, NOISE, a, s),
        lambda a, s: diffcore.add_noise(X, NOISE, a, s, t=t),
        lambda a, s: diffcore.velocity(X, NOISE, a, s),
        lambda a, s: diffcore.predict_epsilon(X, NOISE, a, s, prediction_type="sample"),
        lambda a, s: diffcore.ddim_step(X, NOISE, a, s, 0.95, 0.05),
        lambda a, s: diffcore.denoising_loss(X, X, NOISE, weight=a),
    ):
        with torch.device("meta"):  # stands in for another default device
            found = f(alpha, sigma)
        assert torch.equal(found, f(a, s))
    assert torch.equal(
        diffcore.add_noise(X, NOISE, alpha[::-1], 0.5), diffcore.add_noise(X, NOISE, a.flip(0), 0.5)
    )


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (np.complex128(1 + 5j), TypeError, "alpha must be a number, got complex128"),
        (np.ones(4, complex), TypeError, "alpha must have a floating-point dtype"),
        (np.array(["a", "b"]), TypeError, "alpha must be a number or a torch.Tensor, got ndarray"),
        ([0.5] * 4, TypeError, "alpha must be a number or a torch.Tensor, got list"),
        (10**400, ValueError, "alpha must be below 2"),
    ],
)
def test_what_is_no_coefficient_is_named(value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        diffcore.add_noise(X, NOISE, value, 0.5)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, s: diffcore.predict_x0(X, NOISE, a, s),
        lambda a, s: diffcore.predict_epsilon(X, NOISE, a, s),
        lambda a, s: diffcore.ddpm_step(X, NOISE, a, s, 0.9, 0.1),
        lambda a, s: diffcore.ddim_step(X, NOISE, a, s, 0.9, 0.1),
    ],
)
def test_coefficients_of_different_lengths_are_named(call: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"sigma must have the shape of alpha, \(2,\), .* \(5,\)"):
        call(torch.rand(2), torch.rand(5))
