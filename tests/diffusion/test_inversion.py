"""DDIM up the noise levels: guided-diffusion's step, and the loop from a sample to its noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import GaussianDiffusion, PhiloxNoise, make_betas, respaced_timesteps
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.guidance import CFG
from diffcore.schedules import rescale_zero_terminal_snr
from support.bounds import assert_same_bits
from support.toys import Recorder

T = 50
BETAS = make_betas("linear", T, scale_to_1000=True)
BAR = np.cumprod(1 - BETAS.numpy())
X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
STEPS = torch.tensor([0, 7, 30, T - 1])
NOISE = torch.randn(3, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def bent(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
    return torch.tanh(x) + 0.01 * t.to(x).reshape(-1, 1, 1) + shift


def column(values: Any, t: Tensor) -> Tensor:
    return torch.as_tensor(np.asarray(values))[t].reshape(-1, 1, 1)


def guided_diffusions(
    x: Tensor,
    t: Tensor,
    output: Tensor,
    kind: str = "epsilon",
    clip: bool = True,
    denoised_fn: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """ddim_reverse_sample of guided-diffusion, by its tables; "v" and "flow" from their meaning."""
    bar, following = column(BAR, t).to(x), column([*BAR[1:], 0.0], t).to(x)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    x0 = {
        "epsilon": (1 / bar).sqrt() * x - (1 / bar - 1).sqrt() * output,
        "sample": output,
        "v_prediction": alpha * x - sigma * output,
        "flow_prediction": (x - sigma * output) / (alpha + sigma),
    }[kind]
    if denoised_fn is not None:
        x0 = denoised_fn(x0)
    if clip:
        x0 = x0.clamp(-1, 1)
    noise = ((1 / bar).sqrt() * x - x0) / (1 / bar - 1).sqrt()
    return x0 * following.sqrt() + (1 - following).sqrt() * noise, x0


# ---- one step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("clip", [True, False])
def test_the_step_is_guided_diffusions(kind: str, clip: bool) -> None:
    diffusion = GaussianDiffusion(BETAS, kind)
    for function in (None, lambda x0: 0.8 * x0 + 0.1):
        found = diffusion.ddim_reverse_sample(
            bent, X, STEPS, clip, function, {"shift": 0.2}, 0.0
        )  # fmt: skip
        sample, x0 = guided_diffusions(X, STEPS, bent(X, STEPS, 0.2), kind, clip, function)
        assert (found["sample"] - sample).abs().max() <= 1e-12 * sample.abs().max()
        assert (found["pred_xstart"] - x0).abs().max() <= 1e-12 * x0.abs().max()
    # The test would see the step of p_sample's direction.
    down = diffusion.ddim_sample(bent, X, STEPS, clip, model_kwargs={"shift": 0.2})
    assert (down["sample"] - sample).abs().max() > 1e-3


def test_float32_is_as_good_as_the_eager_formula() -> None:
    for clip in (True, False):
        diffusion = GaussianDiffusion(BETAS, clip_sample=clip)
        x, t = X.float(), STEPS
        found = diffusion.ddim_reverse_sample(bent, x, t)["sample"]
        output = bent(x, t)
        exact, _ = guided_diffusions(x.double(), t, output.double(), clip=clip)
        eager, _ = guided_diffusions(x, t, output, clip=clip)
        ulp = torch.finfo(torch.float32).eps * exact.abs()
        error = (found - exact).abs().amax((1, 2))
        allowed = 2 * (eager - exact).abs().amax((1, 2)) + ulp.amax((1, 2))
        assert (error <= allowed).all()


def test_the_other_rule_keeps_the_models_noise() -> None:
    diffusion = GaussianDiffusion(BETAS)
    output = bent(X, STEPS)
    found = diffusion.ddim_reverse_sample(bent, X, STEPS, rederive_epsilon=False)["sample"]
    _, x0 = guided_diffusions(X, STEPS, output)
    following = column([*BAR[1:], 0.0], STEPS)
    assert (found - (following.sqrt() * x0 + (1 - following).sqrt() * output)).abs().max() <= 1e-12
    assert (found - guided_diffusions(X, STEPS, output)[0]).abs().max() > 1e-3


def test_one_step_up_and_one_down_meet() -> None:
    # With noise that is the same in both calls, the step down undoes the step up.
    diffusion = GaussianDiffusion(BETAS, clip_sample=False)
    up = diffusion.ddim_reverse_sample(lambda x, t: NOISE + 0 * x, X, [3, 7, 30, 48])["sample"]
    down = diffusion.ddim_sample(lambda x, t: NOISE + 0 * x, up, [4, 8, 31, 49])["sample"]
    assert (down - X).abs().max() <= 1e-13


def test_a_learned_variance_is_not_read() -> None:
    diffusion = GaussianDiffusion(BETAS, variance_type="learned_range")
    x = X.transpose(1, 2)

    def both(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.sin(x), 100 + x], dim=1)

    plain = GaussianDiffusion(BETAS)
    for method, t in (("ddim_reverse_sample", (STEPS,)), ("ddim_reverse_sample_loop", ())):
        found = getattr(diffusion, method)(both, x, *t)
        wanted = getattr(plain, method)(lambda x, t: torch.sin(x), x, *t)
        if isinstance(found, dict):
            found, wanted = found["sample"], wanted["sample"]
        assert_same_bits(found, wanted)


def test_zero_terminal_snr_has_a_step_up_from_its_last_timestep() -> None:
    betas = rescale_zero_terminal_snr(BETAS)
    diffusion = GaussianDiffusion(betas, "v_prediction", clip_sample=False)
    # At alpha = 0 the noise is x itself, and there is no noisier level.
    assert torch.equal(diffusion.ddim_reverse_sample(bent, X, T - 1)["sample"], X)
    top = diffusion.ddim_reverse_sample_loop(bent, X, num_steps=5, timestep_spacing="trailing")
    assert top.isfinite().all()


def test_gradients_flow_through_a_step() -> None:
    diffusion, x = GaussianDiffusion(BETAS, clip_sample=False), X[:2, :, :2].clone()
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: diffusion.ddim_reverse_sample(bent, x, [3, 49])["sample"],
        x,
    )


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_steps", "spacing"), [(None, "leading"), (7, "leading"), (7, "trailing"), (1, "linspace")]
)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_constant_noise_is_found_and_leads_back(kind: str, num_steps: Any, spacing: str) -> None:
    diffusion = GaussianDiffusion(BETAS, kind, clip_sample=False)
    up = [0, *respaced_timesteps(T, num_steps or T, spacing)[::-1]]
    options = {"num_steps": num_steps, "timestep_spacing": spacing}

    def going(timesteps: list[int], bars: list[float]) -> Callable[[Tensor, Tensor], Tensor]:
        rows = iter(zip(timesteps, bars, strict=True))

        def model(x: Tensor, t: Tensor) -> Tensor:
            timestep, bar = next(rows)
            assert t.tolist() == [timestep] * len(x)
            alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
            x0 = (x - sigma * NOISE) / alpha
            return {
                "epsilon": NOISE + 0 * x,
                "v_prediction": alpha * NOISE - sigma * x0,
                "flow_prediction": NOISE - x0,
            }[kind]

        return model

    # The model is called at the clean sample and at every level but the last.
    model = going(up[:-1], [1.0, *BAR[up[1:-1]]])
    top = diffusion.ddim_reverse_sample_loop(model, X, **options)
    last = BAR[up[-1]]
    exact = math.sqrt(last) * X + math.sqrt(1 - last) * NOISE
    assert (top - exact).abs().max() <= 1e-12
    down = going(up[:0:-1], list(BAR[up[:0:-1]]))
    back = diffusion.ddim_sample_loop(down, X.shape, noise=top, **options)
    assert (back - X).abs().max() <= 1e-12


@pytest.mark.parametrize("function", [None, lambda x0: 0.8 * x0 + 0.1])
def test_the_loop_is_a_clean_step_and_then_single_steps(function: Any) -> None:
    for clip in (True, False):
        diffusion = GaussianDiffusion(BETAS, clip_sample=clip)
        bar = BAR[0]
        x0 = X.clamp(-1, 1) if clip else X
        x = math.sqrt(bar) * x0 + math.sqrt(1 - bar) * bent(X, torch.tensor(0))
        for t in range(T - 1):
            steps = torch.full((4,), t)
            x, _ = guided_diffusions(x, steps, bent(x, steps), "epsilon", clip, function)
        top = diffusion.ddim_reverse_sample_loop(bent, X, denoised_fn=function)
        assert (top - x).abs().max() <= 1e-11


def test_respaced_processes_tell_the_model_training_timesteps() -> None:
    wanted = [0, 9, 19, 29, 39]
    for loop in (
        lambda model: GaussianDiffusion(BETAS).ddim_reverse_sample_loop(
            model, X, num_steps=5, timestep_spacing="trailing"
        ),
        lambda model: (
            GaussianDiffusion(BETAS).respace(5, "trailing").ddim_reverse_sample_loop(model, X)
        ),
    ):
        model = Recorder()
        loop(model)
        assert [int(t[0]) for t in model.t] == wanted
    model = Recorder()
    GaussianDiffusion(BETAS).respace(5, "trailing").ddim_reverse_sample(model, X, 2)
    assert model.t[0].tolist() == [29] * 4


def test_the_end_converges_to_the_exact_flow_in_a_gaussian_world() -> None:
    mean, std = 0.3, 0.7
    betas = make_betas("linear", 1000)
    bar = np.cumprod(1 - betas.numpy())
    diffusion = GaussianDiffusion(betas, clip_sample=False)
    x = torch.tensor([[mean + 1.2 * std]], dtype=torch.float64)
    errors = []
    for steps in (50, 100, 200):
        levels = iter([1.0, *bar[respaced_timesteps(1000, steps, "trailing")[:0:-1]]])

        def best(x: Tensor, t: Tensor, levels=levels) -> Tensor:
            at = next(levels)
            alpha, sigma = math.sqrt(at), math.sqrt(1 - at)
            return sigma / (at * std**2 + sigma**2) * (x - alpha * mean)

        top = diffusion.ddim_reverse_sample_loop(
            best, x, num_steps=steps, timestep_spacing="trailing"
        )
        exact = math.sqrt(bar[-1]) * mean + 1.2 * math.sqrt(bar[-1] * std**2 + 1 - bar[-1])
        errors.append(abs(float(top) - exact))
    for longer, shorter in pairwise(errors):
        assert 0.85 < math.log2(longer / shorter) < 1.15


def test_guidance_is_that_of_the_loops_down() -> None:
    diffusion = GaussianDiffusion(BETAS, clip_sample=False)
    w = torch.tensor([0.0, 1.0, 2.5, 7.5], dtype=torch.float64)
    column = w.reshape(-1, 1, 1)

    def mixed(x: Tensor, t: Tensor) -> Tensor:
        return bent(x, t) + column * (bent(x, t, 0.3) - bent(x, t))

    wanted = diffusion.ddim_reverse_sample_loop(mixed, X, num_steps=6)
    both = {"model_kwargs": {"shift": 0.3}, "uncond_kwargs": {}, "num_steps": 6}
    for options in ({"guidance_scale": w}, {"guidance": CFG(w)}):
        found = diffusion.ddim_reverse_sample_loop(bent, X, **both, **options)
        assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


def test_routes_give_the_same_bits() -> None:
    diffusion, x = GaussianDiffusion(BETAS), X.float()
    wanted = diffusion.ddim_reverse_sample_loop(bent, x, num_steps=6)
    again = diffusion.ddim_reverse_sample_loop(bent, x, num_steps=6, progress=False)
    assert_same_bits(again, wanted)
    # sample, with the levels of a schedule that rise
    levels = diffcore.solvers.NoiseLevels.from_schedule(
        diffusion.schedule, respaced_timesteps(T, 6)[::-1]
    )
    table = diffcore.solvers.ddim_table(levels, clip_range=1.0)
    assert_same_bits(diffcore.sample(bent, x, table), wanted)
    captured = diffcore.sampling.capture(bent, table, x.shape)
    assert_same_bits(captured(PhiloxNoise(0), x=x), wanted)


def test_the_loop_keeps_the_dtype_and_records_nothing() -> None:
    diffusion, x = GaussianDiffusion(BETAS), X.clone().requires_grad_()
    top = diffusion.ddim_reverse_sample_loop(bent, x, num_steps=3)
    assert not top.requires_grad
    assert torch.equal(x, X)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert diffusion.ddim_reverse_sample_loop(bent, X.to(dtype), num_steps=3).dtype == dtype


def test_nothing_is_drawn() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(())
    torch.manual_seed(5)
    GaussianDiffusion(BETAS).ddim_reverse_sample_loop(bent, X, num_steps=3)
    GaussianDiffusion(BETAS).ddim_reverse_sample(bent, X, STEPS)
    assert torch.equal(torch.rand(()), wanted)


# ---- refusals ------------------------------------------------------------------------------------

D = GaussianDiffusion(BETAS)
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "eta": (
        lambda: D.ddim_reverse_sample(bent, X, 3, eta=0.5),
        ValueError,
        "eta must be 0 for ddim_reverse_sample, because noise cannot be inverted, got 0.5",
    ),
    "eta-loop": (
        lambda: D.ddim_reverse_sample_loop(bent, X, eta=1.0),
        ValueError,
        "eta must be 0 for ddim_reverse_sample_loop, because noise cannot be inverted, got 1",
    ),
    "eta-type": (lambda: D.ddim_reverse_sample(bent, X, 3, eta="0"), TypeError, "eta must be"),
    "sample": (
        lambda: GaussianDiffusion(BETAS, "sample").ddim_reverse_sample_loop(bent, X),
        ValueError,
        "prediction_type must not be 'sample' for ddim_reverse_sample_loop, got 'sample': .*; call",
    ),
    "denoised_fn": (
        lambda: D.ddim_reverse_sample(bent, X, 3, denoised_fn=abs, rederive_epsilon=False),
        ValueError,
        "rederive_epsilon must be True with denoised_fn, got False",
    ),
    "denoised_fn-loop": (
        lambda: D.ddim_reverse_sample_loop(bent, X, denoised_fn=abs, rederive_epsilon=False),
        ValueError,
        "rederive_epsilon must be True with denoised_fn, got False",
    ),
    "denoised_fn-guided": (
        lambda: D.ddim_reverse_sample_loop(bent, X, denoised_fn=abs, guidance_scale=2.0),
        ValueError,
        "denoised_fn must be None under guidance, got a function",
    ),
    "denoised_fn-kind": (
        lambda: D.ddim_reverse_sample(bent, X, 3, denoised_fn=0.5),
        TypeError,
        "denoised_fn must be a function, got float",
    ),
    "denoised-type": (
        lambda: D.ddim_reverse_sample(bent, X, 3, denoised_fn=lambda x0: None),
        TypeError,
        "denoised_fn must return a torch.Tensor, got NoneType",
    ),
    "denoised-shape": (
        lambda: D.ddim_reverse_sample(bent, X, 3, denoised_fn=lambda x0: x0[:1]),
        ValueError,
        r"denoised_fn must return the shape and dtype of x, \(4, 3, 5\) and torch.float64, got \(1",
    ),
    "timestep": (
        lambda: D.ddim_reverse_sample(bent, X, T),
        ValueError,
        f"t must be in 0 .. {T - 1}, got {T}",
    ),
    "x": (lambda: D.ddim_reverse_sample_loop(bent, (4, 3)), TypeError, r"x must be a floating-po"),
    "steps": (lambda: D.ddim_reverse_sample_loop(bent, X, num_steps=T + 1), ValueError, "num_st"),
    "uncond": (
        lambda: D.ddim_reverse_sample_loop(bent, X, uncond_kwargs={}),
        ValueError,
        "guidance_scale must be given with uncond_kwargs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
