"""What a compiler gets of uniform numbers and timesteps: one operator instead of ten rounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcore import EDM, FlowMatching, PhiloxNoise

IDS = torch.tensor([7, 2**40, -3, 0, 11])
DRAWS: dict[str, Callable[[PhiloxNoise], Tensor]] = {
    "uniform": lambda key: key.uniform((5, 3), dtype=torch.float64),
    "timesteps": lambda key: key.timesteps(1000, 5),
}


def count_of_nodes(function: Callable[..., Tensor], *arguments: Any) -> tuple[int, Tensor]:
    counts = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(len(graph.graph.nodes))
        return graph.forward

    found: Tensor = torch.compile(function, backend=backend, fullgraph=True)(*arguments)
    (count,) = counts
    return count, found


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_the_numbers_are_those_of_eager_from_one_operator(draw: Callable[..., Tensor]) -> None:
    def drawn(seed: Tensor | int, ids: Tensor | int, stream: Tensor | int) -> Tensor:
        return draw(PhiloxNoise(seed, ids, stream, 8))

    for key in ((5, 2, 3), (torch.tensor(5), IDS, torch.tensor([3])), (-1, IDS, 0)):
        count, found = count_of_nodes(drawn, *key)
        assert count < 30  # the formula takes two hundred
        assert torch.equal(found, drawn(*key))


@pytest.mark.parametrize("model", [EDM(), FlowMatching(timestep_density="logit_normal")])
def test_a_training_step_that_draws_its_levels(model: Any) -> None:
    network = nn.Conv2d(3, 3, 1)

    def step(x: Tensor, seed: Tensor) -> Tensor:
        noise = PhiloxNoise(seed)
        loss: Tensor = model.training_losses(lambda x, t: network(x), x, noise=noise)["loss"]
        return loss

    x, seed = torch.randn(4, 3, 8, 8), torch.tensor(3)
    count, found = count_of_nodes(step, x, seed)
    assert count < 80
    assert torch.equal(found, step(x, seed))


def test_the_operator_is_one_that_compilers_can_trust() -> None:
    words = torch.ops.diffcore.words.default
    by_number = (None, 9, None, 2, torch.tensor([3]), 0, 2, 5, 4, -7)
    by_tensor = (torch.tensor(5), 0, IDS, 0, None, 4, 0, 6, len(IDS), 7)
    for arguments in (by_number, by_tensor):
        torch.library.opcheck(words, arguments, {"device": torch.device("cpu")})


def test_vmap_over_seeds_while_compiling() -> None:
    def drawn(seeds: Tensor) -> Tensor:
        return torch.vmap(lambda seed: PhiloxNoise(seed).uniform((5,)))(seeds)

    seeds = torch.arange(3)
    compiled = torch.compile(drawn, backend="eager", fullgraph=True)
    assert torch.equal(compiled(seeds), torch.stack([drawn(s[None])[0] for s in seeds]))
