"""What `reverse_step` promises beyond its formula: what it reads, guidance, log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import PhiloxNoise, ops
from diffcore._engine import dispatch, execute, kernel
from support.bounds import assert_same_bits
from support.cases import history_table, step_table, steps_of
from support.refusals import refused

SHAPE = (4, 3, 5, 7)


def tensors(count: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
    return list(drawn.to(device, dtype))


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels called from here on, and `copy` where a tensor is brought into a layout."""
    seen: list[str] = []
    real, copied = execute._C, execute._as

    class Recorder:
        def call(self, index: int, *args: Any) -> Any:
            seen.append(kernel.OPS[index][0])
            return real.call(index, *args)

    monkeypatch.setattr(execute, "_C", Recorder())
    # Inspects only, so that every call goes through _C.call.
    monkeypatch.setattr(dispatch, "_launch", lambda *args: real.launch(*args[:-1], True))
    monkeypatch.setattr(execute, "_as", lambda like, x: seen.append("copy") or copied(like, x))
    return seen


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_history_with_factor_0_is_not_read(count: int, device: str) -> None:
    x, m, *_ = tensors(3, device)
    table = history_table().to(device)
    table[:, 11:] = 0
    wanted, left = ops.reverse_step(x, m, table, t=3, return_history=True)
    wild = [torch.full_like(x, v) for v in (math.nan, math.inf, -math.inf)][:count]
    found = ops.reverse_step(x, m, table, t=3, history=wild, return_history=True)
    assert_same_bits(found, (wanted, left))
    assert_same_bits(ops.reverse_step(x, m, table, t=3, history=wild), wanted)


def test_an_infinite_sample_is_read_once(device: str) -> None:
    """What stands in for a history that is not there has no part, were it infinite."""
    x, m, *_ = tensors(3, device)
    x[0, 0, 0, 0] = math.inf
    table = history_table().to(device)
    first, _ = ops.reverse_step(x, m, table, t=3, return_history=True)
    assert_same_bits(first, ops.reverse_step(x, m, table, t=3))
    assert first[0, 0, 0, 0] == math.inf


def test_each_instance_is_the_same_formula(device: str) -> None:
    x, m, z, *h = tensors(6, device)
    table = history_table().to(device)
    for noise in (None, z):
        for n in (1, 2, 3):
            zero = [torch.zeros_like(x)] * (3 - n)
            wanted = ops.reverse_step(
                x, m, table, t=2, noise=noise, history=[*h[:n], *zero], return_history=True
            )
            found = ops.reverse_step(
                x, m, table, t=2, noise=noise, history=h[:n], return_history=True
            )
            assert_same_bits(found, wanted, f"{n} of history")
            alone = ops.reverse_step(x, m, table, t=2, noise=noise, history=h[:n])
            assert_same_bits(alone, wanted[0])


def test_halves_of_a_prediction_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and variance in one tensor `[B, 2 C, ...]`: neither is copied out of it."""
    x, z, *_ = tensors(3)
    both = torch.randn(4, 6, 5, 7)
    options: dict[str, Any] = {"t": 3, "noise": z, "variance_coefficients": (-0.5, 0.3)}
    m, v = both.chunk(2, dim=1)
    wanted = ops.reverse_step(
        x, m.contiguous(), step_table(), variance_output=v.contiguous(), **options
    )
    seen = launches(monkeypatch)
    found = ops.reverse_step(x, m, step_table(), variance_output=v, **options)
    assert seen == ["reverse_step_learned_noise"]
    assert_same_bits(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_apart_by_any_stride(dtype: torch.dtype, device: str) -> None:
    x, m, z, *_ = tensors(3, device, dtype)
    for stored in (
        torch.randn(8, 3, 5, 7, device=device).to(dtype)[::2],  # every other sample
        torch.randn(1, 3, 5, 7, device=device).to(dtype).expand(4, -1, -1, -1),  # the same for all
        torch.randn(4, 4, 5, 7, device=device).to(dtype)[:, 1:],
        torch.randn(4, 3, 5, 8, device=device).to(dtype)[:, :, :, 1:],  # not whole rows: copied
        torch.randn(4, 5, 7, 3, device=device).to(dtype).permute(0, 3, 1, 2),
    ):
        wanted = ops.reverse_step(x, stored.contiguous(), step_table().to(device), t=3, noise=z)
        found = ops.reverse_step(x, stored, step_table().to(device), t=3, noise=z)
        assert_same_bits(found, wanted)
        wanted = ops.reverse_step(x, m, step_table().to(device), t=3, noise=stored.contiguous())
        found = ops.reverse_step(x, m, step_table().to(device), t=3, noise=stored)
        assert_same_bits(found, wanted)


@pytest.mark.parametrize(
    ("read", "written"),
    [
        (lambda both: both[::2], slice(4, 8)),  # beyond as many rows as m has
        (lambda both: both[::2], slice(0, 4)),
        (lambda both: both[:1].expand(4, -1, -1, -1), slice(0, 4)),  # from the same address
        (lambda both: both[3:4].expand(4, -1, -1, -1), slice(0, 4)),
    ],
    ids=["behind", "every other", "one for all", "the last for all"],
)
def test_out_over_a_part_of_an_input(
    read: Callable[[Tensor], Tensor], written: slice, device: str
) -> None:
    """Nothing is read after it was written over."""
    both = torch.randn(8, 3, 5, 7, device=device)
    x, _ = tensors(2, device)
    m, out = read(both), both[written]
    wanted = ops.reverse_step(x, m.clone(), step_table().to(device), t=3)
    assert ops.reverse_step(x, m, step_table().to(device), t=3, out=out) is out
    assert_same_bits(out, wanted)


# ---- guidance, thresholds, learned variances ----------------------------------------------------


def test_both_predictions_in_one_tensor(device: str) -> None:
    x, m, u, z = tensors(4, device)
    table, scale = history_table().to(device), torch.linspace(1, 7, 4, device=device)
    wanted = ops.reverse_step(
        x, m, table, t=3, noise=z, model_output_uncond=u, guidance_scale=scale
    )
    both = torch.cat([u, m])
    assert_same_bits(ops.reverse_step(x, both, table, t=3, noise=z, guidance_scale=scale), wanted)


def test_threshold_of_0_is_none_and_nan_is_nan(device: str) -> None:
    x, m, *_ = tensors(2, device)
    table = step_table().to(device)
    s = torch.tensor([0.0, 0.5, math.nan, 2.0], device=device)
    found = ops.reverse_step(x, m, table, t=3, threshold=s)
    assert_same_bits(found[0], ops.reverse_step(x, m, table, t=3)[0])
    assert found[2].isnan().all()
    assert not found[[0, 1, 3]].isnan().any()


def test_learned_variance_is_the_interpolation(device: str) -> None:
    """log variance = frac log beta + (1 - frac) log beta_tilde, frac = (v + 1) / 2."""
    x, m, v, z = tensors(4, device, torch.float64)
    beta, beta_tilde = 0.03, 0.02
    frac = (v + 1) / 2
    deviation = torch.exp((frac * math.log(beta) + (1 - frac) * math.log(beta_tilde)) / 2)
    mean = (1.0, 0.2, 0.5, 1.0, 0.3, 0.4, -1.0, 1.0)
    s_0, s_v = math.log(beta * beta_tilde) / 4, math.log(beta / beta_tilde) / 4
    found = ops.reverse_step(
        x, m, mean, noise=z, variance_output=v, variance_coefficients=(s_0, s_v)
    )
    wanted = ops.reverse_step(x, m, mean) + deviation * z
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=1e-14)


# ---- log-probabilities --------------------------------------------------------------------------


def test_log_prob_is_that_of_the_normal_distribution(device: str) -> None:
    x, m, after = tensors(3, device, torch.float64)
    table, t = step_table().to(device), steps_of(4).to(device)
    mean, deviation = ops.reverse_step(x, m, table, t=t), table[t, 3].reshape(4, 1, 1, 1)
    wanted = torch.distributions.Normal(mean, deviation).log_prob(after).flatten(1).sum(1)
    found = ops.step_log_prob(x, m, after, table, t=t)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)


def test_a_step_without_noise_has_no_density(device: str) -> None:
    x, m, after = tensors(3, device)
    m.requires_grad_()
    table = step_table().to(device)
    table[3, 3] = 0
    t = torch.tensor([1, 3, 2, 3], device=device)
    found = ops.step_log_prob(x, m, after, table, t=t)
    assert (found == 0).tolist() == [False, True, False, True]
    (g,) = torch.autograd.grad(found.sum(), m)
    assert g.isfinite().all()
    assert g.flatten(1).any(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("noise", ["tensor", "key"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_and_the_probability_of_what_it_stored(
    dtype: torch.dtype, noise: str, device: str
) -> None:
    """Asked again later, the same model gives the same number: the ratio of a policy is 1."""
    x, m, u, z = tensors(4, device, dtype)
    table = step_table().to(device)
    options: dict[str, Any] = {"t": 3, "model_output_uncond": u, "guidance_scale": 2.0}
    given = z if noise == "tensor" else PhiloxNoise(3)
    after, log_prob = ops.reverse_step(x, m, table, noise=given, return_log_prob=True, **options)
    assert_same_bits(after, ops.reverse_step(x, m, table, noise=given, **options))
    assert_same_bits(log_prob, ops.step_log_prob(x, m, after, table, **options))
    assert log_prob.shape == (4,)
    assert log_prob.dtype == torch.float32


def test_what_was_sampled_is_a_constant_to_its_probability(device: str) -> None:
    x, m, z = tensors(3, device)
    m.requires_grad_()
    table = step_table().to(device)
    after, log_prob = ops.reverse_step(x, m, table, t=3, noise=z, return_log_prob=True)
    (found,) = torch.autograd.grad(log_prob.sum(), m)
    again = ops.step_log_prob(x, m, after.detach(), table, t=3)
    assert_same_bits(found, torch.autograd.grad(again.sum(), m))
    assert found.any()


def test_the_gradient_of_m_alone_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, m, after, u = tensors(4)
    m.requires_grad_()
    found = ops.step_log_prob(x, m, after, step_table(), t=3)
    seen = launches(monkeypatch)
    torch.autograd.grad(found.sum(), m)
    assert seen == ["step_log_prob_backward"]
    u.requires_grad_()
    del seen[:]
    found = ops.step_log_prob(
        x, m, after, step_table(), t=3, model_output_uncond=u, guidance_scale=2.0
    )
    torch.autograd.grad(found.sum(), (m, u))
    assert seen == ["step_log_prob_guided", "step_log_prob_guided_backward"]


@pytest.mark.parametrize("guided", [False, True])
def test_the_gradients_of_a_step_are_one_launch(
    guided: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the noise included."""
    inputs = x, m, z, u = [t.requires_grad_() for t in tensors(4)]
    options: dict[str, Any] = {"noise": z, "t": 3}
    if guided:
        options |= {"model_output_uncond": u, "guidance_scale": 2.0}
    found = ops.reverse_step(x, m, step_table(), **options)
    seen = launches(monkeypatch)
    gradients = torch.autograd.grad(found, inputs[: 3 + guided], torch.ones_like(found))
    assert seen == ["reverse_step" + "_guided" * guided + "_backward_noise"]
    assert_same_bits(gradients[2], torch.full_like(z, float(step_table()[3, 3])))


# ---- mistakes -----------------------------------------------------------------------------------


def test_what_does_not_go_together() -> None:
    x, m, z, h = tensors(4)
    table = history_table()
    step = ops.reverse_step
    refused(ValueError, "at most 3", step, x, m, table, t=0, history=[h] * 4)
    refused(ValueError, "given together", step, x, m, table, t=0, noise=z, variance_output=h)
    learned: dict[str, Any] = {"variance_output": h, "variance_coefficients": (0.0, 1.0)}
    refused(ValueError, "None without noise", step, x, m, table, t=0, **learned)
    refused(ValueError, "or with history", step, x, m, table, t=0, noise=z, history=[h], **learned)
    refused(
        ValueError,
        "^out must be None",
        step,
        x,
        m,
        table,
        t=0,
        return_log_prob=True,
        out=z,
        noise=h,
    )
    refused(ValueError, "^out must be None", step, x, m, table, t=0, return_history=True, out=z)
    refused(
        ValueError,
        "model_output_uncond must be given",
        step,
        x,
        m,
        table,
        t=0,
        guidance_scale=2.0,
    )


def test_a_stochastic_ddim_step_wants_noise() -> None:
    x, m, z = tensors(3)
    levels = (0.6, 0.8, 0.8, 0.6)
    refused(ValueError, "^noise must be given .* eta=0.5", ops.ddim_step, m, x, *levels, eta=0.5)
    assert ops.ddim_step(m, x, *levels, eta=0.5, noise=z).isfinite().all()


def test_tables_and_rows_of_the_wrong_width() -> None:
    x, m, h = tensors(3)
    step = ops.reverse_step
    refused(ValueError, r"must have shape \[T, 14\]", step, x, m, step_table(), t=0, history=[h])
    refused(ValueError, r"\[T, 8\] or \[T, 14\]", step, x, m, torch.zeros(5, 9), t=0)
    refused(ValueError, "must hold 8 or 14 numbers, got 7", step, x, m, (0.0,) * 7)
    refused(TypeError, "^c_m must be .* got str", step, x, m, (0, "0", *(0,) * 6))
    three, rows = torch.ones(3), step_table()
    refused(
        ValueError,
        "^threshold must have 1 or 4 entries.* got 3",
        step,
        x,
        m,
        rows,
        t=0,
        threshold=three,
    )
    refused(ValueError, "threshold must be at least 0", step, x, m, rows, t=0, threshold=-1.0)
    refused(ValueError, "^t must be None", step, x, m, (0.0,) * 8, t=0)
