"""One sampling loop for all solvers: it computes what the tables specify and keeps no state."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, solvers
from diffcore.coefficients.step import PREDICTION_TYPES
from diffcore.sampling import sample
from diffcore.solvers import SolverTable
from support.solver_list import ALL, CHURNED, PATHS, geometric, levels_on
from support.toys import Recorder
from support.walking import walk

SAME = 1e-13
EVERY = {**ALL, **CHURNED}
RATIOS = geometric(6, 0.05, 20.0, to_zero=True)
FEW = ["euler", "heun", "dpmpp-3m", "unipc-3-bh2", "dpmpp-sde", "ddpm", "ddim-as-said"]
each_solver = pytest.mark.parametrize("name", EVERY)
each_of_few = pytest.mark.parametrize("name", FEW)


def bent(x: Tensor, t: Any, shift: float = 0.0) -> Tensor:
    scale = t / (t + 10)
    if isinstance(scale, Tensor):
        scale = scale.to(x).reshape(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x * scale) + 0.1 * torch.cos(3 * x) + shift


def guided(x: Tensor, t: Any, w: Any) -> Tensor:
    unconditional, conditional = bent(x, t), bent(x, t, 0.3)
    return unconditional + w * (conditional - unconditional)


def stacked(x: Tensor, t: Tensor) -> Tensor:
    return torch.cat([bent(x, t), bent(x, t, 0.3)])


def table_of(name: str, path: str = "vp", **options: Any) -> SolverTable:
    if name in CHURNED:
        path = "ve"
    return EVERY[name](levels_on(path, RATIOS), **options)


def case(table: SolverTable, *shape: int) -> tuple[Tensor, Tensor]:
    """(x, the noise of every row and of the start)."""
    shape = shape or (3, 2, 5)
    x = table.init_noise_sigma * torch.randn(shape, dtype=torch.float64)
    return x, torch.randn(len(table) + 1, *shape, dtype=torch.float64)


def assert_close(actual: Tensor, expected: Tensor, bound: float = SAME) -> None:
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= bound * max(1.0, float(expected.abs().max()))


# ---- the loop -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@each_solver
def test_every_solver_computes_what_its_table_specifies(name: str, path: str) -> None:
    for clip_range in (None, (-0.3, 0.4)):
        table = table_of(name, path, clip_range=clip_range)
        x, noise = case(table)
        kept = x.clone()
        out = sample(bent, x, table, noise=noise)
        assert_close(out, walk(table, bent, x, lambda row, z=noise: z[row]))
        assert torch.equal(x, kept)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@each_of_few
def test_every_prediction_type(name: str, prediction_type: str) -> None:
    for levels in (levels_on("vp", RATIOS), levels_on("vp", RATIOS).sigma_space()):
        table = EVERY[name](levels, prediction_type=prediction_type)
        x, noise = case(table)
        out = sample(bent, x, table, noise=noise)
        assert_close(out, walk(table, bent, x, lambda row, z=noise: z[row]))


@each_solver
def test_guidance(name: str) -> None:
    table = table_of(name, clip_range=2.0)
    x, noise = case(table)
    for w in (1.7, torch.tensor([0.0, 1.0, 7.5], dtype=torch.float64)):
        column = w.reshape(3, 1, 1) if isinstance(w, Tensor) else w
        expected = walk(table, lambda x, t, w=column: guided(x, t, w), x, lambda row: noise[row])
        for model, kwargs in (
            (stacked, {}),
            (bent, {"model_kwargs": {"shift": 0.3}, "uncond_kwargs": {}}),
        ):
            assert_close(sample(model, x, table, guidance_scale=w, noise=noise, **kwargs), expected)


@each_solver
def test_noise_is_a_key_a_tensor_or_a_function(name: str) -> None:
    table = table_of(name)
    x, _ = case(table)
    key = PhiloxNoise(4, sample_ids=torch.tensor([5, 0, 2]), stream=3)
    rows = len(table)  # the start of churn comes after all rows
    given = [key.at(3 + 1 + r).tensor(x.shape, dtype=x.dtype) for r in range(rows + 1)]
    asked = []

    def draw(row: int, x: Tensor) -> Tensor | PhiloxNoise:
        asked.append(row)
        return given[row] if row % 2 else key.at(4 + row)

    out = sample(bent, x, table, noise=key)
    assert torch.equal(out, sample(bent, x, table, noise=torch.stack(given)))
    assert torch.equal(out, sample(bent, x, table, noise=draw))
    noisy = [r for r in range(rows) if table.column("c_z")[r] != 0]
    assert asked == [rows] * (table.start_noise != 0) + noisy
    again = sample(bent, x, table, noise=key.at(0))
    assert torch.equal(again, out) != table.stochastic


def test_default_noise_comes_from_torchs_generator() -> None:
    table = table_of("ddpm")
    x, _ = case(table)
    torch.manual_seed(3)
    first = sample(bent, x, table)
    assert not torch.equal(first, sample(bent, x, table))
    torch.manual_seed(3)
    assert torch.equal(first, sample(bent, x, table, noise=PhiloxNoise.from_generator()))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1), (torch.float16, 2e-2)]
)
@each_solver
def test_low_precision_stays_close(name: str, dtype: torch.dtype, bound: float) -> None:
    table = table_of(name, prediction_type="sample")
    x, noise = case(table)
    out = sample(bent, x.to(dtype), table, noise=noise.to(dtype))
    assert out.dtype == dtype
    exact = sample(bent, x, table, noise=noise)
    # Some solvers divide by alpha, and multiply the error of 16 bits: eager's own tells how much.
    eager = walk(table, bent, x.to(dtype), lambda row: noise[row].to(dtype))
    bound = max(bound, 2 * (eager.double() - exact).abs().max().item())
    assert_close(out.double(), exact, bound)


# ---- one step -----------------------------------------------------------------------------------


def all_steps(table: SolverTable, x: Tensor, noise: Tensor) -> list[tuple[Any, ...]]:
    """(x, m, history, x', history') of every row."""
    steps, history = [], ()
    for row in range(len(table)):
        m = bent(table.input_scale[row] * x, table.timesteps[row].to(x).repeat(len(x)))
        z = noise[row] if table.rows[row].noisy else None
        after, left = table.step(row, x, m, history, noise=z)
        steps.append((x, m, history, after, left))
        x, history = after, left
    return steps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@each_solver
def test_rows_by_int_by_counter_and_one_for_each_sample(name: str, dtype: torch.dtype) -> None:
    table = table_of(name)
    x, noise = (v.to(dtype) for v in case(table))
    steps = all_steps(table, x, noise)
    if table.start_noise == 0:
        assert torch.equal(steps[-1][3], sample(bent, x, table, noise=noise))
    for row, (x, m, history, after, left) in enumerate(steps):
        assert len(left) == min(row + 1, table.history)
        found, kept = table.step(torch.tensor([row]), x, m, history, noise=noise[row])
        assert torch.equal(found, after)
        assert len(kept) == table.history
    # Sample b at row r of its own, with the tensors of that step.
    rows = torch.tensor([len(table) - 1, 1 % len(table), len(table) // 2])
    own = [[v[b] for v in steps[r][:2]] for b, r in enumerate(rows)]
    x, m = (torch.stack(v) for v in zip(*own, strict=True))
    fill = torch.zeros_like(x[0])
    history = tuple(
        torch.stack([(*(h[b] for h in steps[r][2]), *[fill] * 3)[k] for b, r in enumerate(rows)])
        for k in range(table.history)
    )
    z = torch.stack([noise[r, b] for b, r in enumerate(rows)])
    found, kept = table.step(rows, x, m, history, noise=z)
    for b, r in enumerate(rows):
        assert torch.equal(found[b], steps[r][3][b])
        if table.coefficients[r, 8:11].any():
            assert torch.equal(kept[0][b], steps[r][4][0][b])


def test_history_is_passed_on_newest_first() -> None:
    table = table_of("dpmpp-3m", prediction_type="sample")
    x, noise = case(table)
    steps = all_steps(table, x, noise)
    for row in range(2, len(table) - 1):  # the newest first
        for k in range(table.history):
            assert torch.equal(steps[row][2][k], steps[row - 1 - k][1])


def test_a_row_that_writes_no_history_still_shifts_it() -> None:
    base = solvers.dpmpp_table(RATIOS[:4], order=3)
    rows = torch.zeros(3, len(solvers.COLUMNS), dtype=torch.float64)
    for row, columns in enumerate(({"c_x": 1, "e_x": 1}, {"c_x": 2}, {"c_x": 1, "c_2": 1})):
        for column, value in columns.items():
            rows[row, solvers.COLUMNS.index(column)] = value
    table = replace(base, coefficients=rows, history=2, rows=())
    x, _ = case(table)
    assert torch.equal(sample(bent, x, table), 3 * x)
    assert torch.equal(walk(table, bent, x), 3 * x)


# ---- no state -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpmpp-3m-heun", "unipc-3-bh2", "dpmpp-sde", "heun-churn"])
def test_threads_share_a_table(name: str) -> None:
    table, together = table_of(name), threading.Barrier(4)
    starts = torch.randn(4, 3, 17)
    alone = [sample(bent, x, table, noise=PhiloxNoise(k)) for k, x in enumerate(starts)]
    found: dict[int, Tensor] = {}

    def run(k: int) -> None:
        def model(x: Tensor, t: Tensor) -> Tensor:
            together.wait(10)  # every call of the model finds all threads at the same row
            return bent(x, t)

        found[k] = sample(model, starts[k], table, noise=PhiloxNoise(k))

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[k], alone[k]) for k in range(4))


# ---- the model and the callback -----------------------------------------------------------------


@each_solver
def test_callbacks_come_once_a_step(name: str) -> None:
    table, seen, calls = table_of(name, clip_range=1.5), [], []
    begins = [row for row, known in enumerate(table.rows) if known.begins]

    def model(x: Tensor, t: Tensor) -> Tensor:
        if calls and len(calls) in begins:  # the model gets what the callback got
            assert torch.equal(x, seen[-1]["x"])
        calls.append((x, t, stacked(x, t)))
        return calls[-1][2]

    def callback(state: dict[str, Any]) -> None:
        row = begins[len(seen)]
        assert len(calls) == [*begins, len(table)][len(seen) + 1]
        x, t, m = calls[row]
        assert torch.equal(state["t"], t)
        assert state["sigma"] == table.sigma[row]
        m_u, m_c = m.chunk(2)
        a_x, a_m = table.column("a_x")[row], table.column("a_m")[row]
        x0 = (a_x * x + a_m * (m_u + 3.0 * (m_c - m_u))).clamp(-1.5, 1.5)
        assert_close(state["denoised"], x0)
        seen.append(state)

    x, noise = case(table)
    out = sample(model, x, table, guidance_scale=3.0, noise=noise, callback=callback)
    assert [state["i"] for state in seen] == list(range(table.num_steps))
    assert len(calls) == len(table)
    assert torch.equal(out, seen[-1]["x"])
    assert torch.equal(out, sample(stacked, x, table, guidance_scale=3.0, noise=noise))


def test_timestep_inputs_of_the_model() -> None:
    for dtype, path in ((torch.bfloat16, "ve"), (torch.float64, "flow"), (torch.float32, "vp")):
        table, model = table_of("dpmpp-2s", path), Recorder()
        sample(model, torch.randn(3, 2, dtype=dtype), table, model_kwargs={"scale": 0.25})
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert torch.equal(torch.stack(model.t), table.timesteps.to(wide)[:, None].expand(-1, 3))
        assert set(model.dtype) == {dtype}


def test_a_model_may_return_another_dtype() -> None:
    table = table_of("dpmpp-2m")
    x = torch.randn(3, 4)
    out = sample(lambda x, t: bent(x, t).double(), x, table)
    assert out.dtype == torch.float32
    assert torch.equal(out, sample(bent, x, table))


def test_no_gradient_is_recorded() -> None:
    net = torch.nn.Linear(4, 4)
    x = torch.randn(3, 4, requires_grad=True)
    out = sample(lambda x, t: net(x), x, table_of("dpmpp-3m"))
    assert not out.requires_grad
    assert torch.is_grad_enabled()


def test_progress_shows_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    table = table_of("heun")
    x, _ = case(table)
    quiet = [sample(bent, x, table, progress=p) for p in (False, None)]  # here is no terminal
    assert capsys.readouterr().err == ""
    shown = sample(bent, x, table, progress=True)
    assert f"{len(table)}/{len(table)}" in capsys.readouterr().err
    assert all(torch.equal(out, shown) for out in quiet)


# ---- refusals -----------------------------------------------------------------------------------

X = torch.ones(2, 3)
SIGMAS = [5.0, 3.0, 1.0, 0.0]
PLAIN = solvers.dpmpp_2m_table(SIGMAS)
NOISY = solvers.ddpm_table(SIGMAS)
REFUSED = {
    "table": (lambda: sample(bent, X, SIGMAS), TypeError, "table must be a SolverTable"),
    "x-int": (lambda: sample(bent, X.int(), PLAIN), TypeError, "x must be a floating-point"),
    "x-list": (lambda: sample(bent, [1.0], PLAIN), TypeError, "x must .* got list"),
    "x-0-dim": (lambda: sample(bent, X[0, 0], PLAIN), TypeError, r"x must .* \(\)"),
    "no-scale": (
        lambda: sample(bent, X, PLAIN, uncond_kwargs={}),
        ValueError,
        "guidance_scale must be given",
    ),
    "half": (lambda: sample(bent, X, PLAIN, guidance_scale=2.0), ValueError, r"shape \(4, 3\)"),
    "both": (
        lambda: sample(stacked, X, PLAIN, guidance_scale=2.0, uncond_kwargs={}),
        ValueError,
        r"shape \(2, 3\), got \(4, 3\)",
    ),
    "scales": (
        lambda: sample(stacked, X, PLAIN, guidance_scale=torch.ones(3)),
        ValueError,
        "guidance_scale must have .* got 3",
    ),
    "output": (lambda: sample(lambda x, t: None, X, PLAIN), TypeError, "model must return"),
    "noise": (lambda: sample(bent, X, NOISY, noise=3), TypeError, "noise must be .* got int"),
    "noise-shape": (
        lambda: sample(bent, X, NOISY, noise=torch.ones(3, 2, 2)),
        ValueError,
        r"noise must have the shape \[S, 2, 3\]",
    ),
    "noise-rows": (
        lambda: sample(bent, X, NOISY, noise=torch.ones(1, 2, 3)),
        ValueError,
        r"noise must have the shape \[S, 2, 3\]",
    ),
    "noise-dtype": (
        lambda: sample(bent, X, NOISY, noise=torch.ones(3, 2, 3).int()),
        TypeError,
        "noise must have dtype",
    ),
    "noise-none": (
        lambda: sample(bent, X, NOISY, noise=lambda r, x: None),
        TypeError,
        "noise must return .* got NoneType",
    ),
    "no-noise": (
        lambda: NOISY.step(0, X, X),
        ValueError,
        "noise must be given at row 0 of ddpm",
    ),
    "no-history": (
        lambda: PLAIN.step(1, X, X),
        ValueError,
        "history must hold at least 1 .* got 0",
    ),
    "history": (
        lambda: PLAIN.step(1, X, X, (X[:, :2],)),
        ValueError,
        "history_1 must have the shape of x",
    ),
    "row": (lambda: PLAIN.step(3, X, X), ValueError, "i must be .* 0 .. 2, got 3"),
    "row-negative": (lambda: PLAIN.step(-1, X, X, (X,)), ValueError, "i must be .* 0 .. 2, got -1"),
    "rows": (lambda: PLAIN.step(torch.tensor([0, 3]), X, X), ValueError, "^i must hold .* got 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument(name: str) -> None:
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
