"""What several processes do with noise keys: the results of one process, by any number of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which DDP imports: once, before the ranks part
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import diffcore
from diffcore import BitsPerDim, PhiloxNoise, bits_per_dim, sampling, solvers
from diffcore.likelihood import VDMBound, vdm_bound
from support.bits import DIFFUSION, KEY, data, model, same_bits

COUNT = 11  # of which no number of ranks but one is a divisor
SIGMAS = [4.0, 2.0, 1.0, 0.5, 0.0]


def own(count: int = COUNT) -> Tensor:
    """The indices of this rank's samples: consecutive ones, as evenly as they go."""
    return torch.arange(count).tensor_split(dist.get_world_size())[dist.get_rank()]


def together(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def evaluate(x: Any, **options: Any) -> BitsPerDim:
    return bits_per_dim(DIFFUSION, model, x, **{"noise": KEY, **options})


# ---- bits_per_dim ------------------------------------------------------------------------------


def bits_of_consecutive_samples(world: int) -> None:
    ids = own()
    key = KEY.for_samples(100 + int(ids[0]))
    for options in ({}, {"timesteps": 5}, {"timesteps": 5, "draws": 2}):
        whole = evaluate(data(COUNT), **options)
        found = evaluate(data(COUNT)[ids], noise=key, batch_size=2, **options, **group())
        same_bits(found, whole, but=["model_calls"])


def bits_of_a_distributed_sampler(world: int) -> None:
    """It fills the last rank's samples up with the first ones, which count once."""
    whole = evaluate(data(COUNT), timesteps=5)
    dataset = TensorDataset(data(COUNT), torch.arange(COUNT))
    for shuffle in (False, True):
        sampler = DistributedSampler(dataset, shuffle=shuffle)
        loader = DataLoader(dataset, batch_size=2, sampler=sampler)
        found = evaluate(loader, timesteps=5, sample_ids=lambda batch: batch[1], **group())
        same_bits(found, whole, but=["model_calls"])
        assert found.samples == COUNT
        key = KEY.for_samples(100 + torch.tensor(list(sampler)))
        keyed = evaluate(loader, timesteps=5, noise=key, **group())
        same_bits(keyed, found)


def bits_of_uneven_parts(world: int) -> None:
    """The first rank has everything but one sample, and the others share the last one."""
    ids = torch.arange(COUNT - 1) if dist.get_rank() == 0 else torch.tensor([COUNT - 1])
    found = evaluate(data(COUNT)[ids], sample_ids=ids, batch_size=3, **group())
    same_bits(found, evaluate(data(COUNT)), but=["model_calls"])


def bits_of_a_rank_without_samples(world: int) -> None:
    ids = torch.arange(COUNT if dist.get_rank() == 1 else 0)
    found = evaluate(data(COUNT)[ids], sample_ids=ids, **group())
    same_bits(found, evaluate(data(COUNT)))


def bits_with_default_noise(world: int) -> None:
    """All ranks use the first rank's seed, whatever their own generators hold."""
    torch.manual_seed(0)
    whole = bits_per_dim(DIFFUSION, model, data(COUNT))
    torch.manual_seed(dist.get_rank())
    ids = own()
    found = bits_per_dim(DIFFUSION, model, data(COUNT)[ids], sample_ids=ids, **group())
    same_bits(found, whole, but=["model_calls"])


def bits_by_hand(world: int) -> None:
    ids = own()
    results = together(evaluate(data(COUNT)[ids], sample_ids=ids))
    same_bits(BitsPerDim.combine(results), evaluate(data(COUNT)), but=["model_calls"])


def bits_of_a_run_that_stopped(world: int) -> None:
    """The ranks stop at different batches; each has its own file."""
    ids = own(4 * world)
    x, options = data(4 * world), {"batch_size": 1, "timesteps": 3, "noise": KEY}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bits.json"
        # Without a group a rank can stop on its own, as if all had been killed just then.
        settings = {"sample_ids": ids, "checkpoint": path, **options}
        stop, calls = 4 * (1 + dist.get_rank() % 3), 0

        def stopping(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > stop:
                raise InterruptedError
            return model(x, t)

        try:
            bits_per_dim(DIFFUSION, stopping, x[ids], **settings)
        except InterruptedError:
            assert path.exists()
        found = bits_per_dim(DIFFUSION, model, x[ids], **settings, **group())
    whole = bits_per_dim(DIFFUSION, model, x, **options)
    same_bits(found, whole)


def one_id_for_two_samples(world: int) -> None:
    """Every rank counts from 0, which would drop all samples but the first rank's in silence."""
    message = ""
    try:
        evaluate(data(COUNT)[own()], **group())
    except ValueError as error:
        message = str(error)
    assert "got id 100 for two samples that differ" in message
    try:
        bits_per_dim(DIFFUSION, model, data(COUNT)[own()], **group())
    except ValueError as error:
        message = str(error)
    assert "sample_ids must be given with process_group" in message


def vdm_bounds(world: int) -> None:
    ids, x = own(), data(COUNT, torch.float64)

    def bound(ids: Tensor) -> VDMBound:
        key = KEY.for_samples(ids)
        t = key.at(2).uniform((len(ids),), dtype=torch.float64)
        return vdm_bound(vdm_model, x[ids], gamma_min=-8.0, gamma_max=5.0, t=t, noise=key)

    whole, found = bound(torch.arange(COUNT)), VDMBound.combine(together(bound(ids)))
    assert torch.equal(found.total_bpd, whole.total_bpd)
    assert found.total_bpd.mean() == whole.total_bpd.mean()


def vdm_model(z: Tensor, gamma: Tensor) -> Tensor:
    return 0.7 * z + 0.2 * torch.sin(z + gamma.reshape(-1, 1, 1, 1))


# ---- sampling ----------------------------------------------------------------------------------


def sampling_by_sample(world: int) -> None:
    table = solvers.euler_ancestral_table(SIGMAS, prediction_type="sample")

    def images(key: PhiloxNoise, shape: tuple[int, ...]) -> Tensor:
        x = key.tensor(shape) * 4
        parts = [
            diffcore.sample(model, x, table, noise=key),
            sampling.sample_dpmpp_2m_sde(model, x, SIGMAS, noise_sampler=key, disable=True),
            DIFFUSION.p_sample_loop(model, shape, noise=key),
            DIFFUSION.ddim_sample_loop(model, shape, num_steps=5, eta=1.0, noise=key),
        ]
        return torch.stack(parts, 1)

    whole = images(PhiloxNoise(3, torch.arange(COUNT)), (COUNT, 1, 3, 3))
    ids = own()
    found = together(images(PhiloxNoise(3, ids), (len(ids), 1, 3, 3)))
    assert torch.equal(torch.cat(found), whole)


def sampling_by_row(world: int) -> None:
    """Context parallelism: each rank has some rows of every image."""
    shape = (2, 3, 4 * world - 1, 5)
    rows = torch.arange(shape[2]).tensor_split(world)[dist.get_rank()]
    local = (*shape[:2], len(rows), shape[3])
    key = PhiloxNoise(3)
    shard = key.for_shard(shape, local, (0, 0, int(rows[0]), 0))
    found = together(DIFFUSION.p_sample_loop(model, local, noise=shard))
    assert torch.equal(torch.cat(found, 2), DIFFUSION.p_sample_loop(model, shape, noise=key))


# ---- training ----------------------------------------------------------------------------------


class Indexed(Dataset[tuple[Tensor, PhiloxNoise]]):
    """Images with the keys of their noise."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, i: int) -> tuple[Tensor, PhiloxNoise]:
        return data(24)[i], PhiloxNoise(9, i)


def train(net: torch.nn.Module, batches: list[tuple[Tensor, PhiloxNoise]], first: int = 0) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step, (x, noise) in enumerate(batches, first):
        t = noise.at(2 * step).timesteps(DIFFUSION.num_timesteps, len(x))
        losses = DIFFUSION.training_losses(lambda x, t: net(x), x, t, noise=noise.at(2 * step + 1))[
            "loss"
        ]
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()


def training_by_rank(world: int) -> None:
    """DDP over shards of each batch trains as one process does, to the rounding of sums."""
    dataset, size = Indexed(), 12

    def network() -> torch.nn.Module:
        torch.manual_seed(1)
        return torch.nn.Conv2d(1, 1, 3, padding=1).double()

    indices = torch.arange(24).split(size)
    alone, ranked = network(), DistributedDataParallel(network())
    x = data(24).double()
    train(alone, [(x[i], PhiloxNoise(9, i)) for i in indices])
    mine = [i.tensor_split(world)[dist.get_rank()] for i in indices]
    loader = DataLoader(dataset, batch_sampler=[i.tolist() for i in mine])
    batches = [(x.double(), noise) for x, noise in loader]
    for i, (_, noise) in zip(mine, batches, strict=True):
        assert noise == PhiloxNoise(9, i)
    train(ranked, batches)
    for a, b in zip(alone.parameters(), ranked.module.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-14)


def training_that_resumes(world: int) -> None:
    """Noise and timesteps of a step need no state: stop after one of two, and go on."""
    i = torch.arange(24).split(12)
    mine = [k.tensor_split(world)[dist.get_rank()] for k in i]
    batches = [(data(24)[k], PhiloxNoise(9, k)) for k in mine]
    nets = []
    for parts in ([(batches, 0)], [(batches[:1], 0), (batches[1:], 1)]):
        torch.manual_seed(1)
        net: torch.nn.Module = torch.nn.Conv2d(1, 1, 3, padding=1)
        for number, (part, first) in enumerate(parts):
            if number:  # another process, with another generator
                saved, net = net, torch.nn.Conv2d(1, 1, 3, padding=1)
                net.load_state_dict(saved.state_dict())
                torch.manual_seed(77)
            ddp = DistributedDataParallel(net)
            train(ddp, part, first)
        nets.append(net)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(a, b)


def the_trap_of_one_seed(world: int) -> None:
    """After one manual_seed on all ranks, default noise is the same on all of them."""
    torch.manual_seed(0)
    x = torch.zeros(2, 1, 3, 3)
    drawn = together(
        diffcore.q_sample(x, 5, PhiloxNoise.from_generator(), DIFFUSION.schedule.table)
    )
    assert all(torch.equal(one, drawn[0]) for one in drawn)
    ranked = together(PhiloxNoise(0).for_samples(2 * dist.get_rank()).tensor(x.shape))
    assert len({float(one.sum()) for one in ranked}) == world


# ------------------------------------------------------------------------------------------------


def group() -> dict[str, Any]:
    return {"process_group": dist.group.WORLD, "progress": False}


def cells(world: int) -> dict[str, Callable[[int], None]]:
    """All checks by name."""
    del world
    found = (
        *(bits_of_consecutive_samples, bits_of_a_distributed_sampler, bits_of_uneven_parts),
        *(bits_of_a_rank_without_samples, bits_with_default_noise, bits_by_hand),
        *(bits_of_a_run_that_stopped, one_id_for_two_samples, vdm_bounds),
        *(sampling_by_sample, sampling_by_row, training_by_rank, training_that_resumes),
        the_trap_of_one_seed,
    )
    return {check.__name__: check for check in found}
