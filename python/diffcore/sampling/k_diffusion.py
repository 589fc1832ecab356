"""k-diffusion's samplers, with its signatures, on top of the one sampling loop.

All of them start from ``x = noise * sigmas[0]`` and run under ``torch.no_grad()``; for gradients
write a loop on ``SolverTable.step``. They take

- model: ``model(x, sigma, **extra_args)`` with sigma ``[B]``; it returns the denoised sample.
- x: Samples ``[B, ...]``.
- sigmas: ``[N + 1]``, falling, with or without a 0 at the end: ``get_sigmas_karras`` and the like;
  or for a sampler without noise rising, from above 0.
  They are read on the host: where they are on a GPU, the call waits for it once. The solver table
  is made when the sigmas or the options are new, and cached.
- extra_args: More arguments for the model.
- callback: Called once a step, after its model call and before x changes (``diffcore.sample`` calls
  its callback after the step), with a read-only dict of ``x``, ``i``, ``sigma`` (``sigmas[i]``),
  ``sigma_hat`` (where the model is called; above ``sigma`` under churn) and ``denoised``. Its
  tensors are not to be changed in place either. What it returns is not read; a tensor is refused.
- disable: ``None`` for a bar on terminals only, ``True`` for none.
- eta, s_noise: Strength of the noise, and a factor of it.
- noise_sampler: ``(sigma, sigma_next) -> noise``, called whenever noise is added, with the ends of
  the interval it is for as 0-dim tensors. Or a noise key, of which row r of the solver table takes
  the stream 1 + r after its own, as in ``diffcore.sample``.
- s_churn, s_tmin, s_tmax: Churn of Karras et al., see ``solvers.euler_table``.

Without a ``noise_sampler``, and always for churn, the kernels generate the noise from a seed that
torch's generator gives: independent normals, where k-diffusion's SDE samplers use a Brownian tree.
``BrownianNoise(key).sampler(x)`` is a ``noise_sampler`` of one path.

Source: https://github.com/crowsonkb/k-diffusion (``k_diffusion/sampling.py``), 4601bf0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from diffcore import solvers
from diffcore._checks import check_not_compiling
from diffcore._engine.kept import made_plainly
from diffcore._types import Model
from diffcore.noise import PhiloxNoise
from diffcore.sampling.loop import run_table
from diffcore.sampling.model import check_samples
from diffcore.sampling.noise import noise_or_default
from diffcore.sampling.step import StateBeforeStep
from diffcore.solvers import SolverTable
from diffcore.solvers.paths import level_vector

Sigmas = Tensor | Sequence[float]
Callback = Callable[[dict[str, Any]], object]
ExtraArgs = Mapping[str, Any] | None
NoiseSampler = Callable[[Tensor, Tensor], Tensor | PhiloxNoise] | PhiloxNoise

_CACHED_TABLES = 32


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Euler's method, with churn. Order 1.

    Source: Karras et al. 2022 (arXiv 2206.00364) algorithm 2, Euler steps.
    """
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return run_sigmas(solvers.euler_table, churn, model, x, sigmas, extra_args, callback, disable)


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Euler's step to sigma_down, and noise up to sigma'. Order 1.

    Source: k-diffusion; with eta <= 1 DDIM, Song et al. 2021 (arXiv 2010.02502) eq. 12.
    """
    make, options = solvers.euler_ancestral_table, {"eta": eta, "s_noise": s_noise}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """Heun's method, with churn: the mean of the derivatives at both ends. Order 2.

    Source: Karras et al. 2022 (arXiv 2206.00364) algorithm 2.
    """
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return run_sigmas(solvers.heun_table, churn, model, x, sigmas, extra_args, callback, disable)


def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver-2, with churn: the derivative at the geometric middle of the sigmas. Order 2.

    Source: Lu et al. 2022 (arXiv 2206.00927) algorithm 1.
    """
    churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    return run_sigmas(solvers.dpm2_table, churn, model, x, sigmas, extra_args, callback, disable)


def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver-2 to sigma_down, and noise up to sigma'. Order 1 (2 for eta = 0).

    Source: k-diffusion; Lu et al. 2022 (arXiv 2206.00927) algorithm 1 for the step.
    """
    make, options = solvers.dpm2_ancestral_table, {"eta": eta, "s_noise": s_noise}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
) -> Tensor:
    """Linear multistep: Adams-Bashforth over the last ``order`` derivatives, 1 to 4 of them.

    Source: Liu et al. 2022 (arXiv 2202.09778) eq. 12, for steps of any length.
    """
    make, options = solvers.lms_table, {"order": order}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable)


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++ (2S) to sigma_down, and noise up to sigma'. Order 1 (2 for eta = 0).

    Source: Lu et al. 2022 (arXiv 2211.01095) algorithm 1; k-diffusion for the noise.
    """
    make, options = solvers.dpmpp_2s_table, {"eta": eta, "s_noise": s_noise}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    r: float = 1 / 2,
) -> Tensor:
    """DPM-Solver++ (SDE): a second call at lambda + r h, noise after both. Order 1 (2 for eta = 0).

    Source: k-diffusion; Lu et al. 2022 (arXiv 2211.01095).
    """
    make, options = solvers.dpmpp_sde_table, {"eta": eta, "s_noise": s_noise, "r": r}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
) -> Tensor:
    """DPM-Solver++ (2M): x0 as a line through the last two predictions. Order 2.

    Source: Lu et al. 2022 (arXiv 2211.01095) algorithm 2.
    """
    return run_sigmas(solvers.dpmpp_2m_table, {}, model, x, sigmas, extra_args, callback, disable)


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    solver_type: str = "midpoint",
) -> Tensor:
    """DPM-Solver++ (2M) SDE, of the "midpoint" or "heun" type. Order 1 (2 for eta = 0).

    Source: Lu et al. 2022 (arXiv 2211.01095) appendix; k-diffusion for eta.
    """
    options = {"eta": eta, "s_noise": s_noise, "solver_type": solver_type}
    make = solvers.dpmpp_2m_sde_table
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """DPM-Solver++ (3M) SDE, as published: see ``solvers.dpmpp_table``. Order 1 (2 for eta = 0).

    Source: Lu et al. 2022 (arXiv 2211.01095) appendix; k-diffusion for eta.
    """
    make, options = solvers.dpmpp_3m_sde_table, {"eta": eta, "s_noise": s_noise}
    return run_sigmas(make, options, model, x, sigmas, extra_args, callback, disable, noise_sampler)


def run_sigmas(
    make: Callable[..., SolverTable],
    options: Mapping[str, Any],
    model: Model,
    x: Tensor,
    sigmas: Sigmas,
    extra_args: ExtraArgs,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None = None,
) -> Tensor:
    """Sample with k-diffusion's arguments.

    Args:
        make: Makes the table from the sigmas.
        options: Its keyword arguments, which key the cache of tables.
        model: See the module.
        x: See the module.
        sigmas: See the module.
        extra_args: See the module.
        callback: See the module.
        disable: See the module.
        noise_sampler: See the module.

    Returns:
        The samples.
    """
    check_not_compiling(
        "a sampler with k-diffusion's signature",
        f"make the table there, with solvers.{make.__name__}(sigmas, ...), and compile "
        "diffcore.sample",
    )
    check_samples(x)
    levels = made_plainly(lambda: level_vector("sigmas", sigmas))
    table = _table(make, tuple(levels.tolist()), **options)
    keyed = noise_sampler is None or isinstance(noise_sampler, PhiloxNoise)
    if not (keyed or callable(noise_sampler)):
        kind = type(noise_sampler).__name__
        raise TypeError(f"noise_sampler must be a function or a PhiloxNoise, got {kind}")

    def noise_of_interval(row: int, x: Tensor) -> Tensor | PhiloxNoise:
        assert callable(noise_sampler)
        return noise_sampler(*table.to(x.device).noise_levels[row])

    def report(state: dict[str, Any]) -> None:
        assert callback is not None
        hat = levels.new_full((), state["sigma"], device=x.device)  # a fill: nothing waits
        given = {"sigma": sigmas[state["i"]], "sigma_hat": hat}
        named = {name: state[name] for name in ("x", "i", "denoised")}
        if isinstance(callback(StateBeforeStep(named, **given)), Tensor):
            raise TypeError(
                "callback must return None in a sampler of k-diffusion, got a torch.Tensor; the "
                "callback of diffcore.sample may return another x"
            )

    return run_table(
        model,
        x,
        table,
        noise_of_interval if callable(noise_sampler) else noise_or_default(noise_sampler, x),
        model_kwargs=extra_args,
        callback=None if callback is None else report,
        callback_first=True,
        progress=None if disable is None else not disable,
    )


@lru_cache(_CACHED_TABLES)
def _table(
    make: Callable[..., SolverTable], sigmas: tuple[float, ...], **options: Any
) -> SolverTable:
    return made_plainly(lambda: make(sigmas, prediction_type="sample", **options))
