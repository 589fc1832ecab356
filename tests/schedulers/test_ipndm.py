"""IPNDMScheduler, fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffcore.solvers import NoiseLevels, ipndm_table
from support.fused import check_closer, check_walk, samples
from support.schedulers import step_errors, walk, within_bound

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

BETAS = [0.98, 0.9, 0.7, 0.66, 0.3, 0.1, 0.0]


def ipndm(**config: Any) -> Any:
    return lambda: diffusers.IPNDMScheduler(**config)


@pytest.mark.parametrize("steps", [1, 5, 10, 20, 50])
@pytest.mark.parametrize("start", [0, 3])
def test_ipndm(steps: int, start: int) -> None:
    """From pure noise, where alpha = 0 and diffusers divides by 1e-8; and from the middle."""
    within_bound(step_errors(ipndm(), steps, start=start), torch.float32)


def test_betas_of_the_user() -> None:
    within_bound(step_errors(ipndm(trained_betas=BETAS), 6), torch.float32)


@pytest.mark.parametrize("steps", [5, 20])
def test_16_bits(steps: int) -> None:
    check_closer(ipndm(), steps)


@pytest.mark.parametrize("where", [{}, {"begin_index": 4, "first": 4}, {"first": 4}], ids=str)
def test_a_walk(where: Any) -> None:
    check_walk(ipndm(), 12, **where)


@pytest.mark.parametrize("rules", ["diffusers", "exact"])
def test_it_is_our_table(rules: str) -> None:
    """Where its levels have alpha > 0, which ours needs."""
    scheduler = ipndm(trained_betas=BETAS)()
    scheduler.set_timesteps(6)
    alpha, sigma = scheduler.alphas.double(), scheduler.betas.double()
    levels = NoiseLevels(alpha, sigma, scheduler.timesteps.double(), "vp", float)
    wanted = ipndm_table(levels, euler_at_final=False, prediction_type="v_prediction")
    found = table_of(scheduler, rules=rules)
    ends = []
    for table in (wanted, found):
        x, history = samples().double(), ()
        for i in range(len(table)):
            x, history = table.step(i, x, torch.cos(x), history)
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)  # alpha^2 + sigma^2 = 1 in float32


def test_what_the_stock_scheduler_begins_it_ends() -> None:
    found = []
    for scheduler in (ipndm()(), fuse(ipndm()())):
        scheduler.set_timesteps(5)
        t = scheduler.timesteps
        x = scheduler.step(samples(), t[0], samples().round().long()).prev_sample
        found.append(scheduler.step(torch.cos(x), t[1], x).prev_sample)
    torch.testing.assert_close(*found)
    assert scheduler.fallbacks == {
        "sample of torch.int64": 1,
        "a walk that the stock scheduler began": 1,
    }
    scheduler.fallbacks.clear()
    scheduler.set_timesteps(5)
    walk(scheduler, samples())
    assert not scheduler.fallbacks


@pytest.mark.parametrize("steps", [2, 3, 6])
def test_a_second_walk_goes_on_from_the_outputs_of_the_first(steps: int) -> None:
    """Without ``set_timesteps`` diffusers keeps them, so that it begins at a higher order."""
    found = []
    for scheduler in (ipndm(trained_betas=BETAS)(), fuse(ipndm(trained_betas=BETAS)())):
        scheduler.set_timesteps(6)
        x = samples()
        for begin in (0, 6 - steps):
            scheduler._step_index = None
            scheduler.set_begin_index(begin)
            for t in scheduler.timesteps[begin : begin + steps]:
                x = scheduler.step(torch.cos(x), t, x).prev_sample
        found.append(x)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert not scheduler.fallbacks
