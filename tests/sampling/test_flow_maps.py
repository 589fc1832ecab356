"""Flow maps: the loop passes the level that a row reaches to the model, and every step is exact."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, ops, solvers
from diffcore.guidance import CFGZeroStar
from diffcore.sampling import capture, pyramid_schedule
from diffcore.solvers import NoiseLevels, SolverTable

MEAN, STD = 0.3, 0.7
X = torch.randn(4, 3, dtype=torch.float64, generator=torch.manual_seed(0))


def std_at(sigma: Tensor) -> Tensor:
    return torch.hypot((1 - sigma) * STD, sigma)


def moved(x: Tensor, sigma: Tensor, to: Tensor) -> Tensor:
    """The flow of Gaussian data: x keeps its quantile."""
    return (1 - to) * MEAN + std_at(to) / std_at(sigma) * (x - (1 - sigma) * MEAN)


def average_velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """u(x, t, r) of Gaussian data, with t = 1000 sigma."""
    t, r = t[:, None] / 1000, r[:, None] / 1000
    return (x - moved(x, t, r)) / (t - r)


@pytest.mark.parametrize(
    "sigmas",
    [[1.0, 0.0], [1.0, 0.3, 0.0], [0.9, 0.5, 0.2, 0.1], [0.0, 1.0], [0.1, 0.4, 0.8]],
)
def test_the_steps_of_a_perfect_flow_map_are_exact(sigmas: list[float]) -> None:
    table = solvers.flow_map_table(sigmas)
    assert not table.stochastic
    assert len(table) == len(sigmas) - 1
    found = diffcore.sample(average_velocity, X, table)
    first, last = torch.tensor([sigmas[0], sigmas[-1]], dtype=torch.float64)
    assert (found - moved(X, first, last)).abs().max() <= 1e-13


def test_it_is_the_sum_of_the_paper() -> None:
    sigmas = torch.tensor([1.0, 0.8, 0.35, 0.0], dtype=torch.float64)

    def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return torch.tanh(x) + (t - 0.3 * r)[:, None]

    x = X
    for t, r in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        x = x - (t - r) * (torch.tanh(x) + t - 0.3 * r)
    table = solvers.flow_map_table(sigmas, num_train_timesteps=1.0)
    assert (diffcore.sample(u, X, table) - x).abs().max() <= 1e-14


def test_a_velocity_that_ignores_r_is_eulers_method() -> None:
    sigmas = torch.linspace(1, 0, 9, dtype=torch.float64)
    for levels in (sigmas, sigmas.flip(0)):
        euler = diffcore.sample(lambda x, t: x.sin() + t[:, None] / 500, X, _euler(levels))
        ours = diffcore.sample(
            lambda x, t, r: x.sin() + t[:, None] / 500, X, solvers.flow_map_table(levels)
        )
        assert (ours - euler).abs().max() <= 1e-13


def _euler(sigmas: Tensor) -> SolverTable:
    return solvers.flow_euler_table(sigmas)


def test_its_order_is_that_of_eulers_method_for_a_velocity() -> None:
    errors = []
    for steps in (200, 400):
        table = solvers.flow_map_table(torch.linspace(0.98, 0.02, steps + 1, dtype=torch.float64))

        def velocity(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            sigma = t[:, None] / 1000
            alpha = 1 - sigma
            x0 = MEAN + alpha * STD**2 / std_at(sigma) ** 2 * (x - alpha * MEAN)
            return (x - x0) / sigma

        first, last = torch.tensor([0.98, 0.02], dtype=torch.float64)
        exact = moved(X, first, last)
        errors.append(float((diffcore.sample(velocity, X, table) - exact).abs().max()))
    assert 1.9 < errors[0] / errors[1] < 2.1
    assert table.order == 1


class Log:
    """A model that keeps what it gets."""

    def __init__(self, name: str = "r") -> None:
        self.name = name
        self.calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = []

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        target = kwargs.pop(self.name)
        self.calls.append((t, target, kwargs))
        return 0.1 * x

    def targets(self) -> list[float]:
        return [float(r[0]) for _, r, _ in self.calls]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_model_gets_both_levels(dtype: torch.dtype) -> None:
    model = Log("r_timestep")
    table = solvers.flow_map_table([1.0, 0.5, 0.25, 0.0], target_name="r_timestep")
    diffcore.sample(model, X.to(dtype), table, model_kwargs={"y": 1})
    for t, r, kwargs in model.calls:
        assert t.shape == r.shape == (4,)
        assert t.dtype == r.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert kwargs == {"y": 1}
    assert [float(t[0]) for t, _, _ in model.calls] == [1000, 500, 250]
    assert model.targets() == [500, 250, 0]


@pytest.mark.parametrize(
    ("levels", "options", "targets"),
    [
        ([0.8, 0.4], {}, [400.0]),
        ([0.0, 0.4, 0.8], {}, [400.0, 800.0]),
        ([1.0, 0.5, 0.0], {"num_train_timesteps": 1.0}, [0.5, 0.0]),
        ([1.0, 0.5, 0.0], {"target_timesteps": [0.5, 0.25]}, [0.5, 0.25]),
        (NoiseLevels.from_flow([1.0, 0.5, 0.0], timesteps=[999, 700]), {}, [700, 0]),
        (NoiseLevels.from_flow([1.0, 0.5, 0.2], timesteps=[999, 700]), {}, [700, 700]),
    ],
)
def test_labels(
    levels: Sequence[float] | NoiseLevels, options: dict[str, Any], targets: list[float]
) -> None:
    table = solvers.flow_map_table(levels, **options)
    assert table.target_timesteps is not None
    assert table.target_timesteps.tolist() == pytest.approx(targets, abs=1e-12)
    integers = isinstance(levels, NoiseLevels)
    assert table.target_timesteps.dtype == (torch.int64 if integers else torch.float64)


def test_guidance_calls_both_with_r() -> None:
    model, table = Log(), solvers.flow_map_table([1.0, 0.5, 0.0])
    two: dict[str, Any] = {"model_kwargs": {"y": 1}, "uncond_kwargs": {"y": 0}}
    diffcore.sample(model, X, table, guidance_scale=2.0, **two)
    assert model.targets() == [500, 500, 0, 0]
    assert [kwargs["y"] for _, _, kwargs in model.calls] == [1, 0, 1, 0]
    assert two == {"model_kwargs": {"y": 1}, "uncond_kwargs": {"y": 0}}
    found = diffcore.sample(
        lambda x, t, r, y: average_velocity(x, t, r) + y, X, table, guidance_scale=2.0, **two
    )
    shifted = diffcore.sample(lambda x, t, r: average_velocity(x, t, r) + 2, X, table)
    assert (found - shifted).abs().max() <= 1e-13
    diffcore.sample(lambda x, t, r: torch.cat([x, x]), X, table, guidance=CFGZeroStar(2.0))


def test_other_loops() -> None:
    table = solvers.flow_map_table([1.0, 0.5, 0.0])
    key, x = PhiloxNoise(3), PhiloxNoise(3).tensor((4, 3), dtype=torch.float64)
    wanted = diffcore.sample(average_velocity, x, table)
    recorded = capture(average_velocity, table, (4, 3), dtype=torch.float64)
    assert torch.equal(recorded(key), wanted)
    for again in (pickle.loads(pickle.dumps(table)), copy.deepcopy(table)):
        assert torch.equal(diffcore.sample(average_velocity, x, again), wanted)
    mine = x
    assert table.target_timesteps is not None
    for i in range(len(table)):
        t, r = (y[i].expand(4) for y in (table.timesteps, table.target_timesteps))
        mine, _ = table.step(i, mine, average_velocity(mine, t, r))
    assert torch.equal(mine, wanted)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def scaled(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return weight * average_velocity(x, t, r)

    gradients = []
    for checkpoint in (False, True):
        out = diffcore.sample(scaled, x, table, differentiable=True, checkpoint=checkpoint)
        (gradient,) = torch.autograd.grad(out.square().sum(), weight)
        gradients.append(gradient)
    assert gradients[0] == gradients[1] != 0
    assert "target timestep 'r'" in repr(table)


@pytest.mark.filterwarnings("ignore")  # those of torch's own compiler
def test_the_loop_compiles() -> None:
    table = solvers.flow_map_table([1.0, 0.5, 0.0])
    run = torch.compile(
        lambda x: diffcore.sample(average_velocity, x, table), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(run(X), diffcore.sample(average_velocity, X, table))


def test_the_second_input_moves_with_the_table() -> None:
    table = solvers.flow_map_table([1.0, 0.5, 0.0])
    copy = table.to("meta").target_timesteps
    assert copy is not None
    assert copy.device.type == "meta"


TABLE = solvers.flow_map_table([1.0, 0.5, 0.0])
FRAMES = torch.zeros(2, 1, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: diffcore.sample(Log(), X, TABLE, model_kwargs={"r": 1}),
            ValueError,
            "model_kwargs must not hold 'r', which flow_map passes to the model",
        ),
        (
            lambda: diffcore.sample(
                Log(), X, TABLE, guidance_scale=1.0, uncond_kwargs={"r": 1}, model_kwargs={}
            ),
            ValueError,
            "uncond_kwargs must not hold 'r'",
        ),
        (
            lambda: diffcore.sample(Log(), X, TABLE, cond_fn=lambda x, t: x),
            ValueError,
            "cond_fn must be None for flow_map, whose model predicts an average",
        ),
        (
            lambda: diffcore.sample(
                Log(), FRAMES, TABLE, schedule=pyramid_schedule(2, 3), group_dim=2
            ),
            ValueError,
            "schedule must be None with the target timesteps of flow_map",
        ),
        (
            lambda: solvers.flow_map_table([1.0, 0.0], target_name="r-1"),
            ValueError,
            "target_name must be the name of an argument, got 'r-1'",
        ),
        (
            lambda: solvers.flow_map_table([1.0, 0.0], target_name=1),  # type: ignore[arg-type]
            TypeError,
            "target_name must be a string, got int",
        ),
        (
            lambda: solvers.flow_map_table([1.0, 0.0], target_timesteps=[1.0, 0.0]),
            ValueError,
            "target_timesteps must hold one for each of the 1 steps, got 2",
        ),
        (
            lambda: solvers.flow_map_table(NoiseLevels.from_sigmas([2.0, 0.0])),
            ValueError,
            "sigmas must be on the path 'flow', got NoiseLevels on 've'",
        ),
        (
            lambda: SolverTable(**{**TABLE.__getstate__(), "target_timesteps": torch.zeros(3)}),
            ValueError,
            r"target_timesteps must have shape \(2,\), got \(3,\)",
        ),
    ],
)
def test_refusals(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_table_without_targets_passes_none() -> None:
    seen: list[dict[str, Any]] = []

    def model(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        seen.append(kwargs)
        return ops.linear_combination(x, x, (0.1, 0.0))

    diffcore.sample(model, X, solvers.flow_euler_table([1.0, 0.5, 0.0]))
    assert seen == [{}, {}]
