"""A recorded loop is the loop: on the CPU the same code unrecorded, on CUDA one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcore import PhiloxNoise
from diffcore.sampling import CapturedSampler, capture, sample
from support.bounds import assert_same_bits
from support.networks import SHAPE, TABLES, Network, options
from support.refusals import refused


def wanted(net: nn.Module, name: str, noise: PhiloxNoise, device: str, **options: Any) -> Tensor:
    table = TABLES[name]
    x = noise.tensor(SHAPE, device=device) * table.init_noise_sigma
    return sample(net, x, table, noise=noise, **options)


@pytest.mark.parametrize("name", TABLES)
def test_the_same_as_sample(name: str, device: str) -> None:
    net = Network().to(device)
    sampler = capture(net, TABLES[name], SHAPE, **options(device))
    ids, stream = torch.tensor([7, -1, 2**40], device=device), torch.tensor(5, device=device)
    seed = torch.tensor([9, 3], device=device)
    for noise in (
        PhiloxNoise(3),
        PhiloxNoise(-4, sample_ids=11, stream=2**31),
        PhiloxNoise(seed, sample_ids=ids, stream=stream),
        PhiloxNoise(seed[:1], sample_ids=ids[0], stream=stream),
        PhiloxNoise(3),
    ):
        found = sampler(noise)
        assert_same_bits(found, wanted(net, name, noise, device, **options(device)))


def test_other_arguments_need_no_new_recording(device: str) -> None:
    net, noise = Network().to(device), PhiloxNoise(1)
    given = options(device)
    sampler = capture(net, TABLES["ddpm"], SHAPE, **given)
    first = sampler(noise)
    y = torch.tensor([2, 2, 0], device=device)
    found = sampler(noise, guidance_scale=5.0, model_kwargs={"y": y})
    changed = {**given, "guidance_scale": 5.0, "model_kwargs": {"y": y}}
    assert_same_bits(found, wanted(net, "ddpm", noise, device, **changed))
    assert not torch.equal(found, first)
    assert given["model_kwargs"]["y"].tolist() == [0, 1, 2]  # the caller's own is not written to


def test_from_a_given_start(device: str) -> None:
    net, noise = Network().to(device), PhiloxNoise(1)
    x = torch.randn(SHAPE, device=device)
    kept = x.clone()
    sampler = capture(net, TABLES["dpmpp_2m"], SHAPE, **options(device))
    found = sampler(noise, x=x)
    assert_same_bits(found, sample(net, x, TABLES["dpmpp_2m"], **options(device)))
    assert_same_bits(x, kept)
    assert_same_bits(sampler(noise, x=x), found)  # the first result is not written to


def test_samples_have_memory_of_their_own(device: str) -> None:
    sampler = capture(Network().to(device), TABLES["ddpm"], SHAPE, **options(device))
    first = sampler(PhiloxNoise(1))
    kept = first.clone()
    sampler(PhiloxNoise(2))
    assert_same_bits(first, kept)


def test_torchs_generator_governs_the_default(device: str) -> None:
    sampler = capture(Network().to(device), TABLES["ddpm"], SHAPE, **options(device))
    torch.manual_seed(4)
    first, second = sampler(), sampler()
    torch.manual_seed(4)
    assert_same_bits(sampler(), first)
    assert not torch.equal(first, second)


def test_thresholds_and_dtypes(device: str) -> None:
    net, noise = Network().to(device).bfloat16(), PhiloxNoise(1)
    given = {**options(device), "dynamic_thresholding_ratio": 0.9}
    sampler = capture(net, TABLES["ddpm"], SHAPE, dtype=torch.bfloat16, **given)
    x = noise.tensor(SHAPE, dtype=torch.bfloat16, device=device)
    found = sampler(noise)
    assert found.dtype == torch.bfloat16
    assert_same_bits(found, sample(net, x, TABLES["ddpm"], noise=noise, **given))


def test_mistakes() -> None:
    net = Network()
    refused(TypeError, "table must be a SolverTable", capture, net, None, SHAPE)
    refused(ValueError, "uncond_kwargs", capture, net, TABLES["ddpm"], SHAPE, uncond_kwargs={})
    refused(ValueError, r"shape must be .*, got \(\)", capture, net, TABLES["ddpm"], ())
    sampler = capture(net, TABLES["ddpm"], SHAPE, model_kwargs={"y": torch.arange(3), "z": 1})
    assert isinstance(sampler, CapturedSampler)
    refused(TypeError, "noise must be a PhiloxNoise", sampler, torch.zeros(SHAPE))
    refused(ValueError, "first_element", sampler, PhiloxNoise(1, first_element=4))
    noise = PhiloxNoise(1)
    refused(ValueError, r"x must have the recorded shape, \(3, 2", sampler, noise, x=torch.zeros(2))
    refused(
        ValueError,
        "guidance_scale must be None, because it was not recorded",
        sampler,
        noise,
        guidance_scale=2.0,
    )
    for bad in ({"z": 2}, {"other": torch.zeros(3)}):
        refused(
            ValueError,
            "must be None, because it was not recorded as a tensor",
            sampler,
            noise,
            model_kwargs=bad,
        )
    refused(
        ValueError,
        r"\['y'\] must have the recorded shape",
        sampler,
        noise,
        model_kwargs={"y": torch.zeros(2)},
    )
