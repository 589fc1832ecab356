"""The noise of groups: keyed by sample and element as ever, or by the id of a group."""

from __future__ import annotations

import pickle

import pytest
import torch

from diffcore import PhiloxNoise, ops
from diffcore.noise import GroupNoise
from diffcore.ops import _groups
from support.folding import LAYOUTS, Layout

KEY = PhiloxNoise(11, stream=3)
IDS = torch.tensor([[4, 7, -1, 2**40, 0], [1, 2, 3, 4, 5]])


@pytest.mark.parametrize(
    "layout", [x for x in LAYOUTS.values() if x.levels == (2, 5)], ids=lambda x: str(x.shape)
)
def test_a_group_has_the_noise_of_a_sample_with_its_id(layout: Layout) -> None:
    key = KEY.for_groups(IDS, layout.dim)
    z = key.tensor(layout.shape)
    folded = layout.folded(z)
    wanted = KEY.for_samples(IDS.flatten()).tensor(folded.shape)
    assert torch.equal(folded, wanted)
    x, a = layout.samples(), torch.rand(layout.levels)
    assert torch.equal(
        ops.add_noise(x, key, a, 1.0, group_dim=layout.dim),
        ops.add_noise(x, z, a, 1.0, group_dim=layout.dim),
    )
    assert torch.equal(ops.add_noise(x, key, 0.5, 1.0), ops.add_noise(x, z, 0.5, 1.0))


def test_groups_of_another_dimension() -> None:
    """A key for frames in dimension 1, in a call whose levels are those of dimension 2."""
    x, a, ids = torch.randn(2, 5, 5, 8), torch.rand(2, 5), IDS
    key = KEY.for_groups(ids, 1)
    wanted = ops.add_noise(x, key.tensor(x.shape), a, 1.0, group_dim=2)
    assert torch.equal(ops.add_noise(x, key, a, 1.0, group_dim=2), wanted)


def test_a_window_that_moves_gets_the_same_frames() -> None:
    shape = (2, 3, 5, 4, 6)
    frames = torch.arange(9)
    first, then = (
        KEY.for_groups(torch.stack((frames[at : at + 5], 100 + frames[at : at + 5])), 2).tensor(
            shape
        )
        for at in (0, 3)
    )
    assert torch.equal(first[:, :, 3:], then[:, :, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["video", "frames first", "tokens"])
def test_the_kernel_generates_it(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = LAYOUTS[name]
    x, a = layout.samples(dtype), torch.rand(layout.levels)
    wanted = ops.add_noise(x, KEY.tensor(x.shape, dtype=dtype), a, 1.0, group_dim=layout.dim)
    monkeypatch.setattr(PhiloxNoise, "tensor", None)  # no tensor of noise is made
    assert torch.equal(ops.add_noise(x, KEY, a, 1.0, group_dim=layout.dim), wanted)


def test_rows_begin_inside_their_samples() -> None:
    groups = _groups.Groups.of("x", torch.empty(2, 3, 5, 4, 6), 2)
    cpu = torch.device("cpu")
    by_sample = _groups._begins(groups.counts, groups.run, False, cpu).view(2, 3, 5)
    by_group = _groups._begins(groups.counts, groups.run, True, cpu).view(2, 3, 5)
    element = torch.arange(3 * 5 * 24).view(3, 5, 24)[..., 0]
    assert torch.equal(by_sample, element.expand(2, 3, 5))
    assert torch.equal(by_group, (torch.arange(3) * 24).view(1, 3, 1).expand(2, 3, 5))


def test_noise_beyond_2_to_34_is_refused() -> None:
    key = PhiloxNoise(0, first_element=2**34 - 8)
    with pytest.raises(ValueError, match="2\\^34"):
        ops.add_noise(torch.zeros(1, 4, 4), key, torch.rand(1, 4), 1.0, group_dim=1)


@pytest.mark.parametrize("shape", [(0, 3, 5, 8), (2, 3, 0, 8), (2, 0, 5, 8), (2, 3, 5, 0)], ids=str)
def test_no_samples_groups_or_elements(shape: tuple[int, ...]) -> None:
    x, a = torch.zeros(shape), torch.rand(shape[0], shape[2])
    assert ops.add_noise(x, KEY, a, 1.0, group_dim=2).shape == shape


def test_the_key_as_a_value() -> None:
    key = KEY.for_groups(IDS, 2)
    assert isinstance(key, GroupNoise)
    assert key == KEY.for_groups(IDS.clone(), 2) == pickle.loads(pickle.dumps(key))
    assert hash(key) == hash(KEY.for_groups(IDS, 2))
    assert key != KEY.for_groups(IDS, 1)
    assert key != KEY.for_samples(IDS.flatten())
    assert torch.equal(key.group_ids, IDS)
    assert key.dim == 2
    at = key.at(9)
    assert torch.equal(at.tensor((2, 3, 5, 4)), KEY.at(9).for_groups(IDS, 2).tensor((2, 3, 5, 4)))
    assert key.for_samples(3) == KEY.for_samples(3)
    assert "for_groups" in repr(key)


def test_timesteps_and_uniform_numbers_of_groups() -> None:
    key, samples = KEY.for_groups(IDS, 2), KEY.for_samples(IDS.flatten())
    assert torch.equal(key.timesteps(1000, 2), samples.timesteps(1000, 10).view(2, 5))
    u = key.uniform((2, 3, 5, 4), -1.0, 1.0)
    wanted = samples.uniform((10, 3, 4), -1.0, 1.0).view(2, 5, 3, 4).movedim(1, 2)
    assert torch.equal(u, wanted)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"group_ids must have shape \[B, G\], got \(5,\)"):
        KEY.for_groups(IDS[0], 1)
    with pytest.raises(TypeError, match=r"group_ids must be integers, got torch.float32"):
        KEY.for_groups(IDS.float(), 1)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        KEY.for_groups(IDS, 0)
    key = KEY.for_groups(IDS, 2)
    for shape in ((2, 3, 4, 8), (3, 3, 5, 8), (2, 3)):
        with pytest.raises(ValueError, match="shape must have 2 samples with 5 groups"):
            key.tensor(shape)
    with pytest.raises(ValueError, match="has no shards"):
        key.for_shard((2, 3, 5), (2, 3, 5), (0, 0, 0))
