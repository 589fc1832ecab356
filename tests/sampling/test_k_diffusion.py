"""k-diffusion's samplers: its signatures, its callbacks, its noise, and the published rules."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, sampling, solvers
from diffcore.sampling import comfy, k_diffusion
from support.sigma_cases import CASES, PROMISE, WALKS, denoiser

CHURNED = "s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0"
NOISY = "eta=1.0, s_noise=1.0, noise_sampler=None"
SIGNATURES = {  # after (model, x, sigmas, extra_args=None, callback=None, disable=None
    "euler": CHURNED,
    "euler_ancestral": NOISY,
    "heun": CHURNED,
    "dpm_2": CHURNED,
    "dpm_2_ancestral": NOISY,
    "lms": "order=4",
    "dpmpp_2s_ancestral": NOISY,
    "dpmpp_sde": NOISY + ", r=0.5",
    "dpmpp_2m": "",
    "dpmpp_2m_sde": NOISY + ", solver_type='midpoint'",
    "dpmpp_3m_sde": NOISY,
}
SIGMAS = WALKS["karras-8"]


def sampler(name: str) -> Any:
    return getattr(sampling, f"sample_{name}")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_k_diffusion(name: str) -> None:
    parameters = inspect.signature(sampler(name)).parameters.values()
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    ours = ", ".join(str(p.replace(annotation=p.empty)) for p in parameters)
    first = "model, x, sigmas, extra_args=None, callback=None, disable=None"
    assert ours == ", ".join(filter(None, (first, SIGNATURES[name])))


def test_every_sampler_is_tried() -> None:
    there_are = {n.removeprefix("sample_") for n in vars(sampling) if n.startswith("sample_")}
    there_are -= {"dpm_adaptive"}  # that chooses its levels: see test_adaptive.py
    there_are -= {n.removeprefix("sample_") for n in vars(comfy) if n.startswith("sample_")}
    assert there_are == SIGNATURES.keys() == {kd_name for kd_name, *_ in CASES.values()}


# ---- numbers ------------------------------------------------------------------------------------


class Sampler:
    """A noise sampler that remembers the intervals it was asked for."""

    def __init__(self, draws: Tensor) -> None:
        self.draws, self.asked = iter(draws), []

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        assert sigma.shape == sigma_next.shape == ()
        self.asked.append((float(sigma), float(sigma_next)))
        return next(self.draws)


def churn_noise(key: PhiloxNoise, table: solvers.SolverTable, shape: Any) -> list[Tensor]:
    """What the steps begin with: the start's noise, then that of the last row of each step."""
    last = [r for r, (a, b) in enumerate(pairwise(table.step_index.tolist())) if a != b]
    streams = [1 + len(table), *(1 + r for r in last)]
    return [key.at(s).tensor(shape, dtype=torch.float64) for s in streams]


@pytest.mark.parametrize("walk_name", WALKS)
@pytest.mark.parametrize("name", CASES)
def test_samplers_are_the_published_rules(name: str, walk_name: str) -> None:
    kd_name, rule, make, options = CASES[name]
    sigmas = WALKS[walk_name]
    x = torch.randn(3, 4, dtype=torch.float64) * sigmas[0]
    draws = torch.randn(64, 3, 4, dtype=torch.float64)
    order, given = iter(draws), dict(options)
    if "eta" in options:
        given["noise_sampler"] = Sampler(draws)
    if "s_churn" in options:
        torch.manual_seed(5)
        key = PhiloxNoise.from_generator()
        table = make(sigmas, prediction_type="sample", **options)
        order = iter(churn_noise(key, table, x.shape))
        options = {"churn": tuple(options.values())}
        torch.manual_seed(5)
    ours = sampler(kd_name)(denoiser, x, sigmas, disable=True, **given)
    theirs = rule(denoiser, x, sigmas.tolist(), lambda: next(order), **options)
    assert (ours - theirs).abs().max() <= PROMISE


@pytest.mark.parametrize("walk_name", WALKS)
@pytest.mark.parametrize("name", [n for n, (*_, options) in CASES.items() if options.get("eta")])
def test_noise_samplers_get_the_intervals_of_k_diffusion(name, walk_name) -> None:
    kd_name, _, _, options = CASES[name]
    wanted = []
    for sigma, after in pairwise(WALKS[walk_name].tolist()):
        if after > 0:
            if kd_name == "dpmpp_sde":
                r = options.get("r", 0.5)
                wanted.append((sigma, math.exp((1 - r) * math.log(sigma) + r * math.log(after))))
            wanted.append((sigma, after))
    noise = Sampler(torch.zeros(64, 3, 4))
    x = torch.ones(3, 4)
    sampler(kd_name)(denoiser, x, WALKS[walk_name], disable=True, noise_sampler=noise, **options)
    assert len(noise.asked) == len(wanted)
    for ours, theirs in zip(noise.asked, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-14, abs=0)


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde"])
def test_default_noise_is_seeded_by_torchs_generator(name: str) -> None:
    x = torch.randn(3, 4)
    torch.manual_seed(7)
    key = PhiloxNoise.from_generator()
    torch.manual_seed(7)
    out = sampler(name)(denoiser, x, SIGMAS, disable=True)
    rows = [r for r, row in enumerate(noisy_table(name).rows) if row.noisy]
    each = Sampler([key.at(1 + r).tensor(x.shape) for r in rows])
    assert torch.equal(out, sampler(name)(denoiser, x, SIGMAS, disable=True, noise_sampler=each))
    assert not torch.equal(out, sampler(name)(denoiser, x, SIGMAS, disable=True))


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde"])
def test_a_key_is_the_noise_of_the_rows(name: str) -> None:
    x, key = torch.randn(3, 4), PhiloxNoise(5, [4, 0, 9])
    out = sampler(name)(denoiser, x, SIGMAS, disable=True, noise_sampler=key)
    rows = [r for r, row in enumerate(noisy_table(name).rows) if row.noisy]
    each = Sampler([key.at(1 + r).tensor(x.shape) for r in rows])
    assert torch.equal(out, sampler(name)(denoiser, x, SIGMAS, disable=True, noise_sampler=each))
    assert torch.equal(out, sampling.sample(denoiser, x, noisy_table(name), noise=key))
    with pytest.raises(TypeError, match="noise_sampler must be a function or a PhiloxNoise"):
        sampler(name)(denoiser, x, SIGMAS, disable=True, noise_sampler=x)


def noisy_table(name: str) -> solvers.SolverTable:
    return CASES[name][2](SIGMAS, prediction_type="sample", **CASES[name][3])


# ---- what else is promised ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SIGNATURES, "euler-churn", "heun-churn", "dpm_2-churn"])
def test_callbacks_are_those_of_k_diffusion(name: str) -> None:
    kd_name, _, _, options = CASES[name]
    options = options if "churn" in name else {}
    calls, steps = [], []

    def model(x: Tensor, sigma: Tensor, shift: float) -> Tensor:
        assert sigma.shape == (3,)
        assert sigma.unique().numel() == 1
        calls.append((x, sigma, denoiser(x, sigma) + shift))
        return calls[-1][2]

    def callback(state: dict[str, Any]) -> None:
        x, sigma, denoised = calls[-1]  # the call that opens the step is the latest
        assert state.keys() == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert torch.equal(state["x"], x)
        assert torch.equal(state["denoised"], denoised)
        assert state["sigma"] == SIGMAS[state["i"]]
        assert state["sigma_hat"].shape == ()
        assert state["sigma_hat"].to(sigma) == sigma[0]
        assert (state["sigma_hat"] > state["sigma"]) == ("churn" in name and state["sigma"] > 0.05)
        steps.append(state["i"])

    x = torch.randn(3, 4, dtype=torch.float64)
    sampler(kd_name)(model, x, SIGMAS, {"shift": 0.5}, callback, True, **options)
    assert steps == list(range(len(SIGMAS) - 1))


def test_sigmas_of_any_kind_and_precision() -> None:
    x = torch.randn(3, 4)
    out = sampling.sample_dpmpp_2m(denoiser, x, SIGMAS.float(), disable=True)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, sampling.sample_dpmpp_2m(denoiser, x, SIGMAS, disable=True))
    as_list = SIGMAS.float().tolist()
    assert torch.equal(out, sampling.sample_dpmpp_2m(denoiser, x, as_list, disable=True))


def test_bar(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(1, 2)
    for disable in (None, True):  # nothing here is a terminal
        sampling.sample_lms(denoiser, x, SIGMAS, disable=disable)
        assert capsys.readouterr().err == ""
    sampling.sample_lms(denoiser, x, SIGMAS, disable=False)
    assert "8/8" in capsys.readouterr().err


def test_a_table_is_made_once_for_the_same_sigmas_and_options() -> None:
    made = []

    def make(sigmas: Any, **options: Any) -> solvers.SolverTable:
        made.append(options["eta"])
        return solvers.euler_ancestral_table(sigmas, **options)

    def run(sigmas: Tensor, eta: float) -> Tensor:
        return k_diffusion.run_sigmas(
            make, {"eta": eta}, denoiser, torch.ones(1, 2), sigmas, None, None, True
        )

    with torch.inference_mode():
        run(SIGMAS, 1.0)
    run(SIGMAS.clone(), 1.0)  # and it serves outside of inference mode
    assert made == [1.0]
    run(SIGMAS, 0.5)
    run(SIGMAS[1:], 1.0)
    assert made == [1.0, 0.5, 1.0]


REFUSED = {
    "rising": (lambda x: sampling.sample_euler(denoiser, x, SIGMAS.flip(0)), "sigma"),
    "one": (lambda x: sampling.sample_euler(denoiser, x, SIGMAS[:1]), "sigmas must have the shape"),
    "order": (lambda x: sampling.sample_lms(denoiser, x, SIGMAS, order=5), "order"),
    "eta": (lambda x: sampling.sample_dpmpp_sde(denoiser, x, SIGMAS, eta=-1.0), "eta"),
    "r": (lambda x: sampling.sample_dpmpp_sde(denoiser, x, SIGMAS, r=0.0), "r must"),
    "type": (
        lambda x: sampling.sample_dpmpp_2m_sde(denoiser, x, SIGMAS, solver_type="none"),
        "solver_type",
    ),
    "model": (lambda x: sampling.sample_euler(lambda x, s: x[:1], x, SIGMAS), "model must return"),
    "noise": (
        lambda x: sampling.sample_euler_ancestral(
            denoiser, x, SIGMAS, noise_sampler=lambda a, b: x[:1]
        ),
        "noise",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 4))
