"""Parts of a data set: ids of samples, samples that come twice, and results that combine."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from diffcore import BitsPerDim, GaussianDiffusion, PhiloxNoise, bits_per_dim
from support.bits import DIFFUSION, KEY, N, data, model, same_bits

OPTIONS = [{}, {"timesteps": 6}, {"timesteps": 6, "draws": 2}]
each_estimator = pytest.mark.parametrize("options", OPTIONS, ids=["exact", "strata", "draws"])


def evaluate(x, **options):
    return bits_per_dim(DIFFUSION, model, x, **{"noise": KEY, **options})


# ---- combine -------------------------------------------------------------------------------------


@each_estimator
def test_parts_combine_to_the_bits_of_one_run(options):
    whole, x = evaluate(data(), **options), data()
    for cuts in ([1], [5, 6], [2, 3, 7, 11]):
        starts, ends = [0, *cuts], [*cuts, N]
        parts = [
            evaluate(x[a:b], noise=KEY.for_samples(100 + a), batch_size=2, **options)
            for a, b in zip(starts, ends, strict=True)
        ]
        combined = BitsPerDim.combine(parts[::-1])
        same_bits(combined, whole, but=["model_calls"])
        assert combined.model_calls == sum(part.model_calls for part in parts)
        in_two_steps = BitsPerDim.combine([parts[0], BitsPerDim.combine(parts[1:])])
        same_bits(in_two_steps, combined)
        travelled = BitsPerDim.combine([pickle.loads(pickle.dumps(part)) for part in parts])
        same_bits(travelled, combined)


def test_combining_changes_no_part():
    parts = [evaluate(data()[:5]), evaluate(data()[5:], noise=KEY.for_samples(105))]
    before = copy.deepcopy(parts)
    first = BitsPerDim.combine(parts)
    same_bits(BitsPerDim.combine(parts), first)
    for part, old in zip(parts, before, strict=True):
        same_bits(part, old)
    same_bits(BitsPerDim.combine(parts[:1]), parts[0])


def test_results_that_do_not_combine():
    first, rest = data()[:5], data()[5:]
    part = evaluate(first)
    for match, other in (
        ("sample ids 100, 101, 102, ... more than once", evaluate(rest)),
        ("one timesteps, None, got 3", evaluate(rest, timesteps=3)),
        ("one draws, 1, got 2", evaluate(rest, draws=2)),
        ("one decoder, 'discretized', got 'gaussian'", evaluate(rest, decoder="gaussian")),
        ("one shared_noise, False, got True", evaluate(rest, noise=torch.randn(rest.shape))),
        ("data must have one shape", evaluate(rest[:, :, :2], noise=KEY.for_samples(105))),
        (
            "results must have one schedule",
            bits_per_dim(GaussianDiffusion(DIFFUSION.betas[:9]), model, rest, noise=KEY),
        ),
    ):
        with pytest.raises(ValueError, match=match):
            BitsPerDim.combine([part, other])
    with pytest.raises(ValueError, match="results must have at least one entry"):
        BitsPerDim.combine([])
    with pytest.raises(TypeError, match="results must be BitsPerDim, got float"):
        BitsPerDim.combine([1.0])


# ---- ids -----------------------------------------------------------------------------------------


@each_estimator
def test_ids_name_the_samples(options):
    """In any order, of a tensor or a loader, from a sequence, a key or the batches themselves."""
    whole = evaluate(data(), **options)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(5))
    x = data()[order]
    loader = DataLoader(TensorDataset(x, order), batch_size=5)
    for source, ids in (
        (x, {"sample_ids": order}),
        (x, {"sample_ids": order.tolist()}),
        (x, {"sample_ids": order.numpy()}),
        (x, {"noise": KEY.for_samples(100 + order)}),
        (loader, {"sample_ids": lambda batch: batch[1]}),
        (loader, {"sample_ids": order}),
    ):
        same_bits(evaluate(source, **ids, **options), whole, but=["model_calls"])


@each_estimator
def test_a_sample_that_comes_twice_counts_once(options):
    whole = evaluate(data(), **options)
    index = torch.cat([torch.arange(N), torch.tensor([0, 5, 5, 1])])
    found = evaluate(data()[index], sample_ids=index, batch_size=3, **options)
    same_bits(found, whole, but=["model_calls"])
    assert found.samples == N


def test_a_sampler_that_fills_up_counts_each_sample_once():
    """The ranks of a run in one process: N = 12 samples, of which a rank of five repeats some."""
    whole, parts, seen = evaluate(data()), [], set()
    for rank in range(5):
        sampler = DistributedSampler(range(N), num_replicas=5, rank=rank, shuffle=False)
        index = torch.tensor([i for i in sampler if i not in seen])
        seen |= set(index.tolist())
        loader = DataLoader(TensorDataset(data()[index]), batch_size=2)
        parts.append(evaluate(loader, sample_ids=index))
    same_bits(BitsPerDim.combine(parts), whole, but=["model_calls"])


# ---- resuming ------------------------------------------------------------------------------------


def test_a_run_with_ids_resumes(tmp_path):
    path = tmp_path / "bits.json"
    index = torch.cat([torch.arange(N), torch.tensor([0, 5])]).flip(0)
    options = {"sample_ids": index, "batch_size": 5, "timesteps": 6}
    whole = evaluate(data()[index], **options)
    calls = 0

    def stopping(x, t):
        nonlocal calls
        calls += 1
        if calls > 10:
            raise InterruptedError
        return model(x, t)

    with pytest.raises(InterruptedError):
        bits_per_dim(DIFFUSION, stopping, data()[index], noise=KEY, checkpoint=path, **options)
    assert json.loads(path.read_text())["batches"] == 1
    resumed = evaluate(data()[index], checkpoint=path, **options)
    same_bits(resumed, whole)
    rest = evaluate(data(20)[N:], noise=KEY.for_samples(100 + N), timesteps=6)
    assert BitsPerDim.combine([resumed, rest]).samples == 20  # it knows the ids of all batches
    with pytest.raises(ValueError, match="must belong to a run with sample_ids = "):
        evaluate(data()[index], checkpoint=path, **{**options, "sample_ids": index.flip(0)})
    keyed = {**options, "sample_ids": None, "noise": PhiloxNoise(5, 100 + index, 7)}
    with pytest.raises(ValueError, match="must belong to a run with noise = "):
        evaluate(data()[index], checkpoint=path, **keyed)


def test_a_batch_of_repeated_samples_alone_resumes(tmp_path):
    path, x = tmp_path / "bits.json", data(2)[[0, 0, 0, 1]]
    options = {"sample_ids": [0, 0, 0, 1], "batch_size": 1, "timesteps": 3}
    whole = evaluate(x, **options)
    same_bits(evaluate(x, checkpoint=path, **options), whole)
    same_bits(evaluate(x, checkpoint=path, **options), whole)
    assert whole.samples == 2
