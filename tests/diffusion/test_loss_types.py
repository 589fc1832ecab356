"""training_losses by loss_type, against guided-diffusion's definitions in plain float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore import GaussianDiffusion, PhiloxNoise
from diffcore._engine import native
from diffcore.coefficients.bound import VARIANCE_TYPES
from diffcore.coefficients.step import PREDICTION_TYPES
from support.bounds import assert_same_bits
from support.guided import BAR, T, at, losses_by_hand, target_of
from support.refusals import refused
from support.toys import BETAS, EPS, half

LEARNED = ("learned", "learned_range")
LOSS_TYPES = ("mse", "rescaled_mse", "kl", "rescaled_kl")
DECODERS = ("discretized", "gaussian")
each_variance = pytest.mark.parametrize("variance_type", VARIANCE_TYPES)
each_learned = pytest.mark.parametrize("variance_type", LEARNED)
each_loss = pytest.mark.parametrize("loss_type", LOSS_TYPES)

# ---- the losses --------------------------------------------------------------------------------

TIMES = torch.tensor([0, 1, 7, 13, 19, 0])
LOST = EPS / BETAS[0].item()  # the relative error of computing 1 - BAR where BAR is almost 1


def batch(variance_type: str, prediction_type: str) -> tuple[Tensor, ...]:
    """Pixels, noise, m and v, with a small error of x_0 at t = 0, so that its bin has mass."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(0, 256, (6, 2, 3, 2), generator=generator)
    pixels.view(-1)[[0, 3]], pixels.view(-1)[[1, 4]] = 0, 255
    x0 = pixels.double() / 127.5 - 1
    noise, off, v = torch.randn(3, *x0.shape, generator=generator, dtype=torch.float64)
    alpha, sigma = at(BAR.sqrt(), TIMES, x0), at((1 - BAR).sqrt(), TIMES, x0)
    wrong = x0 + 0.3 * sigma * off
    m = target_of(wrong, noise - alpha / sigma * (wrong - x0), TIMES, prediction_type)
    v = 0.3 * v - (4 if variance_type == "learned" else 0)
    return x0, noise, m, v


def says(m: Tensor, v: Tensor, variance_type: str) -> Any:
    answer = torch.cat([m, v], dim=1) if variance_type in LEARNED else m
    return lambda x, t: answer


@each_loss
@each_variance
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_losses_are_guided_diffusions(
    loss_type: str, variance_type: str, prediction_type: str, decoder: str
) -> None:
    how = {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "loss_type": loss_type,
    }
    d = GaussianDiffusion(BETAS, **how)
    x0, noise, m, v = batch(variance_type, prediction_type)
    learned = variance_type in LEARNED
    m, v = m.requires_grad_(), v.requires_grad_()
    found = d.training_losses(says(m, v, variance_type), x0, TIMES, noise=noise, decoder=decoder)
    wanted = losses_by_hand(x0, noise, TIMES, m, v if learned else None, decoder=decoder, **how)
    assert found.keys() == wanted.keys()
    names = ("loss",) + ("mse",) * ("mse" in loss_type) + ("vb",) * ("kl" in loss_type or learned)
    assert found.keys() == set(names)
    for name in names:
        assert found[name].shape == (6,)
        torch.testing.assert_close(found[name], wanted[name], rtol=4 * LOST, atol=0)
    weight = torch.linspace(0.5, 2, 6, dtype=torch.float64)
    slopes = torch.autograd.grad((weight * found["loss"]).sum(), (m, v), allow_unused=True)
    exact = torch.autograd.grad((weight * wanted["loss"]).sum(), (m, v), allow_unused=True)
    for slope, truth in zip(slopes, exact, strict=True):
        if truth is None:
            assert slope is None
        else:
            error, most = (c.abs().amax((1, 2, 3)) for c in (slope - truth, truth))
            assert (error <= 32 * LOST * most).all()


@each_learned
def test_what_the_rescaling_is(variance_type: str) -> None:
    x0, noise, m, v = batch(variance_type, "epsilon")
    found = {
        loss_type: GaussianDiffusion(
            BETAS, variance_type=variance_type, loss_type=loss_type
        ).training_losses(says(m, v, variance_type), x0, TIMES, noise=noise)
        for loss_type in LOSS_TYPES
    }
    vb = found["kl"]["loss"]
    close = {"rtol": 4 * EPS, "atol": 0}
    torch.testing.assert_close(found["rescaled_kl"]["loss"], T * vb, **close)
    torch.testing.assert_close(found["mse"]["vb"], vb, **close)
    torch.testing.assert_close(found["rescaled_mse"]["vb"], T / 1000 * vb, **close)
    assert torch.equal(found["rescaled_mse"]["mse"], found["mse"]["mse"])
    fixed = [
        GaussianDiffusion(BETAS, loss_type=loss_type).training_losses(half, x0, TIMES, noise=noise)
        for loss_type in ("mse", "rescaled_mse")
    ]
    assert fixed[0].keys() == fixed[1].keys() == {"loss", "mse"}
    assert torch.equal(fixed[0]["loss"], fixed[1]["loss"])
    assert torch.equal(fixed[0]["loss"], fixed[0]["mse"])


@each_loss
@each_variance
def test_a_key_gives_the_bits_of_its_tensor(loss_type: str, variance_type: str) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type)
    x0, _, m, v = (c.float() for c in batch(variance_type, "epsilon"))
    key, seen = PhiloxNoise(7), []
    for noise in (key, key.tensor(x0.shape)):
        answer = torch.cat([m, v], dim=1) if variance_type in LEARNED else m.clone()
        answer.requires_grad_()

        def model(x: Tensor, t: Tensor, answer: Tensor = answer) -> Tensor:
            return answer

        found = d.training_losses(model, x0, TIMES, noise=noise)
        found["loss"].mean().backward()
        seen.append((*found.values(), answer.grad))
    assert_same_bits(*seen)
    torch.manual_seed(1)
    first = d.training_losses(model, x0, TIMES)["loss"]
    torch.manual_seed(1)
    assert torch.equal(first, d.training_losses(model, x0, TIMES)["loss"])


# ---- gradients ---------------------------------------------------------------------------------


@each_learned
@pytest.mark.parametrize("loss_type", ["mse", "rescaled_mse"])
def test_the_hybrid_loss_teaches_the_mean_by_its_error_alone(
    variance_type: str, loss_type: str
) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type)
    x0, noise, m, v = (c.float() for c in batch(variance_type, "epsilon"))
    both = torch.cat([m, v], dim=1).requires_grad_()
    found = d.training_losses(lambda x, t: both, x0, TIMES, noise=noise)
    for name, silent, loud in (("vb", 0, 1), ("mse", 1, 0)):
        (slope,) = torch.autograd.grad(found[name].sum(), both, retain_graph=True)
        halves = slope.chunk(2, dim=1)
        assert halves[silent].count_nonzero() == 0, name
        assert halves[loud].count_nonzero() == m.numel(), name
    alone = m.clone().requires_grad_()
    mse = GaussianDiffusion(BETAS).training_losses(lambda x, t: alone, x0, TIMES, noise=noise)
    assert_same_bits(found["mse"], mse["loss"])
    (slope,) = torch.autograd.grad(found["loss"].mean(), both)
    (wanted,) = torch.autograd.grad(mse["loss"].mean(), alone)
    assert_same_bits(slope[:, :2], wanted)


@each_learned
@pytest.mark.parametrize("loss_type", ["kl", "rescaled_kl"])
def test_the_bound_teaches_both(variance_type: str, loss_type: str) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type)
    x0, noise, m, v = (c.float() for c in batch(variance_type, "epsilon"))
    both = torch.cat([m, v], dim=1).requires_grad_()
    d.training_losses(lambda x, t: both, x0, TIMES, noise=noise)["loss"].sum().backward()
    assert both.grad is not None
    assert both.grad.isfinite().all()
    assert (both.grad != 0).all()


@each_loss
@each_variance
@pytest.mark.parametrize("decoder", DECODERS)
def test_gradcheck(loss_type: str, variance_type: str, decoder: str) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type)
    x0, noise, m, v = (c[:, :, :1] for c in batch(variance_type, "epsilon"))

    def loss(m: Tensor, v: Tensor) -> Tensor:
        model = says(m, v, variance_type)
        return d.training_losses(model, x0, TIMES, noise=noise, decoder=decoder)["loss"]

    # In the hybrid loss vb reads m as a constant, so its gradient omits a part of the value.
    hybrid = variance_type in LEARNED and "mse" in loss_type
    m, v = m.requires_grad_(not hybrid), v.requires_grad_(variance_type in LEARNED)
    torch.autograd.gradcheck(loss, (m, v))


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_error_reads_its_half_in_place(
    prediction_type: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    d = GaussianDiffusion(BETAS, prediction_type, "learned_range")
    x0, _, m, v = (c.float() for c in batch("learned_range", prediction_type))
    both = torch.cat([m, v], dim=1).requires_grad_()

    def careful(*_: Any) -> None:
        raise AssertionError("a tensor is copied")

    monkeypatch.setattr("diffcore._engine.execute._careful", careful)
    launched.clear()
    d.training_losses(lambda x, t: both, x0, TIMES, noise=PhiloxNoise(1))
    # x_t; the error, with its gradient; and the bound
    assert len(launched) <= 3
    assert launched[0] == "linear_combination*"
    assert "loss" in launched[1]


# ---- conventions -------------------------------------------------------------------------------


@each_learned
def test_weights_weigh_the_error_alone(variance_type: str) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type)
    x0, noise, m, v = batch(variance_type, "epsilon")
    weights = torch.linspace(0.5, 2, T, dtype=torch.float64)
    model = says(m, v, variance_type)
    plain = d.training_losses(model, x0, TIMES, noise=noise)
    found = d.training_losses(model, x0, TIMES, noise=noise, weights=weights)
    torch.testing.assert_close(found["mse"], weights[TIMES] * plain["mse"], rtol=4 * EPS, atol=0)
    assert torch.equal(found["vb"], plain["vb"])
    assert torch.equal(found["loss"], found["mse"] + found["vb"])
    for loss_type in ("kl", "rescaled_kl"):
        d = GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type)
        refused(
            ValueError,
            f"weights must be None with loss_type='{loss_type}'",
            *(d.training_losses, model, x0, TIMES),
            weights=weights,
        )


@each_variance
def test_respaced_losses_count_their_own_steps(variance_type: str) -> None:
    kl, rescaled = (
        GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type).respace(6)
        for loss_type in ("kl", "rescaled_kl")
    )
    x0, noise, m, v = batch(variance_type, "epsilon")
    t, model = torch.arange(6), says(m, v, variance_type)
    vb = kl.training_losses(model, x0, t, noise=noise)["loss"]
    found = rescaled.training_losses(model, x0, t, noise=noise)["loss"]
    torch.testing.assert_close(found, 6 * vb, rtol=4 * EPS, atol=0)


@each_loss
@each_variance
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_samples(loss_type: str, variance_type: str, dtype: torch.dtype) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type)
    x0, noise, m, v = (c.to(dtype) for c in batch(variance_type, "epsilon"))
    m, v = m.requires_grad_(), v.requires_grad_()
    found = d.training_losses(says(m, v, variance_type), x0, TIMES, noise=noise)
    exact = GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type)
    wide = (c.detach().double() for c in (m, v))
    truth = exact.training_losses(
        says(*wide, variance_type), x0.double(), TIMES, noise=noise.double()
    )
    for name, value in found.items():
        assert value.dtype == torch.float32
        # From the same 16-bit inputs, the arithmetic is float32 or better.
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-4, atol=1e-5)
    found["loss"].mean().backward()
    assert m.grad is not None
    assert m.grad.dtype == dtype
    assert m.grad.isfinite().all()
    empty = d.training_losses(lambda x, t: says(x, x, variance_type)(x, t), x0[:0], TIMES[:0])
    assert empty["loss"].shape == (0,)


@each_loss
@each_variance
def test_loss_of_a_process_of_one_timestep_is_finite(loss_type: str, variance_type: str) -> None:
    d = GaussianDiffusion(torch.tensor([0.25]), variance_type=variance_type, loss_type=loss_type)
    x0, noise, m, v = batch(variance_type, "epsilon")
    found = d.training_losses(says(m, v, variance_type), x0, 0, noise=noise)
    assert found["loss"].isfinite().all()


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(2, 3, 4)
    refused(ValueError, "loss_type", GaussianDiffusion, BETAS, loss_type="l2")
    for loss_type in LOSS_TYPES:
        d = GaussianDiffusion(BETAS, variance_type="learned", loss_type=loss_type)
        loss = d.training_losses
        refused(ValueError, r"shape \(2, 6, 4\) .* got \(2, 3, 4\)", loss, half, x, 3)
        refused(ValueError, "decoder", loss, half, x, 3, decoder="laplace")
        refused(ValueError, r"shape \[B, C, ...\]", loss, half, x[:, 0, 0], 3)


@pytest.mark.skipif(native._C is None, reason="needs the compiled module")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("loss_type", ["rescaled_mse", "kl"])
@each_learned
def test_compile_a_training_step(loss_type: str, variance_type: str) -> None:
    d = GaussianDiffusion(BETAS, variance_type=variance_type, loss_type=loss_type)
    x0, noise, _, _ = (c.float() for c in batch(variance_type, "epsilon"))
    torch._dynamo.reset()
    grads = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Conv2d(2, 4, 1)

        def loss(net: Any = net) -> Tensor:
            return d.training_losses(lambda x, t: net(x), x0, TIMES, noise=noise)["loss"].mean()

        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        run().backward()
        grads.append([p.grad for p in net.parameters()])
    for plain, of_compiled in zip(*grads, strict=True):
        torch.testing.assert_close(of_compiled, plain, rtol=1e-5, atol=1e-6)
