"""The density of steps with history and of learned variance, and the KL of two models' steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Normal, kl_divergence

from diffcore import ops, solvers
from diffcore._engine import dispatch, execute, kernel
from diffcore.guidance import APG, RescaledCFG
from support.bounds import assert_same_bits
from support.cases import history_table, step_table, steps_of
from support.solver_list import STOCHASTIC

SHAPE = (4, 3, 5, 7)
SIGMAS = torch.tensor([6.0, 3.0, 1.5, 0.7, 0.2, 0.0], dtype=torch.float64)
LAST = 2
LEARNED = {"variance_coefficients": (-0.7, 0.2)}


def tensors(count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return list(torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64).to(dtype))


def summed(terms: Tensor) -> Tensor:
    return terms.flatten(1).sum(1)


def column(table: Tensor, t: Tensor, k: int) -> Tensor:
    return table[t, k].reshape(4, 1, 1, 1)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels called from here on."""
    seen: list[str] = []
    real = execute._C

    class Recorder:
        def call(self, index: int, *args: Any) -> Any:
            seen.append(kernel.OPS[index][0])
            return real.call(index, *args)

    monkeypatch.setattr(execute, "_C", Recorder())
    monkeypatch.setattr(dispatch, "_launch", lambda *args: real.launch(*args[:-1], True))
    return seen


# ---- the KL of two models' steps ----------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.6])
def test_kl_is_that_of_the_normal_distributions(guided: bool, threshold: float | None) -> None:
    x, m, other, u, other_u = tensors(5)
    table, t = step_table(), steps_of(4)
    options: dict[str, Any] = {"t": t, "threshold": threshold}
    first, second = dict(options), dict(options)
    given = dict(options)
    if guided:
        scale = torch.tensor([1.0, 2.0, 5.0, -1.0], dtype=torch.float64)
        for each, uncond in ((first, u), (second, other_u)):
            each |= {"model_output_uncond": uncond, "guidance_scale": scale}
        given |= {**first, "reference_output_uncond": other_u}
    deviation = column(table, t, 3)
    p = Normal(ops.reverse_step(x, m, table, **first), deviation)
    q = Normal(ops.reverse_step(x, other, table, **second), deviation)
    wanted = summed(kl_divergence(p, q))
    found = ops.step_kl(x, m, other, table, **given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    mean = ops.step_kl(x, m, other, table, **given, reduction="mean")
    torch.testing.assert_close(mean, wanted / 105, rtol=1e-12, atol=0)
    same = given | ({"reference_output_uncond": u} if guided else {})
    assert (ops.step_kl(x, m, m.clone(), table, **same) == 0).all()


def test_what_both_means_share_is_not_rounded_into_their_difference() -> None:
    """Subtracted in float32, means of about 1e4 would leave nothing of a difference of 1e-4."""
    x, m, apart = tensors(3, torch.float32)
    x, other = 1e4 * x, m + 2**-13 * apart
    row = (1.0, 0.3, 0.5, 0.01, 2.0, -0.4, -torch.inf, torch.inf)
    wide = [v.double() for v in (x, m, other)]
    wanted = ops.step_kl(*wide, row)
    torch.testing.assert_close(ops.step_kl(x, m, other, row).double(), wanted, rtol=1e-5, atol=0)
    means = [ops.reverse_step(x, v, row) for v in (m, other)]
    subtracted = summed((means[0] - means[1]).square()) / (2 * 0.01**2)
    assert ((subtracted.double() / wanted - 1).abs() > 0.1).all()
    expected = (0.3 - 0.5 * 0.4) * (wide[1] - wide[2])
    torch.testing.assert_close(wanted, summed(expected.square()) / (2 * 0.01**2))


def test_kl_of_a_step_without_noise_is_0() -> None:
    x, m, other = tensors(3, torch.float32)
    m.requires_grad_()
    table = step_table()
    table[3, 3] = 0
    found = ops.step_kl(x, m, other, table, t=torch.tensor([1, 3, 2, 3]))
    assert (found == 0).tolist() == [False, True, False, True]
    (g,) = torch.autograd.grad(found.sum(), m)
    assert g.isfinite().all()
    assert g.flatten(1).any(1).tolist() == [True, False, True, False]


def test_kl_and_its_gradient_are_a_launch_each(monkeypatch: pytest.MonkeyPatch) -> None:
    x, m, other = tensors(3)
    m.requires_grad_()
    seen = launches(monkeypatch)
    found = ops.step_kl(x, m, other, step_table(), t=3)
    (gradient,) = torch.autograd.grad(found.sum(), m)
    assert seen == ["step_kl", "step_kl_backward"]
    mean = ops.reverse_step(x, m, step_table(), t=3)
    with torch.no_grad():
        other_mean = ops.reverse_step(x, other, step_table(), t=3)
    wanted = (mean - other_mean).square().sum() / (2 * step_table()[3, 3] ** 2)
    torch.testing.assert_close(gradient, *torch.autograd.grad(wanted, m))


def test_kl_has_gradients_by_x_and_by_both_models() -> None:
    x, m, other = [v[:2, 0, :1, :3].contiguous().requires_grad_() for v in tensors(3)]

    def f(*inputs: Tensor) -> Tensor:
        return ops.step_kl(*inputs, step_table(), t=3)

    assert torch.autograd.gradcheck(f, (x, m, other))
    assert torch.autograd.gradgradcheck(f, (x, m, other))


def test_kl_of_rows_of_a_table() -> None:
    """History is a term of both means; CFG++ reads the unconditional prediction itself."""
    x, m, other, u, other_u, *h = tensors(7)
    for name, make in STOCHASTIC.items():
        table = make(SIGMAS)
        i = next(i for i, row in enumerate(table.rows) if row.noisy and i > 1)
        zero = torch.zeros_like(x)
        means = [table.step(i, x, v, h[: table.history], noise=zero)[0] for v in (m, other)]
        deviation = table.column("c_z")[i]
        wanted = summed(kl_divergence(*(Normal(mean, deviation) for mean in means)))
        for row in (i, torch.tensor(i), torch.tensor([i] * 4)):
            found = table.step_kl(row, x, m, other)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0, msg=name)
    table = solvers.cfg_pp_table(SIGMAS, eta=1.0)
    guided = {"guidance_scale": 0.6}
    pairs = ((m, u), (other, other_u))
    means = [table.step(2, x, c, noise=zero, model_output_uncond=v, **guided)[0] for c, v in pairs]
    deviation = table.column("c_z")[2]
    wanted = summed(kl_divergence(*(Normal(mean, deviation) for mean in means)))
    both = {"model_output_uncond": u, "reference_output_uncond": other_u}
    for row in (2, torch.tensor([2] * 4)):
        found = table.step_kl(row, x, m, other, **both, **guided)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)


# ---- log-probabilities with history, CFG++, learned variance ------------------------------------


@pytest.mark.parametrize("name", STOCHASTIC)
def test_the_density_of_every_row(name: str) -> None:
    table = STOCHASTIC[name](SIGMAS)
    x, m, z, *h = tensors(6)
    h = h[: table.history]
    for i, row in enumerate(table.rows):
        options = {} if not row.noisy else {"noise": z}
        x_next, left, found = table.step(i, x, m, h, **options, return_log_prob=True)
        assert_same_bits(
            (x_next, *left), (lambda y: (y[0], *y[1]))(table.step(i, x, m, h, **options))
        )
        assert_same_bits(found, table.log_prob(i, x, m, x_next, h))
        if row.noisy:
            mean = table.step(i, x, m, h, noise=torch.zeros_like(x))[0]
            wanted = summed(Normal(mean, row.coefficients[3]).log_prob(x_next))
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)
            mean_over = table.log_prob(i, x, m, x_next, h, reduction="mean")
            torch.testing.assert_close(mean_over, wanted / 105, rtol=1e-11, atol=0)
            each = table.log_prob(torch.tensor([i] * 4), x, m, x_next, h)
            torch.testing.assert_close(each, wanted, rtol=1e-11, atol=0)
        else:
            assert (found == 0).all()


def test_history_of_an_op_as_of_a_table() -> None:
    x, m, z, *h = tensors(6)
    table, t = history_table(), steps_of(4)
    for count in range(4):
        for keeps in (False, True):
            given: dict[str, Any] = {"history": h[:count], "t": t}
            x_next, *left, found = ops.reverse_step(
                x, m, table, noise=z, return_history=keeps, return_log_prob=True, **given
            )
            plain = ops.reverse_step(x, m, table, noise=z, return_history=keeps, **given)
            assert_same_bits((x_next, *left), plain if keeps else (plain,))
            assert_same_bits(found, ops.step_log_prob(x, m, x_next, table, **given))
            mean = ops.reverse_step(x, m, table, **given)
            wanted = summed(Normal(mean, column(table, t, 3)).log_prob(x_next))
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


def test_the_density_under_cfg_plus_plus() -> None:
    x, m, u, z = tensors(4)
    table = solvers.cfg_pp_table(SIGMAS, eta=1.0)
    given = {"model_output_uncond": u, "guidance_scale": 0.6}
    for i in (1, torch.tensor([1, 2, 1, 0])):
        x_next, _, found = table.step(i, x, m, noise=z, return_log_prob=True, **given)
        mean = table.step(i, x, m, noise=torch.zeros_like(x), **given)[0]
        deviation = table.column("c_z")[i].reshape(-1, 1, 1, 1)
        wanted = summed(Normal(mean, deviation).log_prob(x_next))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
        assert_same_bits(found, table.log_prob(i, x, m, x_next, **given))


def test_the_gradient_under_guidance_by_sums() -> None:
    """The value is the kernel's, the gradient goes through the numbers of the rule too."""
    x, m, u, x_next = [v[:2, 0, :2, :3].contiguous() for v in tensors(4)]
    leaves = [v.requires_grad_() for v in (m, u)]
    row, rule = tuple(history_table()[3].tolist()), RescaledCFG(3.0, 0.7)

    def f(m: Tensor, u: Tensor) -> Tensor:
        return ops.step_log_prob(x, m, x_next, row, model_output_uncond=u, guidance=rule)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)
    with torch.no_grad():
        value = f(*leaves)
    assert_same_bits(f(*leaves), value)


@pytest.mark.parametrize("guided", [False, True])
def test_a_learned_variance(guided: bool) -> None:
    x, m, u, x_next, v = tensors(5)
    m.requires_grad_()
    v.requires_grad_()
    table, t = step_table(), steps_of(4)
    given: dict[str, Any] = {"t": t}
    if guided:
        given |= {"model_output_uncond": u, "guidance_scale": 2.0}
    deviation = column(table, t, 3) * torch.exp(-0.7 + 0.2 * v)
    wanted = summed(Normal(ops.reverse_step(x, m, table, **given), deviation).log_prob(x_next))
    found = ops.step_log_prob(x, m, x_next, table, variance_output=v, **LEARNED, **given)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(y.sum(), (m, v)) for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)
    # Coefficients in every form.
    scales = torch.tensor([[-0.7, 0.2]], dtype=torch.float64)
    of_tables = {"variance_coefficients": scales.expand(len(table), 2).contiguous()}
    again = ops.step_log_prob(x, m, x_next, table, variance_output=v, **of_tables, **given)
    assert_same_bits(again, found)
    for i in range(4):
        row = tuple(table[t[i]].tolist())
        one = {"model_output_uncond": u[i : i + 1], "guidance_scale": 2.0} if guided else {}
        parts = (x[i : i + 1], m[i : i + 1], x_next[i : i + 1])
        each = ops.step_log_prob(*parts, row, variance_output=v[i : i + 1], **LEARNED, **one)
        torch.testing.assert_close(each[0], found[i], rtol=1e-12, atol=0)


def test_learned_rows_without_noise_have_no_density() -> None:
    x, m, x_next, v = tensors(4, torch.float32)
    m.requires_grad_()
    v.requires_grad_()
    table = step_table()
    table[3, 3] = 0
    given = {"variance_output": v, **LEARNED}
    found = ops.step_log_prob(x, m, x_next, table, t=torch.tensor([1, 3, 2, 3]), **given)
    assert (found == 0).tolist() == [False, True, False, True]
    for g in torch.autograd.grad(found.sum(), (m, v)):
        assert g.isfinite().all()
        assert g.flatten(1).any(1).tolist() == [True, False, True, False]
    number = ops.step_log_prob(x, m, x_next, tuple(table[3].tolist()), **given)
    assert (number == 0).all()


def test_16_bit_means_are_not_rounded() -> None:
    """The float64 density of the very values; a mean rounded to bfloat16 is off by far more."""
    x, m, h, v = tensors(4, torch.bfloat16)
    row = tuple(history_table()[3].tolist())
    row = (*row[:3], 0.01, *row[4:])
    z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).bfloat16()
    x_next = ops.reverse_step(x, m, row, history=[h], noise=z)
    wide = [y.double() for y in (x, m, x_next)]
    given = {"variance_output": v, **LEARNED}
    for found, wanted in (
        (
            ops.step_log_prob(x, m, x_next, row, history=[h]),
            ops.step_log_prob(*wide, row, history=[h.double()]),
        ),
        (
            ops.step_log_prob(x, m, x_next, row, **given),
            ops.step_log_prob(*wide, row, **(given | {"variance_output": v.double()})),
        ),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_a_table_of_learned_variance() -> None:
    levels = solvers.NoiseLevels.from_sigmas([3.0, 1.5, 0.4, 0.0])
    table = solvers.ddpm_table(levels, variance_type="learned_range")
    x, m, z, v, other = tensors(5)
    assert table.variance is not None
    for i in (0, LAST, torch.tensor([1, 0, 1, 0])):
        x_next, _, found = table.step(i, x, m, noise=z, variance_output=v, return_log_prob=True)
        assert_same_bits(found, table.log_prob(i, x, m, x_next, variance_output=v))
        if i is LAST:
            assert not table.rows[2].noisy
            assert (found == 0).all()
            continue
        s_0, s_v = (c.reshape(-1, 1, 1, 1) for c in table.variance[i].unbind(-1))
        deviation = table.column("c_z")[i].reshape(-1, 1, 1, 1) * torch.exp(s_0 + s_v * v)
        wanted = summed(Normal(x_next - deviation * z, deviation).log_prob(x_next))
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)
    with pytest.raises(ValueError, match=r"^step_kl must be called on a table of fixed variance"):
        table.step_kl(0, x, m, other)
    with pytest.raises(ValueError, match=r"^variance_output must be given for"):
        table.log_prob(0, x, m, other)


# ---- mistakes -----------------------------------------------------------------------------------


def test_what_is_refused() -> None:
    x, m, other, u, h = tensors(5)
    table, row = history_table(), tuple(step_table()[3].tolist())
    apg = APG(2.0, momentum=-0.5)
    flow = solvers.flow_sde_table([1.0, 0.5, 0.0])
    cfg_pp = solvers.cfg_pp_table(SIGMAS, eta=1.0)
    scored, kl = ops.step_log_prob, ops.step_kl
    guided = {"model_output_uncond": u, "guidance": apg}
    for match, call in {
        "must be given together": lambda: scored(x, m, x, row, variance_output=h),
        "given together, got one": lambda: scored(x, m, x, row, **LEARNED),
        "None with history": lambda: scored(
            x, m, x, table, t=1, history=[h], variance_output=h, **LEARNED
        ),
        "^history must hold at most 3": lambda: scored(x, m, x, table, t=1, history=[h] * 4),
        "^reduction must be one of 'sum', 'mean', got 'all'": lambda: scored(
            x, m, x, row, reduction="all"
        ),
        "^reduction must be one of": lambda: kl(x, m, other, row, reduction="none"),
        "reduction must be": lambda: flow.step(0, x, m, noise=h, reduction="batchmean"),
        "^guidance must not remember": lambda: kl(
            x, m, other, row, reference_output_uncond=u, **guided
        ),
        "not remember earlier rows": lambda: flow.log_prob(0, x, m, x, **guided),
        "^guidance must be given for": lambda: cfg_pp.step_kl(0, x, m, other),
        "guidance must be given for": lambda: cfg_pp.log_prob(0, x, m, other),
        "^i must be a row of": lambda: flow.log_prob(2, x, m, x),
        "i must be a row of": lambda: flow.step_kl(2, x, m, x),
        "^variance_output must be None for flow_sde": lambda: flow.log_prob(
            0, x, m, x, variance_output=u
        ),
        "^noise must be given at row 0": lambda: flow.step(0, x, m, return_log_prob=True),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match=r"^reference_output_uncond must be given with"):
        kl(x, m, other, row, model_output_uncond=u, guidance_scale=2.0)
    with pytest.raises(TypeError, match=r"^model_output_uncond must be given with"):
        flow.step_kl(0, x, m, other, reference_output_uncond=u, guidance_scale=2.0)
    with pytest.raises(TypeError, match=r"^return_log_prob must be"):
        flow.step(0, x, m, noise=h, return_log_prob="yes")


def test_a_fake_tensor_among_real_ones() -> None:
    x, m, other, u = tensors(4)
    row = tuple(step_table()[3].tolist())
    fake = FakeTensorMode().from_tensor(u)
    given = {"model_output_uncond": u, "guidance_scale": 2.0}
    for call in (
        lambda: ops.step_log_prob(x, m, other, row, variance_output=fake, **LEARNED),
        lambda: ops.step_log_prob(x, m, fake, row, variance_output=u, **LEARNED),
        lambda: ops.step_kl(x, m, fake, row, reference_output_uncond=u, **given),
        lambda: ops.step_kl(x, m, other, row, reference_output_uncond=fake, **given),
    ):
        with pytest.raises(AssertionError, match="convert all Tensors to FakeTensors"):
            call()


# ---- a gradient that a number beside a table broke ----------------------------------------------


@pytest.mark.parametrize("needs", ["x", "y", "both"])
def test_the_gradient_of_noising_with_a_number_beside_a_table(needs: str) -> None:
    x, y, *_ = tensors(2)
    levels, t = torch.linspace(0.1, 0.9, 9, dtype=torch.float64), torch.tensor([1, 8, 0, 4])
    leaves = [v.requires_grad_(needs in (name, "both")) for name, v in (("x", x), ("y", y))]
    asked = [v for v in leaves if v.requires_grad]
    found = ops.add_noise(x, y, levels, 0.5, t=t)
    wanted = levels[t].reshape(4, 1, 1, 1) * x + 0.5 * y
    for a, b in zip(*(torch.autograd.grad(v.sum(), asked) for v in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-15, atol=0)
