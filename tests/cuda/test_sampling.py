"""Sampling on CUDA: no waiting, the same bits as on the CPU where noise is concerned, one graph."""

from __future__ import annotations

import pytest
import torch

import diffcore
from diffcore import PhiloxNoise, ops
from diffcore.sampling import capture, sample
from support.bounds import assert_same_bits
from support.networks import LEVELS, SHAPE, TABLES, Network, options
from support.waiting import no_waiting

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("name", TABLES)
def test_sampling_does_not_wait(name: str) -> None:
    net, table = Network().cuda(), TABLES[name]
    x = torch.randn(SHAPE, device="cuda")
    given = options("cuda")

    def once() -> torch.Tensor:
        return sample(net, x, table, noise=PhiloxNoise(3), **given)

    wanted = once()  # copies the table
    with no_waiting():
        found = once()
    assert_same_bits(found, wanted)


def test_a_recorded_loop_does_not_wait() -> None:
    sampler = capture(Network().cuda(), TABLES["dpmpp_2m"], SHAPE, **options("cuda"))
    seed = torch.tensor([3], device="cuda")
    sampler(PhiloxNoise(seed))
    with no_waiting():
        sampler(PhiloxNoise(seed))
        sampler(PhiloxNoise(7))


@pytest.mark.parametrize("name", TABLES)
def test_every_row_at_a_counter(name: str) -> None:
    """One captured step, replayed with a counter on the device, is the walk."""
    table = TABLES[name].to("cuda")
    x0, m = torch.randn(2, *SHAPE, device="cuda")
    noise = PhiloxNoise(3)
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    stream = torch.zeros(1, dtype=torch.int64, device="cuda")
    x, history = x0.clone(), tuple(x0.clone() for _ in range(table.history))

    def step() -> None:
        after, left = table.step(counter, x, m * x, history, noise=noise.at(stream))
        x.copy_(after)
        for h, new in zip(history, left, strict=True):
            h.copy_(new)
        counter.add_(1)
        stream.add_(1)

    diffcore.warm_up()
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    counter.zero_()
    stream.zero_()
    x.copy_(x0)
    for _ in range(len(table)):
        graph.replay()
    wanted, known = x0, ()
    for i in range(len(table)):
        z = noise.at(i).tensor(SHAPE, device="cuda")
        wanted, known = table.step(i, wanted, m * wanted, known, noise=z)
    assert_same_bits(x, wanted)


def test_the_threshold_of_a_step_does_not_wait() -> None:
    x, m = torch.randn(2, 4, 3, 100, 100, device="cuda")
    row = TABLES["ddpm"].rows[0].coefficients
    ops.dynamic_threshold(x, m, row)
    with no_waiting():
        s = ops.dynamic_threshold(x, m, row)
        ops.reverse_step(x, m, row, threshold=s)


def test_a_loop_on_cuda_is_the_loop_on_the_cpu() -> None:
    """The same noise; steps and a model of plain arithmetic differ in roundings only."""

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.9 * x

    for table in (TABLES["ddpm"], diffcore.solvers.dpmpp_3m_sde_table(LEVELS)):
        noise = PhiloxNoise(5)
        x = noise.tensor(SHAPE, dtype=torch.float64)
        cpu, cuda = (sample(model, x.to(d), table, noise=noise).cpu() for d in ("cpu", "cuda"))
        torch.testing.assert_close(cuda, cpu, rtol=1e-12, atol=1e-12)
