"""denoising_loss with loss="pseudo_huber" and "smooth_l1", against formulas in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffcore import GaussianDiffusion, PhiloxNoise, ops
from diffcore.testing import assert_within_bound
from support import formulas
from support.bounds import assert_same_bits, each_low_dtype
from support.losses import (
    BATCH,
    KEY,
    UPSTREAM,
    WEIGHTS,
    Options,
    each_kind,
    eager,
    gradient,
    judge,
    options_of,
    tensors_of,
)

DELTAS: dict[str, Any] = {
    "number": 0.7,
    "samples": torch.tensor([1e-3, 0.1, 0.5, 1.0, 3.0, 1e3], dtype=torch.float64),
}
STEPS = 50
each_loss = pytest.mark.parametrize("loss", ["pseudo_huber", "smooth_l1"])


@each_kind
@each_loss
@each_low_dtype
def test_values_and_gradients(kind: str, loss: str, dtype: torch.dtype, device: str) -> None:
    m, x0, noise = tensors_of(dtype, device)
    wide = tuple(x.detach().double() for x in (m, x0, noise))
    for (of_delta, delta), weight in itertools.product(DELTAS.items(), ("none", "samples")):
        options = options_of(kind, WEIGHTS[weight], device) | {"loss": loss}
        options["delta"] = delta.to(device) if isinstance(delta, Tensor) else delta
        exact, plain = (eager(*x, **options)[:, None] for x in (wide, (m, x0, noise)))
        for form in (noise, KEY):
            judge(ops.denoising_loss(m, x0, form, **options)[:, None], plain, exact, of_delta)
            with torch.no_grad():
                found = ops.denoising_loss(m, x0, form, **options)
            judge(found[:, None], plain, exact, f"{of_delta}, without a gradient")
        for name in ("mean", "weighted", "nothing"):
            total = UPSTREAM[name]
            truth = gradient(eager, wide[0], wide[1:], options, total)
            by_eager = gradient(eager, m, (x0, noise), options, total)
            found = gradient(ops.denoising_loss, m, (x0, KEY), options, total)
            judge(found, by_eager, truth, f"{of_delta}: gradient of {name}")


def test_smooth_l1_is_that_of_torch(device: str) -> None:
    m, _, z = tensors_of(torch.float64, device)
    for delta in (0.01, 0.7, 5.0):
        found = ops.denoising_loss(m, m.detach(), z, loss="smooth_l1", delta=delta)
        wanted = F.smooth_l1_loss(m, z, beta=delta, reduction="none").mean(1)
        torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
        huber = F.huber_loss(m, z, delta=delta, reduction="none").mean(1)
        by_weight = ops.denoising_loss(
            m, m.detach(), z, loss="smooth_l1", delta=delta, weight=delta
        )
        torch.testing.assert_close(by_weight, huber, rtol=1e-13, atol=0)
        gradients = [torch.autograd.grad(y.sum(), m)[0] for y in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_small_and_huge_errors(dtype: torch.dtype, device: str) -> None:
    """Where the formula as written cancels, and where its square overflows."""
    big = torch.finfo(dtype).max
    e = [0.0, 1e-20, 1e-6, -1e-3, 1.0, -1e6, 1e20, -0.4 * big, float("inf"), float("nan")]
    m = torch.tensor(e, dtype=dtype, device=device)[:, None].requires_grad_()
    zero = torch.zeros_like(m)
    delta, tolerance = 0.25, 4 * torch.finfo(dtype).eps
    wide = m.detach().double()
    root = torch.hypot(wide, torch.full_like(wide, delta))
    exact = {
        "pseudo_huber": (2 * delta * wide * (wide / (root + delta)), 2 * delta * wide / root),
        "smooth_l1": (
            torch.where(wide.abs() < delta, wide * wide / (2 * delta), wide.abs() - delta / 2),
            (wide / delta).clamp(-1, 1),
        ),
    }
    for loss, (value, slope) in exact.items():
        found = ops.denoising_loss(m, zero, zero, loss=loss, delta=delta, reduction="sample")
        (of_m,) = torch.autograd.grad(found.sum(), m)
        value, slope = value.clone(), slope.clone()
        if loss == "pseudo_huber":  # its limits, where inf / inf is not a number
            value[-2], slope[-2] = float("inf"), 2 * delta
        torch.testing.assert_close(
            found.double(), value[:, 0], rtol=tolerance, atol=1e-40, equal_nan=True
        )
        torch.testing.assert_close(of_m.double(), slope, rtol=tolerance, atol=1e-40, equal_nan=True)


@each_loss
@pytest.mark.parametrize("delta", [1e-30, 1e-6, 1e6, 1e30])
def test_extreme_deltas(loss: str, delta: float, device: str) -> None:
    m, x0, z = tensors_of(torch.float32, device)
    found = ops.denoising_loss(m, x0, z, loss=loss, delta=delta)
    wide = tuple(x.detach().double() for x in (m, x0, z))
    e = wide[0] - wide[2]
    if loss == "pseudo_huber":
        root = torch.hypot(e, torch.full_like(e, delta))
        terms, slope = 2 * delta * e * (e / (root + delta)), 2 * delta * e / root
    else:
        terms, slope = formulas.error_loss(torch, e, loss, delta), (e / delta).clamp(-1, 1)
    torch.testing.assert_close(found.double(), terms.mean(1), rtol=1e-6, atol=0)
    (of_m,) = torch.autograd.grad(found.sum(), m)
    torch.testing.assert_close(of_m.double() * m.shape[1], slope, rtol=1e-6, atol=1e-38)


@each_kind
@each_loss
def test_gradcheck(kind: str, loss: str, device: str) -> None:
    m, x0, z = tensors_of(torch.float64, device, (BATCH, 2))
    options = options_of(kind, WEIGHTS["table"], device) | {"loss": loss}
    options["delta"] = torch.linspace(0.3, 2, STEPS, dtype=torch.float64, device=device)

    def f(*given: Tensor) -> Tensor:
        return ops.denoising_loss(*given, *(x0, z)[len(given) - 1 :], **options)

    assert torch.autograd.gradcheck(f, m)
    assert torch.autograd.gradcheck(lambda m: f(m).mean(), m)
    assert torch.autograd.gradgradcheck(f, m)
    leaves = [y.detach().clone().requires_grad_() for y in (m, x0, z)]
    assert torch.autograd.gradcheck(f, leaves[: 2 if kind == "sample" else 3])


@each_loss
def test_a_trained_delta_has_its_gradient(loss: str) -> None:
    m, x0, z = tensors_of(torch.float64, "cpu", (BATCH, 3))
    delta = torch.linspace(0.3, 2, BATCH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda d: ops.denoising_loss(m.detach(), x0, z, loss=loss, delta=d), delta
    )


@each_loss
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@each_low_dtype
def test_reductions_and_masks(loss: str, masked: bool, dtype: torch.dtype, device: str) -> None:
    shape = (BATCH, 4, 5, 3)
    m, x0, z = tensors_of(dtype, device, shape)
    delta = torch.linspace(0.2, 2, BATCH, device=device)
    options: Options = {"prediction_type": "flow_prediction", "weight": 1.5, "loss": loss}
    options["delta"] = delta
    wide = [x.detach().double().requires_grad_() for x in (m, x0, z)]
    q = None
    if masked:
        q = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(3)).to(device) / 4
        m.data[q == 0] = float("nan")
        q[-1] = 0
        options["mask"] = q  # exact in 16 bits

    def reduced(m: Tensor, x0: Tensor, z: Tensor, reduction: str) -> Tensor:
        d = delta.to(m.dtype).reshape(-1, 1, 1, 1)
        if q is not None:
            m = m.masked_fill(q == 0, 0.0)
        terms = 1.5 * formulas.error_loss(torch, m - (z - x0), loss, d)
        terms = terms if q is None else terms * q.to(m.dtype)
        if reduction == "none":
            return terms
        n: Any = 60
        if q is not None:
            n = q.double().flatten(1).sum(1)
            n = n + (n == 0)
        found = terms.flatten(1).sum(1) / n
        return {"sample": lambda: found, "mean": found.mean, "sum": found.sum}[reduction]()

    for reduction, form in itertools.product(("none", "sample", "mean", "sum"), (z, KEY)):
        found = ops.denoising_loss(m, x0, form, reduction=reduction, **options)
        exact, plain = reduced(*wide, reduction), reduced(m, x0, z, reduction)
        assert found.dtype == (dtype if reduction == "none" else torch.float32)
        if reduction in ("none", "sample"):
            assert_within_bound(found, plain.to(found.dtype), exact, name=reduction)
        else:
            torch.testing.assert_close(found.double(), exact, rtol=(BATCH + 2) * 2.0**-24, atol=0)
        of_m, by_eager, truth = (
            torch.autograd.grad(3 * y.sum(), leaf)[0]
            for y, leaf in ((found, m), (plain, m), (exact, wide[0]))
        )
        assert_within_bound(of_m, by_eager, truth, name=f"gradient of {reduction}")


@each_loss
@pytest.mark.parametrize("reduction", ["group", "sample", "none"])
def test_groups(loss: str, reduction: str, device: str) -> None:
    shape = (4, 3, 5, 8)
    m, x0, z = tensors_of(torch.float32, device, shape)
    delta = torch.linspace(0.1, 3, 20, device=device).reshape(4, 5)
    options: Options = {"loss": loss, "group_dim": 2, "reduction": reduction}
    found = ops.denoising_loss(m, x0, KEY.for_samples(None), delta=delta, **options)
    z = KEY.for_samples(None).tensor(shape, device=device)
    e = m.double() - z.double()
    terms = formulas.error_loss(torch, e, loss, delta[:, None, :, None].double())
    wanted = {"group": terms.mean((1, 3)), "sample": terms.mean((1, 2, 3)), "none": terms}
    torch.testing.assert_close(found.double(), wanted[reduction], rtol=1e-5, atol=1e-7)
    t = torch.randint(0, STEPS, (4, 5), generator=torch.Generator().manual_seed(4)).to(device)
    table = torch.linspace(0.1, 3, STEPS, device=device)
    key = KEY.for_samples(None)
    by_table = ops.denoising_loss(m, x0, key, delta=table, t=t, **options)
    torch.testing.assert_close(
        by_table, ops.denoising_loss(m, x0, key, delta=table[t], **options), rtol=1e-6, atol=1e-7
    )


@each_loss
def test_bits_do_not_depend_on_batch_or_threads(loss: str, device: str) -> None:
    m, x0, z = tensors_of(torch.float32, device, (BATCH, 70001))
    options: Options = {"loss": loss, "delta": 0.5, "prediction_type": "flow_prediction"}
    found = ops.denoising_loss(m, x0, z, **options)
    (of_m,) = torch.autograd.grad(found.sum(), m)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = ops.denoising_loss(m, x0, z, **options)
        assert_same_bits(torch.autograd.grad(again.sum(), m)[0], of_m)
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(again, found)
    part = ops.denoising_loss(m[2:4], x0[2:4], z[2:4], **options)
    assert_same_bits(part, found[2:4])


def test_an_infinite_tensor_that_is_not_in_the_target_has_no_effect(device: str) -> None:
    m, x0, z = tensors_of(torch.float32, device)
    x0 = torch.full_like(x0, float("inf"))
    for loss, q in itertools.product(("pseudo_huber", "smooth_l1"), (None, torch.ones(()))):
        found = ops.denoising_loss(m, x0, z, loss=loss, delta=1.0, mask=q)
        assert found.isfinite().all()


@each_loss
def test_training_losses(loss: str, device: str) -> None:
    diffusion = GaussianDiffusion(torch.linspace(1e-3, 0.2, STEPS))
    x0 = torch.randn(4, 3, 6, 8, generator=torch.Generator().manual_seed(1)).to(device)
    table = torch.linspace(0.1, 3, STEPS, dtype=torch.float64)
    weights = torch.linspace(1, 2, STEPS)
    key = PhiloxNoise(5)
    z = key.tensor(x0.shape, device=device).double()
    t = torch.tensor([0, 30, 49, 7], device=device)
    at = torch.tensor([[0, 30, 49, 7, 7, 1]] * 4, device=device)
    for delta, of_groups in itertools.product((0.3, table), (False, True)):
        steps = at if of_groups else t
        more: Options = {"group_dim": 2} if of_groups else {}
        found = diffusion.training_losses(
            lambda x, t: 0.5 * x, x0, steps, noise=key, loss=loss, delta=delta, weights=weights,
            **more,
        )  # fmt: skip
        shape = (4, 1, 6, 1) if of_groups else (4, 1, 1, 1)
        alpha, sigma = (
            c.to(device)[steps].reshape(shape)
            for c in (diffusion.sqrt_alphas_cumprod, diffusion.sqrt_one_minus_alphas_cumprod)
        )
        e = 0.5 * (alpha * x0.double() + sigma * z) - z
        d = delta.to(device)[steps].reshape(shape) if isinstance(delta, Tensor) else delta
        terms = formulas.error_loss(torch, e, loss, d)
        w = weights.double().to(device)[steps].reshape(shape)
        wanted = (w * terms).mean((1, 2, 3))
        for name in ("loss", "mse"):
            torch.testing.assert_close(found[name].double(), wanted, rtol=1e-5, atol=0)


def test_refused() -> None:
    m, x0, z = tensors_of(torch.float32)
    diffusion = GaussianDiffusion(torch.linspace(1e-3, 0.2, STEPS))
    of_bound = GaussianDiffusion(torch.linspace(1e-3, 0.2, STEPS), loss_type="kl")
    t = torch.zeros(BATCH, dtype=torch.int64)

    def losses(of: GaussianDiffusion, **options: Any) -> Any:
        return of.training_losses(lambda x, t: x, x0, t, noise=z, **options)

    huber = "pseudo_huber"
    cases: list[tuple[Any, type[Exception], str]] = [
        ({"loss": "huber", "delta": 1.0}, ValueError, "loss must be one of 'mse', 'pseudo_huber'"),
        ({"loss": huber}, ValueError, "delta must be given with loss='pseudo_huber', got None"),
        ({"delta": 1.0}, ValueError, "delta must be left out with loss='mse', got one"),
        ({"loss": huber, "delta": "x"}, TypeError, "delta must be .*, got str"),
    ]
    bad = (0.0, -1.0, float("inf"), float("nan"), torch.tensor([1.0, 0, 1, 1, 1, 1]))
    message = "delta must be positive and in the range"
    cases += [({"loss": huber, "delta": delta}, ValueError, message) for delta in bad]
    for options, error, message in cases:
        for call in (
            lambda o: ops.denoising_loss(m, x0, z, **o),
            lambda o: ops.denoising_loss(m, x0, z, group_dim=1, **o),
            lambda o: losses(diffusion, **o),
        ):
            with pytest.raises(error, match=message):
                call(options)
    with pytest.raises(ValueError, match="loss must be 'mse' with loss_type='kl', got 'smooth_l1'"):
        losses(of_bound, loss="smooth_l1", delta=1.0)
    with pytest.raises(ValueError, match=r"delta must be a number or have shape \(50,\), got"):
        losses(diffusion, loss="smooth_l1", delta=torch.ones(3))
    with pytest.raises(ValueError, match=r"delta must .*\b6\b.*got"):
        ops.denoising_loss(m, x0, z, loss="smooth_l1", delta=torch.ones(3))
