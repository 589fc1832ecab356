"""Steps of models that were distilled to a few: predict a clean sample, then add noise again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from diffcore._checks import as_positive, check_choice
from diffcore._types import ClipRange
from diffcore.coefficients.consistency import consistency_coefficients, lcm_coefficients
from diffcore.coefficients.step import PREDICTION_TYPES, x0_coefficients
from diffcore.schedules.tensors import as_float64
from diffcore.solvers.levels import Level, Levels, NoiseLevels, as_levels
from diffcore.solvers.named import edm_levels, flow_levels, refuse_second
from diffcore.solvers.paths import level_vector, ratio_at, refuse_first, timestep_vector
from diffcore.solvers.rows import (
    Rows,
    at_least_zero,
    jump,
    move,
    one_call_coefficients,
    one_call_table,
    toward,
)
from diffcore.solvers.table import SolverTable

# The default of time_scale below: OpenAI's consistency models get 1000 log(sigma) / 4.
_TIME_SCALE = 1000.0
# Numbers that were rounded to float32 are taken for what they stand for.
_NEAR = 1e-6
# pi / 2 as diffusers writes it, 1.5708, is a little above.
_ROUNDED = 1e-5


def renoise_table(
    levels: Levels, *, prediction_type: str = "epsilon", clip_range: ClipRange = None
) -> SolverTable:
    """The predicted clean sample with new noise: x' = alpha' x0 + sigma' z. Order 1.

    For models distilled to predict x_0 in one step, where the error of each step is renewed with
    its noise: DMD's samplers, LCM models of a rectified flow, and the stochastic sampler of flows.
    It does not follow the probability flow of a model that predicts the mean of x_0.

    Args:
        levels: Noise levels to visit, or sigmas ``[N + 1]`` with alpha = 1.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: Levels that rise, or as ``NoiseLevels``.

    Source:
        Song et al. 2023 (arXiv 2303.01469) algorithm 1; Yin et al. 2024 (DMD2, arXiv 2405.14867).
    """
    levels = as_levels(levels, prediction_type)
    levels.check_falls("renoise_table")
    rows = Rows("renoise", levels, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        rows.add(i, here, **_renoised(after))
    return rows.table(1)


def lcm_table(
    levels: Levels,
    *,
    timestep_scaling: float = 10.0,
    sigma_data: float = 0.5,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Latent consistency models: x' = alpha' (c_skip x + c_out x0) + sigma' z. Order 1.

    c_skip and c_out are ``coefficients.lcm_coefficients`` of the timestep input, which make the
    result x itself at timestep 0; x is the scaled model input. ``clip_range`` is applied to x0,
    before them. For LCM models of a rectified flow, which have none, use ``renoise_table``.

    Args:
        levels: Noise levels to visit, such as ``NoiseLevels.from_schedule`` at the timesteps of
            ``spacings.lcm_timesteps``, or sigmas ``[N + 1]`` with alpha = 1.
        timestep_scaling: See ``coefficients.lcm_coefficients``.
        sigma_data: See ``coefficients.lcm_coefficients``.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: Levels that rise or whose timesteps are below 0, a ``timestep_scaling`` or
            ``sigma_data`` that is not positive, or as ``NoiseLevels``.

    Source:
        Luo et al. 2023 (arXiv 2310.04378) algorithm 3, with the coefficients of its code.
    """
    levels = as_levels(levels, prediction_type)
    levels.check_falls("lcm_table")
    _check_times(levels, "lcm_table")
    rows = Rows("lcm", levels, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        c_skip, c_out = lcm_coefficients(
            here.timestep, sigma_data=sigma_data, timestep_scaling=timestep_scaling
        )
        rows.add(i, here, **_renoised(after, float(c_skip) * here.input_scale, float(c_out)))
    return rows.table(1)


def tcd_table(
    levels: Levels,
    *,
    gamma: float = 0.3,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Trajectory consistency distillation: down to timestep s, then noise up to t'. Order 1.

    s = (1 - gamma) t', rounded down where timesteps are integers. x_s = alpha_s x0 + sigma_s
    epsilon, then the forward jump x' = (alpha' / alpha_s) x_s + c_z z. gamma = 0 is DDIM without
    noise; gamma = 1 goes down to timestep 0 in every step. A step to the clean sample returns x0;
    diffusers' ``TCDScheduler`` ends at the level of timestep 0, which is
    ``from_schedule(final_sigmas_type="sigma_min")``. With a clip, epsilon follows from the clipped
    x0.

    Args:
        levels: Noise levels to visit, such as ``NoiseLevels.from_schedule`` at the timesteps of
            ``spacings.lcm_timesteps``, or sigmas ``[N + 1]`` with alpha = 1. With gamma = 0 they
            may rise.
        gamma: In [0, 1]; diffusers calls it ``eta``.
        prediction_type: What the model predicts, one of ``PREDICTION_TYPES``.
        clip_range: Bounds of the predicted x_0: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows.

    Raises:
        ValueError: gamma outside [0, 1]; gamma above 0 with levels that rise, with timesteps below
            0, or with levels that do not know the level at s; or as ``NoiseLevels``.

    Source:
        Zheng et al. 2024 (arXiv 2402.19159) algorithm 4.
    """
    gamma = at_least_zero("gamma", gamma)
    if gamma > 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma}")
    levels = as_levels(levels, prediction_type)
    if gamma > 0:
        levels.check_falls("tcd_table with gamma > 0")
        _check_times(levels, "tcd_table with gamma > 0")
    rows = Rows("tcd", levels, prediction_type, clip_range)
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        if gamma == 0 or after.sigma == 0:
            rows.add(i, here, **move(here, after.alpha, after.sigma))
            continue
        below = _below(levels, after, gamma)
        r, variance = jump(below, after) if below.ratio < after.ratio else (1.0, 0.0)
        c_x, c_0 = toward(here, r * below.alpha, r * below.sigma)
        rows.add(i, here, c_x=c_x, c_0=c_0, c_z=math.sqrt(variance))
    return rows.table(1)


def consistency_table(
    sigmas: Levels,
    *,
    sigma_data: float = 0.5,
    sigma_min: float = 0.002,
    s_noise: float = 1.0,
    time_scale: float = _TIME_SCALE,
    prediction_type: str = "epsilon",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Consistency models: x' = f + sqrt(sigma'^2 - sigma_min^2) z, f = c_skip x + c_out F. Order 1.

    c_skip and c_out are ``coefficients.consistency_coefficients``. f is a sample at the level
    sigma_min, so x' is one at sigma'. The model gets x / sqrt(sigma^2 + sigma_data^2), and
    ``time_scale`` log(sigma) / 4. Steps to sigma_min or to 0 add no noise.

    Args:
        sigmas: ``[N + 1]``, falling to sigma_min or 0, or ``NoiseLevels.from_edm``.
        sigma_data: Standard deviation of the data. Not with ``NoiseLevels``, which have their own.
        sigma_min: The lowest noise level of the training, at least 0.
        s_noise: Factor of the added noise.
        time_scale: Factor of the timestep input; 1000 for OpenAI's checkpoints. Not with
            ``NoiseLevels``, which have their own timestep inputs.
        prediction_type: "epsilon" for the network's F, "v_prediction" for -F, as in
            ``NoiseLevels.from_edm``, or "sample" for f itself.
        clip_range: Bounds of f: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows; init_noise_sigma is the largest sigma.

    Raises:
        ValueError: Sigmas that rise or lie below ``sigma_min`` before the last, "flow_prediction",
            or as ``edm_euler_table``.

    Source:
        Song et al. 2023 (arXiv 2303.01469) algorithm 1 and appendix C.
    """
    check_choice("prediction_type", prediction_type, _OF_NETWORK)
    s_noise = at_least_zero("s_noise", s_noise)
    sigma_min = at_least_zero("sigma_min", sigma_min)
    time_scale = as_positive("time_scale", time_scale, finite=True)
    levels = edm_levels(sigmas, sigma_data)
    if isinstance(sigmas, NoiseLevels):
        refuse_second("time_scale", time_scale, _TIME_SCALE)
    else:
        levels = levels.with_timesteps(time_scale * levels.timesteps)
    levels.check_falls("consistency_table", "sigmas")
    visited = levels.sigma[:-1]
    refuse_first(
        f"sigmas must be at least sigma_min, {sigma_min:g}, before the last",
        visited,
        visited < sigma_min * (1 - _NEAR),
    )
    levels = replace(levels, init_noise_sigma=float(levels.sigma[0]))
    rows = Rows("consistency", levels, prediction_type, clip_range)
    assert levels.input_std is not None
    for i, (here, after) in enumerate(pairwise(levels.levels())):
        known = {"a_x": 0.0, "a_m": 1.0}
        if prediction_type != "sample":
            c_skip, c_out = consistency_coefficients(
                here.sigma, sigma_data=levels.input_std, sigma_min=sigma_min
            )
            sign = 1.0 if prediction_type == "epsilon" else -1.0
            known = {"a_x": float(c_skip), "a_m": sign * float(c_out)}
        above = (after.sigma - sigma_min) * (after.sigma + sigma_min)
        ends = after.sigma <= sigma_min * (1 + _NEAR)  # sigma_min may be rounded to float32 there
        rows.add(i, here, **known, c_0=1.0, c_z=0.0 if ends else s_noise * math.sqrt(above))
    return rows.table(1)


_OF_NETWORK = ("epsilon", "v_prediction", "sample")


def trigflow_table(
    times: Tensor | Sequence[float],
    *,
    sigma_data: float = 0.5,
    timesteps: Tensor | Sequence[float] | None = None,
    prediction_type: str = "v_prediction",
    clip_range: ClipRange = None,
) -> SolverTable:
    """Sampling of sCM in TrigFlow's terms: x' = cos t' f + sin t' sigma_data z. Order 1.

    x_t = cos(t) x_0 + sin(t) sigma_data noise, and f = cos(t) x - sin(t) sigma_data F with F the
    network's output for x / sigma_data at t. F is the v of a variance preserving process of x_0 /
    sigma_data; the other prediction types are those of that process too, as is "sample", x_0 /
    sigma_data.

    TrigFlow is EDM's process with sigma = sigma_data tan(t) and F = -F of EDM. Solvers that follow
    the probability flow take ``NoiseLevels.from_edm(sigma_data * tan(t))`` with "v_prediction".

    Args:
        times: t, ``[N + 1]``, falling, in [0, pi / 2], usually to 0; 1.5708 counts as pi / 2.
        sigma_data: Standard deviation of the data.
        timesteps: Timestep input of the model ``[N]``; t by default.
        prediction_type: "v_prediction" for F, or another one of ``PREDICTION_TYPES``.
        clip_range: Bounds of f: ``c`` for [-c, c], (lowest, highest), or ``None``.

    Returns:
        N rows; init_noise_sigma is ``sigma_data``.

    Raises:
        ValueError: times outside [0, pi / 2] or that rise, or as ``NoiseLevels``.

    Source:
        Lu and Song 2024 (arXiv 2410.11081) section 3 and algorithm 2.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    t = level_vector("times", times)
    refuse_first("times must lie in [0, pi / 2]", t, (t < 0) | (t > math.pi / 2 + _ROUNDED))
    data = as_positive("sigma_data", sigma_data, finite=True)
    refuse_first("times must fall at every step", t[1:], t[1:] >= t[:-1], 1)
    alpha = torch.where(t >= math.pi / 2, 0.0, t.cos())
    sigma = torch.where(t >= math.pi / 2, 1.0, t.sin())
    labels = t[:-1] if timesteps is None else timestep_vector(timesteps)
    levels = NoiseLevels(alpha, data * sigma, labels, "vp", float, init_noise_sigma=data)
    rows = Rows("trigflow", levels, "sample", clip_range)
    unit = zip(alpha.tolist(), sigma.tolist(), strict=True)
    for i, ((here, after), (a, s)) in enumerate(zip(pairwise(levels.levels()), unit, strict=False)):
        a_x, a_m = x0_coefficients(a, s, prediction_type)
        known = {"a_x": float(a_x), "a_m": data * float(a_m)}
        rows.add(i, here._replace(input_scale=1 / data), **known, **_renoised(after))
    return rows.table(1)


def flow_map_table(
    sigmas: Levels,
    *,
    num_train_timesteps: float = 1000.0,
    target_timesteps: Tensor | Sequence[float] | None = None,
    target_name: str = "r",
) -> SolverTable:
    """Flow maps, as of MeanFlow: x' = x - (sigma - sigma') u(x, sigma, sigma'). Order 1.

    u is the average velocity of a rectified flow from sigma to sigma', noise minus data. The model
    gets both levels: ``model(x, t, r=...)`` with t and r the timestep inputs of sigma and sigma'.
    The steps are exact for the flow's own map, and those of ``flow_euler_table`` for a velocity
    that does not depend on r. Levels may rise, for a model that was trained with r > t. The
    "denoised" of a callback is x - sigma u, which is x_0 only in a step to 0.

    Args:
        sigmas: As for ``flow_euler_table``; MeanFlow's steps are those of equal sigmas.
        num_train_timesteps: t and r are sigma and sigma' times this; 1 for MeanFlow. Not with
            ``NoiseLevels``, which have their own.
        target_timesteps: r of each row, ``[N]``; by default the timestep input of the next level.
            A model that gets the length of the step takes ``t - r`` here.
        target_name: The keyword argument of the model that gets r; diffusers' is "r_timestep".

    Returns:
        N rows.

    Raises:
        TypeError: ``target_name`` is not a string.
        ValueError: ``target_name`` is no name, not one target timestep for each step, or as
            ``flow_euler_table``.

    Source:
        Geng et al. 2025 (MeanFlow, arXiv 2505.13447) eq. 12; Boffi et al. 2024 (flow maps, arXiv
        2406.07507).
    """
    if not isinstance(target_name, str):
        raise TypeError(f"target_name must be a string, got {type(target_name).__name__}")
    if not target_name.isidentifier():
        raise ValueError(f"target_name must be the name of an argument, got {target_name!r}")
    levels = flow_levels(sigmas, num_train_timesteps)
    length = levels.sigma[1:] - levels.sigma[:-1]
    coefficients = one_call_coefficients(
        "flow_map", levels, "flow_prediction", None, c_x=torch.ones_like(length), c_m=length
    )
    if target_timesteps is None:
        targets = _next_timesteps(levels)
    else:
        targets = timestep_vector(target_timesteps)
        if len(targets) != len(levels):
            raise ValueError(
                f"target_timesteps must hold one for each of the {len(levels)} steps, got "
                f"{len(targets)}"
            )
    return one_call_table(
        "flow_map", levels, coefficients, target_timesteps=targets, target_name=target_name
    )


def _renoised(after: Level, c_x: float = 0.0, c_0: float = 1.0) -> dict[str, float]:
    """The columns of x' = alpha' (c_x x + c_0 x0) + sigma' z: new noise at the level reached."""
    return {"c_x": after.alpha * c_x, "c_0": after.alpha * c_0, "c_z": after.sigma}


def _next_timesteps(levels: NoiseLevels) -> Tensor:
    """The timestep input of the level that each step reaches; 0 for the clean one."""
    *_, end = levels.levels()
    last = 0.0 if end.sigma == 0 else end.timestep
    times = levels.timesteps
    following = torch.cat([times[1:].double(), as_float64([last])])
    integers = times.dtype == torch.int64 and bool((following == following.round()).all())
    return following.long() if integers else following


def _below(levels: NoiseLevels, after: Level, gamma: float) -> Level:
    """TCD's level at s, from the next level at t'."""
    time = after.timestep
    s = (1 - gamma) * time
    if levels.timesteps.dtype == torch.int64 and abs(time - round(time)) < _NEAR:
        s = (1 - gamma) * round(time)
        s = float(math.floor(s + _NEAR))  # 0.1 of 10 is 1, also if 0.1 is 1 - 0.9
    return levels.at(ratio_at(levels.time_of, s))


def _check_times(levels: NoiseLevels, name: str) -> None:
    """Refuses timesteps below 0, such as EDM's logarithms: there 0 is not the clean end."""
    times = levels.timesteps
    refuse_first(f"timesteps must be at least 0 for {name}", times, times < 0)
