"""Ops with a level for each group: the bits of folding the groups into the batch by hand."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import PhiloxNoise, guidance, ops, solvers
from diffcore.sigmas import get_sigmas_flow
from support.folding import LAYOUTS, Layout

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KEY = PhiloxNoise(2**40 + 3, sample_ids=5, stream=2, first_element=8)
FLOW = solvers.NoiseLevels.from_flow(get_sigmas_flow(8))
TABLES = {
    "euler": solvers.euler_table(FLOW, prediction_type="flow_prediction"),
    "dpm++ 2m": solvers.dpmpp_table(FLOW, order=2, prediction_type="flow_prediction"),
    "sde": solvers.flow_sde_table(FLOW, eta=0.5),
}

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def levels(layout: Layout) -> tuple[Tensor, Tensor]:
    a, s = torch.rand(2, *layout.levels, dtype=torch.float64) + 0.25
    return a, s


@each_layout
@each_dtype
def test_add_noise(layout: Layout, dtype: torch.dtype) -> None:
    x, (a, s) = layout.samples(dtype), levels(layout)
    z = KEY.tensor(x.shape, dtype=dtype)
    wanted = layout.unfolded(
        ops.add_noise(layout.folded(x), layout.folded(z), a.flatten(), s.flatten())
    )
    for noise in (KEY, z):
        for dim in (layout.dim, layout.dim - x.ndim):
            found = ops.add_noise(x, noise, a, s, group_dim=dim)
            assert torch.equal(found, wanted)
            assert found.stride() == x.stride()
    out = torch.empty_like(x)
    assert ops.add_noise(x, KEY, a, s, group_dim=layout.dim, out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, wanted)


@each_layout
def test_levels_of_samples_and_of_all(layout: Layout) -> None:
    x, z = layout.samples(), layout.samples()
    a = torch.rand(layout.shape[0])
    assert torch.equal(
        ops.add_noise(x, z, a, 0.5, group_dim=layout.dim), ops.add_noise(x, z, a, 0.5)
    )


@each_layout
def test_conversions(layout: Layout) -> None:
    x, m, (a, s) = layout.samples(), layout.samples(), levels(layout)
    t = torch.randint(0, 10, layout.levels)
    table = torch.rand(10, 2, dtype=torch.float64)
    f = layout.folded
    folded = (f(x), f(m), a.flatten(), s.flatten())
    cases: dict[str, tuple[Tensor, Tensor]] = {
        "velocity": (ops.velocity(x, m, a, s, group_dim=layout.dim), ops.velocity(*folded)),
        "tables": (
            ops.velocity(x, m, table[:, 0], table[:, 1], t=t, group_dim=layout.dim),
            ops.velocity(f(x), f(m), table[:, 0], table[:, 1], t=t.flatten()),
        ),
        "q_sample": (
            ops.q_sample(x, t, m, table, group_dim=layout.dim),
            ops.q_sample(f(x), t.flatten(), f(m), table),
        ),
    }
    for convert in (ops.predict_x0, ops.predict_epsilon):
        for kind in ("epsilon", "v_prediction", "flow_prediction"):
            found = convert(m, x, a, s, prediction_type=kind, group_dim=layout.dim)
            wanted = convert(f(m), f(x), *folded[2:], prediction_type=kind)
            cases[f"{convert.__name__} {kind}"] = found, wanted
    for name, (found, wanted) in cases.items():
        assert torch.equal(found, layout.unfolded(wanted)), name


def test_a_target_comes_with_it() -> None:
    layout = LAYOUTS["video"]
    x, (a, s) = layout.samples(), levels(layout)
    x_t, v = ops.add_noise(x, KEY, a, s, return_target="v_prediction", group_dim=2)
    assert torch.equal(x_t, ops.add_noise(x, KEY, a, s, group_dim=2))
    assert torch.equal(v, ops.velocity(x, KEY, a, s, group_dim=2))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("name", ["video", "video, channels last", "actions"])
def test_a_row_for_each_group(table: solvers.SolverTable, name: str) -> None:
    layout = LAYOUTS[name]
    f = layout.folded
    x, m, u = (layout.samples() for _ in range(3))
    h = tuple(layout.samples() for _ in range(table.history))
    i = torch.randint(1, len(table), layout.levels)
    scale, bound = torch.rand(2, *layout.levels) + 1
    rule = guidance.RescaledCFG(3.0, 0.5)
    w, g = rule.numbers(m, u)
    groups = layout.levels[1]
    by_row = guidance.Weighted(
        w.repeat_interleave(groups), torch.as_tensor(g).repeat_interleave(groups)
    )
    cases = (
        ({}, {}),
        ({"threshold": bound}, {"threshold": bound.flatten()}),
        (
            {"model_output_uncond": u, "guidance_scale": scale},
            {"model_output_uncond": f(u), "guidance_scale": scale.flatten()},
        ),
        (
            {"model_output_uncond": u, "guidance": rule},
            {"model_output_uncond": f(u), "guidance": by_row},
        ),
    )
    for given, folded in cases:
        found, left = table.step(i, x, m, h, noise=KEY, group_dim=layout.dim, **given)
        wanted, kept = table.step(
            i.flatten(), f(x), f(m), tuple(map(f, h)), noise=f(KEY.tensor(x.shape)), **folded
        )
        assert torch.equal(found, layout.unfolded(wanted)), given
        assert len(left) == len(kept) == table.history
        for a, b in zip(left, kept, strict=True):
            assert torch.equal(a, layout.unfolded(b))


def test_a_reverse_step_and_its_probability() -> None:
    layout = LAYOUTS["video"]
    f, table = layout.folded, TABLES["sde"]
    x, m = layout.samples(), layout.samples()
    i = torch.randint(1, len(table) - 1, layout.levels)
    columns = table.coefficients[:, :8].contiguous()
    found, score = ops.reverse_step(
        x, m, columns, t=i, noise=KEY, group_dim=2, return_log_prob=True
    )
    rows = ops.reverse_step(x, m, columns[i], noise=KEY, group_dim=2)
    wanted, each = ops.reverse_step(
        f(x), f(m), columns, t=i.flatten(), noise=f(KEY.tensor(x.shape)), return_log_prob=True
    )
    assert torch.equal(found, layout.unfolded(wanted))
    assert torch.equal(rows, found)
    # A group is several runs of memory, whose sums are added.
    torch.testing.assert_close(score, each.view(layout.levels))
    again = ops.step_log_prob(x, m, found, columns, t=i, group_dim=2)
    assert torch.equal(again, score)


@each_layout
def test_gradients(layout: Layout) -> None:
    x, z = (layout.samples(torch.float64).requires_grad_() for _ in range(2))
    a, s = (y.requires_grad_() for y in levels(layout))

    def noised(x: Tensor, z: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return ops.add_noise(x, z, a, s, group_dim=layout.dim)

    assert torch.autograd.gradcheck(noised, (x, z, a, s))
    # Beside a gradient of the levels the noise of a key is read from a tensor.
    by_key = ops.add_noise(x, KEY, a, s, group_dim=layout.dim)
    by_tensor = noised(x, KEY.tensor(x.shape, dtype=x.dtype), a, s)
    assert torch.equal(by_key, by_tensor)


@pytest.mark.parametrize("name", ["video", "video, channels last", "tokens"])
def test_compiled_and_vmapped(name: str) -> None:
    layout = LAYOUTS[name]
    x, (a, s) = layout.samples(), levels(layout)

    def step(x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        return ops.add_noise(x, KEY, a, s, group_dim=layout.dim)

    wanted = step(x, a, s)
    compiled: Callable[..., Tensor] = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, a, s), wanted)
    z = KEY.tensor(x.shape)
    both = torch.vmap(lambda a: ops.add_noise(x, z, a, s, group_dim=layout.dim))(
        torch.stack((a, a / 2))
    )
    torch.testing.assert_close(both[0], wanted)
    torch.testing.assert_close(both[1], ops.add_noise(x, z, a / 2, s, group_dim=layout.dim))


BAD: dict[str, tuple[Callable[[Tensor, Tensor], object], type[Exception], str]] = {
    "no group_dim": (
        lambda x, a: ops.add_noise(x, x, a, 1.0),
        ValueError,
        r"alpha must have one number per sample, got shape \(2, 5\); .* with group_dim",
    ),
    "no group_dim, t": (
        lambda x, a: ops.q_sample(x, a.long(), x, torch.rand(9, 2)),
        ValueError,
        r"t must be one step, or \[2\], .* got shape \(2, 5\); .*pass \[B, F\] with group_dim",
    ),
    "other groups": (
        lambda x, a: ops.add_noise(x, x, a[:, :3], 1.0, group_dim=2),
        ValueError,
        r"alpha must have shape \[B, G\], B = 2 and G = 5, .* with group_dim, got \(2, 3\)",
    ),
    "the samples": (
        lambda x, a: ops.add_noise(x, x, a, 1.0, group_dim=0),
        ValueError,
        r"group_dim must be a dimension of x0 other than 0, in 1 \.\. 4, got 0",
    ),
    "no such dimension": (
        lambda x, a: ops.add_noise(x, x, a, 1.0, group_dim=5),
        ValueError,
        r"group_dim must be a dimension of x0 other than 0, in 1 \.\. 4, got 5",
    ),
    "no int": (
        lambda x, a: ops.add_noise(x, x, a, 1.0, group_dim="frames"),  # type: ignore[call-overload]
        TypeError,
        r"group_dim must be an int, got str",
    ),
    "other noise": (
        lambda x, a: ops.add_noise(x, x[:, :2], a, 1.0, group_dim=2),
        ValueError,
        r"noise must have the shape of the samples, \(2, 3, 5, 4, 6\), got \(2, 2, 5, 4, 6\)",
    ),
    "a step out of range": (
        lambda x, a: ops.q_sample(x, a.long() + 9, x, torch.rand(9, 2), group_dim=2),
        ValueError,
        r"t must hold steps in 0 \.\. 8, got 9",
    ),
    "no tensor": (
        lambda x, a: ops.add_noise([1.0], x, a, 1.0, group_dim=2),  # type: ignore[call-overload]
        TypeError,
        r"x0 must be a torch.Tensor, got list",
    ),
    "out elsewhere": (
        lambda x, a: ops.add_noise(
            x, x, a, 1.0, group_dim=2, out=x.clone(memory_format=torch.channels_last_3d)
        ),
        ValueError,
        r"out must lie in memory as the samples do with group_dim",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), BAD.values(), ids=BAD)
def test_errors(
    call: Callable[[Tensor, Tensor], object], kind: type[Exception], message: str
) -> None:
    layout = LAYOUTS["video"]
    with pytest.raises(kind, match=message):
        call(layout.samples(), torch.rand(layout.levels))


def test_timesteps_of_a_diffusion_say_how() -> None:
    diffusion = diffcore.GaussianDiffusion(torch.linspace(1e-4, 0.02, 10, dtype=torch.float64))
    x = LAYOUTS["video"].samples()
    with pytest.raises(ValueError, match=r"got \(2, 5\); .*pass \[B, F\] with group_dim"):
        diffusion.q_sample(x, torch.zeros(2, 5, dtype=torch.int64))


def test_rows_of_coefficients() -> None:
    """One for all, one for each sample, one for each group; G = 8 is the width of a row too."""
    x, m = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 8, 4)
    table = TABLES["sde"].coefficients[:, :8].contiguous()
    of_all, of_samples = table[2], table[[2, 4]]
    by_group = table[torch.randint(0, 8, (2, 8))]
    plain = {"noise": KEY.tensor(x.shape)}
    assert torch.equal(
        ops.reverse_step(x, m, of_all, group_dim=2, **plain),
        ops.reverse_step(x, m, of_all, **plain),
    )
    assert torch.equal(
        ops.reverse_step(x, m, of_samples, group_dim=2, **plain),
        ops.reverse_step(x, m, of_samples, **plain),
    )
    found = ops.reverse_step(x, m, by_group, group_dim=2, **plain)
    for g in range(8):
        alone = ops.reverse_step(
            x[:, :, g], m[:, :, g], by_group[:, g], noise=plain["noise"][:, :, g]
        )
        assert torch.equal(found[:, :, g], alone)
    with pytest.raises(ValueError, match=r"coefficients must have shape \[B, G, n\], B = 2 and G"):
        ops.reverse_step(x, m, by_group[:, :3], group_dim=2, **plain)


@pytest.mark.parametrize("step", [ops.ddpm_step, ops.ddim_step], ids=["ddpm", "ddim"])
def test_named_steps(step: Callable[..., Tensor]) -> None:
    layout = LAYOUTS["video"]
    f = layout.folded
    x, m, u = (layout.samples() for _ in range(3))
    sigma = torch.rand(layout.levels, dtype=torch.float64) * 0.5 + 0.4
    before = sigma * 0.7
    levels = [(1 - sigma**2).sqrt(), sigma, (1 - before**2).sqrt(), before]
    options: dict[str, object] = {"clip_range": 1.0, "prediction_type": "v_prediction"}
    if step is ops.ddim_step:
        options["eta"] = 0.5
    scale = torch.rand(layout.levels) + 1
    found = step(
        m,
        x,
        *levels,
        noise=KEY,
        model_output_uncond=u,
        guidance_scale=scale,
        group_dim=2,
        **options,
    )
    wanted = step(
        f(m),
        f(x),
        *(y.flatten() for y in levels),
        noise=f(KEY.tensor(x.shape)),
        model_output_uncond=f(u),
        guidance_scale=scale.flatten(),
        **options,
    )
    assert torch.equal(found, layout.unfolded(wanted))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_densities_of_table_rows(reduction: str) -> None:
    layout = LAYOUTS["video"]
    f, table = layout.folded, TABLES["sde"]
    x, m = layout.samples(), layout.samples()
    i = torch.randint(1, len(table) - 1, layout.levels)
    found, _, score = table.step(
        i, x, m, noise=KEY, group_dim=2, return_log_prob=True, reduction=reduction
    )
    z = f(KEY.tensor(x.shape))
    _, _, wanted = table.step(
        i.flatten(), f(x), f(m), noise=z, return_log_prob=True, reduction=reduction
    )
    torch.testing.assert_close(score, wanted.view(layout.levels))
    columns = table.coefficients[:, :8].contiguous()
    again = ops.step_log_prob(x, m, found, columns, t=i, group_dim=2, reduction=reduction)
    torch.testing.assert_close(again, score)


@pytest.mark.parametrize("name", ["video", "video, channels last", "tokens"])
def test_a_known_part_at_the_level_of_each_group(name: str) -> None:
    layout, table = LAYOUTS[name], TABLES["sde"]
    f = layout.folded
    x, m, known, z = (layout.samples() for _ in range(4))
    i = torch.randint(0, len(table), layout.levels)
    mask = (torch.rand(layout.shape[-1]) < 0.5).float() * 0.75
    found, _ = table.step(
        i, x, m, noise=KEY, mask=mask, known=known, known_noise=z, group_dim=layout.dim
    )
    wanted, _ = table.step(
        i.flatten(),
        f(x),
        f(m),
        noise=f(KEY.tensor(x.shape)),
        mask=f(mask.expand(layout.shape)),
        known=f(known),
        known_noise=f(z),
    )
    assert torch.equal(found, layout.unfolded(wanted))


def test_a_known_part_has_no_density() -> None:
    table, x = TABLES["sde"], torch.randn(2, 8)
    part = {"mask": torch.ones(8), "known": x, "known_noise": x}
    with pytest.raises(ValueError, match="mask must be None with return_log_prob"):
        table.step(1, x, x, noise=KEY, return_log_prob=True, **part)


def test_levels_as_lists_and_numpy_numbers() -> None:
    x, a = torch.randn(2, 3, 5, 4), torch.rand(2, 5)
    wanted = ops.add_noise(x, x, a, 0.5, group_dim=2)
    for given in (a.tolist(), a.numpy()):
        assert torch.equal(ops.add_noise(x, x, given, np.float64(0.5), group_dim=2), wanted)
    meta = ops.add_noise(x.to("meta"), x.to("meta"), a.to("meta"), np.float64(0.5), group_dim=2)
    assert meta.shape == x.shape
