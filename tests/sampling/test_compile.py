"""A sampling loop under torch.compile: one graph, compiled once, bits of the plain loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from diffcore import PhiloxNoise, solvers
from diffcore._engine import native
from diffcore.sampling import sample
from diffcore.schedules import NoiseSchedule, make_betas, respaced_timesteps
from diffcore.sigmas import get_sigmas_karras
from diffcore.solvers import NoiseLevels, SolverTable
from support.bounds import assert_same_bits

pytestmark = [
    pytest.mark.skipif(native._C is None, reason="needs the compiled module"),
    # torch's own compiler warns about its own deprecations
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


def levels(steps: int) -> NoiseLevels:
    return NoiseLevels.from_schedule(
        NoiseSchedule.from_betas(make_betas("linear", 1000)),
        torch.tensor(respaced_timesteps(1000, steps, "trailing")),
    )


STEPS = 20
LEVELS = levels(STEPS)
TABLES = {
    "ddpm": solvers.ddpm_table(LEVELS, clip_range=1.0),
    "dpmpp-2m": solvers.dpmpp_2m_table(LEVELS),
    "heun-churn": solvers.heun_table(get_sigmas_karras(STEPS // 2, 0.1, 10.0), s_churn=2.0),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    counters.clear()


class Net(torch.nn.Module):
    """A convolution that knows the time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.conv(x) + 1e-3 * t.to(x)[:, None, None, None])


def loop(table: SolverTable) -> Callable[[Tensor, Tensor], Tensor]:
    net = Net()

    def run(x: Tensor, seed: Tensor) -> Tensor:
        return sample(net, x, table, noise=PhiloxNoise(seed))

    return run


@pytest.mark.parametrize("name", TABLES)
def test_a_loop_compiles_once_and_gives_the_same_bits(name: str) -> None:
    run = loop(TABLES[name])
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2, 3):
            x, key = torch.randn(2, 1, 8, 8), torch.tensor(seed)
            assert_same_bits(compiled(x, key), run(x, key))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_torchs_generator_seeds_a_compiled_loop() -> None:
    net = Net()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    x, found = torch.randn(2, 1, 8, 8), []
    for run in (compiled, sample, compiled):
        torch.manual_seed(len(found) // 2)
        found.append(run(net, x, TABLES["ddpm"]))
    assert_same_bits(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.slow
def test_inductor_compiles_the_loop_once() -> None:
    # The loop is unrolled, so inductor's time grows with the steps.
    run, x = loop(solvers.ddpm_table(levels(4), clip_range=1.0)), torch.randn(2, 1, 8, 8)
    compiled = torch.compile(run, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            key = torch.tensor(seed)
            # the network's own arithmetic is inductor's
            torch.testing.assert_close(compiled(x, key), run(x, key), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
