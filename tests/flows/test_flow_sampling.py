"""FlowMatching's levels, tables and samples: both directions, both signs, OT-CFM, any solver."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import FlowMatching, PhiloxNoise, SolverTable, solvers
from support.flows import CONVENTIONS, MEAN, STD, path, world

KEY = PhiloxNoise(17)
Z = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
each_convention = pytest.mark.parametrize("make", CONVENTIONS.values(), ids=CONVENTIONS)

SOLVERS: dict[str, tuple[Callable[..., SolverTable], int]] = {
    "euler": (solvers.flow_euler_table, 1),
    "heun": (solvers.flow_heun_table, 2),
}


@each_convention
@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_converge_to_the_flow(make: Any, solver: str) -> None:
    """In a Gaussian world the flow keeps quantiles: z becomes MEAN + sd z, sd that of the end."""
    flow, (function, order) = make(), SOLVERS[solver]
    wanted = MEAN + Z * (STD**2 + flow.sigma_min**2).sqrt()
    errors = []
    for n in (40, 80):
        found = flow.sample(world(flow), Z, n, solver=function)
        errors.append(float((found - wanted).abs().max()))
    assert errors[1] < 0.1 / order**3
    assert errors[0] / errors[1] > 2 ** (order - 0.35)


def test_samples_have_the_covariance_of_the_data() -> None:
    flow = FlowMatching.sd3()
    x = flow.sample(
        world(flow), (8_000, 3), 60, KEY, solver=solvers.flow_heun_table, dtype=torch.float64
    )
    error = 4 / len(x) ** 0.5
    assert ((x.mean(0) - MEAN).abs() < STD * error + 2e-3).all()
    correlation = ((x - x.mean(0)) / STD).T.cov()
    assert (correlation - torch.eye(3)).abs().max() < 1.5 * error + 4e-3


@each_convention
def test_the_noise_comes_back(make: Any) -> None:
    flow = make()
    down = flow.levels(200).sigma
    model = world(flow)
    x = flow.sample(model, Z, 200, solver=solvers.flow_heun_table)
    up = torch.linspace(0, 1, 201, dtype=torch.float64)
    back = flow.sample(model, x, sigmas=up, solver=solvers.flow_heun_table)
    assert down[0] == 1
    torch.testing.assert_close(back, Z, rtol=0, atol=2e-3)


def negated(model: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, told: -model(x, told)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", [*SOLVERS, "unipc", "dpmpp_2m", "flow_sde"])
def test_directions_and_signs_give_the_same_bits(dtype: torch.dtype, solver: str) -> None:
    def model(x: Tensor, told: Tensor) -> Tensor:
        return torch.sin(3 * x) + 0.5 * x

    function = getattr(solvers, f"{solver}_table")
    wanted = None
    for noise_at in (0, 1):
        for target, its_model in (
            ("noise_minus_data", model),
            ("data_minus_noise", negated(model)),
        ):
            flow = FlowMatching(noise_at=noise_at, target=target, shift=3.0)
            found = flow.sample(its_model, (2, 3), 6, KEY, solver=function, dtype=dtype)
            wanted = found if wanted is None else wanted
            assert torch.equal(found, wanted)


def test_the_default_is_the_table_of_the_solvers() -> None:
    flow = FlowMatching(shift=3.0)
    sigmas = diffcore.sigmas.get_sigmas_flow(7, shift=3.0)
    torch.testing.assert_close(flow.levels(7).sigma, sigmas, rtol=1e-15, atol=0)
    for function in (solvers.flow_euler_table, solvers.dpmpp_2m_table):
        wanted = function(solvers.NoiseLevels.from_flow(sigmas), prediction_type="flow_prediction")
        found = flow.table(sigmas=sigmas, solver=function)
        torch.testing.assert_close(found.coefficients, wanted.coefficients, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(found.timesteps, wanted.timesteps, rtol=1e-15, atol=0)
    turned = FlowMatching(noise_at=0, target="data_minus_noise", num_train_timesteps=1.0)
    told = turned.levels(4).timesteps
    torch.testing.assert_close(told, torch.tensor([0, 0.25, 0.5, 0.75], dtype=torch.float64))
    r = math.sqrt(3.0)  # between sigma / alpha = 3 and 1
    three = turned.table(sigmas=[0.75, 0.5, 0.0], solver=solvers.dpm2_table).timesteps
    torch.testing.assert_close(three, torch.tensor([0.25, 1 / (1 + r), 0.5]).double())


def test_ot_cfm_is_euler_on_its_own_path() -> None:
    flow = FlowMatching.ot_cfm(0.05)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cos(2 * x) * (1 + t.unsqueeze(1)) - x

    n = 9
    x = Z
    for i in range(n):
        t = torch.full((len(x),), i / n, dtype=x.dtype)
        x = x + model(x, t) / n
    table = flow.table(n)
    assert (table.input_scale == 1).all()
    assert table.final_alpha == 1
    assert table.final_sigma == pytest.approx(0.05, rel=1e-14)
    torch.testing.assert_close(flow.sample(model, Z, n), x, rtol=1e-13, atol=1e-13)
    for row in table.rows:
        told = table.timesteps[table.rows.index(row)]
        alpha, beta = path(flow, told)
        assert row.alpha == pytest.approx(alpha.item(), abs=1e-14)
        assert row.sigma == pytest.approx(beta.item(), abs=1e-14)
    # The levels alone serve the same solver, for x divided by the sum of its coefficients.
    plain = solvers.flow_euler_table(flow.levels(n))
    torch.testing.assert_close(1.05 * diffcore.sample(model, Z, plain), x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("solver", ["heun", "unipc", "sde", "cfg_pp"])
def test_own_units_are_the_same_steps(solver: str) -> None:
    """Steps of x with history, noise, clips and m_u: those of x divided by its two coefficients."""
    flow = FlowMatching.ot_cfm(0.3)
    tables = {
        "heun": (solvers.heun_table, {"clip_range": 0.8}),
        "unipc": (solvers.unipc_table, {}),
        "sde": (solvers.flow_sde_table, {"eta": 0.4}),
        "cfg_pp": (solvers.dpmpp_2m_cfg_pp_table, {}),
    }
    function, options = tables[solver]
    levels = flow.levels(sigmas=[0.9, 0.6, 0.4, 0.1])
    scaled = function(levels, prediction_type="flow_prediction", **options)
    own = flow.table(sigmas=[0.9, 0.6, 0.4, 0.1], solver=function, solver_options=options)

    def model(x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        return torch.cos(2 * x + shift) * (1 + t.unsqueeze(1)) - x

    guided: dict[str, Any] = {}
    if solver == "cfg_pp":
        guided = {"guidance_scale": 0.6, "uncond_kwargs": {"shift": 1.0}}
    k, noise = scaled.input_scale[0], KEY.tensor((len(scaled), *Z.shape), dtype=Z.dtype)
    end = own.final_alpha / scaled.final_alpha
    wanted = end * diffcore.sample(model, Z / k, scaled, noise=noise, **guided)
    scale = torch.cat([scaled.input_scale[1:], k.new_tensor([end])])
    if solver == "sde":  # the noise of x is that of the other times the sum of x's coefficients
        torch.testing.assert_close(own.column("c_z"), scaled.column("c_z") * scale)
    found = diffcore.sample(model, Z, own, noise=noise, **guided)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_callable_shift_reads_the_shape() -> None:
    flow = FlowMatching(shift=lambda shape: 1.0 + shape[-1], noise_at=0, target="data_minus_noise")
    shape = (2, 3, 4)
    plain = FlowMatching(shift=5.0)
    assert torch.equal(flow.levels(6, shape=shape).sigma, plain.levels(6).sigma)
    t = flow.sample_timesteps(shape, KEY, dtype=torch.float64)
    torch.testing.assert_close(1 - t, plain.sample_timesteps(2, KEY, dtype=torch.float64))

    def model(x: Tensor, told: Tensor) -> Tensor:
        return 0.1 * x

    assert torch.equal(
        flow.sample(negated(model), shape, 3, KEY), plain.sample(model, shape, 3, KEY)
    )
    mean = flow.training_losses(model, torch.zeros(shape), noise=KEY)["loss"]
    again = flow.training_losses(model, torch.zeros(shape), t.float(), noise=KEY)["loss"]
    torch.testing.assert_close(mean, again)


def test_guidance_starts_and_further_options() -> None:
    flow = FlowMatching()

    def model(x: Tensor, told: Tensor, shift: float = 0.0) -> Tensor:
        return x + shift

    x = flow.sample(
        model, (2, 3), 4, KEY, guidance_scale=2.0, uncond_kwargs={"shift": 1.0}, dtype=torch.float64
    )
    wanted = KEY.tensor((2, 3), dtype=torch.float64)
    for _ in range(4):
        wanted = wanted - 0.25 * (wanted + 1 + 2 * (wanted - wanted - 1))
    torch.testing.assert_close(x, wanted)
    steps: list[int] = []
    flow.sample(model, Z, 4, callback=lambda state: steps.append(state["i"]))
    assert steps == [0, 1, 2, 3]
    told: list[float] = []
    flow.sample(lambda x, t: told.append(t[0].item()) or x, Z, 2, timesteps=[7, 3])
    assert told == [7, 3]


def test_pickles_and_words() -> None:
    flow = FlowMatching.flux(4096)
    again = pickle.loads(pickle.dumps(flow))
    assert repr(again) == repr(flow)
    assert "shift=3.158" in repr(flow)
    levels = pickle.loads(pickle.dumps(again.levels(5)))
    assert torch.equal(levels.timesteps, flow.levels(5).timesteps)
    assert levels.reversed().rising
    assert len(levels.skip(2)) == 3
    assert type(levels.with_timesteps(range(5))) is type(levels)
