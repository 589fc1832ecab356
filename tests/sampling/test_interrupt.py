"""Ctrl-C in the sampling loop ends it at once, and what the callback kept is enough to continue."""

from __future__ import annotations

import signal

import pytest
import torch

import diffcore
from diffcore import PhiloxNoise
from diffcore.solvers import NoiseLevels, ddim_table

SCHEDULE = diffcore.NoiseSchedule.from_betas(diffcore.make_betas("linear", 100, scale_to_1000=True))
LEVELS = NoiseLevels.from_schedule(SCHEDULE, range(99, 0, -10))


@pytest.mark.parametrize("stop", [1, 6, 10])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ctrl_c_ends_sample_within_one_call(stop, eta):
    table = ddim_table(LEVELS, eta=eta)
    key, calls, kept = PhiloxNoise(3), 0, {}
    start = key.tensor((4, 3, 8))

    def model(x, t):
        return torch.sin(x + t.reshape(-1, 1, 1) / 50)

    def interrupted(x, t):
        nonlocal calls
        calls += 1
        if calls == stop:
            signal.raise_signal(signal.SIGINT)
        return model(x, t)

    with pytest.raises(KeyboardInterrupt):
        diffcore.sample(interrupted, start, table, noise=key, callback=kept.update)
    assert calls == stop
    assert kept.get("i", -1) == stop - 2  # the last step that was completed
    expected = diffcore.sample(model, start, table, noise=key)
    x, first = (kept["x"], kept["i"] + 1) if kept else (start, 0)
    with torch.no_grad():
        for i in range(first, len(table)):
            t = table.timesteps[i].expand(len(x))
            x, _ = table.step(i, x, model(x, t), noise=key.at(1 + i) if eta else None)
    assert torch.equal(x, expected)
