"""ComfyUI's samplers under their own names: signatures, formulas, noise and callbacks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, sampling
from diffcore.sampling import BrownianNoise, comfy
from diffcore.sigmas import get_sigmas_karras
from support import comfy_rules as rules
from support.bounds import assert_same_bits

SIGMAS = get_sigmas_karras(7, 0.05, 14.6)
SIGNATURES = {  # after (model, x, sigmas, extra_args=None, callback=None, disable=None
    "res_multistep": "s_noise=1.0, noise_sampler=None",
    "res_multistep_ancestral": "eta=1.0, s_noise=1.0, noise_sampler=None",
    "gradient_estimation": "ge_gamma=2.0",
    "er_sde": "s_noise=1.0, noise_sampler=None, noise_scaler=None, max_stage=3",
    "seeds_2": "eta=1.0, s_noise=1.0, noise_sampler=None, r=0.5, solver_type='phi_1'",
    "seeds_3": f"eta=1.0, s_noise=1.0, noise_sampler=None, r_1={1 / 3}, r_2={2 / 3}",
}
RULES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "res_multistep": (rules.res_multistep, {}, {"s_noise": 2.0}),
    "res_multistep_ancestral": (rules.res_multistep, {"eta": 0.8, "s_noise": 1.1}, {}),
    "gradient_estimation": (rules.gradient_estimation, {"gamma": 1.7}, {"ge_gamma": 1.7}),
    "er_sde": (rules.er_sde, {"order": 2, "s_noise": 1.1}, {"max_stage": 2, "s_noise": 1.1}),
    "seeds_2": (rules.seeds_2, {"eta": 0.5, "r": 0.4, "solver_type": "phi_2"}, {}),
    "seeds_3": (rules.seeds_3, {"eta": 0.5, "r_1": 0.2, "r_2": 0.7}, {}),
}


def denoiser(x: Tensor, sigma: Any) -> Tensor:
    sigma = sigma if isinstance(sigma, float) else sigma.reshape(-1, 1)
    return torch.tanh(x / (1 + sigma)) + 0.1 * torch.cos(3 * x / (1 + sigma))


def test_there_are_these() -> None:
    there_are = {n.removeprefix("sample_") for n in vars(comfy) if n.startswith("sample_")}
    assert there_are == SIGNATURES.keys() == RULES.keys()


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_comfyui(name: str) -> None:
    parameters = inspect.signature(getattr(sampling, f"sample_{name}")).parameters.values()
    ours = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
    first = "model, x, sigmas, extra_args=None, callback=None, disable=None"
    assert ours == f"{first}, {SIGNATURES[name]}"


@pytest.mark.parametrize("name", RULES)
def test_samplers_are_the_published_rules(name: str) -> None:
    rule, of_rule, given = RULES[name]
    sampler = getattr(sampling, f"sample_{name}")
    x = 14.6 * torch.randn(3, 4, dtype=torch.float64)
    draws = torch.randn(30, 3, 4, dtype=torch.float64)
    order, states = iter(draws), []
    options = dict(given or of_rule)
    if "noise_sampler" in inspect.signature(sampler).parameters:
        options["noise_sampler"] = lambda sigma, after: next(order)
    found = sampler(denoiser, x, SIGMAS, disable=True, callback=states.append, **options)
    order = iter(draws)
    levels = [(1.0, s) for s in SIGMAS.tolist()]
    wanted = rule(denoiser, x, levels, lambda: next(order), **of_rule)
    assert (found - wanted).abs().max() <= 1e-10
    assert [float(s["sigma"]) for s in states] == SIGMAS[:-1].tolist()


@pytest.mark.parametrize("name", ["res_multistep_ancestral", "er_sde", "seeds_2", "seeds_3"])
def test_noise_of_a_key_and_of_a_path(name: str) -> None:
    sampler = getattr(sampling, f"sample_{name}")
    x = 14.6 * torch.randn(3, 4, dtype=torch.float64)
    runs = [
        sampler(denoiser, x, SIGMAS, disable=True, noise_sampler=noise)
        for noise in (PhiloxNoise(1), PhiloxNoise(1), BrownianNoise(PhiloxNoise(1)).sampler(x))
    ]
    assert_same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[2].isfinite().all()
