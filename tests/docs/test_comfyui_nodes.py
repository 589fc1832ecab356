"""The example node of ComfyUI, against a stub of what it needs of ComfyUI."""

from __future__ import annotations

import runpy
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise
from diffcore.sigmas import get_sigmas_flow, get_sigmas_karras
from support import comfy_rules as rules
from support.pages import ROOT

SEED = 2**64 - 3  # ComfyUI's seeds go beyond an int64
STEPS = 60
SIGMAS = {
    False: get_sigmas_karras(STEPS, 0.03, 14.6).float(),
    True: get_sigmas_flow(STEPS).float(),
}
MEAN, STD = 0.4, 0.5  # of the data


class Const:
    """The model sampling of flows."""


class KSampler:
    """What ComfyUI does with a sampler function: arguments of its own by keyword, and a wrapper."""

    def __init__(self, sampler_function: Any, extra_options: Any = None) -> None:
        self.function, self.options = sampler_function, extra_options or {}

    def sample(self, model: Any, x: Tensor, sigmas: Tensor, seed: int, callback: Any) -> Tensor:
        extra_args = {"model_options": {}, "seed": seed, "denoise_mask": None}
        return self.function(
            model,
            x,
            sigmas,
            extra_args=extra_args,
            callback=lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1),
            disable=True,
            **self.options,
        )


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    comfy = {name: ModuleType(name) for name in ("comfy", "comfy.samplers", "comfy.model_sampling")}
    comfy["comfy"].samplers = comfy["comfy.samplers"]
    comfy["comfy.samplers"].KSAMPLER = KSampler
    comfy["comfy.model_sampling"].CONST = Const
    for name, module in comfy.items():
        monkeypatch.setitem(sys.modules, name, module)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "comfyui_nodes.py")))


class Denoiser:
    """E[x_0 | x] of Gaussian data, inside two wrappers as ComfyUI's models are."""

    def __init__(self, flow: bool) -> None:
        sampling = Const() if flow else object()
        self.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
        self.flow = flow

    def __call__(
        self, x: Tensor, sigma: Tensor, denoise_mask: Any, model_options: Any, seed: int
    ) -> Tensor:
        assert denoise_mask is None
        assert sigma.shape == x.shape[:1]
        s = sigma.view(-1, 1, 1, 1)
        a = 1 - s if self.flow else torch.ones_like(s)
        return MEAN + STD**2 * a / (a**2 * STD**2 + s**2) * (x - a * MEAN)


def run(
    nodes: Any, solver: str, flow: bool, x: Tensor, *, eta: float = 1.0, steps: Any = None
) -> Tensor:
    (sampler,) = nodes.DiffcoreSampler().get_sampler(solver, eta, 1.0)
    seen: list[Any] = steps if steps is not None else []
    sigmas = SIGMAS[flow]
    return sampler.sample(Denoiser(flow), x, sigmas, SEED, lambda *a: seen.append(a))


def start(flow: bool, batch: int = 400) -> Tensor:
    """The data with the noise of the first level."""
    sigma = float(SIGMAS[flow][0])
    alpha = 1 - sigma if flow else 1.0
    std = (alpha**2 * STD**2 + sigma**2) ** 0.5
    return alpha * MEAN + std * torch.randn(batch, 1, 4, 4)


SOLVERS = [
    *("dpmpp_2m", "dpmpp_2m_sde", "unipc", "sa_solver", "deis", "res_multistep", "er_sde"),
    *("euler", "euler_ancestral", "heun"),
]


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_are_those_of_the_data(nodes: Any, solver: str, flow: bool) -> None:
    steps: list[Any] = []
    x = run(nodes, solver, flow, start(flow), steps=steps)
    assert [(i, total) for i, _, _, total in steps] == [(i, STEPS) for i in range(STEPS)]
    assert all(d.shape == x.shape for _, d, _, _ in steps)
    # Four standard errors of the 6,400 numbers; Euler with noise loses 6 % of the deviation.
    assert abs(float(x.mean()) - MEAN) < 4 * STD / 80
    assert abs(float(x.std()) / STD - 1) < 4 / 113 + 0.06


def test_every_solver_is_tested(nodes: Any) -> None:
    ((choices,), *_) = nodes.DiffcoreSampler.INPUT_TYPES()["required"].values()
    assert choices == list(nodes.SOLVERS) == SOLVERS
    assert nodes.NODE_CLASS_MAPPINGS["DiffcoreSampler"] is nodes.DiffcoreSampler
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    assert hasattr(nodes.DiffcoreSampler, nodes.DiffcoreSampler.FUNCTION)


@pytest.mark.parametrize("flow", [False, True])
def test_euler_is_the_loop_of_comfyui(nodes: Any, flow: bool) -> None:
    x = start(flow, 3)
    found = run(nodes, "euler", flow, x)
    sigmas, model = SIGMAS[flow].double(), Denoiser(flow)
    wide = x.double()
    for now, then in pairwise(sigmas):
        denoised = model(wide, now.expand(3), None, None, 0)
        wide = wide + (wide - denoised) / now * (then - now)
    torch.testing.assert_close(found.double(), wide, rtol=1e-5, atol=1e-5)


def test_euler_ancestral_of_a_flow_is_that_of_comfyui(nodes: Any) -> None:
    x, sigmas, model = start(True, 3), SIGMAS[True].double(), Denoiser(True)
    key = PhiloxNoise(SEED)
    draws = (key.at(1 + row).tensor(x.shape).double() for row in range(STEPS))
    levels = [(1 - s, s) for s in sigmas.tolist()]

    def denoised(x: Tensor, ratio: float) -> Tensor:
        sigma = 1 / (1 + 1 / ratio)  # 1 for an infinite ratio to the signal
        return model(x, torch.full((3,), sigma, dtype=x.dtype), None, None, 0)

    wanted = rules.euler_ancestral_rf(denoised, x.double(), levels, lambda: next(draws), eta=0.7)
    found = run(nodes, "euler_ancestral", True, x, eta=0.7)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["dpmpp_2m_sde", "euler_ancestral", "er_sde", "sa_solver"])
@pytest.mark.parametrize("flow", [False, True])
def test_noise_follows_the_seed_and_not_the_batch(nodes: Any, solver: str, flow: bool) -> None:
    x = start(flow, 5)
    whole = run(nodes, solver, flow, x)
    assert torch.equal(run(nodes, solver, flow, x[:2]), whole[:2])


def test_too_few_sigmas_are_no_steps(nodes: Any) -> None:
    x = torch.randn(1, 1, 2, 2)
    options = {"solver": "euler", "eta": 1.0, "s_noise": 1.0}
    assert nodes.sample(Denoiser(False), x, torch.ones(1), **options) is x
