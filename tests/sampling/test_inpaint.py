"""A known part in steps and loops: its bits, its levels, its gradients, and RePaint's moments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, ops, solvers
from diffcore.sampling import capture
from diffcore.solvers import NoiseLevels, SolverTable
from support.bounds import assert_same_bits, each_dtype
from support.solver_list import ALL, CHURNED, PATHS, levels_on

SHAPE = (3, 2, 4, 5)
KEY = PhiloxNoise(11, sample_ids=4)
RATIOS = torch.tensor([8.0, 3.0, 1.1, 0.4, 0.1, 0.0], dtype=torch.float64)
MASK = torch.rand(3, 1, 4, 5, generator=torch.Generator().manual_seed(1)) > 0.5
TABLES = [(name, path) for path in PATHS for name in ALL] + [(name, "ve") for name in CHURNED]
each_place = pytest.mark.parametrize("blend_at", ["after_step", "before_model"])


def table_of(name: str, path: str = "vp", ratios: Tensor = RATIOS) -> SolverTable:
    return {**ALL, **CHURNED}[name](levels_on(path, ratios), prediction_type="sample")


def model(x: Tensor, t: Tensor, scale: Any = 0.5) -> Tensor:
    return torch.tanh(scale * x) + 0.1 * x.flip(-1)  # sees the known part


def samples(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, known = torch.randn(2, *SHAPE, generator=generator).to(device, dtype)
    return 8 * x, known


def known_at(known: Tensor, noise: Any, alpha: float, sigma: float) -> Tensor:
    return ops.add_noise(known, noise, alpha, sigma)


@each_place
@pytest.mark.parametrize(("name", "path"), TABLES)
def test_the_known_part_has_the_bits_of_q_sample(name: str, path: str, blend_at: Any) -> None:
    """In what the model gets, and in what comes out."""
    table, (x, known) = table_of(name, path), samples(torch.float32)
    seen: list[Tensor] = []

    def watched(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return model(x, t)

    found = diffcore.sample(watched, x, table, noise=KEY, mask=MASK, known=known, blend_at=blend_at)
    for i, row in enumerate(table.rows):
        expected = known_at(known, KEY, row.alpha, row.sigma)
        expected = expected if row.input_scale == 1 else row.input_scale * expected
        if i or blend_at == "before_model":
            assert_same_bits(seen[i].masked_fill(MASK, 0), expected.masked_fill(MASK, 0))
    assert torch.equal(found.masked_fill(MASK, 0), known.masked_fill(MASK, 0))


@each_dtype
def test_every_dtype(dtype: torch.dtype, device: str) -> None:
    x, known = samples(dtype, device)
    mask = MASK.to(device)
    z = KEY.at(5).tensor(SHAPE, dtype=dtype, device=device)
    for name in ("ddpm", "dpmpp-2m", "heun"):
        table = table_of(name)
        for i in (0, 1, len(table) - 1):
            history = (0.3 * x,) * table.history
            given: dict[str, Any] = {"noise": KEY.at(3)}
            plain, kept = table.step(i, x, 0.4 * x, history, **given)
            row = table.rows[i]
            for noise in (KEY.at(5), z):
                given |= {"mask": mask, "known": known, "known_noise": noise}
                found, after = table.step(i, x, 0.4 * x, history, **given)
                put = known_at(known, noise, row.next_alpha, row.next_sigma)
                assert_same_bits(found, torch.where(mask, plain, put))
                assert len(after) == len(kept)
                for a, b in zip(after, kept, strict=True):
                    assert_same_bits(a, b)


@pytest.mark.parametrize("name", ["ddpm", "dpmpp-2m", "heun"])
def test_rows_selected_by_tensors(name: str, device: str) -> None:
    table, (x, known) = table_of(name), samples(torch.float64, device)
    mask = MASK.to(device)
    history = (0.3 * x,) * table.history
    given: dict[str, Any] = {"mask": mask, "known": known, "known_noise": KEY}
    rows = torch.tensor([0, len(table) - 1, 1], device=device)
    z = torch.randn_like(x)
    found, _ = table.step(rows, x, 0.4 * x, history, noise=z, **given)
    for b, i in enumerate(rows.tolist()):
        counter = torch.tensor([i], device=device)
        for row in (i, counter):
            one, _ = table.step(row, x, 0.4 * x, history, noise=z, **given)
            torch.testing.assert_close(one[b], found[b], rtol=1e-14, atol=1e-14)


def test_the_last_level_need_not_be_clean() -> None:
    ratios = RATIOS[:-1]
    x, known = samples(torch.float32)
    for path in PATHS:
        levels = levels_on(path, ratios)
        for make in (solvers.euler_table, solvers.dpmpp_2m_table):
            table = make(levels, prediction_type="sample")
            assert (table.final_alpha, table.final_sigma) == (
                float(levels.alpha[-1]),
                float(levels.sigma[-1]),
            )
            found = diffcore.sample(model, x, table, noise=KEY, mask=MASK, known=known)
            put = known_at(known, KEY, table.final_alpha, table.final_sigma)
            assert_same_bits(found.masked_fill(MASK, 0), put.masked_fill(MASK, 0))


# ---- loops ---------------------------------------------------------------------------------------


@each_place
@pytest.mark.parametrize("name", ["ddpm", "dpmpp-2m", "heun"])
@pytest.mark.parametrize("soft", [False, True])
def test_a_loop_of_ones_own(name: str, soft: bool, blend_at: str) -> None:
    table, (x, known) = table_of(name), samples(torch.float64)
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(3)) if soft else MASK
    given: dict[str, Any] = {"mask": mask, "known": known}
    found = diffcore.sample(model, x, table, noise=KEY, **given, blend_at=blend_at)  # type: ignore[arg-type]
    start, z, history = x.clone(), KEY.tensor(SHAPE, dtype=torch.float64), ()
    q = mask.double()
    for i, row in enumerate(table.rows):
        if blend_at == "before_model":
            x = q * x + (1 - q) * (row.alpha * known + row.sigma * z)
        m = model(row.input_scale * x, table.timesteps[i].expand(3))
        noise = KEY.at(1 + i) if row.noisy else None
        if blend_at == "after_step":
            x, history = table.step(i, x, m, history, noise=noise, **given, known_noise=z)
        else:
            x, history = table.step(i, x, m, history, noise=noise)
    if blend_at == "before_model":
        x = q * x + (1 - q) * known
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)
    assert torch.equal(start, samples(torch.float64)[0])


@pytest.mark.parametrize("name", ["ddpm", "dpmpp-2m", "heun"])
def test_hard_masks_give_the_same_at_both_places(name: str) -> None:
    table, (x, known) = table_of(name, "ve"), samples(torch.float64)
    first = table.rows[0]
    x = torch.where(MASK, x, known_at(known, KEY, first.alpha, first.sigma))
    after, before = (
        diffcore.sample(model, x, table, noise=KEY, mask=MASK, known=known, blend_at=place)  # type: ignore[arg-type]
        for place in ("after_step", "before_model")
    )
    assert torch.equal(after, before)


def test_before_the_model_as_comfyui_does_it() -> None:
    """Its x is never blended: the model's input is, and the known part of the predicted x_0."""
    table, (x, known) = table_of("dpmpp-2m", "ve"), samples(torch.float64)
    z, history = KEY.tensor(SHAPE, dtype=torch.float64), ()
    found = diffcore.sample(
        model, x, table, noise=KEY, mask=MASK, known=known, blend_at="before_model"
    )
    for i, row in enumerate(table.rows):
        seen = torch.where(MASK, x, known + row.sigma * z)
        x0 = torch.where(MASK, model(seen, table.timesteps[i].expand(3)), known)
        x, history = table.step(i, x, x0, history)
    torch.testing.assert_close(found, x, rtol=1e-12, atol=1e-12)


def test_hooks_guidance_and_noise_of_other_kinds() -> None:
    table, (x, known) = table_of("dpmpp-2m"), samples(torch.float64)
    z = torch.randn(SHAPE, dtype=torch.float64)
    inputs: list[Tensor] = []

    def keeping(x: Tensor, t: Tensor, scale: float) -> Tensor:
        inputs.extend([x] if scale == 0.9 else [])
        return model(x, t, scale)

    options: dict[str, Any] = {
        "guidance_scale": 2.0,
        "model_kwargs": {"scale": 0.9},
        "uncond_kwargs": {"scale": 0.4},
        "mask": MASK,
        "known": known,
        "before_model": lambda state: 0.9 * state["x"],
        "blend_at": "before_model",
    }
    found = diffcore.sample(keeping, x, table, known_noise=z, **options)
    for seen, row in zip(inputs, table.rows, strict=True):
        put = row.input_scale * known_at(known, z, row.alpha, row.sigma)
        assert torch.equal(seen[~MASK.expand_as(seen)], put[~MASK.expand_as(put)])
    options["noise"] = torch.randn(len(table), *SHAPE, dtype=torch.float64)
    assert torch.equal(diffcore.sample(model, x, table, known_noise=z, **options), found)
    default = []
    for _ in range(2):
        torch.manual_seed(0)
        default.append(diffcore.sample(model, x, table, **options))
    assert torch.equal(*default)
    assert not torch.equal(default[0], found)


@each_place
@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_through_a_loop(blend_at: Any, checkpoint: bool) -> None:
    table, (x, known) = table_of("dpmpp-2m"), samples(torch.float64)
    z = torch.randn(SHAPE, dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0], dtype=torch.float64)

    def run(known: Tensor, z: Tensor, scale: Tensor) -> Tensor:
        return diffcore.sample(
            model,
            x,
            table,
            model_kwargs={"scale": scale},
            mask=mask,
            known=known,
            known_noise=z,
            blend_at=blend_at,
            differentiable=True,
            checkpoint=checkpoint,
        )

    leaves = (known.requires_grad_(), z.requires_grad_(), scale)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_recorded_loops(device: str) -> None:
    table, (_, known) = table_of("ddpm"), samples(torch.float32, device)
    mask = MASK.to(device)
    for blend_at in ("after_step", "before_model"):
        recorded = capture(
            model,
            table,
            SHAPE,
            mask=mask,
            known=known,
            blend_at=blend_at,
            device=device,  # type: ignore[arg-type]
        )
        for seed in (1, 2):
            key = PhiloxNoise(seed, sample_ids=7)
            start = key.tensor(SHAPE, device=device) * table.init_noise_sigma
            given: dict[str, Any] = {"mask": mask, "known": known, "blend_at": blend_at}
            expected = diffcore.sample(model, start, table, noise=key, **given)
            assert_same_bits(recorded(key), expected)
            other = {"mask": ~mask, "known": known + 1}
            expected = diffcore.sample(model, start, table, noise=key, **{**given, **other})
            assert_same_bits(recorded(key, **other), expected)
            recorded(key, mask=mask, known=known)
    with pytest.raises(ValueError, match="known_noise must be None, because it was not recorded"):
        recorded(KEY, known_noise=known)
    plain = capture(model, table, SHAPE, device=device)
    with pytest.raises(ValueError, match="mask must be None, because it was not recorded"):
        plain(KEY, mask=mask)


def test_a_compiled_loop(device: str) -> None:
    table, (x, known) = table_of("dpmpp-2m"), samples(torch.float32, device)
    mask = MASK.to(device)

    def run(x: Tensor, known: Tensor) -> Tensor:
        return diffcore.sample(model, x, table, noise=KEY, mask=mask, known=known)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, known), run(x, known))


# ---- RePaint in the Gaussian world ---------------------------------------------------------------

COV = np.array([[1.0, 0.8], [0.8, 1.3]])
KNOWN = 0.9  # the first coordinate; the second is N(0.72, 0.66) then
MEAN, VARIANCE = 0.8 * KNOWN, 1.3 - 0.8**2


def repaint_levels(steps: int) -> NoiseLevels:
    ratios = torch.logspace(1, math.log10(0.02), steps, dtype=torch.float64)
    return NoiseLevels.from_sigmas(torch.cat([ratios, ratios.new_zeros(1)]))


def repaint_moments(table: SolverTable, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of RePaint's samples with the exact model: every move is affine."""
    mean, cov = np.zeros(2), np.eye(2) * table.init_noise_sigma**2
    for row in table.rows:
        c_x, c_m, c_0, c_z = row.coefficients[:4]
        move = c_x * np.eye(2) + (c_m + c_0) * COV @ np.linalg.inv(COV + row.sigma**2 * np.eye(2))
        for left in reversed(range(repeats if row.next_sigma > 0 else 1)):
            mean, cov = move @ mean, move @ cov @ move.T + c_z**2 * np.eye(2)
            mean[0], cov[0, 1], cov[1, 0], cov[0, 0] = KNOWN, 0, 0, row.next_sigma**2
            if left:
                cov = cov + (row.sigma**2 - row.next_sigma**2) * np.eye(2)
    return mean, cov


def repaint(table: SolverTable, repeats: int, count: int) -> Tensor:
    cov = torch.from_numpy(COV)
    x = KEY.tensor((count, 2), dtype=torch.float64) * table.init_noise_sigma
    known, mask = torch.full_like(x, KNOWN), torch.tensor([False, True])
    stream = 1
    for i, row in enumerate(table.rows):
        gain = cov @ torch.linalg.inv(cov + row.sigma**2 * torch.eye(2, dtype=torch.float64))
        for left in reversed(range(repeats if row.next_sigma > 0 else 1)):
            z, z_known, z_up = (KEY.at(stream + k) for k in range(3))
            stream += 3
            given: dict[str, Any] = {"mask": mask, "known": known, "known_noise": z_known}
            x, _ = table.step(i, x, x @ gain.T, noise=z, **given)
            if left:  # alpha is 1 at all levels
                x = ops.add_noise(x, z_up, 1.0, math.sqrt(row.sigma**2 - row.next_sigma**2))
    return x


def test_repaint_has_the_moments_of_its_affine_moves() -> None:
    table = solvers.euler_ancestral_table(repaint_levels(10), prediction_type="sample")
    count = 20_000
    x = repaint(table, 3, count)
    mean, cov = repaint_moments(table, 3)
    assert (x[:, 0] == KNOWN).all()
    error = abs(float(x[:, 1].mean()) - mean[1]) / math.sqrt(cov[1, 1] / count)
    assert error < 4
    error = abs(float(x[:, 1].var()) - cov[1, 1]) / (cov[1, 1] * math.sqrt(2 / count))
    assert error < 4


def test_repaints_moments_converge_to_those_of_the_conditional() -> None:
    errors = []
    for steps in (50, 100, 200):
        table = solvers.euler_ancestral_table(repaint_levels(steps), prediction_type="sample")
        mean, cov = repaint_moments(table, 150)
        assert abs(mean[1] - MEAN) < 0.01 * math.sqrt(VARIANCE)
        errors.append(abs(cov[1, 1] / VARIANCE - 1))
    assert errors[2] < 0.04
    assert errors[1] / errors[0] < 0.65
    assert errors[2] / errors[1] < 0.65


# ---- bad arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"known": None}, ValueError, "^known must be given with mask, got None$"),
        ({"mask": None}, ValueError, "^mask must be given with known, got None$"),
        (
            {"mask": None, "known": None, "known_noise": KEY},
            ValueError,
            "^mask must be given with known_noise, got None$",
        ),
        ({"known": [1.0]}, TypeError, "^known must be a torch.Tensor, got list$"),
        (
            {"known": torch.ones(2, 4, 5)},
            ValueError,
            r"^known must have the shape of x, \(3, 2, 4, 5\), got \(2, 4, 5\)",
        ),
        (
            {"known": torch.ones(SHAPE, dtype=torch.float64)},
            TypeError,
            r"^known must have the dtype of x, torch.float32, got torch.float64; pass known.to",
        ),
        (
            {"known_noise": torch.ones(SHAPE).double()},
            TypeError,
            "^known_noise must have the dtype of x, torch.float32, got torch.float64",
        ),
        (
            {"known_noise": torch.ones(3)},
            ValueError,
            r"^known_noise must have the shape of x, \(3, 2, 4, 5\), got \(3,\)",
        ),
        (
            {"known_noise": 3},
            TypeError,
            "^known_noise must be a torch.Tensor or a PhiloxNoise, got int$",
        ),
        ({"mask": torch.ones(3, 4, 5)}, ValueError, "^mask must broadcast to the shape of x"),
        ({"mask": torch.full((5,), 1.5)}, ValueError, r"^mask must have values in \[0, 1\]"),
        (
            {"mask": torch.ones(5, requires_grad=True)},
            ValueError,
            "^mask must not require grad",
        ),
    ],
)
def test_bad_arguments(options: Any, kind: type[Exception], message: str) -> None:
    table, (x, known) = table_of("ddim"), samples(torch.float32)
    given = {"mask": MASK, "known": known, **options}
    with pytest.raises(kind, match=message):
        diffcore.sample(lambda x, t: 1 / 0, x, table, **given)  # type: ignore[arg-type,return-value]
    given.setdefault("known_noise", KEY)
    with pytest.raises(kind, match=message):
        table.step(0, x, x, **given)


def test_where_to_blend_and_the_noise_of_a_step() -> None:
    table, (x, known) = table_of("ddim"), samples(torch.float32)
    with pytest.raises(ValueError, match="blend_at must be one of 'after_step', 'before_model'"):
        diffcore.sample(model, x, table, mask=MASK, known=known, blend_at="after")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="known_noise must be given with mask, got None"):
        table.step(0, x, x, mask=MASK, known=known)
