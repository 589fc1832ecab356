"""ComfyUI's samplers that k-diffusion does not have, with the same arguments.

``diffcore.sampling.k_diffusion`` describes the arguments that all of them have. The sigmas are
those of alpha = 1; for a rectified flow make the table from ``NoiseLevels.from_flow``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffcore import solvers
from diffcore._types import Model
from diffcore.sampling.k_diffusion import Callback as StepCallback
from diffcore.sampling.k_diffusion import ExtraArgs, NoiseSampler, Sigmas, run_sigmas


def sample_res_multistep(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """RES of two steps. Order 2. It adds no noise: the last two arguments are not read.

    Source: ComfyUI; Zhang et al. 2023 (arXiv 2308.02157).
    """
    del s_noise, noise_sampler
    make, options = solvers.res_multistep_table, {"eta": 0.0}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable)


def sample_res_multistep_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """RES of two steps to sigma_down, and noise up to sigma'. Order 1 (2 for eta = 0).

    Source: ComfyUI; Zhang et al. 2023 (arXiv 2308.02157).
    """
    make, options = solvers.res_multistep_table, {"eta": eta, "s_noise": s_noise}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_gradient_estimation(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    ge_gamma: float = 2.0,
) -> Tensor:
    """Euler's step along an extrapolated derivative. Order 1.

    Source: ComfyUI; Permenter and Yuan 2023 (arXiv 2306.04848).
    """
    make, options = solvers.gradient_estimation_table, {"gamma": ge_gamma}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable)


def sample_er_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    noise_scaler: Callable[[float], float] | None = None,
    max_stage: int = 3,
) -> Tensor:
    """ER-SDE-Solver of order ``max_stage``; the noise follows from ``noise_scaler``. Order 1.

    Source: ComfyUI; Cui et al. 2023 (arXiv 2309.06169).
    """
    make = solvers.er_sde_table
    options = {"order": max_stage, "noise_scaler": noise_scaler, "s_noise": s_noise}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_seeds_2(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 0.5,
    solver_type: str = "phi_1",
) -> Tensor:
    """SEEDS-2: a second call at lambda + r h, and one path of noise. Order 1 (2 for eta = 0).

    Source: ComfyUI; Gonzalez et al. 2023 (arXiv 2305.14267).
    """
    make = solvers.seeds_2_table
    options = {"eta": eta, "s_noise": s_noise, "r": r, "solver_type": solver_type}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_seeds_3(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: StepCallback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r_1: float = 1 / 3,
    r_2: float = 2 / 3,
) -> Tensor:
    """SEEDS-3: calls at lambda + r_1 h and + r_2 h, one path of noise. Order 1 (3 for eta = 0).

    Source: ComfyUI; Gonzalez et al. 2023 (arXiv 2305.14267).
    """
    make = solvers.seeds_3_table
    options = {"eta": eta, "s_noise": s_noise, "r_1": r_1, "r_2": r_2}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)
