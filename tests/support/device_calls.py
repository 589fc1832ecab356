"""Loops, levels and other calls of several ops, as functions of samples on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import diffcore
from diffcore import (
    FlowMatching,
    GaussianDiffusion,
    PhiloxNoise,
    guidance,
    losses,
    sampling,
    solvers,
    spacings,
    vae,
)
from diffcore import consistency as cm
from diffcore import sigmas as levels_of
from diffcore import timesteps as densities
from diffcore.likelihood import bits_per_dim, ode_log_likelihood, vdm_bound
from diffcore.noise import offset_noise, pyramid_noise
from diffcore.schedules.logsnr import LOGSNR_SCHEDULES
from support.solver_list import ALL, CHURNED, geometric, levels_on

KEY = PhiloxNoise(7)
SHAPE = (3, 2, 5)
RULES = {
    "CFG++": guidance.CFGPlusPlus(0.6),
    "rescaled": guidance.RescaledCFG(4.0),
    "zero star": guidance.CFGZeroStar(4.0),
    "APG": guidance.APG(4.0, norm_threshold=2.0, momentum=-0.5),
    "TCFG": guidance.TCFG(4.0),
    "norm preserving": guidance.NormPreservingCFG(4.0),
}
SAMPLERS = {
    "euler": {},
    "heun": {"s_churn": 4.0},
    "lms": {},
    "dpm_2_ancestral": {"noise_sampler": KEY},
    "dpmpp_2m": {},
    "dpmpp_sde": {"noise_sampler": KEY},
    "dpmpp_3m_sde": {"noise_sampler": KEY},
}


def model(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
    time = t.to(x).reshape(*t.shape, *[1] * (x.ndim - t.ndim))
    return torch.tanh(0.5 * x + 0.1 * torch.cos(time) + shift)


def _learned(x: Tensor, t: Tensor) -> Tensor:
    """A model that predicts its variance too."""
    return torch.cat([model(x, t), torch.tanh(x)], 1)


def _levels(x: Tensor) -> Tensor:
    return torch.tensor([0.2, 0.5, 0.9]).to(x.device)


def _pixels(x: Tensor, bits: int = 8) -> Tensor:
    most = 2**bits - 1
    pixels = torch.randint(most + 1, x.shape, generator=torch.Generator().manual_seed(5))
    return (pixels / (most / 2) - 1).to(x.dtype).to(x.device)


# ---- sampling -----------------------------------------------------------------------------------


def _sample(make: Callable[..., Any], path: str, x: Tensor, **options: Any) -> Any:
    levels = levels_on(path, geometric(6, 0.1, 8.0, to_zero=True))
    table = make(levels, prediction_type="sample")
    if options.pop("brownian", False):
        options["noise"] = sampling.BrownianNoise(KEY).for_table(table)
    options = {"noise": KEY, **options}
    return diffcore.sample(model, x * table.init_noise_sigma, table, **options)


def _known(x: Tensor) -> Tensor:
    mask = (torch.arange(5) < 2).to(x.dtype).to(x.device)
    kept = {"mask": mask, "known": x.tanh(), "known_noise": KEY}
    return _sample(solvers.ddpm_table, "vp", x, **kept)


def _corrected(x: Tensor) -> Tensor:
    table = solvers.euler_table(levels_on("vp", geometric(6, 0.1, 8.0, to_zero=True)))
    corrector = sampling.LangevinCorrector(model, table, noise=KEY)
    return diffcore.sample(model, x, table, callback=corrector)


def _scored(x: Tensor) -> tuple[Tensor, ...]:
    found = _sample(solvers.ddpm_table, "vp", x, return_log_prob=True)
    return found.log_probs, found.samples


def _slope(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    _sample(solvers.ddim_table, "vp", x, differentiable=True).sum().backward()
    assert x.grad is not None
    return x.grad


def _k_diffusion(name: str, x: Tensor) -> Tensor:
    sigmas = levels_of.get_sigmas_karras(6, 0.1, 8.0, device=x.device)
    sampler = getattr(sampling, f"sample_{name}")
    torch.manual_seed(0)
    return sampler(model, 8 * x, sigmas, disable=True, **SAMPLERS[name])


def _adaptive(x: Tensor) -> tuple[Tensor, Tensor]:
    seen: list[Tensor] = []
    keep = {"callback": lambda state: seen.append(state["sigma"]), "disable": True}
    # Few and large steps: rounding decides of none whether it is taken.
    found = sampling.sample_dpm_adaptive(model, 8 * x, 0.1, 8.0, rtol=0.5, atol=0.5, **keep)
    return found, torch.stack(seen)


_GUIDED = {"uncond_kwargs": {"shift": 0.3}}
SAMPLING: dict[str, Callable[[Tensor], Any]] = {
    **{f"sample, {name}": partial(_sample, make, "flow") for name, make in ALL.items()},
    **{f"sample, {name}": partial(_sample, make, "ve") for name, make in CHURNED.items()},
    **{
        f"sample, {name}": partial(
            _sample,
            solvers.cfg_pp_table if name == "CFG++" else solvers.dpmpp_table,
            "vp",
            guidance=rule,
            **_GUIDED,
        )
        for name, rule in RULES.items()
    },
    "sample, threshold": partial(
        _sample, solvers.ddim_table, "vp", dynamic_thresholding_ratio=0.8, sample_max_value=2.0
    ),
    "sample, known part": _known,
    "sample, cond_fn": partial(_sample, solvers.ddim_table, "vp", cond_fn=lambda x, t: -0.1 * x),
    "sample, Langevin corrector": _corrected,
    "sample, log-probability": _scored,
    "sample, Brownian noise": lambda x: _sample(solvers.dpmpp_2m_sde_table, "ve", x, brownian=True),
    "sample, differentiable": _slope,
    "sample, levels of groups": lambda x: _sample(
        solvers.euler_table, "flow", x, schedule=sampling.pyramid_schedule(6, 2), group_dim=1
    ),
    **{f"sample_{name}": partial(_k_diffusion, name) for name in SAMPLERS},
    "sample_dpm_adaptive": _adaptive,
}


# ---- diffusions and flows -----------------------------------------------------------------------


def _diffusion(**options: Any) -> GaussianDiffusion:
    return GaussianDiffusion(diffcore.make_betas("linear", 25, scale_to_1000=True), **options)


def _cosine() -> diffcore.ContinuousTimeGaussianDiffusion:
    return diffcore.ContinuousTimeGaussianDiffusion("cosine")


def _where(x: Tensor) -> dict[str, Any]:
    return {"dtype": x.dtype, "device": x.device}


def _consistency(x: Tensor) -> tuple[Tensor, ...]:
    pair = cm.draw_pair(cm.ladder(20), 3, KEY, device=x.device)
    network = cm.ConsistencyModel()
    loss = network.training_losses(model, model, x, pair, KEY)
    return (*pair, loss, network.denoise(model, x, pair[1]))


PROCESSES: dict[str, Callable[[Tensor], Any]] = {
    "p_sample_loop": lambda x: _diffusion().p_sample_loop(model, x.shape, noise=KEY, **_where(x)),
    "p_sample_loop, learned": lambda x: _diffusion(variance_type="learned_range").p_sample_loop(
        _learned, x.shape, noise=KEY, **_where(x)
    ),
    "ddim_sample_loop": lambda x: _diffusion().ddim_sample_loop(
        model, x.shape, num_steps=5, noise=KEY, **_where(x)
    ),
    "FlowMatching.sample, from x": lambda x: FlowMatching(shift=3.0).sample(model, x, num_steps=5),
    "EDM.sample, from x": lambda x: diffcore.EDM().sample(model, x, num_steps=5),
    "continuous sample, from x": lambda x: _cosine().sample(model, x, num_steps=5),
    "training_losses, weights": lambda x: _diffusion().training_losses(
        model,
        x,
        torch.arange(3).to(x.device),
        noise=KEY,
        weights=torch.linspace(1, 2, 25, dtype=torch.float64),
    )["loss"],
    "consistency": _consistency,
    "KEY.timesteps": lambda x: KEY.timesteps(1000, 3, device=x.device),
    "KEY.uniform": lambda x: KEY.uniform((3, 4), -1.0, 2.0, device=x.device),
    "EDM.sample_sigmas, of 3": lambda x: diffcore.EDM().sample_sigmas(3, KEY, device=x.device),
    "FlowMatching.sample_timesteps, from data": lambda x: FlowMatching(
        noise_at=0, target="data_minus_noise"
    ).sample_timesteps(3, KEY, device=x.device),
    **{
        f"timesteps.draw, {name}": lambda x, name=name: densities.draw(
            name, 3, KEY, stratified=True, shift=3.0, device=x.device
        )
        for name in densities.DENSITIES
    },
    **{
        f"density, {name}": lambda x, density=density: density(_levels(x))
        for name, density in {**densities.DENSITIES, "stratified": densities.stratified}.items()
    },
    **{
        f"log-SNR, {name}": lambda x, logsnr=logsnr: logsnr(_levels(x))
        for name, logsnr in LOGSNR_SCHEDULES.items()
    },
    "ContinuousTimeGaussianDiffusion.logsnr": lambda x: _cosine().logsnr(_levels(x)),
    # 1 - t is a difference that float32 would not keep.
    "log-SNR near the end": lambda x: _cosine().logsnr(1 - _levels(x) / 1024),
    "q_sample, cosine": lambda x: _cosine().q_sample(x, _levels(x), KEY),
    "offset_noise": lambda x: offset_noise(KEY, x.shape, **_where(x)),
    "pyramid_noise": lambda x: pyramid_noise(KEY, (3, 2, 8, 8), **_where(x)),
    "preconditioning": lambda x: diffcore.EDM().preconditioning(_levels(x)),
    "flow_weights": lambda x: losses.flow_weights(_levels(x), "cosmap"),
    "p2_weights": lambda x: losses.p2_weights(_levels(x)),
    "shift_sigmas": lambda x: spacings.shift_sigmas(_levels(x), 3.0),
    "get_sigmas_karras": lambda x: levels_of.get_sigmas_karras(6, 0.1, 8.0, device=x.device),
    "get_sigmas_vp": lambda x: levels_of.get_sigmas_vp(6, device=x.device),
    "get_sigmas_ays": lambda x: levels_of.get_sigmas_ays(6, device=x.device),
    "SolverTable.to": lambda x: (
        solvers.ddpm_table(levels_on("vp", geometric(6, 0.1, 8.0))).to(x.device).coefficients
    ),
}


# ---- likelihood and VAE -------------------------------------------------------------------------


def _flow_likelihood(x: Tensor, **options: Any) -> Tensor:
    table = solvers.euler_table(levels_on("flow", geometric(8, 0.05, 20.0).flip(0)))
    return ode_log_likelihood(model, x, table, **options).log_likelihood


def _bits(x: Tensor, bits: int) -> Tensor:
    data = [_pixels(x, bits)]
    found = bits_per_dim(_diffusion(), model, data, noise=KEY, bits=bits)
    return torch.tensor([found.total, found.standard_error]).to(x.device)


def _vdm(x: Tensor, bits: int, **options: Any) -> Tensor:
    return vdm_bound(
        model, _pixels(x, bits), t=_levels(x), noise=KEY, bits=bits, **options
    ).total_nats


def _report(x: Tensor) -> tuple[Tensor, ...]:
    found = vae.latent_report(x, 0.1 * x)
    return found.kl, found.mean, found.variance


LIKELIHOOD: dict[str, Callable[[Tensor], Any]] = {
    "ode_log_likelihood, exact": _flow_likelihood,
    "ode_log_likelihood, hutchinson": lambda x: _flow_likelihood(
        x, divergence="hutchinson", num_samples=2, noise=KEY, dof=_levels(x) * 10
    ),
    "bits_per_dim, 16 bits": lambda x: _bits(x.float(), 16),
    "vdm_bound, pixels": lambda x: _vdm(x, 8, gamma_min=-13.3, gamma_max=5.0),
    "vdm_bound, 5 bits": lambda x: _vdm(x, 5, gamma_min=-13.3, gamma_max=5.0),
    "vdm_bound, gamma": lambda x: _vdm(x, 8, gamma=lambda t: 9 * t * t - 7 + t),
    "discretized log-likelihood, 5 bits": lambda x: diffcore.discretized_gaussian_log_likelihood(
        _pixels(x, 5), means=x.tanh(), log_scales=x - 3, bits=5
    ),
    "elbo": lambda x: vae.elbo(x, 0.9 * x, x, 0.1 * x),
    "latent_report of x": _report,
}
CALLS = SAMPLING | PROCESSES | LIKELIHOOD
