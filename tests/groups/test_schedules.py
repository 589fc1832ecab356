"""Sampling with a row for each group: independent groups end where they would alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, guidance, sample, solvers
from diffcore.sampling import pyramid_schedule
from diffcore.sigmas import get_sigmas_flow, get_sigmas_karras
from support.folding import LAYOUTS

LAYOUT = LAYOUTS["video"]
KEY = PhiloxNoise(7)
FLOW = solvers.NoiseLevels.from_flow(get_sigmas_flow(6))
EDM = solvers.NoiseLevels.from_sigmas(get_sigmas_karras(5, 0.1, 10.0))
TABLES = {
    "euler": solvers.euler_table(FLOW, prediction_type="flow_prediction"),
    "heun": solvers.heun_table(FLOW, prediction_type="flow_prediction"),
    "dpm++ 2m": solvers.dpmpp_table(FLOW, order=2, prediction_type="flow_prediction"),
    "sde": solvers.flow_sde_table(FLOW, eta=0.5),
    "input scale": solvers.euler_table(EDM, prediction_type="v_prediction"),
}
SAMPLES = torch.randn(LAYOUT.shape, dtype=torch.float64)
each_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def model(x: Tensor, t: Tensor, bias: float = 0.0) -> Tensor:
    """A model that treats each frame by its own timestep."""
    t = t if t.ndim == 2 else t.unsqueeze(1)
    return torch.tanh(x * (1 + 0.001 * t)[:, None, :, None, None]) + bias


@each_table
def test_one_row_for_all_groups_is_sample(table: solvers.SolverTable) -> None:
    plain = sample(model, SAMPLES, table, noise=KEY)
    schedule = pyramid_schedule(len(table), 5, 0)
    assert torch.equal(
        sample(model, SAMPLES, table, noise=KEY, schedule=schedule, group_dim=2), plain
    )


@each_table
@pytest.mark.parametrize("delay", [1, 3, 50])
def test_staggered_groups_end_as_they_would_alone(table: solvers.SolverTable, delay: int) -> None:
    if table.stochastic:
        return  # the noise of a model call is that of other rows then
    plain = sample(model, SAMPLES, table)
    schedule = pyramid_schedule(len(table), 5, delay)
    assert torch.equal(sample(model, SAMPLES, table, schedule=schedule, group_dim=2), plain)


def test_a_window_that_rolls() -> None:
    table = TABLES["euler"]
    plain = sample(model, SAMPLES, table)
    full = pyramid_schedule(len(table), 5, 2)
    x = SAMPLES
    for part in full.split(4):
        x = sample(model, x, table, schedule=part, group_dim=2)
    assert torch.equal(x, plain)


def test_guidance_and_gradients() -> None:
    table, schedule = TABLES["euler"], pyramid_schedule(6, 5, 1)
    kwargs: dict[str, Any] = {"model_kwargs": {}, "uncond_kwargs": {"bias": 0.5}}
    for rule in ({"guidance_scale": 2.0}, {"guidance": guidance.CFG(2.0)}):
        plain = sample(model, SAMPLES, table, **rule, **kwargs)
        found = sample(model, SAMPLES, table, schedule=schedule, group_dim=2, **rule, **kwargs)
        assert torch.equal(found, plain)
    x = SAMPLES.clone().requires_grad_()
    sample(model, x, table, schedule=schedule, group_dim=2, differentiable=True).sum().backward()
    y = SAMPLES.clone().requires_grad_()
    sample(model, y, table, differentiable=True).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_noise_of_a_call() -> None:
    table = TABLES["sde"]
    schedule = pyramid_schedule(len(table), 5, 1)
    calls: list[int] = []

    def noise(m: int, x: Tensor) -> Tensor:
        calls.append(m)
        return KEY.at(1 + m).tensor(x.shape, dtype=x.dtype)

    by_key = sample(model, SAMPLES, table, noise=KEY, schedule=schedule, group_dim=2)
    assert torch.equal(
        sample(model, SAMPLES, table, noise=noise, schedule=schedule, group_dim=2), by_key
    )
    rows = torch.tensor([row.noisy for row in table.rows] + [False])
    assert calls == [m for m in range(len(schedule)) if rows[schedule[m]].any()]


def test_what_the_model_is_called_with() -> None:
    table = TABLES["euler"]
    seen: list[Tensor] = []

    def keep(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    schedule = torch.tensor([[[-1, 0]], [[4, 1]], [[5, -1]], [[-1, -1]]])
    sample(keep, torch.zeros(1, 2, 4), table, schedule=schedule, group_dim=1)
    t = [*table.timesteps.tolist(), 0]
    wanted = [[t[4], t[0]], [t[4], t[1]], [t[5], t[2]], [0, t[2]]]
    assert torch.equal(torch.cat(seen), torch.tensor(wanted, dtype=seen[0].dtype))


def test_pyramid_schedule() -> None:
    assert pyramid_schedule(2, 3).squeeze(1).tolist() == [
        [0, -1, -1],
        [1, 0, -1],
        [-1, 1, 0],
        [-1, -1, 1],
    ]
    for arguments in ((0, 1, 1), (1, 0, 1), (1, 1, -1)):
        with pytest.raises(ValueError, match="must be at least"):
            pyramid_schedule(*arguments)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "twice": ([[[0] * 5]] * 2, ValueError, "got row 0 after row 0 for sample 0, group 0"),
    "skipped": ([[[0] * 5], [[2] * 5]], ValueError, "got row 2 after row 0"),
    "range": ([[[6] * 5]], ValueError, r"rows 0 \.\. 5 of .*, got values from 6 to 6"),
    "floats": (torch.zeros(3, 1, 5), TypeError, "schedule must be an int64 or int32 tensor"),
    "shape": (torch.zeros(3, 5).long(), ValueError, r"\[M, B, G\], \(M, 2, 5\), or \(M, 1, 5\)"),
    "pause": ([[[0] * 5], [[-1] * 5], [[1] * 5]], ValueError, "must not pause a group"),
    "amid history": ([[[2] * 5]], ValueError, "must start each group of .* at a row that reads no"),
    "no ints": ("rows", TypeError, r"schedule must be a tensor of ints \[M, B, G\], got str"),
}


@pytest.mark.parametrize(("schedule", "kind", "message"), BAD.values(), ids=BAD)
def test_schedules_that_are_refused(schedule: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        sample(model, SAMPLES, TABLES["dpm++ 2m"], schedule=schedule, group_dim=2)


def test_no_samples() -> None:
    x, table = torch.zeros(0, 3, 5, 4, 6), TABLES["euler"]
    schedule = pyramid_schedule(len(table), 5)
    assert sample(model, x, table, schedule=schedule, group_dim=2).shape == x.shape


def test_arguments_that_do_not_go_together() -> None:
    schedule = pyramid_schedule(6, 5)
    table = TABLES["euler"]
    with pytest.raises(ValueError, match="group_dim must be given with schedule, got None"):
        sample(model, SAMPLES, table, schedule=schedule)
    with pytest.raises(ValueError, match="schedule must be given with group_dim, got None"):
        sample(model, SAMPLES, table, group_dim=2)
    with pytest.raises(ValueError, match="callback must not be given with schedule"):
        sample(model, SAMPLES, table, schedule=schedule, group_dim=2, callback=print)


COVARIANCE = 0.8 ** (torch.arange(6.0)[:, None] - torch.arange(6.0)).abs().double()


def exact(x: Tensor, t: Tensor) -> Tensor:
    """E[noise - x_0 | x] of frames with this covariance, each frame at its own level t."""
    level = t[0]  # the same for all samples here
    data, noise = torch.diag(1 - level), torch.diag(level)
    spread = data @ COVARIANCE @ data + noise @ noise
    return (
        torch.linalg.solve(spread, (noise - COVARIANCE @ data).mT, left=True)
        .mT.matmul(x.unsqueeze(-1))
        .squeeze(-1)
    )


@pytest.mark.parametrize("delay", [0, 0.5, 2])
def test_staggered_frames_have_the_distribution_of_the_data(delay: float) -> None:
    """The covariance of Euler's samples, exact as the image of the identity, at first order.

    Every path of the levels from noise to data ends there; ``delay`` is that of a frame, in tenths
    of a walk.
    """
    errors = []
    for steps in (40, 80):
        table = solvers.euler_table(
            solvers.NoiseLevels.from_flow(torch.linspace(1, 0, steps + 1, dtype=torch.float64)),
            prediction_type="flow_prediction",
        )
        scale = table.timesteps[0]
        schedule = pyramid_schedule(steps, 6, int(delay * steps / 10))
        start = torch.eye(6, dtype=torch.float64)
        image = sample(
            lambda x, t, scale=scale: exact(x, t / scale),
            start,
            table,
            schedule=schedule,
            group_dim=1,
        )
        errors.append((image.mT @ image - COVARIANCE).abs().max().item())
    assert errors[1] < 0.05
    assert 1.7 < errors[0] / errors[1] < 2.3
