"""The messages that the page of common errors lists are those that are raised."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import diffcore
from diffcore import solvers
from support.pages import ROOT

PAGE = ROOT / "docs/how-to/errors.md"
BETAS = diffcore.make_betas("linear", 1000)
D = diffcore.GaussianDiffusion(BETAS)
TABLE = solvers.euler_table([9.0, 3.0, 0.0])
IMAGES = torch.tensor([0.0, 1.0]).expand(4, 3, 8, 2)


@dataclass
class UNet2DOutput:
    sample: Tensor


def half(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x


def written(state: dict[str, Any]) -> None:
    state["x"] = 0


MISTAKES: list[Callable[[], Any]] = [
    lambda: diffcore.sample(lambda x, t: UNet2DOutput(x), IMAGES, TABLE),
    lambda: D.training_losses(lambda x, t: x.clone().requires_grad_(), IMAGES * 2 - 1, 3)[
        "loss"
    ].backward(),
    lambda: D.q_sample(IMAGES.byte(), 3),
    lambda: diffcore.GaussianDiffusion(BETAS).training_losses(half, IMAGES, 3),
    lambda: D.q_sample(IMAGES, torch.rand(4)),
    lambda: D.q_sample(IMAGES[:2], torch.zeros(2, 5, dtype=torch.int64)),
    lambda: diffcore.GaussianDiffusion(D.alphas_cumprod),
    lambda: diffcore.GaussianDiffusion(BETAS.clone().requires_grad_()),
    lambda: diffcore.add_noise(IMAGES, IMAGES, D.schedule.alpha, D.schedule.sigma),
    lambda: solvers.euler_table([1.0, 0.0], prediction_type="flow_prediction"),
    lambda: solvers.ddpm_table([0.0, 3.0, 9.0]),
    lambda: diffcore.sample(half, IMAGES, TABLE, guidance_scale=2.0),
    lambda: diffcore.sample(half, IMAGES, TABLE, callback=written),
]


def raised(mistake: Callable[[], Any]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            mistake()
        except Exception as error:
            return str(error)
    return "nothing"


def test_the_messages_on_the_page_are_those_that_are_raised() -> None:
    rows = re.findall(r"^\| (.*?) \| .* \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [m.group(1) for row in rows if (m := re.match(r"`(.*?)`", row))]
    messages = [raised(mistake) for mistake in MISTAKES]
    assert len(quoted) == len(messages)
    for listed, message in zip(quoted, messages, strict=True):
        # Dots stand for the sizes that are left out.
        pattern = re.escape(listed).replace(re.escape("..."), ".*")
        assert re.search(pattern, message), (listed, message)
