"""Whole pipelines of diffusers with a fused scheduler, beside the same ones with a stock one."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers", reason="pipelines import it")

from diffcore.diffusers import fuse, unfuse  # noqa: E402
from diffcore.diffusers.registry import FAMILIES  # noqa: E402
from diffcore.diffusers.scheduler import Manner  # noqa: E402
from support.pipelines import CASES, SD, generator  # noqa: E402
from support.schedulers import configured, make_steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

# Of two walks with the same noise, each rounding its own way, through a network at every step.
TOLERANCE = 1e-5
each_case = pytest.mark.parametrize("name", CASES)


def assert_same_images(ours: Any, stock: Any) -> None:
    """Pixels in [0, 1] within the tolerance, and the images in 8 bits but for a few last bits."""
    assert stock.std() > 0.01, "the images show nothing"
    np.testing.assert_allclose(ours, stock, rtol=0, atol=TOLERANCE)
    ours, stock = (np.round(255 * x).astype(int) for x in (ours, stock))
    # A pixel is within the tolerance of a half, where it is rounded to another number, with the
    # probability 2 * 255 * TOLERANCE.
    assert abs(ours - stock).max() <= 1
    assert (ours != stock).sum() <= 2 + 4 * 255 * TOLERANCE * ours.size


@each_case
def test_a_fused_pipeline_draws_the_same_images(name: str) -> None:
    case = CASES[name]
    pipe = case.make()
    stock = case.run(pipe)
    assert fuse(pipe) is pipe
    assert_same_images(case.run(pipe), stock)
    assert not pipe.scheduler.fallbacks
    assert unfuse(pipe) is pipe
    np.testing.assert_array_equal(case.run(pipe), stock)


def settings(scheduler: Any) -> dict[str, Any]:
    """The configuration without what loading and saving note in it."""
    return {name: x for name, x in scheduler.config.items() if not name.startswith("_")}


@each_case
def test_a_fused_pipeline_is_saved_as_a_stock_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = case.make()
    kind, stock = type(pipe.scheduler), case.run(pipe)
    fuse(pipe).save_pretrained(tmp_path)
    encoders = {n: None for n in pipe.components if n.startswith(("text_encoder", "tokenizer"))}
    loaded = type(pipe).from_pretrained(tmp_path, **encoders)
    assert type(loaded.scheduler) is kind
    assert settings(loaded.scheduler) == settings(pipe.scheduler)
    loaded.set_progress_bar_config(disable=True)
    assert_same_images(case.run(loaded), stock)  # weights lie elsewhere, and convolutions care


def flow_or_not() -> list[tuple[str, str]]:
    """Every fused scheduler that pipelines of Stable Diffusion, or of version 3, may be given."""
    sd = {kind.name for kind in diffusers.schedulers.KarrasDiffusionSchedulers}
    names = [stock.__name__ for stock in FAMILIES]
    return [("txt2img", n) for n in names if n in sd] + [
        ("sd3", n) for n in names if n.startswith("FlowMatch")
    ]


@pytest.mark.parametrize(("case", "scheduler"), flow_or_not())
def test_schedulers_in_a_pipeline(case: str, scheduler: str) -> None:
    kind = getattr(diffusers, scheduler)
    config = SD if case == "txt2img" else {}
    pipe = CASES[case].make(kind.from_config(configured(kind).config, **config))
    torch.manual_seed(0)  # not every pipeline passes its generator on
    stock = CASES[case].run(pipe)
    torch.manual_seed(0)
    assert_same_images(CASES[case].run(fuse(pipe)), stock)
    assert not pipe.scheduler.fallbacks


@pytest.mark.parametrize("name", ["ddim", "img2img", "ltx"])
def test_pipelines_in_inference_mode(name: str) -> None:
    """The timesteps are then inference tensors, whose writes nobody counts."""
    case = CASES[name]
    pipe = case.make()
    with torch.inference_mode():
        stock = case.run(pipe)
        ours = case.run(fuse(pipe))
        guided = ours if name == "ddim" else case.run(fuse(pipe, guidance=True))
    assert_same_images(ours, stock)
    assert_same_images(guided, stock)
    assert not pipe.scheduler.fallbacks


def test_a_generator_for_each_image() -> None:
    case = CASES["txt2img"]
    pipe = case.make(diffusers.DDPMScheduler(**SD))

    def run() -> tuple[Any, list[Tensor]]:
        generators = [generator(seed) for seed in (3, 4)]
        return case.run(pipe, generator=generators), [g.get_state() for g in generators]

    stock, states = run()
    fuse(pipe)
    ours, states_after = run()
    assert_same_images(ours, stock)
    assert all(torch.equal(a, b) for a, b in zip(states, states_after, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pipelines_in_16_bits(dtype: torch.dtype) -> None:
    """The mean error of the pixels, beside the pipeline in float32, is no larger than stock's."""
    case = CASES["txt2img"]
    latents = torch.randn(2, 4, 8, 8, generator=generator(1))  # drawn in 16 bits they are others
    pipe = case.make()
    truth = case.run(pipe, latents=latents, eta=0.0)
    pipe = pipe.to(dtype)
    stock = case.run(pipe, latents=latents.to(dtype), eta=0.0)
    ours = case.run(fuse(pipe), latents=latents.to(dtype), eta=0.0)
    assert not pipe.scheduler.fallbacks
    assert abs(ours - truth).mean() <= abs(stock - truth).mean()


def converted(pipe: Any) -> Any:
    """With another scheduler, as the documentation of diffusers writes it."""
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    return pipe


def test_a_scheduler_made_from_the_config_of_a_fused_one() -> None:
    pipe = fuse(CASES["txt2img"].make(), rules="exact", noise="philox")
    kind = type(pipe.scheduler)
    assert kind is not diffusers.DDIMScheduler
    assert isinstance(pipe.scheduler, diffusers.DDIMScheduler)
    assert kind.__name__ == "DDIMScheduler"
    # What its own class makes is fused as it is; what a stock class makes is stock.
    again = kind.from_config(pipe.scheduler.config)
    assert type(again) is kind
    assert again._fusion.manner == Manner("exact", "philox")
    assert type(diffusers.DDIMScheduler.from_config(pipe.scheduler.config)) is (
        diffusers.DDIMScheduler
    )
    assert again.config == diffusers.DDIMScheduler.from_config(pipe.scheduler.config).config


def test_a_converted_scheduler_is_fused_again() -> None:
    case = CASES["txt2img"]
    pipe = converted(case.make())
    stock = case.run(pipe)
    pipe = converted(fuse(case.make()))
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    assert_same_images(case.run(fuse(pipe)), stock)
    assert not pipe.scheduler.fallbacks


def test_a_pipeline_that_converts_its_scheduler_itself() -> None:
    """DDIMPipeline makes a stock DDIMScheduler of any, so it is fused after construction."""
    pipe = CASES["ddim"].make(fuse(diffusers.DDPMScheduler()))
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    fuse(pipe)
    assert type(pipe.scheduler) is type(fuse(diffusers.DDIMScheduler()))


def pickled(scheduler: Any) -> Any:
    return pickle.loads(pickle.dumps(scheduler))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
@pytest.mark.parametrize("stock", FAMILIES, ids=lambda stock: stock.__name__)
def test_a_copy_goes_on_where_the_walk_is(stock: Any, copied: Any) -> None:
    def walked(scheduler: Any) -> tuple[Any, Tensor]:
        timesteps = make_steps(scheduler, 6)
        draws = inspect.signature(scheduler.step).parameters.keys() & {"generator"}
        given = {name: generator(1) for name in draws}
        x = torch.randn(2, 4, 8, 8, generator=generator())
        for i, t in enumerate(timesteps):
            scheduler = copied(scheduler) if i == 3 else scheduler
            scale = getattr(scheduler, "scale_model_input", None)
            seen = x if scale is None else scale(x, t)
            x = scheduler.step(torch.tanh(seen), t, x, **given).prev_sample
        return scheduler, x

    if copied is pickled and stock is diffusers.SASolverScheduler:
        pytest.skip("a stock one cannot be pickled: it holds a lambda")
    ours, x = walked(fuse(configured(stock)))
    _, x_stock = walked(configured(stock))
    assert type(ours) is type(fuse(stock()))
    assert not ours.fallbacks
    torch.testing.assert_close(x, x_stock, rtol=0, atol=1e-5 * float(x_stock.abs().max()))
