"""DPM-Solver with error control: the sampler that chooses its own noise levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from diffcore import ops
from diffcore._checks import as_flag, as_int, as_positive, as_real, check_not_compiling
from diffcore._devices import wide_dtype
from diffcore._types import Model
from diffcore.coefficients.step import STEP_COLUMNS
from diffcore.noise import PhiloxNoise
from diffcore.sampling.k_diffusion import Callback, ExtraArgs, NoiseSampler
from diffcore.sampling.model import call_model, check_model_kwargs, check_samples
from diffcore.sampling.noise import noise_or_default
from diffcore.sampling.progress import progress_counter
from diffcore.sampling.step import StateBeforeStep
from diffcore.solvers.levels import NoiseLevels
from diffcore.solvers.rows import ancestral, at_least_zero

ORDERS = (2, 3)

_LEFT = 1e-5  # closer than this to the end in log(sigma), the loop ends
_SHORTEST = 1e-8  # a step in log(sigma), of which nobody waits for a hundred million


@overload
def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: Literal[False] = False,
) -> Tensor: ...
@overload
def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    *,
    return_info: Literal[True],
) -> tuple[Tensor, dict[str, int]]: ...
@torch.no_grad()
def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: float,
    sigma_max: float,
    extra_args: ExtraArgs = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: float = 0.0,
    s_noise: float = 1.0,
    noise_sampler: NoiseSampler | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, dict[str, int]]:
    """DPM-Solver-12 or -23, whose steps in log(sigma) follow from an estimate of their error.

    A step is taken with two orders. Their difference over ``max(atol, rtol max(|x_low|,
    |x_prev|))``, as a root mean square over all samples, is the error: a step is accepted where
    the controller keeps at least ``accept_safety`` of its length, and else is taken again with the
    shorter one. The error is read on the host, so every step waits for the device, and the samples
    of a batch share their levels.

    Args:
        model: ``model(x, sigma, **extra_args)`` with sigma ``[B]``; it returns the denoised sample.
        x: Samples ``[B, ...]`` at ``sigma_max``, with alpha = 1.
        sigma_min: Where to end, above 0. Above ``sigma_max`` the samples go up.
        sigma_max: Where to start.
        extra_args: More arguments for the model.
        callback: Called after each step, accepted or not, with a read-only dict of ``x`` and
            ``sigma`` (where the loop is then), ``i``, ``t`` = -log(sigma), ``denoised`` (where the
            step began), ``error``, ``h`` (the next step in log(sigma)), and the entries of the
            info; ``sigma_hat`` is ``sigma`` and ``t_up`` is ``t``.
        disable: ``None`` for a bar on terminals only, ``True`` for none. It counts model calls.
        order: 3 (three calls a step, orders 2 and 3) or 2 (two calls, orders 1 and 2).
        rtol: Relative tolerance, at least 0.
        atol: Absolute tolerance, above 0.
        h_init: Length of the first step in log(sigma), above 0.
        pcoeff: Proportional coefficient of the PID controller.
        icoeff: Integral coefficient.
        dcoeff: Derivative coefficient.
        accept_safety: See above.
        eta: Strength of the noise, at least 0; each step then goes down further and noise leads
            back.
        s_noise: Factor of the added noise.
        noise_sampler: ``(sigma, sigma_next) -> noise``, or a noise key, of which the n-th accepted
            step takes the stream n after its own. ``None`` for a key seeded by torch's generator.
        return_info: Return the counts as well.

    Returns:
        The samples at ``sigma_min``; with ``return_info`` also a dict of ``steps``, ``nfe`` (model
        calls), ``n_accept`` and ``n_reject``. After a rejected step the first prediction is kept,
        which saves a call that k-diffusion makes.

    Raises:
        TypeError: An argument, or the output of the model, has the wrong type.
        ValueError: A number out of range, eta above 0 on the way up, an error that is not finite,
            or steps that become shorter than 1e-8.

    Source:
        Lu et al. 2022 (arXiv 2206.00927) appendix C; k-diffusion's ``sample_dpm_adaptive``.
    """
    check_not_compiling("sample_dpm_adaptive", "compile the model that it gets")
    check_samples(x)
    check_model_kwargs(extra_args, "extra_args")
    low, high = as_positive("sigma_min", sigma_min), as_positive("sigma_max", sigma_max)
    if as_int("order", order) not in ORDERS:
        raise ValueError(f"order must be 2 or 3, got {order}")
    eta, s_noise = at_least_zero("eta", eta), at_least_zero("s_noise", s_noise)
    if eta > 0 and low > high:
        raise ValueError(f"eta must be 0 where sigma_min is above sigma_max, got {eta}")
    rtol, atol = at_least_zero("rtol", rtol), as_positive("atol", atol, finite=True)
    noise = _noise(noise_sampler, x, eta)
    control = _Controller(
        as_positive("h_init", h_init, finite=True) * (1 if low <= high else -1),
        (as_real("pcoeff", pcoeff), as_real("icoeff", icoeff), as_real("dcoeff", dcoeff)),
        1.5 if eta else order,
        as_real("accept_safety", accept_safety),
    )
    info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
    bar = progress_counter(None, "dpm_adaptive", None if disable is None else not disable)
    time, end = -math.log(high), -math.log(low)
    before, denoised = x, None  # the last x_low, and the prediction at x
    with bar:

        def predict(x: Tensor, sigma: float) -> Tensor:
            info["nfe"] += 1
            bar.update()
            levels = torch.full((x.shape[0],), sigma, dtype=x.dtype, device=x.device)
            return call_model(model, x, levels, extra_args)

        down_to, nearer = (low, min) if low <= high else (0.0, max)
        while abs(end - time) > _LEFT:
            sigma = math.exp(-time)
            target = nearer(time + control.h, end)
            if abs(control.h) < _SHORTEST:
                raise ValueError(
                    f"rtol and atol must allow steps, got {rtol} and {atol}: at sigma = "
                    f"{sigma:.6g} the step in log(sigma) fell below {_SHORTEST}"
                )
            sigma_next = math.exp(-target)
            down, up = _with_noise(sigma, sigma_next, down_to, eta)
            if denoised is None:
                denoised = predict(x, sigma)
            attempt = _third_order if order == 3 else _second_order
            x_low, x_high = attempt(predict, x, denoised, sigma, down)
            scale = torch.maximum(x_low.abs(), before.abs()).mul_(rtol).clamp_(min=atol)
            error = float(
                ((x_low - x_high) / scale).square().mean(dtype=wide_dtype(x.device)).sqrt()
            )
            if not math.isfinite(error):
                raise ValueError(
                    f"model must return finite numbers, got others at sigma = {sigma:.6g}"
                )
            first = denoised
            if control.accepts(error):
                info["n_accept"] += 1
                before, x, time, denoised = x_low, x_high, target, None
                if up > 0:
                    z = noise(sigma, sigma_next, info["n_accept"])
                    x = ops.add_noise(x, z, 1.0, s_noise * up)
            else:
                info["n_reject"] += 1
            info["steps"] += 1
            if callback is not None:
                _report(callback, x, time, first, error, control.h, info)
    return (x, info) if as_flag("return_info", return_info) else x


class _Controller:
    """The PID control of the length of steps.

    Args:
        h: The first length.
        coefficients: Proportional, integral, derivative.
        order: Of the solver.
        accept_safety: The least factor of the length with which a step is accepted.
    """

    def __init__(
        self, h: float, coefficients: tuple[float, float, float], order: float, accept_safety: float
    ) -> None:
        p, i, d = coefficients
        self.h = h
        self._powers = (p + i + d) / order, -(p + 2 * d) / order, d / order
        self._accept_safety = accept_safety
        self._inverse: list[float] = []  # one over the error of this step and the last two

    def accepts(self, error: float) -> bool:
        """Whether to accept a step with this error; sets the next length."""
        inverse = 1 / (error + 1e-8)
        self._inverse = [inverse, *self._inverse[1:]] if self._inverse else [inverse] * 3
        factor = math.prod(e**b for e, b in zip(self._inverse, self._powers, strict=True))
        factor = 1 + math.atan(factor - 1)
        accepted = factor >= self._accept_safety
        if accepted:
            self._inverse = [inverse, *self._inverse[:2]]
        self.h *= factor
        return accepted


def _noise(noise_sampler: NoiseSampler | None, x: Tensor, eta: float) -> Any:
    """(sigma, sigma_next, number of the step) -> noise."""
    keyed = noise_sampler is None or isinstance(noise_sampler, PhiloxNoise)
    if not (keyed or callable(noise_sampler)):
        kind = type(noise_sampler).__name__
        raise TypeError(f"noise_sampler must be a function or a PhiloxNoise, got {kind}")
    if not keyed:
        return lambda sigma, after, n: noise_sampler(  # type: ignore[operator, misc]
            *torch.tensor([sigma, after], dtype=wide_dtype(x.device), device=x.device)
        )
    if eta == 0:
        return None
    key = noise_or_default(noise_sampler, x)  # type: ignore[arg-type]
    assert isinstance(key, PhiloxNoise)
    return lambda sigma, after, n: key.at(key.stream + n)


def _with_noise(sigma: float, after: float, lowest: float, eta: float) -> tuple[float, float]:
    """Where the step goes down to, at least to ``lowest``, and the noise after it."""
    if eta == 0:
        return after, 0.0
    here, there = NoiseLevels.from_sigmas([sigma, after]).levels()
    down = max(ancestral(here, there, eta)[0], lowest)
    return down, math.sqrt(max((after - down) * (after + down), 0.0))


def _third_order(
    predict: Any, x: Tensor, first: Tensor, sigma: float, after: float
) -> tuple[Tensor, Tensor]:
    """DPM-Solver-2 with r = 1/3, and DPM-Solver-3 with 1/3 and 2/3."""
    r_1, r_2, h = 1 / 3, 2 / 3, math.log(sigma / after)
    one, two = sigma * math.exp(-r_1 * h), sigma * math.exp(-r_2 * h)
    second = predict(_step(x, one / sigma, [first], [1 - one / sigma]), one)
    keep = after / sigma
    # epsilon of the second call less that of the first is (first - second) / one.
    turn = (sigma - after) / (2 * r_1 * one)
    x_low = _step(x, keep, [second, first], [turn, 1 - keep - turn])
    bend = r_2 / r_1 * (math.expm1(r_2 * h) / (r_2 * h) - 1) / one
    turn = two * bend
    middle = _step(x, two / sigma, [second, first], [turn, 1 - two / sigma - turn])
    third = predict(middle, two)
    size = after / r_2 * (math.expm1(h) / h - 1)
    weights = [size / two, -size * bend, 1 - keep - size / two + size * bend]
    return x_low, _step(x, keep, [third, second, first], weights)


def _second_order(
    predict: Any, x: Tensor, first: Tensor, sigma: float, after: float
) -> tuple[Tensor, Tensor]:
    """DPM-Solver-1, and DPM-Solver-2 with r = 1/2."""
    keep, middle = after / sigma, math.sqrt(sigma) * math.sqrt(after)
    x_low = _step(x, keep, [first], [1 - keep])
    second = predict(_step(x, middle / sigma, [first], [1 - middle / sigma]), middle)
    turn = (sigma - after) / middle
    return x_low, _step(x, keep, [second, first], [turn, 1 - keep - turn])


def _step(x: Tensor, keep: float, denoised: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``keep x`` and the weighted predictions, in one launch.

    Args:
        x: Samples where the step begins.
        keep: Their factor.
        denoised: Predictions of x_0.
        weights: Their factors.

    Returns:
        Like ``x``.
    """
    columns = {"c_x": keep, "a_m": 1.0, "clip_min": -math.inf, "clip_max": math.inf}
    columns |= {f"c_{k}": weight for k, weight in enumerate(weights)}
    row = tuple(columns.get(name, 0.0) for name in STEP_COLUMNS)
    return ops.reverse_step(x, denoised[0], row, history=denoised[1:])


def _report(
    callback: Callback,
    x: Tensor,
    time: float,
    denoised: Tensor,
    error: float,
    h: float,
    info: dict[str, int],
) -> None:
    """Calls the callback after a step."""
    sigma = torch.tensor(math.exp(-time), dtype=wide_dtype(x.device), device=x.device)
    state = StateBeforeStep(
        x=x, i=info["steps"] - 1, t=time, t_up=time, sigma=sigma, sigma_hat=sigma,
        denoised=denoised, error=error, h=h, **info,
    )  # fmt: skip
    if isinstance(callback(state), Tensor):
        raise TypeError(
            "callback must return None in a sampler of k-diffusion, got a torch.Tensor; the "
            "callback of diffcore.sample may return another x"
        )
