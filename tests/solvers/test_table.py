"""A solver table is data: it can be pickled, copied and compared by identity."""

from __future__ import annotations

import contextlib
import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode

from diffcore.coefficients import ddim_coefficients, ddpm_coefficients
from diffcore.diffusion import GaussianDiffusion
from diffcore.ops import _launch, reverse_step
from diffcore.schedules import NoiseSchedule, make_betas
from diffcore.solvers import NoiseLevels, SolverTable, ddpm_table
from diffcore.solvers.rows import Rows
from support.op_case import without_kernels
from support.solver_list import ALL, CHURNED
from support.toys import Says, half

SIGMAS = [10.0, 4.0, 1.0, 0.3, 0.0]


@pytest.mark.parametrize("name", ["heun", "dpmpp-3m", "ddpm"])
def test_tables_can_be_pickled_and_copied(name: str) -> None:
    table = ALL[name](SIGMAS)
    table.to("meta")
    x, m = torch.randn(2, 3, 5)
    history = (m,) * table.history
    expected, _ = table.step(1, x, m, history, noise=m)
    state = pickle.dumps(table)
    assert b"Plan" not in state  # kernels are planned again, not stored
    for again in (pickle.loads(state), copy.deepcopy(table), copy.copy(table)):
        assert again.rows == table.rows
        assert again != table
        assert torch.equal(again.step(1, x, m, history, noise=m)[0], expected)


def state_of(table: SolverTable, **changes: Any) -> dict[str, Any]:
    return {**table.__getstate__(), **changes}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"history": 7}, ValueError, "history must be in 0 .. 3, got 7"),
        ({"history": "1"}, TypeError, "history must be an int, got str"),
        ({"order": 0}, ValueError, "order must be at least 1"),
        ({"name": None}, TypeError, "name must be a string"),
        ({"init_noise_sigma": "1"}, TypeError, "init_noise_sigma must be a number"),
        ({"coefficients": torch.zeros(0, 14)}, ValueError, r"coefficients must have shape \[S, 14"),
        ({"coefficients": torch.zeros(4, 8)}, ValueError, r"coefficients must have shape \[S, 14"),
        ({"coefficients": torch.zeros(14)}, ValueError, "coefficients must have shape"),
        ({"coefficients": [[0.0] * 14] * 4}, TypeError, "coefficients must be a torch.Tensor"),
        ({"timesteps": torch.arange(3)}, ValueError, r"timesteps must have shape \(4,\), got \(3,"),
        ({"step_index": torch.arange(9)}, ValueError, r"step_index must have shape \(4,\)"),
        ({"noise_levels": torch.zeros(4)}, ValueError, r"noise_levels must have shape \(4, 2\)"),
        ({"variance": torch.zeros(4, 3)}, ValueError, r"variance must have shape \(4, 2\)"),
        ({"sigma": None}, TypeError, "sigma must be a torch.Tensor, got NoneType"),
        ({"more": 1}, ValueError, "state must have the fields .* got more too many or too few"),
    ],
)
def test_a_state_that_is_no_table_is_refused(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    table = ALL["ddpm"](SIGMAS)
    with pytest.raises(kind, match=message):
        SolverTable.__new__(SolverTable).__setstate__(state_of(table, **change))
    if "more" not in change:  # the constructor checks the same fields
        with pytest.raises(kind, match=message):
            SolverTable(**state_of(table, **change))


def test_a_state_without_a_field_is_refused() -> None:
    state = state_of(ALL["ddpm"](SIGMAS))
    del state["alpha"]
    with pytest.raises(ValueError, match=r"state must have the fields .* got alpha"):
        SolverTable.__new__(SolverTable).__setstate__(state)


@pytest.mark.parametrize("name", {**ALL, **CHURNED})
def test_a_table_prints_as_one_line(name: str) -> None:
    levels = NoiseLevels.from_sigmas(SIGMAS)
    table = {**ALL, **CHURNED}[name](levels)
    for text in (repr(table), repr(table.to("meta")), repr(levels)):
        assert len(text) < 120
        assert "\n" not in text
    assert repr(table).startswith(f"SolverTable('{table.name}', 4 steps, {len(table)} model calls")
    assert ("stochastic" in repr(table)) == table.stochastic
    assert repr(levels) == "NoiseLevels(path='ve', 4 steps, sigma / alpha from 10 to 0)"


def test_rows_are_named_by_an_int() -> None:
    table, x = ALL["heun"](SIGMAS), torch.ones(2, 3)
    for f in (table.step, table.denoised):
        with pytest.raises(TypeError, match="i must be an int, got float"):
            f(1.0, x, x)
        with pytest.raises(ValueError, match=r"i must be a row of heun, 0 .. 6, got 7"):
            f(7, x, x)
    with pytest.raises(TypeError, match=r"got Row; pass table.rows\[i\].coefficients"):
        reverse_step(x, x, table.rows[0])
    row = ALL["euler"](SIGMAS)
    assert torch.equal(reverse_step(x, x, row.rows[1].coefficients), row.step(1, x, x)[0])
    assert torch.equal(reverse_step(x, x, row.coefficients, t=1), row.step(1, x, x)[0])


def test_a_single_step_builds_no_rows_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    # A row for each timestep took 7 s at T = 100,000, before the first step of a diffusion.
    def built(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a row was built in Python")

    monkeypatch.setattr(Rows, "add", built)
    monkeypatch.setattr(_launch, "row_plan", built)
    monkeypatch.setattr(NoiseLevels, "x0", built)
    for variance_type in ("fixed_small", "learned_range"):
        diffusion = GaussianDiffusion(make_betas("linear", 50), "epsilon", variance_type)
        model = half if variance_type == "fixed_small" else Says(0.0)
        x = torch.ones(1, 2, 3)
        assert diffusion.p_sample(model, x, 5)["sample"].isfinite().all()
        assert diffusion.p_mean_variance(model, x, 5)["mean"].isfinite().all()
        assert diffusion.ddim_sample(model, x, 5, eta=0.5)["sample"].isfinite().all()


EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("make", ["ddpm", "ddim-half", "ddim-as-said"])
def test_vectors_have_the_coefficients_of_single_steps(make: str, prediction: str) -> None:
    schedule = NoiseSchedule.from_betas(make_betas("linear", 50, scale_to_1000=True))
    levels = NoiseLevels.from_schedule(schedule, list(range(50))[::-1])
    table = ALL[make](levels, prediction_type=prediction, clip_range=1.0)
    ends = [(float(a), float(s)) for a, s in zip(levels.alpha, levels.sigma, strict=True)]
    for i, (here, after) in enumerate(pairwise(ends)):
        single = (
            ddpm_coefficients(*here, *after, prediction_type=prediction, clip_range=1.0)
            if make == "ddpm"
            else ddim_coefficients(
                *here,
                *after,
                eta=0.5 if make == "ddim-half" else 0.0,
                rederive_epsilon=make != "ddim-as-said",
                prediction_type=prediction,
                clip_range=1.0,
            )
        )
        # On some processors torch takes the square roots of a vector with an error of one ulp.
        torch.testing.assert_close(table.coefficients[i, :8], single, rtol=2 * EPS, atol=0)


def test_coefficients_beyond_float32_are_refused() -> None:
    tiny = NoiseLevels.from_schedule(NoiseSchedule.from_betas([0.999] * 26), [25, 24])
    for make in ALL.values():
        with pytest.raises(ValueError, match=r"must (be finite|not be 0).* in float32"):
            make(tiny)


@pytest.mark.parametrize("learned", [False, True])
def test_rows_in_a_tensor_are_named_as_the_argument(learned: bool) -> None:
    levels = NoiseSchedule.from_betas([0.1, 0.2, 0.3])
    made = NoiseLevels.from_schedule(levels, [2, 1, 0])
    table = ddpm_table(made, variance_type="learned" if learned else "fixed_small")
    x = torch.zeros(2, 3)
    freed = torch.zeros(2, dtype=torch.int64)
    freed.untyped_storage().resize_(0)
    wrong: dict[str, tuple[torch.Tensor, type[Exception]]] = {
        r"i must hold steps in 0 .. 2, got 9": (torch.tensor([0, 9]), ValueError),
        r"i must hold steps in 0 .. 2, got -1": (torch.tensor([-1]), ValueError),
        r"i must be one step, .* got shape \(3,\)": (torch.tensor([0, 1, 2]), ValueError),
        r"i must be on cpu, as the samples, got meta": (freed.to("meta"), ValueError),
        r"i must have memory": (freed, ValueError),
        r"i must be an int or an int64 or int32 tensor, got torch.float32": (x[:, 0], TypeError),
    }  # fmt: skip
    extra = {"variance_output": x} if learned else {}
    for mode in (contextlib.nullcontext, BaseTorchFunctionMode, without_kernels):
        for message, (i, kind) in wrong.items():
            with pytest.raises(kind, match=f"^{message}"), mode():
                table.step(i, x, x, noise=x, **extra)
