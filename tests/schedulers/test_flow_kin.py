"""Flow maps, LTX's ancestral steps and sCM, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore.solvers import (
    NoiseLevels,
    flow_euler_ancestral_table,
    flow_map_table,
    trigflow_table,
)
from support.fused import (
    STEPS,
    check_closer,
    check_exact,
    check_philox,
    check_refused,
    check_same_steps,
    check_starts,
    check_steps,
    check_walk,
    samples,
)

diffusers = pytest.importorskip("diffusers")
from diffcore.diffusers import fuse, table_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers


# ---- flow maps ---------------------------------------------------------------------------------


def flow_map(shift: float = 1.0) -> Callable[[], Any]:
    return lambda: diffusers.FlowMapEulerDiscreteScheduler(shift=shift)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_flow_map(shift: float) -> None:
    check_steps(flow_map(shift))
    check_walk(flow_map(shift))
    check_starts(flow_map(shift))
    check_walk(flow_map(shift), {"sigmas": [1.0, 0.6, 0.55]})
    check_walk(flow_map(shift), {"timesteps": [900.0, 500.0, 100.0]})


def test_flow_map_in_16_bits() -> None:
    # diffusers computes this step in float64 and rounds once.
    check_closer(flow_map(5.0))


@pytest.mark.parametrize("r", [0.0, 321.5, "next", "same", "tensor"])
@pytest.mark.parametrize("t", [0, "off"])
def test_flow_map_to_any_level(r: Any, t: Any) -> None:
    stock, fused = flow_map(5.0)(), fuse(flow_map(5.0)())
    x, m = samples(), samples(seed=1)
    for scheduler in (stock, fused):
        scheduler.set_timesteps(6)

    def step(scheduler: Any) -> Tensor:
        times = scheduler.timesteps
        begin = 777.7 if t == "off" else times[1]
        targets = {"next": times[3].expand(2), "same": begin, "tensor": torch.tensor([500.0])}
        found: Tensor = scheduler.step(m, begin, x, targets.get(r, r)).prev_sample
        return found

    for _ in range(2):
        wanted, came = step(stock), step(fused)
        torch.testing.assert_close(came, wanted, atol=1e-6, rtol=1e-6)
        assert stock.step_index == fused.step_index
    assert not fused.fallbacks


def test_flow_map_that_goes_to_diffusers() -> None:
    fused, stock = fuse(flow_map()()), flow_map()()
    for scheduler in (fused, stock):
        scheduler.set_timesteps(4)
    x, r = samples(), torch.tensor([100.0, 300.0])
    wanted, came = (s.step(x, s.timesteps[0], x, r).prev_sample for s in (stock, fused))
    assert torch.equal(wanted, came)
    with pytest.raises(ValueError, match="r_timestep"):
        fused.step(x, 777.7, x)
    assert list(fused.fallbacks) == [
        "a timestep of shape (2,)",
        "r_timestep=None at a timestep that is not of the schedule",
    ]


def test_flow_map_table() -> None:
    scheduler = flow_map(3.0)()
    scheduler.set_timesteps(5)
    levels = NoiseLevels.from_flow(scheduler.sigmas, timesteps=scheduler.timesteps)
    table = table_of(scheduler)
    check_same_steps(table, flow_map_table(levels))
    check_exact(flow_map(3.0))
    assert table.target_name == "r_timestep"
    assert table.target_timesteps is not None
    assert table.target_timesteps.tolist() == [*scheduler.timesteps[1:].tolist(), 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4), (1,)])
def test_flow_map_noise(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    stock, fused = flow_map()(), fuse(flow_map()())
    x, noise = (samples((3, 4, 6, 6), seed=s).to(dtype) for s in (0, 1))
    t = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 1000
    sigma = (t.double() / 1000).view(*shape, *[1] * (4 - len(shape)))
    truth = sigma * noise.double() + (1 - sigma) * x.double()
    errors = [
        float((s.scale_noise(x, t, noise).double() - truth).abs().max()) for s in (fused, stock)
    ]
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * float(truth.abs().max())
    if dtype == torch.bfloat16:
        assert errors[0] <= errors[1]


# ---- LTX ---------------------------------------------------------------------------------------


def ltx(eta: float = 1.0, s_noise: float = 1.0) -> Callable[[], Any]:
    return lambda: diffusers.LTXEulerAncestralRFScheduler(eta=eta, s_noise=s_noise)


SIGMAS = [1.0, 0.9, 0.5, 0.2, 0.0]


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("s_noise", [0.0, 1.0])
def test_ltx(eta: float, s_noise: float) -> None:
    make = ltx(eta, s_noise)
    given = [*STEPS, {"sigmas": SIGMAS}, {"timesteps": SIGMAS}]
    check_steps(make, given, drawn_in=torch.float32)
    check_walk(make)
    check_walk(make, {"sigmas": SIGMAS})


def test_ltx_otherwise() -> None:
    check_starts(ltx())
    check_closer(ltx(), drawn_in=torch.float32)
    check_philox(ltx(0.7))
    for given in ({"num_inference_steps": 6}, {"sigmas": [1.0, 0.8, 0.3, 0.0]}):
        scheduler = ltx(0.7, 1.1)()
        scheduler.set_timesteps(**given)
        sigmas = scheduler.sigmas.double()
        times = scheduler.timesteps[: len(sigmas) - 1].double()
        levels = NoiseLevels.from_flow(sigmas, timesteps=times)
        wanted = flow_euler_ancestral_table(levels, eta=0.7, s_noise=1.1)
        check_same_steps(table_of(scheduler, rules="exact"), wanted)
        check_exact(ltx(0.7, 1.1), given)


def test_ltx_keeps_the_dtype_of_the_sample() -> None:
    x, m = samples().bfloat16(), samples(seed=1)
    found = []
    for scheduler in (ltx()(), fuse(ltx()())):
        scheduler.set_timesteps(4)
        generator = torch.Generator().manual_seed(1)
        found.append(scheduler.step(m, scheduler.timesteps[0], x, generator).prev_sample)
    assert found[0].dtype == found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[1], found[0])


def test_ltx_before_set_timesteps() -> None:
    with pytest.raises(ValueError, match="Call `set_timesteps`"):
        fuse(ltx()()).step(samples(), 1.0, samples())


# ---- sCM ---------------------------------------------------------------------------------------


def scm(**config: Any) -> Callable[[], Any]:
    return lambda: diffusers.SCMScheduler(**config)


def counted(steps: int) -> dict[str, Any]:
    return {"num_inference_steps": steps, "intermediate_timesteps": None}


OWN = {
    **counted(3),
    "timesteps": [1.5, 1.0, 0.4, 0.0],
    "max_timesteps": None,
}


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_scm(sigma_data: float) -> None:
    make = scm(sigma_data=sigma_data)
    given = [*(counted(n) for n in (1, *STEPS)), 2, OWN]
    check_steps(make, given, drawn_in=torch.float32, stop=-1)
    for steps in (counted(10), 2, OWN):
        check_walk(make, steps, last=-1)
    check_starts(make, steps=counted(10), last=-1)


def test_scm_otherwise() -> None:
    check_closer(scm(), counted(10), drawn_in=torch.float32, stop=-1)
    check_philox(scm(), steps=counted(6), last=-1)
    scheduler = scm()()
    scheduler.set_timesteps(**counted(5))
    wanted = trigflow_table(scheduler.timesteps.double())
    table = table_of(scheduler, rules="exact")
    check_exact(scm(), counted(5))
    for i, row in enumerate(table.rows):
        x, F, z = (samples(seed=s).double() for s in (1, 2, 3))
        found: list[Tensor] = [
            one.step(i, x, m, noise=z)[0] for one, m in ((table, 0.5 * F), (wanted, F))
        ]
        torch.testing.assert_close(*found)
        assert row.coefficients[5] == pytest.approx(-row.sigma / 0.5)
    assert table_of(scheduler).rows[0].alpha < 0 == table.rows[0].alpha


def test_scm_dtypes() -> None:
    found = []
    for scheduler in (scm()(), fuse(scm()())):
        scheduler.set_timesteps(2)
        x, generator = samples().bfloat16(), torch.Generator().manual_seed(1)
        found.append(scheduler.step(x, scheduler.timesteps[0], x, generator).to_tuple())
    for wanted, came in zip(*found, strict=True):
        assert wanted.dtype == came.dtype
        torch.testing.assert_close(came, wanted, atol=1e-2, rtol=1e-2)


def test_scm_that_goes_to_diffusers() -> None:
    def step(scheduler: Any) -> None:
        with pytest.raises(ValueError, match="parameterization"):
            scheduler.step(samples(), scheduler.timesteps[0], samples())

    fused = fuse(scm(prediction_type="epsilon")())
    fused.set_timesteps(2)
    check_refused(fused, "prediction_type='epsilon'", step)
