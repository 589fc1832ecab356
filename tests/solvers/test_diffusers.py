"""The solvers against the step loops of diffusers' schedulers, where diffusers is installed.

Theirs run in float32 as they are; a model that is neither linear nor even shows every coefficient.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from diffcore import solvers
from diffcore.schedules import NoiseSchedule, make_betas, respaced_timesteps
from diffcore.sigmas import (
    get_sigmas_beta,
    get_sigmas_exponential,
    get_sigmas_flow,
    get_sigmas_karras,
)
from diffcore.solvers import NoiseLevels
from diffcore.spacings import spaced_timesteps, time_shift
from support.walking import ancestral_noise, dummy, told, walk

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # those of diffusers

LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def bent(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Neither linear nor even, so that every coefficient shows."""
    return torch.tanh(x) * 0.7 + 0.2 * torch.cos(3 * x) * (float(t) + 1) / (float(t) + 300)


def their_walk(scheduler: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    x = x.float() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(bent(seen, t), t, x, **options).prev_sample
    return x.double()


def train(beta_schedule: str) -> NoiseSchedule:
    betas = make_betas(beta_schedule, 1000)
    return NoiseSchedule.from_betas(betas)


def same(ours: torch.Tensor, theirs: torch.Tensor, digits: float = 2e-4) -> None:
    assert (ours - theirs).abs().max() <= digits * theirs.abs().max()


SPACINGS = ("linspace", "leading", "trailing")
PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [3, 12, 20])
@pytest.mark.parametrize(
    ("order", "algorithm", "solver"),
    [
        (1, "dpmsolver++", "midpoint"),
        (2, "dpmsolver++", "midpoint"),
        (2, "dpmsolver++", "heun"),
        (3, "dpmsolver++", "midpoint"),
        (1, "sde-dpmsolver++", "midpoint"),
        (2, "sde-dpmsolver++", "midpoint"),
        (2, "sde-dpmsolver++", "heun"),
    ],
)
def test_dpmpp_is_that_of_diffusers(spacing, final, steps, order, algorithm, solver) -> None:
    theirs = diffusers.DPMSolverMultistepScheduler(
        solver_order=order,
        algorithm_type=algorithm,
        solver_type=solver,
        timestep_spacing=spacing,
        final_sigmas_type=final,
        **LINEAR,
    )
    theirs.set_timesteps(steps)
    levels = NoiseLevels.from_schedule(
        train("linear"), told(1000, steps, spacing=spacing), final_sigmas_type=final
    )
    assert levels.timesteps.tolist() == theirs.timesteps.tolist()
    table = solvers.dpmpp_table(levels, order=order, algorithm_type=algorithm, solver_type=solver)
    draws = ancestral_noise(steps)
    out = walk(table, bent, dummy() - 0.5, lambda row: draws[row])
    same(out, their_walk(theirs, dummy() - 0.5, generator=torch.manual_seed(0)))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [3, 6, 10, 11, 12, 20])
def test_singlestep_is_that_of_diffusers(order, solver, final, steps) -> None:
    theirs = diffusers.DPMSolverSinglestepScheduler(
        solver_order=order, solver_type=solver, final_sigmas_type=final, **LINEAR
    )
    theirs.set_timesteps(steps)
    levels = NoiseLevels.from_schedule(train("linear"), told(1000, steps), final_sigmas_type=final)
    assert levels.timesteps.tolist() == theirs.timesteps.tolist()
    table = solvers.dpmpp_singlestep_table(levels, order=order, solver_type=solver)
    same(walk(table, bent, dummy() - 0.5), their_walk(theirs, dummy() - 0.5))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
def test_unipc_is_that_of_diffusers(prediction_type, spacing, order, solver) -> None:
    # To sigma = 0 theirs gives nan with bh1 (0 times infinity).
    final = "zero" if solver == "bh2" else "sigma_min"
    theirs = diffusers.UniPCMultistepScheduler(
        solver_order=order,
        final_sigmas_type=final,
        solver_type=solver,
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        disable_corrector=[2],
        **LINEAR,
    )
    theirs.set_timesteps(10)
    levels = NoiseLevels.from_schedule(
        train("linear"), told(1000, 10, spacing=spacing), final_sigmas_type=final
    )
    assert levels.timesteps.tolist() == theirs.timesteps.tolist()
    table = solvers.unipc_table(
        levels,
        order=order,
        solver_type=solver,
        disable_corrector=[2],
        prediction_type=prediction_type,
    )
    same(walk(table, bent, dummy() - 0.5), their_walk(theirs, dummy() - 0.5))


EULER_FAMILY = {
    "euler": ("EulerDiscreteScheduler", solvers.euler_table),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", solvers.euler_ancestral_table),
    "heun": ("HeunDiscreteScheduler", solvers.heun_table),
    "lms": ("LMSDiscreteScheduler", solvers.lms_table),
    "dpm2": ("KDPM2DiscreteScheduler", solvers.dpm2_table),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", solvers.dpm2_ancestral_table),
}


@pytest.mark.parametrize("name", EULER_FAMILY)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_euler_family_is_that_of_diffusers(name, spacing, prediction_type) -> None:
    kind, make = EULER_FAMILY[name]
    theirs = getattr(diffusers, kind)(
        timestep_spacing=spacing, prediction_type=prediction_type, **LINEAR
    )
    theirs.set_timesteps(10)
    levels = NoiseLevels.from_schedule(train("linear"), spaced_timesteps(1000, 10, spacing))
    table = make(levels.sigma_space(), prediction_type=prediction_type)
    x = (dummy() - 0.5) * float(theirs.init_noise_sigma) / table.init_noise_sigma
    options = {"generator": torch.manual_seed(0)} if "ancestral" in name else {}
    their_out = their_walk(theirs, dummy() - 0.5, **options)
    draws = iter(ancestral_noise(40))
    x = x * table.init_noise_sigma
    same(walk(table, bent, x, lambda row: next(draws)), their_out)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # linspace: see peers, T // n
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rederive", [False, True])
def test_ddim_is_that_of_diffusers(spacing, prediction_type, eta, rederive) -> None:
    theirs = diffusers.DDIMScheduler(
        timestep_spacing=spacing, prediction_type=prediction_type, **LINEAR
    )
    theirs.set_timesteps(10)
    visited = torch.tensor(respaced_timesteps(1000, 10, spacing))
    assert visited.tolist() == theirs.timesteps.tolist()
    table = solvers.ddim_table(
        NoiseLevels.from_schedule(train("linear"), visited),
        eta=eta,
        rederive_epsilon=rederive,
        prediction_type=prediction_type,
        clip_range=1.0,
    )
    draws = ancestral_noise(10)
    options = {"eta": eta, "use_clipped_model_output": rederive}
    their_out = their_walk(theirs, dummy() - 0.5, generator=torch.manual_seed(0), **options)
    # They add noise in the last step too, by 1 - alpha_0 / 1 rounded to float32: none in truth.
    same(walk(table, bent, dummy() - 0.5, lambda row: draws[row]), their_out, 1e-3)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_is_that_of_diffusers(spacing, prediction_type, variance_type) -> None:
    theirs = diffusers.DDPMScheduler(
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        variance_type=variance_type,
        **LINEAR,
    )
    theirs.set_timesteps(10)
    visited = torch.tensor(respaced_timesteps(1000, 10, spacing))
    assert visited.tolist() == theirs.timesteps.tolist()
    table = solvers.ddpm_table(
        NoiseLevels.from_schedule(train("linear"), visited),
        variance_type=variance_type,
        prediction_type=prediction_type,
        clip_range=1.0,
    )
    draws = ancestral_noise(10)
    their_out = their_walk(theirs, dummy() - 0.5, generator=torch.manual_seed(0))
    if spacing == "trailing" and variance_type == "fixed_large":
        # They add noise to the clean sample, for the last timestep is not 0: take it off again.
        their_out = their_out - float(theirs._get_variance(visited[-1])) ** 0.5 * draws[9]
    same(walk(table, bent, dummy() - 0.5, lambda row: draws[row]), their_out, 1e-3)


@pytest.mark.parametrize("kind", ["Euler", "Heun"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_is_that_of_diffusers(kind, shift) -> None:
    theirs = getattr(diffusers, f"FlowMatch{kind}DiscreteScheduler")(shift=shift)
    theirs.set_timesteps(9)
    sigmas = theirs.sigmas.double()
    if kind == "Heun":  # they repeat every sigma but the first and the 0
        sigmas = torch.cat([sigmas[:1], sigmas[1::2]])
    make = {"Euler": solvers.flow_euler_table, "Heun": solvers.flow_heun_table}[kind]
    table = make(sigmas)
    assert (table.timesteps - theirs.timesteps).abs().max() <= 1e-4
    x = dummy().float() - 0.5
    for t in theirs.timesteps:
        x = theirs.step(bent(x, t), t, x).prev_sample
    same(walk(table, bent, dummy() - 0.5), x.double())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_levels_are_those_of_diffusers_shifted_once(shift) -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=torch.linspace(1, 1 / 12, 12).tolist())  # as its pipelines do
    assert (get_sigmas_flow(12, shift=shift) - theirs.sigmas).abs().max() <= 1e-6
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=torch.linspace(1, 1 / 12, 12).tolist(), mu=0.8)
    ours = time_shift(get_sigmas_flow(12), 0.8)
    assert (ours - dynamic.sigmas).abs().max() <= 1e-6


def test_a_flow_with_labels_of_its_own_is_that_of_diffusers() -> None:
    # It shifts the sigmas that it gets, and tells the model the timesteps as they are.
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1.0, 0.7, 0.3], timesteps=[900.0, 500.0, 100.0])
    table = solvers.flow_euler_table(
        NoiseLevels.from_flow(theirs.sigmas, timesteps=theirs.timesteps)
    )
    assert table.timesteps.tolist() == [900, 500, 100]
    x = dummy().float() - 0.5
    for t in theirs.timesteps:
        x = theirs.step(bent(x, t), t, x).prev_sample
    same(walk(table, bent, dummy() - 0.5), x.double())


def test_an_inverted_flow_is_that_of_diffusers() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)
    theirs.set_timesteps(9)
    table = solvers.flow_euler_table(theirs.sigmas.double())
    assert theirs.sigmas[0] < theirs.sigmas[-1] == 1
    assert (table.timesteps - theirs.timesteps).abs().max() <= 1e-4
    x = dummy().float() - 0.5
    for t in theirs.timesteps:
        x = theirs.step(bent(x, t), t, x).prev_sample
    same(walk(table, bent, dummy() - 0.5), x.double())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_euler_is_that_of_diffusers(prediction_type) -> None:
    theirs = diffusers.EDMEulerScheduler(prediction_type=prediction_type)
    theirs.set_timesteps(10)
    table = solvers.edm_euler_table(
        get_sigmas_karras(10, 0.002, 80.0), prediction_type=prediction_type
    )
    x = (dummy() - 0.5) * table.init_noise_sigma
    same(walk(table, bent, x), their_walk(theirs, dummy() - 0.5))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers_for_every_number_of_steps(spacing) -> None:
    multistep = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, **LINEAR)
    euler = diffusers.EulerDiscreteScheduler(timestep_spacing=spacing, **LINEAR)
    for steps in range(2, 151):
        multistep.set_timesteps(steps)
        theirs = multistep.timesteps
        if len(theirs) == steps:  # NumPy's arange may go one too far, to timestep -1
            assert told(1000, steps, spacing=spacing).tolist() == theirs.tolist()
        euler.set_timesteps(steps)
        ours = spaced_timesteps(1000, steps, spacing)
        assert len(euler.timesteps) != steps or (ours - euler.timesteps).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["karras", "exponential", "beta"])
def test_noise_levels_are_those_of_diffusers(name) -> None:
    if name == "beta":
        pytest.importorskip("scipy")
    euler = diffusers.EulerDiscreteScheduler(**{f"use_{name}_sigmas": True}, **LINEAR)
    euler.set_timesteps(12)
    first, last = float(euler.sigmas[0]), float(euler.sigmas[-2])
    make = {
        "karras": get_sigmas_karras,
        "exponential": get_sigmas_exponential,
        "beta": get_sigmas_beta,
    }[name]
    ours = make(12, last, first)
    assert ((ours - euler.sigmas).abs() <= 2e-6 * ours + 1e-9).all()
    levels = NoiseLevels.from_schedule(train("linear"), sigmas=ours)
    assert (levels.timesteps - euler.timesteps).abs().max() <= 0.02


def test_third_order_sde_is_not_that_of_diffusers() -> None:
    """Theirs has the sign of a term turned: the weight of D2 tends to -1 for small steps, not 0."""
    theirs = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, algorithm_type="sde-dpmsolver++", **LINEAR
    )
    theirs.set_timesteps(20)
    levels = NoiseLevels.from_schedule(train("linear"), told(1000, 20))
    table = solvers.dpmpp_table(levels, order=3, algorithm_type="sde-dpmsolver++")
    draws = ancestral_noise(20)
    ours = walk(table, bent, dummy() - 0.5, lambda row: draws[row])
    their_out = their_walk(theirs, dummy() - 0.5, generator=torch.manual_seed(0))
    assert (ours - their_out).abs().max() > 0.01 * their_out.abs().max()
    h = 0.01
    for sign, limit in ((1, -1.0), (-1, 0.0)):  # as they have it, and as k-diffusion has it
        weight = sign * (1 - math.exp(-2 * h) - 2 * h) / (2 * h) ** 2 - 0.5
        assert abs(sign * weight - limit) < 0.01


@pytest.mark.parametrize("kind", ["DPMSolver", "UniPC"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_multistep_solvers_in_a_flow_are_those_of_diffusers(kind, order, shift) -> None:
    theirs = getattr(diffusers, f"{kind}MultistepScheduler")(
        solver_order=order,
        use_flow_sigmas=True,
        flow_shift=shift,
        prediction_type="flow_prediction",
    )
    theirs.set_timesteps(12)
    levels = NoiseLevels.from_flow(theirs.sigmas)
    make = {"DPMSolver": solvers.dpmpp_table, "UniPC": solvers.unipc_table}[kind]
    table = make(levels, order=order, prediction_type="flow_prediction")
    x = (dummy() - 0.5).float()
    for t in theirs.timesteps:  # they tell the model whole timesteps
        x = theirs.step(bent(x, 100), t, x).prev_sample
    # They start at 1 - 1e-6 or so, of which float32 keeps one digit in alpha.
    same(walk(table, lambda x, t: bent(x, 100), dummy() - 0.5), x.double(), 2e-3)
