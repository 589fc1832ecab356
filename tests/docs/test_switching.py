"""What the how-to pages claim about diffusers, with the code of the pages."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import diffcore
from diffcore import solvers
from support.pages import ROOT, blocks

diffusers = pytest.importorskip("diffusers", reason="what the pages claim is about diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

SCALED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def page(name: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for _, code in blocks(ROOT / "docs" / "how-to" / name):
        exec(code, namespace)
    return namespace


def bent(x: Tensor, t: Any) -> Tensor:
    return torch.tanh(x) * 0.7 + 0.2 * torch.cos(3 * x) * (float(t.flatten()[0]) + 1) / 1000


def test_inversion_is_that_of_diffusers() -> None:
    of_page = page("inversion.md")
    scheduler = diffusers.DDIMInverseScheduler(**LINEAR, clip_sample=False)
    scheduler.set_timesteps(50)
    x = of_page["image"]
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t), t, x).prev_sample
    levels = of_page["as_diffusers"]
    for ours in (
        of_page["invert"](bent, of_page["image"], levels),
        diffcore.sample(bent, of_page["image"], solvers.ddim_table(levels)),
    ):
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_the_training_lines_give_one_loss() -> None:
    of_page = page("from-diffusers.md")
    latents, t, condition = (of_page[name] for name in ("latents", "t", "condition"))
    noise = torch.randn_like(latents)
    scheduler = diffusers.DDPMScheduler(1000, **SCALED)
    noisy = scheduler.add_noise(latents, noise, t)
    target = scheduler.get_velocity(latents, noise, t)
    theirs = F.mse_loss(of_page["unet"](noisy, t, condition).sample, target)
    ours = of_page["diffusion"].training_losses(
        of_page["model"], latents, t, noise=noise, model_kwargs={"condition": condition}
    )
    torch.testing.assert_close(ours["loss"].mean(), theirs, rtol=1e-5, atol=0)


def test_the_sampling_lines_give_one_result() -> None:
    of_page = page("from-diffusers.md")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, **SCALED, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(30)
    x = start = torch.randn(4, 4, 8, 8)
    for t in scheduler.timesteps:
        x = scheduler.step(bent(x, t), t, x).prev_sample
    ours = diffcore.sample(bent, start, of_page["table"])
    torch.testing.assert_close(ours, x, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_starting_from_an_image_is_img2img(spacing: str) -> None:
    # As the pipelines do: the last int(strength * steps) timesteps, from the image noised there.
    image, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 8, 8)
    scheduler = diffusers.DDIMScheduler(**LINEAR, timestep_spacing=spacing)
    scheduler.set_timesteps(20)
    rest = scheduler.timesteps[8:]
    x = scheduler.add_noise(image, noise, rest[:1].expand(2))
    for t in rest:
        x = scheduler.step(bent(x, t), t, x).prev_sample

    schedule = diffcore.NoiseSchedule.from_betas(diffcore.make_betas("linear", 1000))
    timesteps = diffcore.respaced_timesteps(1000, 20, spacing)
    levels = solvers.NoiseLevels.from_schedule(schedule, timesteps).skip(8)
    table = solvers.ddim_table(levels, rederive_epsilon=False, clip_range=1.0)
    start = diffcore.add_noise(image, noise, float(levels.alpha[0]), float(levels.sigma[0]))
    torch.testing.assert_close(diffcore.sample(bent, start, table), x, rtol=1e-4, atol=1e-4)


def test_every_fused_scheduler_is_on_the_page() -> None:
    from diffcore.diffusers.registry import FAMILIES

    text = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    assert [kind.__name__ for kind in FAMILIES if f"`{kind.__name__}`" not in text] == []


def test_the_page_of_fused_schedulers_names_tables_that_exist() -> None:
    text = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `\w+Scheduler`.*", text, re.MULTILINE)
    assert len(rows) > 20
    classes = {name for row in rows for name in re.findall(r"\w+Scheduler", row)}
    assert [name for name in classes if not hasattr(diffusers, name)] == []
    tables = {name for row in rows for name in re.findall(r"\w+_table", row)}
    assert [name for name in tables if not hasattr(solvers, name)] == []
