"""Noise keys in data loaders, and in files."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from diffcore import PhiloxNoise
from support.bounds import assert_same_bits
from support.refusals import refused


class Keyed(Dataset[tuple[Tensor, PhiloxNoise]]):
    """Samples with their keys, as a data set would give them."""

    def __init__(self, key: PhiloxNoise, count: int) -> None:
        self.key, self.count = key, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Tensor, PhiloxNoise]:
        return torch.full((2, 3), float(i)), self.key.for_samples(i)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_makes_one_key_of_a_batch(workers: int) -> None:
    key = PhiloxNoise(torch.tensor([7, 1]), stream=3)
    loader = DataLoader(Keyed(key, 7), batch_size=3, num_workers=workers)
    batches = list(loader)
    assert [type(noise) for _, noise in batches] == [PhiloxNoise] * 3
    noise = torch.cat([noise.tensor(x.shape) for x, noise in batches])
    assert_same_bits(noise, key.tensor((7, 2, 3)))
    assert torch.equal(batches[2][1].sample_ids, torch.tensor([6]))


def test_keys_collate_wherever_they_are() -> None:
    key = PhiloxNoise(7)
    shard = key.for_shard((4, 2, 3), (4, 2, 2), (0, 0, 1))
    ids = [5, torch.tensor(-1), torch.tensor([2**40]), np.int64(0)]
    for made in (key, shard, key.at(torch.tensor(3))):
        batch = default_collate([{"noise": made.for_samples(i), "x": 1.0} for i in ids])
        assert batch["noise"] == made.for_samples([5, -1, 2**40, 0])
        assert default_collate([(made,)]) == [made.for_samples([0])]


def test_keys_that_do_not_collate() -> None:
    key = PhiloxNoise(7)
    for others in (
        [key, PhiloxNoise(8)],
        [key, key.at(1)],
        [key, PhiloxNoise(7, first_element=4)],
        [key, key.for_shard((4, 2, 3), (4, 2, 2), (0, 0, 1))],
    ):
        refused(ValueError, "differ in sample_ids only", default_collate, others)
    several = [key, key.for_samples([1, 2])]
    refused(ValueError, "must have one sample id, got 2", default_collate, several)


def load(saved: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, **options)


def test_keys_in_checkpoints() -> None:
    keys = [
        PhiloxNoise(5),
        PhiloxNoise(-5, sample_ids=2**40, stream=7, first_element=8),
        PhiloxNoise(torch.tensor([5, 2]), [4, -1, 9], torch.tensor(3)),
    ]
    for key in keys:
        assert load({"step": 3, "noise": key}, weights_only=True)["noise"] == key
        assert load([key], weights_only=False) == [key]
        assert key.__reduce__()[0] is PhiloxNoise  # no private name in files


def test_files_of_earlier_versions() -> None:
    old = b"\x80\x02cdiffcore.noise\n_rebuilt\nq\x00(K\x05K\x02K\x03K\x08tq\x01Rq\x02."
    assert pickle.loads(old) == PhiloxNoise(5, sample_ids=2, stream=3, first_element=8)


def test_moving_a_key() -> None:
    key = PhiloxNoise(5, [1, 2])
    there = key.to("meta")
    assert isinstance(there.sample_ids, Tensor)
    assert there.sample_ids.device.type == "meta"
    assert (there.seed, there.stream) == (5, 0)
    numbers = PhiloxNoise(5, 3)
    assert numbers.to("meta") is numbers
    assert copy.deepcopy(key) == key.to("cpu")
