"""q_sample_jump: the Markov steps between two timesteps, in one launch."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import diffcore
from diffcore import GaussianDiffusion, PhiloxNoise

T = 40
BETAS = diffcore.make_betas("linear", T, scale_to_1000=True, beta_end=0.01)
D = GaussianDiffusion(BETAS)
KEY = PhiloxNoise(5, stream=3)
ONE, ZERO = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)


def steps(betas: Tensor, t: int, u: int) -> tuple[float, float]:
    """r^2 and the variance of the Markov steps t + 1 .. u, exact in the betas."""
    r2, variance = Fraction(1), Fraction(0)
    for beta in betas[t + 1 : u + 1].tolist():
        r2, variance = r2 * (1 - Fraction(beta)), (1 - Fraction(beta)) * variance + Fraction(beta)
    return float(r2), float(variance)


PAIRS = [(0, 1), (0, T - 1), (3, 4), (7, 19), (T - 2, T - 1), (12, 12)]


@pytest.mark.parametrize(("t", "u"), PAIRS)
def test_it_is_the_markov_steps(t: int, u: int) -> None:
    for betas in (BETAS, diffcore.make_betas("squaredcos_cap_v2", T), torch.full((T,), 1e-7)):
        d = GaussianDiffusion(betas, prediction_type="sample")
        r2, variance = steps(d.betas, t, u)
        for given in ((t, u), (torch.tensor([t]), torch.tensor([u])), (t, [u])):
            of_x, of_noise = d.q_sample_jump(ONE, *given, ZERO), d.q_sample_jump(ZERO, *given, ONE)
            assert float(of_x) ** 2 == pytest.approx(r2, rel=1e-12)
            assert float(of_noise) ** 2 == pytest.approx(variance, rel=1e-8, abs=0)


def test_after_q_sample_it_is_q_sample_in_distribution() -> None:
    """x_0 keeps its factor, and the two noises together have the variance at u."""
    for t, u in PAIRS:
        of_x0 = D.q_sample_jump(D.q_sample(ONE, t, ZERO), t, u, ZERO)
        torch.testing.assert_close(of_x0, D.q_sample(ONE, u, ZERO), rtol=1e-13, atol=0)
        first = D.q_sample_jump(D.q_sample(ZERO, t, ONE), t, u, ZERO)
        second = D.q_sample_jump(ZERO, t, u, ONE)
        wanted = D.q_sample(ZERO, u, ONE) ** 2
        torch.testing.assert_close(first**2 + second**2, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_timesteps_by_sample_noise_and_layouts(dtype: torch.dtype) -> None:
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64).to(dtype)
    t, u = (torch.tensor(values) for values in zip(*PAIRS, strict=True))
    z = KEY.tensor(x.shape, dtype=dtype)
    found = D.q_sample_jump(x, t, u, KEY)
    assert torch.equal(found, D.q_sample_jump(x, t, u, z))
    for i, pair in enumerate(PAIRS):  # ints, and a tensor beside an int: the same bits
        alone = D.q_sample_jump(x[i : i + 1], *pair, z[i : i + 1])
        assert torch.equal(found[i : i + 1], alone)
        mixed = D.q_sample_jump(x[i : i + 1], t[i : i + 1].int(), pair[1], z[i : i + 1])
        assert torch.equal(mixed, alone)
    assert torch.equal(found[5], x[5])  # u = t
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(D.q_sample_jump(last, t, u, KEY), found)
    torch.manual_seed(3)
    default = D.q_sample_jump(x, t, u)
    torch.manual_seed(3)
    assert torch.equal(default, D.q_sample_jump(x, t, u))
    assert not torch.equal(default, found)


def test_without_signal_at_the_end() -> None:
    betas = torch.cat([BETAS, torch.ones(1)])
    d = GaussianDiffusion(betas, prediction_type="v_prediction")
    x, z = torch.randn(2, 4, 5)
    assert torch.equal(d.q_sample_jump(x, 3, T, z), z)
    ends = torch.tensor([T, T, 3, T])
    found = d.q_sample_jump(x, torch.tensor([3, T, 3, 0]), ends, z)
    assert torch.equal(found, torch.stack([z[0], x[1], x[2], z[3]]))
    assert torch.equal(d.q_sample_jump(x, T, T, z), x)


def test_a_respaced_diffusion_jumps_between_its_own_timesteps() -> None:
    kept = [1, 8, 15, 30]
    x, z = torch.randn(2, 4, 5, dtype=torch.float64)
    found = D.respace(kept).q_sample_jump(x, 0, 2, z)
    torch.testing.assert_close(found, D.q_sample_jump(x, 1, 15, z), rtol=1e-12, atol=1e-12)


def test_gradients_and_transforms() -> None:
    t, u = torch.tensor([3, 9]), torch.tensor([12, 9])
    x, z = torch.randn(2, 2, 5, dtype=torch.float64).unbind()
    x, z = x.clone().requires_grad_(), z.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, z: D.q_sample_jump(x, t, u, z), (x, z))
    found = torch.func.vmap(lambda x, z, t: D.q_sample_jump(x[None], t[None], 20, z[None])[0])(
        x, z, t
    )
    torch.testing.assert_close(found, D.q_sample_jump(x, t, 20, z))
    _, tangent = torch.func.jvp(lambda x: D.q_sample_jump(x, 3, 9, z), (x,), (z,))
    torch.testing.assert_close(tangent, D.q_sample_jump(z, 3, 9, torch.zeros_like(z)))


X = torch.ones(2, 3)
REFUSED: list[tuple[Any, type, str]] = [
    ((X, 5, 3), ValueError, "u must be at least t, 5, got 3; a jump adds noise"),
    ((X, torch.tensor([1, 5]), torch.tensor([2, 3])), ValueError, "u must be at least t, 5, got 3"),
    ((X, [1, 5], 3), ValueError, "u must be at least t, 5, got 3"),
    ((X, -1, 3), ValueError, r"t must be in 0 \.\. 39, got -1"),
    ((X, 3, T), ValueError, r"u must be in 0 \.\. 39, got 40"),
    ((X, 3, torch.tensor([4, T])), ValueError, r"u must be in 0 \.\. 39, got values from 4 to 40"),
    ((X, torch.tensor([4, T]), 39), ValueError, r"t must be in 0 \.\. 39, got values from 4 to 40"),
    ((X, 3, torch.tensor([4, 5, 6])), ValueError, r"u must have shape \(2,\), got \(3,\)"),
    ((X, 3, 4.5), TypeError, "u must be an int, an int64 or int32 tensor, or a list of ints, got"),
    ((X, 3, torch.tensor([4.0, 5.0])), TypeError, "u must be an int or an int64 or int32 tensor"),
    (([1.0], 3, 4), TypeError, "x_t must be a floating-point tensor"),
    ((X.int(), torch.tensor([3, 3]), 4), TypeError, "x_t must be a floating-point tensor"),
    ((X, 3, 4, torch.ones(2)), ValueError, r"noise must have the shape of the samples, \(2, 3\)"),
    ((X, 3, 4, 1.0), TypeError, "noise must be a tensor or a PhiloxNoise, got float"),
]


@pytest.mark.parametrize(("given", "error", "message"), REFUSED)
def test_what_is_refused(given: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        D.q_sample_jump(*given)
