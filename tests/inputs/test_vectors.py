"""Betas, sigmas and timesteps as lists, arrays and tensors: float64 always, gradients refused."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import schedules, solvers
from diffcore.schedules import NoiseSchedule
from diffcore.solvers import NoiseLevels

BETAS = [0.1, 0.2, 0.3]
FALLING = [0.9, 0.7, 0.3]
SIGMAS = [0.9, 0.3, 0.1, 0.0]
SCHEDULE = NoiseSchedule.from_betas(torch.tensor(BETAS, dtype=torch.float64))


def alpha_of(levels: NoiseLevels) -> Tensor:
    return torch.stack([levels.alpha, levels.sigma])


# Each with numbers of which none is a float32.
VECTORS: dict[str, tuple[list[float], Callable[[Any], Tensor]]] = {
    "diffusion": (BETAS, lambda v: diffcore.GaussianDiffusion(v).betas),
    "from_betas": (BETAS, lambda v: NoiseSchedule.from_betas(v).table),
    "rescale": (BETAS, schedules.rescale_zero_terminal_snr),
    "from_cumprod": (FALLING, lambda v: NoiseSchedule.from_alphas_cumprod(v).table),
    "betas_from": (FALLING, schedules.betas_from_alphas_cumprod),
    "from_sigmas": (BETAS, lambda v: NoiseSchedule.from_sigmas(v).table),
    "schedule": (BETAS, lambda v: NoiseSchedule(v, v).table),
    "levels": (SIGMAS, lambda v: alpha_of(NoiseLevels.from_sigmas(v))),
    "edm": (SIGMAS, lambda v: alpha_of(NoiseLevels.from_edm(v))),
    "flow": (SIGMAS, lambda v: alpha_of(NoiseLevels.from_flow(v))),
    "at-sigmas": (SIGMAS, lambda v: alpha_of(NoiseLevels.from_schedule(SCHEDULE, sigmas=v))),
    "table": (SIGMAS, lambda v: solvers.heun_table(v).coefficients),
    "flow-table": (SIGMAS, lambda v: solvers.flow_heun_table(v).coefficients),
    "sampler": (
        SIGMAS,
        lambda v: diffcore.sampling.sample_euler(
            lambda x, s: 0.3 * x, torch.ones(1, 2).double(), v
        ),
    ),
}


@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def _default_dtype(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("_default_dtype")
@pytest.mark.parametrize("name", VECTORS)
def test_numbers_are_never_rounded_to_the_default_dtype(name: str) -> None:
    values, call = VECTORS[name]
    expected = call(torch.tensor(values, dtype=torch.float64))
    assert expected.dtype == torch.float64
    array = np.array(values)
    for given in (values, tuple(values), array, np.array(values[::-1])[::-1], list(array)):
        assert torch.equal(call(given), expected)


@pytest.mark.usefixtures("_default_dtype")
def test_a_list_of_betas_is_what_it_says() -> None:
    assert diffcore.GaussianDiffusion([0.1, 0.2]).betas.tolist() == [0.1, 0.2]
    assert NoiseSchedule.from_sigmas([0.1, 0.2]).sigma.tolist() == [0.1, 0.2]
    assert NoiseLevels.from_sigmas([0.2, 0.1]).sigma.tolist() == [0.2, 0.1]


@pytest.mark.parametrize("name", VECTORS)
def test_a_gradient_is_not_dropped_in_silence(name: str) -> None:
    values, call = VECTORS[name]
    tensor = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"must not require grad.*\.detach\(\)"):
        call(tensor)
    call(tensor.detach())


@pytest.mark.parametrize("name", VECTORS)
def test_a_table_does_not_change_with_its_source(name: str) -> None:
    values, call = VECTORS[name]
    source = torch.tensor(values, dtype=torch.float64)
    made = call(source)
    expected = made.clone()
    source.zero_()
    assert torch.equal(made, expected)


@pytest.mark.parametrize(
    "given",
    [
        [2, 1],
        (2, 1),
        np.array([2, 1]),
        np.array([2, 1], np.int32),
        [np.int64(2), np.int16(1)],
        [torch.tensor(2), torch.tensor(1)],
        torch.tensor([2, 1], dtype=torch.int32),
    ],
)
def test_integer_timesteps_stay_integers(given: Any) -> None:
    levels = NoiseLevels.from_schedule(SCHEDULE, given)
    assert levels.timesteps.dtype == torch.int64
    assert levels.timesteps.tolist() == [2, 1]
    assert NoiseLevels.from_sigmas([0.5, 0.2, 0.0], given).timesteps.dtype == torch.int64


@pytest.mark.parametrize("given", [[1.5, 0.5], np.array([1.5, 0.5]), [np.float32(1.5), 0.5]])
def test_fractional_timesteps_are_float64(given: Any) -> None:
    levels = NoiseLevels.from_schedule(SCHEDULE, given)
    assert levels.timesteps.dtype == torch.float64
    assert levels.timesteps.tolist() == [1.5, 0.5]


@pytest.mark.parametrize("given", ["linear", {"a": 1}, 3.0, None, [True, False], ["a"], object()])
def test_what_is_no_vector_is_named(given: Any) -> None:
    for name, call in {
        "betas": diffcore.GaussianDiffusion,
        "levels": solvers.euler_table,
        "sigmas": solvers.flow_euler_table,
        "alphas_cumprod": schedules.betas_from_alphas_cumprod,
    }.items():
        with pytest.raises(TypeError, match=f"^{name} must be a tensor of real numbers, got "):
            call(given)


def test_sigmas_without_alpha_are_no_flow() -> None:
    # The velocity of a flow to the point 0.5, and where it leads from 2.
    x0, z = torch.tensor([[0.5]]).double(), torch.tensor([[2.0]]).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - x0) / t.view(-1, 1)

    makes = [getattr(solvers, name) for name in solvers.__all__ if name.endswith("_table")]
    makes = [make for make in makes if next(iter(signature(make).parameters)) == "levels"]
    makes = [make for make in makes if "cfg_pp" not in make.__name__]  # they need guidance
    assert len(makes) > 16
    fast = partial(solvers.dpm_fast_table, num_calls=4)  # its levels end above 0
    makes = [fast if make is solvers.dpm_fast_table else make for make in makes]
    for make, bare in itertools.product(makes, ([0.8, 0.5, 0.0], torch.tensor([0.8, 0.5, 0.0]))):
        with pytest.raises(ValueError, match=r"levels must be NoiseLevels.*from_flow\(sigmas"):
            make(bare, prediction_type="flow_prediction")
    levels = NoiseLevels.from_flow([0.8, 0.5, 0.0], num_train_timesteps=1.0)
    for make in makes:
        if make is fast:
            continue
        table = make(levels, prediction_type="flow_prediction")
        found = diffcore.sample(velocity, z, table, noise=diffcore.PhiloxNoise(1))
        # The result of an LCM has some x in it, at the low timestep inputs here.
        assert make is solvers.lcm_table or (found - 0.5).abs().item() < 1e-12
    # alpha = 1 is possible, when it is said.
    assert (
        len(
            solvers.euler_table(
                NoiseLevels.from_sigmas([0.8, 0.5, 0.0]), prediction_type="flow_prediction"
            )
        )
        == 2
    )


def test_flow_and_edm_tables_take_levels() -> None:
    flow = NoiseLevels.from_flow([0.9, 0.4, 0.0], num_train_timesteps=500.0)
    edm = NoiseLevels.from_edm([9.0, 4.0, 0.0], sigma_data=0.7)
    for make, levels, given, setting in (
        (solvers.flow_euler_table, flow, [0.9, 0.4, 0.0],
         {"num_train_timesteps": 500.0}),
        (solvers.flow_heun_table, flow, [0.9, 0.4, 0.0],
         {"num_train_timesteps": 500.0}),
        (solvers.edm_euler_table, edm, [9.0, 4.0, 0.0], {"sigma_data": 0.7}),
        (solvers.edm_heun_table, edm, [9.0, 4.0, 0.0], {"sigma_data": 0.7}),
    ):  # fmt: skip
        found, expected = make(levels), make(given, **setting)
        assert torch.equal(found.coefficients, expected.coefficients)
        assert torch.equal(found.timesteps, expected.timesteps)
        with pytest.raises(ValueError, match=f"{next(iter(setting))} must be left out"):
            make(levels, **setting)
        wrong = edm if levels is flow else NoiseLevels.from_sigmas([9.0, 0.0])
        with pytest.raises(ValueError, match=r"^sigmas must be "):
            make(wrong)
        assert len(make(levels.skip(1))) == 1


def test_levels_of_any_vectors() -> None:
    levels = NoiseLevels.from_schedule(SCHEDULE, [2, 1])
    expected = solvers.heun_table(levels.sigma_space())
    lists = {"alpha": levels.alpha.tolist(), "sigma": levels.sigma.numpy()}
    for times in ([2, 1], np.array([2, 1]), torch.tensor([2, 1], dtype=torch.int32)):
        again = dataclasses.replace(levels, timesteps=times, **lists)
        assert again.alpha.dtype == again.sigma.dtype == torch.float64
        assert again.timesteps.dtype == torch.int64
        table = solvers.heun_table(again.sigma_space())
        assert torch.equal(table.coefficients, expected.coefficients)
        assert torch.equal(table.timesteps, expected.timesteps)
    with pytest.raises(ValueError, match="sigma must not require grad"):
        dataclasses.replace(levels, sigma=levels.sigma.requires_grad_())
    with pytest.raises(TypeError, match="alpha must be a tensor of real numbers, got str"):
        dataclasses.replace(levels, alpha="a")


@pytest.mark.parametrize("name", VECTORS)
def test_a_tensor_without_values_is_named(name: str) -> None:
    values, call = VECTORS[name]
    with pytest.raises(ValueError, match=r"^\w+ must have values, got a tensor on meta"):
        call(torch.tensor(values, device="meta"))
    with pytest.raises(ValueError, match=r"^timesteps must have values, got a tensor on meta"):
        NoiseLevels.from_schedule(SCHEDULE, torch.ones(2, device="meta"))
