"""Checks of models, losses and loops on DTensors: the unsharded result is the truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

import diffcore
from diffcore import GaussianDiffusion, PhiloxNoise, losses, ops, solvers, vae
from diffcore.guidance import RescaledCFG
from diffcore.likelihood import vdm_bound
from diffcore.sigmas import get_sigmas_karras
from support.dtensors import (
    PLACEMENTS,
    backward,
    distribute,
    distributed,
    expect_close,
    expect_same,
    mesh_of,
    rows_of,
)
from support.networks import LEVELS
from support.ranks import Cells
from support.toys import BETAS

SHAPE = (5, 4, 6, 4)
KEY = PhiloxNoise(11, sample_ids=40, stream=2)
T = torch.tensor([0, 3, 19, 7, 0])
PIXELS = (torch.arange(480).remainder(256) / 127.5 - 1).reshape(SHAPE)

Call = Callable[..., Any]
"""A function of (samples, another tensor of their shape, t) that returns tensors."""


def network(x: Tensor, t: Tensor, scale: float = 1.0) -> Tensor:
    """A model of exact operations; it takes no mixture of plain tensors and DTensors."""
    return x * (0.5 * scale) + 0.25 * x * (t.to(x.dtype) / 64).reshape(-1, 1, 1, 1)


def of_two_halves(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([network(x, t), 0.125 * x], dim=1)


def of_two_batches(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([network(x, t, 0.5), network(x, t)], dim=0)


def compare(name: str, found: Any, wanted: Any) -> None:
    """Tensors in tuples, dicts and lists; sums that cross ranks are close, all else is equal."""
    if isinstance(wanted, Tensor):
        expect_same(name, found, wanted)
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            compare(f"{name} {key}", found[key], value)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for i, value in enumerate(wanted):
            compare(f"{name} {i}", found[i], value)
    else:
        assert found == wanted, f"{name}: {found}, wanted {wanted}"


def tensors_of(result: Any) -> tuple[Any, ...]:
    """The tensors of a result."""
    if isinstance(result, Tensor):
        return (result,)
    values = result.values() if isinstance(result, dict) else result
    return tuple(y for v in values for y in tensors_of(v)) if hasattr(values, "__iter__") else ()


def _cell(call: Call, *, gradient: bool = False) -> Callable[[int], None]:
    """The call for plain t, for a DTensor t and for an int, against the unsharded call."""

    def cell(world: int) -> None:
        mesh = mesh_of(world)
        other = torch.randn(SHAPE).mul(0.3).requires_grad_(gradient)
        wanted: dict[Any, Any] = {}
        for t in (T, 3):
            result = call(PIXELS, other, t)
            backward(tensors_of(result))
            wanted[id(t)], other.grad = (result, other.grad), None
        for placements in PLACEMENTS[world]:
            x = distribute(PIXELS, mesh, placements)
            times = [(distribute(T, mesh, rows_of(placements)), T), (T, T), (3, 3)]
            for t, like in times if world == 2 else times[:1]:
                y = distributed(other, mesh, placements)
                result, grad = wanted[id(like)]
                found = call(x, y, t)
                compare(str(placements), found, result)
                backward(tensors_of(found))
                if gradient:
                    expect_same(f"gradient {placements}", y.grad, grad)

    return cell


# ---- GaussianDiffusion ---------------------------------------------------------------------------

_PLAIN = GaussianDiffusion(BETAS)
_RANGE = GaussianDiffusion(BETAS, "v_prediction", "learned_range", loss_type="rescaled_mse")
_KL = GaussianDiffusion(BETAS, "sample", "learned", loss_type="kl")
_SPACED = _PLAIN.respace([0, 1, 2, 3, 5, 7, 9, *range(10, 20)])  # T has to be below its length
_TEN = torch.linspace(0.5, 2, 20)


def _spaced(x: Tensor, t: Any) -> Any:
    t = t.clamp(max=16) if isinstance(t, Tensor) else t
    return _SPACED.p_sample(network, x, t, noise=KEY)


def _loss(d: GaussianDiffusion, learned: bool, **options: Any) -> Call:
    """The losses, of a model whose output depends on the other tensor."""

    def call(x: Tensor, y: Tensor, t: Any) -> Any:
        def model(x_t: Tensor, t: Tensor) -> Tensor:
            m = network(x_t, t) + y
            return torch.cat([m, 0.125 * m], dim=1) if learned else m

        return d.training_losses(model, x, t, noise=KEY, **options)

    return call


_DIFFUSION: dict[str, Call] = {
    "q_mean_variance": lambda x, y, t: _PLAIN.q_mean_variance(x, t),
    "q_sample": lambda x, y, t: (_PLAIN.q_sample(x, t, KEY), _PLAIN.q_sample(x, t, y)),
    "q_sample_jump": lambda x, y, t: (
        _PLAIN.q_sample_jump(x, t, 19, KEY),
        _PLAIN.q_sample_jump(x, 3, 9, y),
    ),
    "q_posterior_mean_variance": lambda x, y, t: _PLAIN.q_posterior_mean_variance(x, y, t),
    "p_mean_variance": lambda x, y, t: _PLAIN.p_mean_variance(network, x, t),
    "p_mean_variance learned": lambda x, y, t: _RANGE.p_mean_variance(of_two_halves, x, t),
    "p_sample": lambda x, y, t: _PLAIN.p_sample(network, x, t, noise=KEY),
    "p_sample learned": lambda x, y, t: _RANGE.p_sample(of_two_halves, x, t, noise=y),
    "p_sample cond_fn": lambda x, y, t: _RANGE.p_sample(
        of_two_halves, x, t, cond_fn=lambda x, t: -x, noise=KEY
    ),
    "p_sample respaced": lambda x, y, t: _spaced(x, t),
    "ddim_sample": lambda x, y, t: _PLAIN.ddim_sample(network, x, t, eta=0.5, noise=KEY),
    "ddim_reverse_sample": lambda x, y, t: _PLAIN.ddim_reverse_sample(network, x, t),
    "vb_terms_bpd": lambda x, y, t: _KL.vb_terms_bpd(of_two_halves, x, y, t),
    "prior_bpd": lambda x, y, t: _PLAIN.prior_bpd(x),
}
_LOSSES: dict[str, Call] = {
    "training_losses": _loss(_PLAIN, False, weights=_TEN),
    "training_losses learned range": _loss(_RANGE, True),
    "training_losses kl": _loss(_KL, True),
}


def _calc_bpd_loop(world: int) -> None:
    """The complete bound, with its noise from a key."""
    short = GaussianDiffusion(BETAS[:4])
    wanted = short.calc_bpd_loop(network, PIXELS, noise=KEY)
    for placements in PLACEMENTS[world]:
        x = distribute(PIXELS, mesh_of(world), placements)
        found = short.calc_bpd_loop(network, x, noise=KEY)
        for name, w in wanted.items():
            expect_close(name, found[name].full_tensor(), w)


# ---- sampling ------------------------------------------------------------------------------------

_TABLES = {
    "ddpm": solvers.ddpm_table(LEVELS, clip_range=1.0),
    "dpmpp 3m sde": solvers.dpmpp_3m_sde_table(LEVELS),
    "heun with churn": solvers.heun_table(get_sigmas_karras(6, 0.1, 10.0), s_churn=2.0),
    "learned": solvers.ddpm_table(LEVELS, variance_type="learned"),
}


def _loops(world: int) -> None:
    """`sample` with every kind of table, guidance, dynamic thresholds, and callbacks."""
    x = torch.randn(SHAPE)
    states: list[dict[str, Any]] = []
    options: dict[str, dict[str, Any]] = {
        "ddpm": {"callback": states.append, "noise": KEY},
        "dpmpp 3m sde": {"guidance_scale": 2.0, "uncond_kwargs": {"scale": 0.5}, "noise": KEY},
        "heun with churn": {"noise": torch.randn(12, *SHAPE)},
        "learned": {"noise": lambda i, x: KEY.at(i)},
    }
    models = {"learned": of_two_halves}
    for name, table in _TABLES.items():
        model = models.get(name, network)
        states.clear()
        wanted = diffcore.sample(model, x, table, **options[name])
        before = list(states)
        for placements in PLACEMENTS[world][-2:]:
            states.clear()
            there = distribute(x, mesh_of(world), placements)
            compare(name, diffcore.sample(model, there, table, **options[name]), wanted)
            compare(name, states, before)


def _guided_in_one_call(world: int) -> None:
    """A model that returns both predictions in one batch, and thresholds of complete samples."""
    table, x = _TABLES["dpmpp 3m sde"], torch.randn(SHAPE)
    options: dict[str, Any] = {"guidance_scale": torch.linspace(1, 2, 5), "noise": KEY}
    options["dynamic_thresholding_ratio"] = 0.9
    by_sums = {"guidance": RescaledCFG(1.5, interval=(0.0, 0.7)), "noise": KEY}
    for given in (options, by_sums):
        wanted = diffcore.sample(of_two_batches, x, table, **given)
        for placements in PLACEMENTS[world]:
            there = distribute(x, mesh_of(world), placements)
            compare("guided", diffcore.sample(of_two_batches, there, table, **given), wanted)


def _sample_loops_of_a_diffusion(world: int) -> None:
    """p_sample_loop and ddim_sample_loop from an x_T that is a DTensor."""
    x = torch.randn(SHAPE)
    options: dict[str, Any] = {"num_steps": 4, "step_noise": KEY}
    for loop in (_PLAIN.p_sample_loop, _PLAIN.ddim_sample_loop):
        wanted = loop(network, SHAPE, noise=x, **options)
        for placements in PLACEMENTS[world]:
            there = distribute(x, mesh_of(world), placements)
            compare("loop", loop(network, SHAPE, noise=there, **options), wanted)


def _densities_of_a_table(world: int) -> None:
    """Log-probabilities with history and guidance, KLs, and those that a loop returns."""
    table, mesh = _TABLES["dpmpp 3m sde"], mesh_of(world)
    x, m, u, *h = torch.randn(5, *SHAPE)
    guided = {"guidance_scale": 2.0}

    def densities(x: Tensor, m: Tensor, u: Tensor, *h: Tensor) -> tuple[Tensor, ...]:
        uncond = {"model_output_uncond": u, **guided}
        loop = diffcore.sample(network, x, table, noise=KEY, return_log_prob=True)
        return (
            table.log_prob(4, x, m, u, h, reduction="mean"),
            table.log_prob(4, x, m, u, h, **uncond),
            table.step_kl(4, x, m, u),
            table.step_kl(4, x, m, u, reference_output_uncond=m, **uncond),
            loop.log_probs[:-1],
        )

    wanted = densities(x, m, u, *h)
    for placements in PLACEMENTS[world]:
        found = densities(*(distribute(y, mesh, placements) for y in (x, m, u, *h)))
        for y, w in zip(found, wanted, strict=True):
            expect_close("density", y.full_tensor(), w)


def _rows_of_a_table(world: int) -> None:
    """`SolverTable.step` at an int, at a counter and at a row for each sample."""
    table, mesh = _TABLES["dpmpp 3m sde"], mesh_of(world)
    x, m, *h = torch.randn(4, *SHAPE)
    rows = torch.tensor([2, 3, 4, 5, 6])
    for i in (4, torch.tensor(4), rows):
        wanted = table.step(i, x, m, h, noise=KEY)
        for placements in PLACEMENTS[world]:
            there = [distribute(y, mesh, placements) for y in (x, m, *h)]
            compare("row", table.step(i, *there[:2], there[2:], noise=KEY), wanted)
            if i is rows:
                at = distribute(rows, mesh, rows_of(placements))
                compare("rows", table.step(at, *there[:2], there[2:], noise=KEY), wanted)


# ---- the VAE, weights, the bound in continuous time ----------------------------------------------


def _posterior(x: Tensor, y: Tensor, t: Any) -> Any:
    p = vae.DiagonalGaussianDistribution(x)
    q = vae.DiagonalGaussianDistribution(y)
    z, kl = p.sample_kl(noise=KEY)
    sure = vae.DiagonalGaussianDistribution(x, deterministic=True)
    return [z, kl, p.sample(noise=KEY), p.kl(q), p.nll(z.detach()), p.std, sure.kl(), sure.sample()]


def _decoder(x: Tensor, y: Tensor, t: Any) -> Any:
    kl = ops.standard_normal_kl(x, y, reduction="sample")
    return [
        vae.vae_loss(x, y, kl),
        vae.elbo(x, y, y, x, decoder_std=0.5),
        vae.elbo_terms(x, y, kl)["bpd"],
        vae.elbo_terms(x, y, kl, decoder_std=torch.tensor(0.7))["elbo"],
    ]


def _importance(x: Tensor, y: Tensor, t: Any) -> Any:
    twice = torch.stack([x, y])
    return vae.importance_weighted_bound(x, twice, twice, y, x)


def _close_cell(call: Call) -> Callable[[int], None]:
    """Values that torch's own operations computed from sums which cross ranks."""

    def cell(world: int) -> None:
        mesh, other = mesh_of(world), torch.randn(SHAPE).mul(0.3)
        wanted = tensors_of(call(PIXELS, other, T))
        for placements in PLACEMENTS[world]:
            x, y = (distribute(v, mesh, placements) for v in (PIXELS, other))
            found = tensors_of(call(x, y, T))
            for f, w in zip(found, wanted, strict=True):
                expect_close(str(placements), f.full_tensor(), w)

    return cell


def _weights(world: int) -> None:
    """Loss weights of an SNR that is a DTensor."""
    snr = torch.logspace(-2, 2, 20, dtype=torch.float64)
    there = distribute(snr, mesh_of(world), (Replicate(),) * mesh_of(world).ndim)
    for weights in (losses.min_snr_weights, losses.edm_weights):
        compare("weights", weights(there), weights(snr))


def _vdm(x: Tensor, y: Tensor, t: Any) -> Any:
    found = vdm_bound(network, x, gamma_min=-6.0, gamma_max=4.0, noise=KEY, t=t / 20)
    return [found.prior_nats, found.diffusion_nats, found.reconstruction_nats]


def _vdm_own_times(world: int) -> None:
    """The times that `vdm_bound` draws itself are the same on all ranks, and so is the noise."""
    torch.manual_seed(3)
    wanted = vdm_bound(network, PIXELS, gamma_min=-6.0, gamma_max=4.0)
    for placements in PLACEMENTS[world]:
        torch.manual_seed(3 + torch.distributed.get_rank())
        x = distribute(PIXELS, mesh_of(world), placements)
        found = vdm_bound(network, x, gamma_min=-6.0, gamma_max=4.0)
        assert torch.equal(found.t, wanted.t)
        expect_close("diffusion", found.diffusion_nats.full_tensor(), wanted.diffusion_nats)


def _wrong_values(world: int) -> None:
    """Values are checked on the rank that has them."""
    placements = (Shard(0), *(Replicate(),) * (mesh_of(world).ndim - 1))
    x = distribute(PIXELS + 0.001, mesh_of(world), placements)
    with pytest.raises(ValueError, match="x_start must be pixels"):
        _PLAIN.vb_terms_bpd(network, x, x, 3)
    with pytest.raises(ValueError, match=r"t must be in 0 .. 19, got values from 20 to 20"):
        _PLAIN.p_sample(network, x, torch.full((5,), 20))


def _samplers_and_bits(world: int) -> None:
    """k-diffusion's samplers, whose seed is that of the first rank; `bits_per_dim` refuses."""
    x, sigmas = torch.randn(SHAPE), get_sigmas_karras(4, 0.1, 9.0)
    torch.manual_seed(4)
    wanted = diffcore.sampling.sample_euler_ancestral(network, x, sigmas)
    for placements in PLACEMENTS[world]:
        torch.manual_seed(4 + torch.distributed.get_rank())
        there = distribute(x, mesh_of(world), placements)
        found = diffcore.sampling.sample_euler_ancestral(network, there, sigmas)
        compare("euler ancestral", found, wanted)
    with pytest.raises(TypeError, match="data must be plain tensors, got DTensor"):
        diffcore.bits_per_dim(_PLAIN, network, distribute(PIXELS, mesh_of(world), placements))


def cells(world: int) -> Cells:
    """The checks for this many ranks, by name."""
    checks: tuple[Callable[[int], None], ...] = (
        *(_calc_bpd_loop, _loops, _guided_in_one_call, _sample_loops_of_a_diffusion),
        *(_rows_of_a_table, _densities_of_a_table, _weights, _vdm_own_times, _wrong_values),
        _samplers_and_bits,
    )
    return {
        **{name: _cell(call) for name, call in _DIFFUSION.items()},
        **{name: _cell(call, gradient=True) for name, call in _LOSSES.items()},
        "posterior": _cell(_posterior),
        "decoder": _close_cell(_decoder),
        "importance weighted bound": _close_cell(_importance),
        "vdm_bound": _close_cell(_vdm),
        **{check.__name__.strip("_").replace("_", " "): check for check in checks},
    }
