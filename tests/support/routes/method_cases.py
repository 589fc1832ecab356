"""The public methods and functions above the ops, each on a model of one elementwise weight."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffcore import (
    BitsPerDim,
    GaussianDiffusion,
    NoiseLevels,
    NoiseSchedule,
    bits_per_dim,
    make_betas,
    sample,
    sampling,
    solvers,
)
from diffcore.likelihood import vdm_bound
from support.routes.case import Case, nothing
from support.routes.op_cases import KEY
from support.routes.vae_cases import VAE_CASES

STEPS = 25
SIGMAS = [9.0, 3.0, 1.0, 0.3, 0.0]
LEVELS = torch.tensor(SIGMAS)
Given = dict[str, Tensor]


ROUND: list[Callable[[Tensor], Tensor]] = []
"""What happens to the outputs of models, as autocast rounds them; see ``model_rounds``."""


@contextlib.contextmanager
def model_rounds(by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    ROUND.append(by)
    try:
        yield
    finally:
        ROUND.pop()


def model(given: Given, *, learned: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """A network of one parameter, ``given["weight"]``, of the shape of the samples."""
    weight = given["weight"]

    def predict(x: Tensor, t: Tensor) -> Tensor:
        time = (t.to(x) / STEPS).reshape(-1, *[1] * (x.ndim - 1))
        output = weight * x + 0.3 * torch.sin(3 * x + time)
        if learned:
            output = torch.cat([output, torch.tanh(weight * x)], 1)
        return ROUND[-1](output) if ROUND else output

    return predict


def diffusion(**options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(make_betas("linear", STEPS, scale_to_1000=True), **options)


def steps(batch: int) -> Given:
    """Timesteps that touch both ends."""
    return {"t": (torch.arange(batch) * 9 + STEPS - 1) % STEPS}


def _method(
    name: str,
    call: Callable[[GaussianDiffusion, Given], Any],
    tensors: str,
    differentiable: str,
    *,
    timesteps: bool = True,
    suffix: str = "",
    **options: Any,
) -> Case:
    return Case(
        f"GaussianDiffusion.{name}{suffix}",
        f"GaussianDiffusion.{name}",
        "diffusion",
        call,
        tuple(tensors.split()),
        tuple(differentiable.split()),
        steps if timesteps else lambda batch: {},
        partial(diffusion, **options),
    )


WEIGHTS = torch.linspace(0.5, 2, STEPS)


def _training(
    noise: Any, given: Given, d: GaussianDiffusion, x: str = "x", weights: Tensor | None = None
) -> Any:
    net = model(given, learned=d.variance_type in ("learned", "learned_range"))
    noise = given["noise"] if noise == "tensor" else noise
    return d.training_losses(net, given[x], given["t"], noise=noise, weights=weights)


DIFFUSION_CASES: list[Case] = [
    _method("q_mean_variance", lambda d, g: d.q_mean_variance(g["x"], g["t"]), "x", "x"),
    _method("q_sample", lambda d, g: d.q_sample(g["x"], g["t"], g["noise"]), "x noise", "x noise"),
    _method("q_sample", lambda d, g: d.q_sample(g["x"], g["t"], KEY), "x", "x", suffix=", key"),
    _method(
        "q_posterior_mean_variance",
        lambda d, g: d.q_posterior_mean_variance(g["x"], g["x_t"], g["t"]),
        "x x_t",
        "x x_t",
    ),
    _method(
        "training_losses",
        lambda d, g: _training("tensor", g, d),
        "x weight noise",
        "x weight",
    ),
    _method(
        "training_losses", lambda d, g: _training(KEY, g, d), "x weight", "weight", suffix=", key"
    ),
    _method(
        "training_losses",
        lambda d, g: _training(None, g, d),
        "x weight",
        "weight",
        suffix=", default noise",
    ),
    _method(
        "training_losses",
        lambda d, g: _training("tensor", g, d, weights=WEIGHTS),
        "x weight noise",
        "weight",
        suffix=", v_prediction, weights",
        prediction_type="v_prediction",
    ),
    _method(
        "training_losses",
        lambda d, g: _training("tensor", g, d, "pixels"),
        "pixels weight noise",
        "weight",
        suffix=", learned_range",
        variance_type="learned_range",
        loss_type="rescaled_mse",
    ),
    _method(
        "training_losses",
        lambda d, g: _training(KEY, g, d, "pixels"),
        "pixels weight",
        "weight",
        suffix=", kl, key",
        loss_type="kl",
    ),
    _method(
        "p_mean_variance",
        lambda d, g: d.p_mean_variance(model(g), g["x"], g["t"]),
        "x weight",
        "x weight",
    ),
    _method(
        "p_mean_variance",
        lambda d, g: d.p_mean_variance(model(g, learned=True), g["x"], g["t"], False),
        "x weight",
        "x weight",
        suffix=", learned_range",
        variance_type="learned_range",
    ),
    _method(
        "p_sample",
        lambda d, g: d.p_sample(model(g), g["x"], g["t"], noise=g["noise"]),
        "x weight noise",
        "x weight",
    ),
    _method(
        "p_sample",
        lambda d, g: d.p_sample(model(g), g["x"], g["t"], noise=KEY),
        "x weight",
        "x weight",
        suffix=", key",
    ),
    _method(
        "p_sample",
        lambda d, g: d.p_sample(model(g, learned=True), g["x"], g["t"], noise=KEY),
        "x weight",
        "",  # the variance is not differentiated here
        suffix=", learned_range, key",
        variance_type="learned_range",
    ),
    _method(
        "ddim_sample",
        lambda d, g: d.ddim_sample(model(g), g["x"], g["t"]),
        "x weight",
        "x weight",
    ),
    _method(
        "ddim_sample",
        lambda d, g: d.ddim_sample(model(g), g["x"], g["t"], eta=0.5, noise=KEY),
        "x weight",
        "x weight",
        suffix=", key",
    ),
    _method(
        "ddim_reverse_sample",
        lambda d, g: d.ddim_reverse_sample(model(g), g["x"], g["t"]),
        "x weight",
        "x weight",
    ),
    _method(
        "p_sample_loop",
        lambda d, g: d.p_sample_loop(
            model(g), g["x"].shape, noise=g["x"], step_noise=KEY, num_steps=4
        ),
        "x weight",
        "",
        timesteps=False,
        suffix=", key",
    ),
    _method(
        "ddim_sample_loop",
        lambda d, g: d.ddim_sample_loop(model(g), g["x"].shape, noise=g["x"], num_steps=4),
        "x weight",
        "",
        timesteps=False,
    ),
    _method(
        "ddim_reverse_sample_loop",
        lambda d, g: d.ddim_reverse_sample_loop(model(g), g["x"], num_steps=4),
        "x weight",
        "",
        timesteps=False,
    ),
    _method("respace", lambda d, g: d.respace(5).q_sample(g["x"], 2, KEY), "x", "x",
            timesteps=False, suffix=", key"),
    _method("prior_bpd", lambda d, g: d.prior_bpd(g["x"]), "x", "x", timesteps=False),
    _method(
        "vb_terms_bpd",
        lambda d, g: d.vb_terms_bpd(model(g), g["pixels"], g["x_t"], g["t"]),
        "pixels x_t weight",
        "weight",
    ),
    _method(
        "calc_bpd_loop",
        lambda d, g: d.calc_bpd_loop(model(g), g["pixels"], noise=KEY),
        "pixels weight",
        "",
        timesteps=False,
        suffix=", key",
    ),
]  # fmt: skip


def levels() -> NoiseLevels:
    schedule = NoiseSchedule.from_betas(make_betas("linear", STEPS, scale_to_1000=True))
    return NoiseLevels.from_schedule(schedule, [20, 12, 5, 1])


def table_case(
    name: str,
    call: Callable[[Any, Given], Any],
    tensors: str,
    differentiable: str,
    table: Callable[[], Any] = nothing,
    *,
    others: Callable[[int], Given] = lambda batch: {},
    suffix: str = "",
) -> Case:
    return Case(
        f"{name}{suffix}",
        name,
        "solver",
        call,
        tuple(tensors.split()),
        tuple(differentiable.split()),
        others,
        table,
    )


def each_row(batch: int) -> Given:
    return {"i": torch.arange(batch) % 3}


SOLVER_CASES: list[Case] = [
    table_case(
        "SolverTable.step",
        lambda table, g: table.step(1, g["x"], g["m"], (g["h"],)),
        "x m h",
        "x m h",
        lambda: solvers.dpmpp_2m_table(levels()),
    ),
    table_case(
        "SolverTable.step",
        lambda table, g: table.step(g["i"], g["x"], g["m"], noise=KEY),
        "x m",
        "x m",
        lambda: solvers.ddpm_table(levels(), clip_range=1.0),
        others=each_row,
        suffix=", rows, key",
    ),
    table_case(
        "SolverTable.denoised",
        lambda table, g: table.denoised(2, g["x"], g["m"]),
        "x m",
        "x m",
        lambda: solvers.euler_table(SIGMAS),
    ),
    table_case(
        "sample",
        lambda table, g: sample(model(g), g["x"], table, noise=KEY),
        "x weight",
        "",
        lambda: solvers.ddpm_table(levels(), clip_range=1.0),
        suffix=", ddpm, key",
    ),
    table_case(
        "sample",
        lambda table, g: sample(model(g), g["x"], table, guidance_scale=2.0, uncond_kwargs={}),
        "x weight",
        "",
        lambda: solvers.dpmpp_2m_table(levels()),
        suffix=", dpmpp_2m, guided",
    ),
    table_case(
        "sample",
        lambda table, g: sample(model(g), g["x"], table, noise=KEY, dynamic_thresholding_ratio=0.9),
        "x weight",
        "",
        lambda: solvers.heun_table(SIGMAS, s_churn=2.0),
        suffix=", churn, threshold, key",
    ),
    table_case(
        "sampling.sample_dpmpp_2m",
        lambda _, g: sampling.sample_dpmpp_2m(model(g), g["x"], LEVELS, disable=True),
        "x weight",
        "",
    ),
    table_case(
        "sampling.sample_euler_ancestral",
        lambda _, g: sampling.sample_euler_ancestral(
            model(g), g["x"], LEVELS, disable=True,
            noise_sampler=lambda *ends: g["x"] * 0.5,
        ),
        "x weight",
        "",
    ),
]  # fmt: skip


def _bound(given: Given, **options: Any) -> Any:
    found = vdm_bound(model(given), given["pixels"], t=given["t"], **options)
    return found.total_bpd, found.prior_nats, found.diffusion_nats, found.reconstruction_nats


def _bits(found: BitsPerDim) -> Any:
    total = torch.tensor([found.total, found.prior], dtype=torch.float64, device="cpu")
    return total, found.terms


def times(batch: int) -> Given:
    return {"t": torch.linspace(0.05, 0.95, batch, dtype=torch.float64)}


LIKELIHOOD_CASES: list[Case] = [
    Case(
        "vdm_bound, key",
        "likelihood.vdm_bound",
        "likelihood",
        lambda _, g: _bound(g, gamma_min=-8.0, gamma_max=3.0, noise=KEY),
        ("pixels", "weight"),
        ("weight",),
        times,
    ),
    Case(
        "vdm_bound, steps, gamma",
        "likelihood.vdm_bound",
        "likelihood",
        lambda _, g: _bound(
            g, gamma=lambda t: 11 * t**2 + t - 8, num_timesteps=7, noise=g["noise"]
        ),
        ("pixels", "weight", "noise"),
        ("weight",),
        times,
    ),
    Case(
        "bits_per_dim, key",
        "bits_per_dim",
        "likelihood",
        lambda d, g: _bits(bits_per_dim(d, model(g), g["pixels"], timesteps=3, noise=KEY)),
        ("pixels", "weight"),
        subject=diffusion,
    ),
]


METHOD_CASES: list[Case] = [*DIFFUSION_CASES, *SOLVER_CASES, *LIKELIHOOD_CASES, *VAE_CASES]
