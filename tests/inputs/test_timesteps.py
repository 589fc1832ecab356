"""Timesteps as an int, a list, an array, 0-dim, one-element or int32 tensors: one meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore.coefficients import vlb_coefficients
from support.toys import BETAS, half

D = diffcore.GaussianDiffusion(BETAS, "v_prediction")
SHORT = D.respace([2, 5, 9, 11])
X, Y, NOISE = (torch.linspace(-1, k, 12).view(2, 6) for k in (1, 2, -2))
TABLE = D.schedule.table
STEPS = torch.rand(20, 8, dtype=torch.float64)
VLB = vlb_coefficients(
    D.schedule.alpha, D.schedule.sigma, prediction_type="v_prediction", decoder="gaussian"
)
KEY = diffcore.PhiloxNoise(5)

Call = Callable[[Any], Any]
METHODS: dict[str, Call] = {
    "q_sample": lambda t: D.q_sample(X, t, NOISE),
    "q_mean_variance": lambda t: torch.stack(D.q_mean_variance(X, t)),
    "q_posterior": lambda t: torch.stack(D.q_posterior_mean_variance(X, Y, t)),
    "training_losses": lambda t: D.training_losses(half, X, t, noise=NOISE)["loss"],
    "weights": lambda t: D.training_losses(half, X, t, noise=NOISE, weights=torch.arange(20.0))[
        "loss"
    ],
    "p_mean_variance": lambda t: torch.stack([*D.p_mean_variance(half, X, t).values()]),
    "p_sample": lambda t: D.p_sample(half, X, t, noise=NOISE)["sample"],
    "ddim_sample": lambda t: D.ddim_sample(half, X, t, eta=0.5, noise=NOISE)["sample"],
    "ddim_reverse_sample": lambda t: D.ddim_reverse_sample(half, X, t)["sample"],
    "vb_terms": lambda t: D.vb_terms_bpd(half, X, Y, t, decoder="gaussian")["output"],
    "respaced": lambda t: SHORT.p_sample(half, X, t, noise=NOISE)["sample"],
}
OPS: dict[str, Call] = {
    "q_sample": lambda t: diffcore.q_sample(X, t, NOISE, TABLE),
    "q_sample-key": lambda t: diffcore.q_sample(X, t, KEY, TABLE),
    "q_sample-target": lambda t: diffcore.q_sample(
        X, t, NOISE, TABLE, return_target="v_prediction"
    )[1],
    "add_noise": lambda t: diffcore.add_noise(X, NOISE, TABLE[:, 0], TABLE[:, 1], t=t),
    "velocity": lambda t: diffcore.velocity(X, NOISE, TABLE[:, 0], TABLE[:, 1], t=t),
    "linear": lambda t: diffcore.linear_combination(X, Y, TABLE, t=t),
    "loss": lambda t: diffcore.denoising_loss(X, Y, NOISE, weight=TABLE[:, 0], t=t),
    "reverse_step": lambda t: diffcore.reverse_step(X, Y, STEPS, t=t),
    "reverse_step-noise": lambda t: diffcore.reverse_step(X, Y, STEPS, t=t, noise=NOISE),
    "log_prob": lambda t: diffcore.step_log_prob(X, Y, NOISE, STEPS, t=t),
    "threshold": lambda t: diffcore.dynamic_threshold(
        X, Y, STEPS, t=t, ratio=0.5, sample_max_value=2.0
    ),
    "vlb": lambda t: diffcore.vlb_term(X, Y, VLB, t=t, noise=NOISE),
    "vlb-x_t": lambda t: diffcore.vlb_term(X, Y, VLB, t=t, x_t=NOISE),
}
ALL = {**{f"method-{k}": v for k, v in METHODS.items()}, **{f"op-{k}": v for k, v in OPS.items()}}
SAME = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3])]
EACH = [[3, 1], (3, 1), np.array([3, 1]), np.array([3, 1], np.int16), [np.int64(3), np.int64(1)]]
FORMS = [torch.tensor([3, 1], dtype=torch.int32), torch.tensor([1, 3]).flip(0)]


@pytest.mark.parametrize("name", ALL)
def test_every_form_means_the_same(name: str) -> None:
    call = ALL[name]
    for forms, t in ((SAME, torch.tensor([3, 3])), ([*EACH, *FORMS], torch.tensor([3, 1]))):
        expected = call(t)
        for form in forms:
            assert torch.equal(call(form), expected)


@pytest.mark.parametrize("name", ALL)
def test_what_is_no_timestep_is_named(name: str) -> None:
    many = torch.zeros(2, 5, dtype=torch.int64)
    for wrong in (1.0, np.float64(1.0), True, "1", [1.0, 2.0], np.array([1.0, 2.0]), [[1], "a"]):
        with pytest.raises(TypeError, match=r"\bt must "):
            ALL[name](wrong)
    for wrong in (20, [3, 20], np.int64(-1), [3, 1, 2], many):
        with pytest.raises(ValueError, match=r"\bt must "):
            ALL[name](wrong)


def test_the_model_gets_one_timestep_for_each_sample() -> None:
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return half(x, t)

    for t in (3, torch.tensor(3), torch.tensor([3]), [3, 3], np.array([3, 3], np.int32)):
        D.p_sample(model, X, t)
        D.training_losses(model, X, t)
    for t in seen:
        assert t.dtype == torch.int64
        assert t.tolist() == [3, 3]
        assert t.is_contiguous()


def test_messages_say_what_to_write_instead() -> None:
    with pytest.raises(TypeError, match=r"got torch.float32; timesteps are the integers 0 .. 19"):
        D.q_sample(X, torch.rand(2))
    with pytest.raises(ValueError, match=r"got \(2, 5\); .* pass \[B, F\] with group_dim"):
        D.q_sample(X, torch.zeros(2, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"t must be on cpu, .* got meta; t.to\(x_start.device\)"):
        D.q_sample(X, torch.zeros(2, dtype=torch.int64, device="meta"))


def test_ints_in_a_row_are_numbers() -> None:
    row = (1, 0, 0, 0, 1, 0, -1, 1)
    floats = tuple(map(float, row))
    mixed = (np.float32(1), 0, 0.0, np.int64(0), 1.0, 0, -1, 1)
    for given in (row, mixed):
        for noise in (None, NOISE, KEY):
            assert torch.equal(
                diffcore.reverse_step(X, Y, given, noise=noise),
                diffcore.reverse_step(X, Y, floats, noise=noise),
            )
        assert torch.equal(
            diffcore.step_log_prob(X, Y, X, given), diffcore.step_log_prob(X, Y, X, floats)
        )
    with pytest.raises(TypeError, match=r"c_m must be a number or a torch.Tensor, got str"):
        diffcore.reverse_step(X, Y, (1, "a", 0, 0, 1, 0, -1, 1))
