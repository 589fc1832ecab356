"""bits_per_dim with a checkpoint: going on to the same bits, and from no other run."""

from __future__ import annotations

import json

import pytest
import torch

from diffcore import GaussianDiffusion, PhiloxNoise, bits_per_dim
from support.bits import DIFFUSION, KEY, data, model, same_bits


class Stop(Exception):
    """The power went out."""


def stopping(after):
    calls = 0

    def predict(x, t):
        nonlocal calls
        calls += 1
        if calls > after:
            raise Stop
        return model(x, t)

    return predict


@pytest.mark.parametrize("options", [{}, {"timesteps": 6, "draws": 2}], ids=["exact", "strata"])
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("noise", [None, KEY], ids=["seeded", "key"])
def test_a_run_goes_on_to_the_same_bits(tmp_path, options, loaded, noise):
    path = tmp_path / "bits.json"
    source = {"data": data().split(5)} if loaded else {"data": data(), "batch_size": 5}

    def run(predict, checkpoint):
        return bits_per_dim(
            DIFFUSION, predict, **source, **options, noise=noise, checkpoint=checkpoint
        )

    torch.manual_seed(3)
    whole = run(model, None)
    each = whole.model_calls // 3
    torch.manual_seed(3)
    with pytest.raises(Stop):
        run(stopping(each + each // 2), path)  # in the middle of the second batch
    assert json.loads(path.read_text())["samples"] == 5
    torch.manual_seed(99)
    with pytest.raises(Stop):
        run(stopping(each), path)  # one more batch, then again
    assert json.loads(path.read_text())["samples"] == 10
    same_bits(run(model, path), whole)
    same_bits(run(stopping(0), path), whole)  # finished: no call
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "bits.json"

    def run(diffusion=DIFFUSION, **changes):
        options = {"noise": KEY, "timesteps": 4, "data": data(), "batch_size": 5, **changes}
        return bits_per_dim(diffusion, model, **options, checkpoint=path)

    run()
    for changes, name in (
        ({"timesteps": 5}, "timesteps = 5, got 4"),
        ({"timesteps": None}, "timesteps = None, got 4"),
        ({"draws": 2}, "draws = 2, got 1"),
        ({"decoder": "gaussian"}, "decoder = gaussian, got discretized"),
        ({"clip_denoised": False}, "clip = None, got 1.0"),
        ({"noise": PhiloxNoise(6)}, "noise"),
        ({"noise": None}, "noise"),
        ({"batch_size": 4}, "batch_size = 4, got 5"),
        ({"data": data(11)}, "data"),
        ({"diffusion": GaussianDiffusion(DIFFUSION.betas * 0.9)}, "betas"),
        ({"diffusion": GaussianDiffusion(DIFFUSION.betas, "sample")}, "prediction_type"),
    ):
        with pytest.raises(ValueError, match=f"must belong to a run with {name}"):
            run(**changes)
    path.write_text("{}")
    with pytest.raises(ValueError, match="must be a file written by bits_per_dim"):
        run()
    path.write_text("half a fi")
    with pytest.raises(ValueError, match="must be a file written by bits_per_dim"):
        run()
    path.unlink()
    loader = data().split(5)
    bits_per_dim(DIFFUSION, model, loader, timesteps=4, checkpoint=path)
    with pytest.raises(ValueError, match=r"first 3 batches had 12 samples, got 9 samples"):
        bits_per_dim(DIFFUSION, model, data().split(3)[:3], timesteps=4, checkpoint=path)
    for other in (loader[::-1], [*loader[:2], -loader[2]]):  # of which the last has two samples
        with pytest.raises(ValueError, match="in the same order"):
            bits_per_dim(DIFFUSION, model, other, timesteps=4, checkpoint=path)


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    class Shrinking(torch.nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = torch.nn.Parameter(torch.tensor(by))
            self.register_buffer("nothing", torch.zeros(0, dtype=torch.bfloat16))

        def forward(self, x, t):
            return self.by * model(x, t)

    def run(by):
        path = tmp_path / "bits.json"
        return bits_per_dim(DIFFUSION, Shrinking(by), data(), timesteps=4, checkpoint=path)

    same_bits(run(0.5), run(0.5))
    with pytest.raises(ValueError, match="must belong to a run with model = "):
        run(0.25)


def test_a_checkpoint_of_other_arguments_of_the_model_is_refused(tmp_path):
    def named(x, t, **kwargs):
        return model(x, t)

    def run(**kwargs):
        path = tmp_path / "bits.json"
        return bits_per_dim(
            DIFFUSION, named, data(), timesteps=4, model_kwargs=kwargs, checkpoint=path
        )

    given = {"y": torch.arange(3), "scale": 1.5, "held": object()}
    same_bits(run(**given), run(**{**given, "held": object()}))
    for change in ({"y": torch.arange(3) + 1}, {"scale": 2.0}, {"held": None}, {"more": 1}):
        with pytest.raises(ValueError, match="must belong to a run with model_kwargs = "):
            run(**{**given, **change})
