"""Whatever is passed: a result, or a TypeError or ValueError that names the argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import diffcore
from diffcore import losses, schedules, solvers, vae
from diffcore.solvers import NoiseLevels
from support.toys import half

JUNK: dict[str, Any] = {
    "none": None,
    "string": "a",
    "bytes": b"x",
    "true": True,
    "minus one": -1,
    "zero": 0,
    "one and a half": 1.5,
    "huge": 10**400,
    "nan": math.nan,
    "inf": math.inf,
    "complex": 1j,
    "no array": np.zeros(0),
    "array with nan": np.array([1.0, np.nan]),
    "array of strings": np.array(["a"]),
    "empty list": [],
    "mixed list": [1, "a"],
    "dict": {},
    "object": object(),
    "matrix": torch.zeros(2, 2),
    "no tensor": torch.zeros(0),
    "complex tensor": torch.tensor(1j),
    "bools": torch.ones(3, dtype=torch.bool),
    "meta": torch.zeros(3, device="meta"),
    "grad": torch.ones(2, requires_grad=True),
}
S = diffcore.NoiseSchedule.from_betas([0.1, 0.2, 0.3])
D = diffcore.GaussianDiffusion([0.1, 0.2, 0.3])
X, SIGMAS = torch.ones(2, 3), [3.0, 1.0, 0.0]
TABLE = solvers.euler_ancestral_table(SIGMAS)
RANGE = {"n": 4, "sigma_min": 0.1, "sigma_max": 3.0}
SPACED = {"num_timesteps": 20, "num_steps": 4, "spacing": "leading", "steps_offset": 1}
LEVELS = {"levels": SIGMAS, "prediction_type": "epsilon", "clip_range": 1.0}
SDE = {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "make_betas": (schedules.make_betas, {"name": "linear", "num_timesteps": 5, "beta_end": 0.1}),
    "from_cumprod": (schedules.betas_from_alphas_cumprod, {"alphas_cumprod": [0.9, 0.5]}),
    "rescale": (schedules.rescale_zero_terminal_snr, {"betas": [0.1, 0.2]}),
    "karras": (schedules.get_sigmas_karras, {**RANGE, "rho": 7.0}),
    "poly": (schedules.get_sigmas_polyexponential, {**RANGE, "rho": 1.0}),
    "beta": (schedules.get_sigmas_beta, {**RANGE, "alpha": 0.6, "beta": 0.6}),
    "vp": (schedules.get_sigmas_vp, {"n": 4, "beta_d": 19.0, "beta_min": 0.1, "eps_s": 0.1}),
    "flow": (schedules.get_sigmas_flow, {"n": 4, "shift": 1.0, "sigma_min": 0.1}),
    "laplace": (schedules.get_sigmas_laplace, {**RANGE, "mu": 0.0, "beta": 0.5}),
    "kl_optimal": (schedules.get_sigmas_kl_optimal, RANGE),
    "linear_quadratic": (
        schedules.get_sigmas_linear_quadratic,
        {"n": 4, "sigma_max": 1.0, "threshold_noise": 0.025, "linear_steps": 2},
    ),
    "ays": (schedules.get_sigmas_ays, {"n": 4, "model": "sd15"}),
    "simple": (schedules.get_sigmas_simple, {"schedule": S, "n": 2}),
    "sgm_uniform": (schedules.get_sigmas_sgm_uniform, {"schedule": S, "n": 2}),
    "ddim_uniform": (schedules.get_sigmas_ddim_uniform, {"schedule": S, "n": 2}),
    "shift": (schedules.shift_sigmas, {"sigmas": [0.5], "shift": 3.0}),
    "time_shift": (
        schedules.time_shift,
        {"sigmas": [0.5], "mu": 3.0, "time_shift_type": "linear"},
    ),
    "stretch": (schedules.stretch_to_terminal, {"sigmas": [0.5], "shift_terminal": 0.1}),
    "mu": (
        schedules.dynamic_shift_mu,
        {"image_seq_len": 512, "base_image_seq_len": 256, "base_shift": 0.5, "max_shift": 1.15},
    ),
    "spaced": (schedules.spaced_timesteps, {**SPACED, "last_timestep": 15}),
    "respaced": (schedules.respaced_timesteps, SPACED),
    "clipped": (schedules.clipped_length, {"schedule": S, "lambda_min_clipped": -5.0}),
    "to-sigmas": (schedules.timesteps_to_sigmas, {"schedule": S, "timesteps": [1.0]}),
    "to-timesteps": (schedules.sigmas_to_timesteps, {"schedule": S, "sigmas": [1.0]}),
    "schedule": (diffcore.NoiseSchedule, {"alpha": [0.9, 0.5], "sigma": [0.1, 0.5]}),
    "diffusion": (
        diffcore.GaussianDiffusion,
        {
            "betas": [0.1, 0.2],
            "prediction_type": "sample",
            "variance_type": "fixed_small",
            "clip_sample_range": 1.0,
            "loss_type": "mse",
        },
    ),
    "from_sigmas": (NoiseLevels.from_sigmas, {"sigmas": SIGMAS, "timesteps": [3, 1]}),
    "from_edm": (NoiseLevels.from_edm, {"sigmas": SIGMAS, "sigma_data": 0.5}),
    "from_flow": (
        NoiseLevels.from_flow,
        {"sigmas": [1.0, 0.5, 0.0], "num_train_timesteps": 1000.0},
    ),
    "from_schedule": (
        NoiseLevels.from_schedule,
        {"schedule": S, "timesteps": [2, 1], "final_sigmas_type": "zero"},
    ),
    "skip": (NoiseLevels.from_sigmas(SIGMAS).skip, {"steps": 1}),
    "sigma_space": (NoiseLevels.from_schedule(S, [2, 1]).sigma_space, {"init_noise_sigma": 1.0}),
    "euler": (
        solvers.euler_table,
        {**LEVELS, "s_churn": 0.1, "s_tmin": 0.0, "s_tmax": 9.0, "s_noise": 1.0},
    ),
    "ddpm": (solvers.ddpm_table, {**LEVELS, "variance_type": "fixed_small"}),
    "ddim": (solvers.ddim_table, {**LEVELS, "eta": 0.5}),
    "lms": (solvers.lms_table, {**LEVELS, "order": 2}),
    "dpmpp": (solvers.dpmpp_table, {**LEVELS, **SDE, "order": 2, "eta": 0.5, "s_noise": 1.0}),
    "dpmpp_sde": (solvers.dpmpp_sde_table, {**LEVELS, "eta": 0.5, "r": 0.5}),
    "unipc": (solvers.unipc_table, {**LEVELS, "order": 2, "solver_p": "unip"}),
    "ipndm": (solvers.ipndm_table, {**LEVELS, "order": 2, "steps": "variable"}),
    "pndm": (solvers.pndm_table, LEVELS),
    "heunpp2": (solvers.heunpp2_table, {**LEVELS, "s_churn": 0.1}),
    "deis": (solvers.deis_table, {**LEVELS, "order": 2, "variable": "t"}),
    "dpm_fast": (
        solvers.dpm_fast_table,
        {"levels": [5.0, 1.0], "num_calls": 4, "eta": 0.5, "s_noise": 1.0},
    ),
    "sa_solver": (
        solvers.sa_solver_table,
        {
            **LEVELS,
            "predictor_order": 2,
            "corrector_order": 2,
            "tau": 0.5,
            "mode": "pec",
            "s_noise": 1.0,
        },
    ),
    "flow_table": (
        solvers.flow_euler_table,
        {"sigmas": [1.0, 0.5, 0.0], "num_train_timesteps": 500.0},
    ),
    "res_multistep": (solvers.res_multistep_table, {**LEVELS, "eta": 0.5, "s_noise": 1.0}),
    "gradient_estimation": (solvers.gradient_estimation_table, {**LEVELS, "gamma": 2.0}),
    "er_sde": (
        solvers.er_sde_table,
        {**LEVELS, "order": 2, "s_noise": 1.0, "num_integration_points": 20},
    ),
    "seeds_2": (solvers.seeds_2_table, {**LEVELS, "eta": 0.5, "s_noise": 1.0, "r": 0.5}),
    "seeds_3": (solvers.seeds_3_table, {**LEVELS, "eta": 0.5, "r_1": 0.2, "r_2": 0.5}),
    "restart": (
        solvers.restart_table,
        {**LEVELS, "restarts": [(1.0, 3.0, 2, 1)], "s_noise": 1.0, "rho": 7.0},
    ),
    "flow_ancestral": (
        solvers.flow_dpmpp_2s_ancestral_table,
        {"sigmas": [1.0, 0.5, 0.0], "eta": 0.5, "s_noise": 1.0},
    ),
    "edm_table": (solvers.edm_heun_table, {"sigmas": SIGMAS, "sigma_data": 0.7}),
    "column": (TABLE.column, {"name": "c_x"}),
    "step": (TABLE.step, {"i": 0, "x": X, "model_output": X, "noise": X}),
    "denoised": (TABLE.denoised, {"i": 0, "x": X, "model_output": X}),
    "min_snr": (losses.min_snr_weights, {"snr": S.snr, "gamma": 5.0, "prediction_type": "sample"}),
    "edm_weights": (losses.edm_weights, {"snr": S.snr, "sigma_data": 0.5}),
    "vae": (vae.vae_loss, {"x": X, "x_recon": X, "kl": torch.ones(2), "decoder_std": 1.0}),
    "q_sample": (D.q_sample, {"x_start": X, "t": 1, "noise": X}),
    "q_mean_variance": (D.q_mean_variance, {"x_start": X, "t": 1}),
    "losses": (
        D.training_losses,
        {"model": half, "x_start": X, "t": 1, "noise": X, "weights": [1.0, 1.0, 1.0]},
    ),
    "p_sample": (D.p_sample, {"model": half, "x": X, "t": 1, "noise": X}),
    "ddim_sample": (D.ddim_sample, {"model": half, "x": X, "t": 1, "noise": X, "eta": 0.5}),
    "ddim_loop": (
        D.ddim_sample_loop,
        {"model": half, "shape": (2, 3), "noise": X, "num_steps": 2, "eta": 0.5},
    ),
    "ddim_reverse_sample": (D.ddim_reverse_sample, {"model": half, "x": X, "t": 1, "eta": 0.0}),
    "ddim_reverse_loop": (
        D.ddim_reverse_sample_loop,
        {"model": half, "x": X, "num_steps": 2, "eta": 0.0},
    ),
    "with_timesteps": (
        NoiseLevels.from_flow([1.0, 0.5, 0.0]).with_timesteps,
        {"timesteps": [2, 1]},
    ),
    "respace": (D.respace, {"timesteps": 2, "timestep_spacing": "leading"}),
    "sample": (
        diffcore.sample,
        {
            "model": half,
            "x": X,
            "table": TABLE,
            "noise": X.expand(2, 2, 3),
            "dynamic_thresholding_ratio": 0.9,
            "sample_max_value": 2.0,
        },
    ),
}
ARGUMENTS = [(name, a) for name, (_, good) in CALLS.items() for a in good if a != "model"]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_a_result_or_an_error_by_name(name: str, argument: str) -> None:
    call, good = CALLS[name]
    call(**good)
    # Where several arguments have to fit each other, the error may begin with another of them.
    others = "|".join(good) if argument in ("x", "x_start", "shape", "model_output") else argument
    for kind, value in JUNK.items():
        error = error_of(call, {**good, argument: value})
        named = error is None or re.search(rf"(?<!\w)({others})(?!\w)", str(error))
        assert named, f"{kind}: {error}"


def error_of(call: Callable[..., Any], arguments: dict[str, Any]) -> Exception | None:
    try:
        call(**arguments)
    except (TypeError, ValueError) as error:
        return error
    return None
