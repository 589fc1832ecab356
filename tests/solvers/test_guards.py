"""What a solver table is, where its formulas end, and what it refuses."""

from __future__ import annotations

import math
import threading
from dataclasses import FrozenInstanceError

import pytest
import torch

from diffcore import sigmas as spacing
from diffcore import solvers
from diffcore.schedules import NoiseSchedule, make_betas, rescale_zero_terminal_snr
from diffcore.solvers import COLUMNS, NoiseLevels
from diffcore.spacings import clipped_length, spaced_timesteps
from support.solver_list import ALL, CHURNED, DETERMINISTIC, PATHS, geometric, levels_on
from support.walking import walk

SIGMAS = [10.0, 4.0, 1.0, 0.3, 0.0]
LINEAR = NoiseSchedule.from_betas(make_betas("linear", 1000))
# Solvers that need a level between two, or lambda at the start: sigma / alpha must be finite there.
NEED_SIGNAL = ("dpm2", "dpm2_ancestral-0", "dpm2_ancestral", "dpmpp-2s", "dpmpp-sde-0")
NEED_SIGNAL += ("dpmpp-2s-midpoint", "dpmpp-2s-heun", "dpmpp-3s-midpoint", "dpmpp-3s-heun")
NEED_SIGNAL += ("dpmpp-2s-ancestral", "dpmpp-sde", "dpmpp-sde-r", "seeds_3-0", "seeds_3")
NEED_SIGNAL += ("dpm-3s-heun", "dpm-sde-2m")


def bent(x, t):
    return torch.tanh(x) + 0.1 * torch.cos(3 * x)


# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", {**ALL, **CHURNED})
def test_shape_and_meaning_of_a_table(name):
    table = {**ALL, **CHURNED}[name](SIGMAS, clip_range=(-1.0, 2.0))
    rows = len(table)
    assert table.coefficients.shape == (rows, len(COLUMNS))
    for vector in (table.timesteps, table.alpha, table.sigma, table.input_scale):
        assert vector.shape == (rows,)
        assert vector.dtype == torch.float64
    assert table.noise_levels.shape == (rows, 2)
    assert table.step_index.unique().tolist() == list(range(4))
    assert table.num_steps == 4
    assert table.coefficients.isfinite().logical_or(table.coefficients.isinf()).all()
    assert table.column("clip_min").unique().tolist() == [-1.0]
    assert table.column("clip_max").unique().tolist() == [2.0]
    without_clip = table.coefficients[:, [i for i, n in enumerate(COLUMNS) if "clip" not in n]]
    assert without_clip.isfinite().all()
    assert table.column("c_z")[-1] == 0
    assert table.init_noise_sigma == 10.0
    assert 0 <= table.history <= 3
    read = table.coefficients[:, 11:] != 0
    assert table.history == max([k + 1 for k in range(3) if read[:, k].any()], default=0)
    for row in range(rows):  # a row writes what a later row reads, and nothing else
        later = [read[row + k, k - 1] for k in (1, 2, 3) if row + k < rows]
        assert bool((table.coefficients[row, 8:11] != 0).any()) == any(later)
    assert not read[0].any()


def test_churn_precedes_the_model():
    gamma = math.sqrt(2) - 1
    table = solvers.euler_table(SIGMAS, s_churn=4.0)
    assert table.sigma.tolist() == [s * (1 + gamma) for s in SIGMAS[:-1]]
    assert table.timesteps.tolist() == table.sigma.tolist()
    assert table.start_scale == 1
    assert math.isclose(table.start_noise, SIGMAS[0])  # (1 + gamma)^2 - 1 = 1
    assert torch.allclose(table.column("c_z"), torch.tensor([*SIGMAS[1:-1], 0.0]).double())
    some = solvers.heun_table(SIGMAS, s_churn=4.0, s_tmin=0.5, s_tmax=5.0)
    assert some.start_noise == 0
    assert (some.column("c_z") != 0).tolist() == [False, True, False, True, False, False, False]


def test_columns_by_name():
    table = solvers.dpmpp_table(SIGMAS)
    for i, name in enumerate(COLUMNS):
        assert torch.equal(table.column(name), table.coefficients[:, i])
    with pytest.raises(ValueError, match="name must be one of"):
        table.column("c_4")


def test_tables_are_frozen_and_copied_once_to_a_device():
    table = solvers.heun_table(SIGMAS)
    with pytest.raises(FrozenInstanceError):
        table.order = 3
    assert table.to("cpu") is table
    copy = table.to("meta")
    assert copy is table.to(torch.device("meta"))
    assert copy.coefficients.device.type == "meta"
    assert (copy.name, copy.order, copy.history) == (table.name, table.order, table.history)
    found = []
    fresh = solvers.heun_table(SIGMAS)
    threads = [threading.Thread(target=lambda: found.append(fresh.to("meta"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(one) for one in found}) == 1


def test_timesteps_are_integers_at_levels_of_the_schedule():
    times = torch.tensor([999, 500, 20])
    levels = NoiseLevels.from_schedule(LINEAR, times)
    assert solvers.dpmpp_table(levels).timesteps.dtype == torch.int64
    assert solvers.heun_table(levels).timesteps.tolist() == [999, 500, 500, 20, 20]
    between = solvers.dpm2_table(levels).timesteps
    assert between.dtype == torch.float64
    assert between[::2].tolist() == [999, 500, 20]
    assert 500 < between[1] < 999
    assert torch.equal(levels.alpha[:-1], LINEAR.alpha[times])
    assert (levels.alpha[-1], levels.sigma[-1]) == (1, 0)
    to_first = NoiseLevels.from_schedule(LINEAR, times, final_sigmas_type="sigma_min")
    assert (to_first.alpha[-1], to_first.sigma[-1]) == (LINEAR.alpha[0], LINEAR.sigma[0])
    heun = solvers.heun_table(to_first)
    assert heun.timesteps.tolist() == [999, 500, 500, 20, 20, 0]


def test_timesteps_given_with_sigmas_are_interpolated_between():
    levels = NoiseLevels.from_sigmas([9.0, 4.0, 1.0, 0.0], torch.tensor([30.0, 20.0, 10.0]))
    times = solvers.dpm2_table(levels).timesteps
    assert torch.allclose(times, torch.tensor([30.0, 25.0, 20.0, 15.0, 10.0]).double())


def test_lists_of_numbers_are_float64():
    times = [600.1, 300.7, 0.3]
    assert NoiseLevels.from_schedule(LINEAR, times).timesteps.tolist() == times
    assert NoiseLevels.from_schedule(LINEAR, [600, 300, 0]).timesteps.dtype == torch.int64
    assert NoiseLevels.from_sigmas([0.3, 0.1]).sigma.tolist() == [0.3, 0.1]


def test_levels_without_their_first_steps():
    levels = NoiseLevels.from_schedule(LINEAR, torch.tensor([900, 600, 300, 0]))
    left = levels.skip(2)
    assert left.timesteps.tolist() == [300, 0]
    assert left.init_noise_sigma == LINEAR.sigma[300]
    assert len(solvers.dpmpp_table(left)) == 2
    for steps in (-1, 4):
        with pytest.raises(ValueError, match="steps must lie in"):
            levels.skip(steps)


# ---- where formulas end ------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", [name for name in ALL if name != "lcm"])  # x is in its result
def test_the_last_step_to_a_clean_sample_returns_x0(name, path):
    table = ALL[name](levels_on(path, geometric(4, 0.1, 9.0, to_zero=True)))
    last = dict(zip(COLUMNS, table.coefficients[-1].tolist(), strict=True))
    direct = {"c_x": 0.0, "c_m": 0.0, "c_0": 1.0, "c_z": 0.0, "c_1": 0.0, "c_2": 0.0, "c_3": 0.0}
    if name in ("lms-2", "lms-3", "lms-4", "pndm", "unipc-2-noise"):
        assert last["c_1"] != 0  # Adams-Bashforth is of full order to the end, as in k-diffusion
        return
    for column, value in direct.items():
        assert abs(last[column] - value) <= 1e-15


@pytest.mark.parametrize("name", [name for name in ALL if name != "lcm"])
@pytest.mark.parametrize("sigmas", [[5.0, 0.0], [5.0, 1.0], [5.0, 5.0], [5.0, 2.0, 0.0]])
def test_few_steps(name, sigmas):
    table = ALL[name](sigmas, prediction_type="sample")
    x = torch.linspace(-9, 9, 5, dtype=torch.float64)
    out = walk(table, bent, x, lambda row: torch.zeros_like(x))
    assert out.isfinite().all()
    if sigmas == [5.0, 0.0]:
        assert torch.equal(out, bent(x, 0.0))
        assert len(table) == 1
    if sigmas == [5.0, 5.0] and name not in ("renoise", "tcd"):  # nowhere to go
        assert torch.allclose(out, x, rtol=1e-15)


@pytest.mark.parametrize("name", ALL)
def test_solvers_from_pure_noise(name):
    flow = NoiseLevels.from_flow(spacing.get_sigmas_flow(6, shift=3.0))
    times = torch.tensor([999, 700, 400, 100, 20, 0])
    terminal = NoiseSchedule.from_betas(rescale_zero_terminal_snr(make_betas("linear", 1000)))
    preserving = NoiseLevels.from_schedule(terminal, times)
    assert flow.alpha[0] == preserving.alpha[0] == 0
    for levels in (flow, preserving):
        straight = name.startswith(("heun", "lms", "ipndm", "pndm")) and levels.path == "vp"
        if name in NEED_SIGNAL or straight:
            with pytest.raises(ValueError, match="levels must start at alpha > 0"):
                ALL[name](levels, prediction_type="v_prediction")
            continue
        for kind in ("v_prediction", "flow_prediction", "sample"):
            if name == "ddim-as-said" and kind == "sample":
                continue
            table = ALL[name](levels, prediction_type=kind)
            x = torch.linspace(-2, 2, 5, dtype=torch.float64)
            assert walk(table, bent, x, lambda row: torch.ones(5).double()).isfinite().all()
        with pytest.raises(ValueError, match=r"alpha must not be 0 .*zero terminal SNR"):
            ALL[name](levels, prediction_type="epsilon")


@pytest.mark.parametrize("name", ["dpmpp-2m", "dpmpp-3m", "unipc-2-bh2", "unipc-3-bh1"])
def test_pure_noise_is_the_limit_of_a_little_signal(name):
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    results = []
    for first in (1.0, 1 - 1e-13):
        levels = NoiseLevels.from_flow([first, 0.8, 0.5, 0.2, 0.0])
        table = DETERMINISTIC[name](levels, prediction_type="flow_prediction")
        results.append(walk(table, bent, x))
    if "unipc" not in name:  # UniPC corrects a step from little signal, and none from no signal
        assert (results[0] - results[1]).abs().max() < 0.1
    assert results[1].isfinite().all()


def test_cosine_schedule_is_cut_where_lambda_asks():
    cosine = NoiseSchedule.from_betas(make_betas("squaredcos_cap_v2", 1000))
    last = clipped_length(cosine, -5.1)
    times = spaced_timesteps(1000, 10, drop_last=True, last_timestep=last).round().long()
    levels = NoiseLevels.from_schedule(cosine, times)
    assert levels.levels()[0].lam >= -5.1
    for name in ("dpmpp-3m", "unipc-3-bh2", "dpmpp-2s"):
        x = torch.linspace(-2, 2, 5, dtype=torch.float64)
        assert walk(DETERMINISTIC[name](levels), bent, x).abs().max() < 1e3


def test_from_15_steps_on_dpmpp_keeps_its_order_to_the_end():
    for steps, keeps in ((14, False), (15, True)):
        levels = spacing.get_sigmas_karras(steps + 1, 0.1, 10.0)[:-1]
        last = solvers.dpmpp_table(levels, order=3).coefficients[-3:, 11:] != 0
        assert last.tolist()[1:] == [[True, keeps, False], [keeps, keeps, False]]
        euler = solvers.dpmpp_table(levels, order=3, euler_at_final=True).coefficients[-1, 11:]
        assert not euler.any()


# ---- refusals ----------------------------------------------------------------------------------

REFUSED = {
    "rising": (
        lambda: solvers.euler_table([1.0, 2.0, 0.0]),
        ValueError,
        "sigmas must fall at every step, got step 0",
    ),
    "equal": (
        lambda: solvers.euler_table([2.0, 1.0, 1.0, 0.0]),
        ValueError,
        "must fall at every step, got step 1",
    ),
    "negative": (
        lambda: solvers.euler_table([2.0, -1.0]),
        ValueError,
        "sigma must be at least 0, got -1 at index 1",
    ),
    "zero-inside": (
        lambda: solvers.euler_table([2.0, 0.0, 0.0]),
        ValueError,
        "sigma must be above 0 before the last level, got 0 at index 1",
    ),
    "single": (lambda: solvers.euler_table([2.0]), ValueError, r"shape \[N \+ 1\]"),
    "matrix": (lambda: solvers.euler_table(torch.ones(2, 2)), ValueError, r"shape \[N \+ 1\]"),
    "nan": (lambda: solvers.euler_table([math.nan, 0.0]), ValueError, "levels must be finite"),
    "inf": (lambda: solvers.euler_table([math.inf, 1.0]), ValueError, "levels must be finite"),
    "strings": (lambda: solvers.euler_table(["a", "b"]), TypeError, "levels must be a tensor"),
    "bool": (lambda: solvers.euler_table(torch.tensor([True, False])), TypeError, "real numbers"),
    "prediction": (
        lambda: solvers.euler_table(SIGMAS, prediction_type="x0"),
        ValueError,
        "prediction_type must be one of",
    ),
    "clip": (lambda: solvers.euler_table(SIGMAS, clip_range=-1.0), ValueError, "clip_range"),
    "order-dpmpp": (
        lambda: solvers.dpmpp_table(SIGMAS, order=4),
        ValueError,
        "order must be in 1 .. 3",
    ),
    "order-singlestep": (
        lambda: solvers.dpmpp_singlestep_table(SIGMAS, order=4),
        ValueError,
        r"in 1 \.\. 3",
    ),
    "order-unipc": (
        lambda: solvers.unipc_table(SIGMAS, order=0),
        ValueError,
        "order must be in 1 .. 3",
    ),
    "order-lms": (
        lambda: solvers.lms_table(SIGMAS, order=5),
        ValueError,
        "order must be in 1 .. 4",
    ),
    "order-float": (
        lambda: solvers.lms_table(SIGMAS, order=2.0),
        TypeError,
        "order must be an int",
    ),
    "solver-dpmpp": (
        lambda: solvers.dpmpp_table(SIGMAS, solver_type="bh2"),
        ValueError,
        "solver_type must be one of 'midpoint', 'heun'",
    ),
    "solver-unipc": (
        lambda: solvers.unipc_table(SIGMAS, solver_type="heun"),
        ValueError,
        "solver_type must be one of 'bh1', 'bh2'",
    ),
    "algorithm": (
        lambda: solvers.dpmpp_table(SIGMAS, algorithm_type="ode-dpmsolver"),
        ValueError,
        "algorithm_type must be one of",
    ),
    "variance": (
        lambda: solvers.ddpm_table(SIGMAS, variance_type="small"),
        ValueError,
        "variance_type must be one of",
    ),
    "eta": (lambda: solvers.euler_ancestral_table(SIGMAS, eta=-0.1), ValueError, "eta must be at"),
    "eta-ddim": (
        lambda: solvers.ddim_table(SIGMAS, eta=1.1),
        ValueError,
        r"eta must be in \[0, 1\]",
    ),
    "eta-type": (
        lambda: solvers.dpmpp_2s_table(SIGMAS, eta="1"),
        TypeError,
        "eta must be a number",
    ),
    "s_noise": (lambda: solvers.dpmpp_sde_table(SIGMAS, s_noise=-1.0), ValueError, "s_noise"),
    "r": (lambda: solvers.dpmpp_sde_table(SIGMAS, r=0.0), ValueError, "r must lie in"),
    "s_churn": (lambda: solvers.heun_table(SIGMAS, s_churn=-1.0), ValueError, "s_churn"),
    "s_tmin": (lambda: solvers.heun_table(SIGMAS, s_tmin=2.0, s_tmax=1.0), ValueError, "s_tmin"),
    "churn-vp": (
        lambda: solvers.euler_table(
            NoiseLevels.from_schedule(LINEAR, torch.tensor([9, 0])), s_churn=1.0
        ),
        ValueError,
        "s_churn must be 0 unless alpha = 1",
    ),
    "flow-range": (lambda: solvers.flow_euler_table([2.0, 0.0]), ValueError, "must lie in"),
    "sigma_data": (
        lambda: solvers.edm_heun_table(SIGMAS, sigma_data=0.0),
        ValueError,
        "sigma_data must be above 0",
    ),
    "neither": (
        lambda: NoiseLevels.from_schedule(LINEAR),
        ValueError,
        "timesteps or sigmas must be given, got neither",
    ),
    "rounded-labels": (
        lambda: NoiseLevels.from_schedule(
            LINEAR, [3.5, 2.5, 1.5, 0.5], sigmas=SIGMAS, round_timesteps=True
        ),
        ValueError,
        "round_timesteps must be False with timesteps and sigmas, got True",
    ),
    "timesteps-out": (
        lambda: NoiseLevels.from_schedule(LINEAR, torch.tensor([1000, 0])),
        ValueError,
        "timesteps must lie in 0 .. 999",
    ),
    "timesteps-rise": (
        lambda: NoiseLevels.from_schedule(LINEAR, torch.tensor([0, 10, 5, 20])),
        ValueError,
        "timesteps must rise at every step, got 5 at index 2",
    ),
    "timesteps-empty": (
        lambda: NoiseLevels.from_schedule(LINEAR, []),
        ValueError,
        "timesteps must be real numbers",
    ),
    "timesteps-count": (
        lambda: NoiseLevels.from_sigmas(SIGMAS, torch.arange(2)),
        ValueError,
        "one for each of the 4 steps",
    ),
    "final": (
        lambda: NoiseLevels.from_schedule(LINEAR, torch.tensor([5]), final_sigmas_type="one"),
        ValueError,
        "final_sigmas_type",
    ),
    "path": (
        lambda: NoiseLevels.from_schedule(
            NoiseSchedule(torch.tensor([0.5, 0.4]), torch.tensor([0.1, 0.9])), torch.tensor([1, 0])
        ),
        ValueError,
        "schedule must be variance preserving",
    ),
    "sigma-space": (
        lambda: NoiseLevels.from_sigmas(SIGMAS).sigma_space(),
        ValueError,
        "path must be 'vp'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_schedule_of_one_timestep_gives_one_step():
    schedule = NoiseSchedule.from_betas(torch.tensor([0.5]))
    levels = NoiseLevels.from_schedule(schedule, torch.tensor([0]))
    for name in ALL:
        assert len(ALL[name](levels)) == 1
