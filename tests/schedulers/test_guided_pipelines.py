"""Whole pipelines whose guidance a fused step takes along, beside those that compute it."""

from __future__ import annotations

import copy
import pickle
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="pipelines import it")

from diffcore.diffusers import fuse, unfuse  # noqa: E402
from diffcore.diffusers.guidance import predicted  # noqa: E402
from diffcore.diffusers.guiders import watch  # noqa: E402
from support.pipelines import CASES, SD, embeddings, generator, unet_2d_condition  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

TOLERANCE = 1e-5
GUIDED = {"txt2img": 10, "img2img": 6, "inpaint": 8, "sd3": 5, "ltx": 4, "wan": 3}  # the steps


@pytest.mark.parametrize("name", GUIDED)
def test_a_pipeline_with_guidance_in_the_step(name: str) -> None:
    case = CASES[name]
    pipe = fuse(case.make())
    plain, other = case.run(pipe), case.run(pipe, guidance_scale=4.0)
    assert abs(plain - other).max() > 100 * TOLERANCE, "guidance shows"
    ours = case.run(fuse(pipe, guidance=True))
    np.testing.assert_allclose(ours, plain, rtol=0, atol=TOLERANCE)
    assert pipe.scheduler.guided_steps == GUIDED[name]
    assert not pipe.scheduler.fallbacks
    # Without guidance a model output is one prediction.
    case.run(pipe, guidance_scale=1.0)
    assert pipe.scheduler.guided_steps == GUIDED[name]
    np.testing.assert_array_equal(case.run(fuse(pipe)), plain)
    assert pipe.scheduler.guided_steps == 0


@pytest.mark.parametrize("name", ["txt2img", "ltx"])
def test_rescaled_guidance_is_computed(name: str) -> None:
    case = CASES[name]
    pipe = fuse(case.make())
    plain = case.run(pipe, guidance_rescale=0.7)
    assert abs(plain - case.run(pipe)).max() > 100 * TOLERANCE, "rescaling shows"
    np.testing.assert_array_equal(case.run(fuse(pipe, guidance=True), guidance_rescale=0.7), plain)
    assert pipe.scheduler.guided_steps == 0


def test_three_predictions_are_computed() -> None:
    case = CASES["pix2pix"]
    pipe = fuse(case.make())
    plain = case.run(pipe)
    np.testing.assert_array_equal(case.run(fuse(pipe, guidance=True)), plain)
    assert pipe.scheduler.guided_steps == 0


def test_a_stock_scheduler_after_a_watched_network() -> None:
    case = CASES["txt2img"]
    pipe = case.make()
    stock = case.run(pipe)
    fuse(pipe, guidance=True)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    np.testing.assert_array_equal(case.run(pipe), stock)


def test_networks_are_given_back() -> None:
    pipe = fuse(fuse(CASES["txt2img"].make(), guidance=True), guidance=True)
    twin = copy.deepcopy(pipe.unet)
    assert len(pipe.unet._forward_hooks) == len(twin._forward_hooks) == 1
    unfuse(pipe)
    assert not pipe.unet._forward_hooks
    assert len(twin._forward_hooks) == 1
    pipe.unet = pickle.loads(pickle.dumps(twin))
    unfuse(pipe)
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_network(in_place: bool) -> None:
    """``torch.compile(network)`` calls the hook outside of its graph, ``network.compile()`` not."""
    case = CASES["sd3"]
    pipe = fuse(case.make())
    plain = case.run(pipe)
    if in_place:
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    ours = case.run(fuse(pipe, guidance=True))
    np.testing.assert_allclose(ours, plain, rtol=0, atol=TOLERANCE)
    assert pipe.scheduler.guided_steps == (0 if in_place else GUIDED["sd3"])


class Modular:
    """The denoising loop of SDXL's modular pipeline with a guider."""

    steps = 6

    def __init__(self, guider: Any) -> None:
        from diffusers.modular_pipelines.stable_diffusion_xl import denoise

        self.pipe = denoise.StableDiffusionXLDenoiseStep().init_pipeline()
        self.pipe.update_components(
            unet=unet_2d_condition(
                addition_embed_type="text_time",
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=6 * 4 + 8,
            ),
            scheduler=diffusers.DDIMScheduler(**SD),
            guider=guider,
        )
        for loop in (self.pipe.blocks, self.pipe._blocks):
            loop.set_progress_bar_config(disable=True)

    def run(self) -> Tensor:
        self.pipe.scheduler.set_timesteps(self.steps)
        inputs = {
            "prompt_embeds": embeddings(2, 4, 8),
            "negative_prompt_embeds": embeddings(2, 4, 8, seed=3),
            "pooled_prompt_embeds": embeddings(2, 8),
            "negative_pooled_prompt_embeds": embeddings(2, 8, seed=3),
            "add_time_ids": torch.ones(2, 6),
            "negative_add_time_ids": torch.ones(2, 6),
        }
        found: Tensor = self.pipe(
            latents=torch.randn(2, 4, 8, 8, generator=generator()),
            timesteps=self.pipe.scheduler.timesteps,
            num_inference_steps=self.steps,
            denoiser_input_fields=inputs,
            output="latents",
        )
        return found


def guiders() -> list[Any]:
    """A guider, and how many of the six steps take it along."""
    cfg, zero, tangential, projected = (
        diffusers.ClassifierFreeGuidance,
        diffusers.ClassifierFreeZeroStarGuidance,
        diffusers.TangentialClassifierFreeGuidance,
        diffusers.AdaptiveProjectedGuidance,
    )
    original = {"use_original_formulation": True}
    cases = {
        "plain": (cfg, {}, 6),
        "plain, original": (cfg, original, 6),
        "interval": (cfg, {"start": 0.2, "stop": 0.6}, 2),
        "off": (cfg, {"guidance_scale": 1.0}, 0),
        "rescaled": (cfg, {"guidance_rescale": 0.5}, 6),
        "rescaled, original": (cfg, {"guidance_rescale": 0.5, **original}, 6),
        "zero star": (zero, {"zero_init_steps": 2}, 4),
        "zero star, original": (zero, {"zero_init_steps": 0, "start": 0.4, **original}, 4),
        "zero star, rescaled": (zero, {"zero_init_steps": 0, "guidance_rescale": 0.5}, 0),
        "tangential": (tangential, {}, 6),
        "tangential, original": (tangential, original, 6),
        "tangential, rescaled": (tangential, {"guidance_rescale": 0.5}, 0),
        "projected, original": (
            projected,
            {"eta": 0.3, "adaptive_projected_guidance_rescale": 2.0, **original},
            6,
        ),
        "projected": (projected, {"eta": 0.3}, 0),
        "projected, momentum": (
            projected,
            {"adaptive_projected_guidance_momentum": -0.5, **original},
            0,
        ),
    }
    return [pytest.param(*case, id=name) for name, case in cases.items()]


@pytest.mark.parametrize(("kind", "config", "guided"), guiders())
def test_a_modular_pipeline_with_a_guider(kind: Any, config: dict[str, Any], guided: int) -> None:
    loop = Modular(kind(**{"guidance_scale": 3.0, **config}))
    stock = loop.run()
    fuse(loop.pipe, guidance=True)
    ours = loop.run()
    assert loop.pipe.scheduler.guided_steps == guided
    assert not loop.pipe.scheduler.fallbacks
    print(float((ours - stock).abs().max() / stock.abs().max()))
    torch.testing.assert_close(ours, stock, rtol=0, atol=TOLERANCE * float(stock.abs().max()))
    unfuse(loop.pipe)
    assert "forward" not in vars(loop.pipe.guider)
    assert torch.equal(loop.run(), stock)


@pytest.mark.parametrize(("kind", "config", "guided"), guiders())
def test_what_a_guider_returns_has_its_bits(kind: Any, config: dict[str, Any], guided: int) -> None:
    """Looked at in the next step, when the guider has gone on, and in a copy of it."""
    guider = kind(**{"guidance_scale": 3.0, **config})
    pipe = types.SimpleNamespace(components={"guider": guider})
    cond, uncond = (torch.randn(2, 4, 8, 8, generator=generator(seed)) for seed in (1, 2))
    found = []
    for noted in (False, True):
        if noted:
            watch(pipe)
        guider.set_state(3, 6, torch.tensor(1))
        c, u = (predicted(x.clone()) if noted else x for x in (cond, uncond))
        given = (
            {"pred_cond": c, "pred_uncond": u} if guider.num_conditions == 2 else {"pred_cond": c}
        )
        outputs = [forward(**given) for forward in (copy.deepcopy(guider).forward, guider.forward)]
        guider.set_state(0, 6, torch.tensor(1))
        found.append([x for o in outputs for x in (o.pred, o.pred_cond, o.pred_uncond)])
    for stock, ours in zip(*found, strict=True):
        assert ours is stock is None or torch.equal(ours, stock)
